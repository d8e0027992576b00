"""What surrounds a run in its process: accelerate, the tracker, and the signals that stop it."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from ..options import find_device, resolve_precision

if TYPE_CHECKING:
    from accelerate import Accelerator

    from .config import TrainConfig


@contextlib.contextmanager
def new_accelerator(config: TrainConfig) -> Iterator[Accelerator]:
    """Make the accelerator of a run. What another one in this process has set stays as it is."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState
    from accelerate.utils import GradientAccumulationPlugin, ProjectConfiguration

    device = find_device(config.device)
    precision = resolve_precision(config.mixed_precision, device)
    had_state, had_process_state = bool(AcceleratorState._shared_state), bool(PartialState._shared_state)
    gradient_state = dict(GradientState._shared_state)
    try:
        accelerator = Accelerator(
            cpu=device.type == "cpu",
            mixed_precision=precision,
            # As a number it would give way to ACCELERATE_GRADIENT_ACCUMULATION_STEPS of the environment.
            gradient_accumulation_plugin=GradientAccumulationPlugin(
                num_steps=config.gradient_accumulation_steps, sync_with_dataloader=False
            ),
            log_with=None if config.log_with == "none" else config.log_with,
            project_config=ProjectConfiguration(
                project_dir=str(config.output_dir), logging_dir=str(config.output_dir)
            ),
        )
    except ValueError as error:
        if not had_state:
            raise
        raise ValueError(
            f"This process has an Accelerator already, with mixed_precision={AcceleratorState().mixed_precision!r} on "
            f"{AcceleratorState().device}, but this run needs {precision!r} on {device}. Give it the same "
            "mixed_precision and device, or start it in a process of its own."
        ) from error
    try:
        yield accelerator
    finally:
        for tracker in accelerator.trackers:
            tracker.finish()
        if not had_process_state:
            accelerator.state.destroy_process_group()
        if not had_state:
            # accelerate keeps the precision of the first run in a process; a second run could not change it.
            AcceleratorState._reset_state(reset_partial_state=not had_process_state)
        GradientState._shared_state.clear()
        GradientState._shared_state.update(gradient_state)


def check_tracker(log_with: str) -> None:
    """Raise an `ImportError` if the tracker's package is missing; accelerate would train without it."""
    packages = {"tensorboard": ("tensorboard", "tensorboardX"), "none": ()}.get(log_with, (log_with,))
    if packages and not any(importlib.util.find_spec(package) for package in packages):
        raise ImportError(
            f"log_with={log_with!r} needs the package {packages[0]}: pip install {packages[0]}; or set "
            "log_with='none'."
        )


def start_tracker(accelerator: Accelerator, name: str, settings: dict[str, Any]) -> None:
    """Start the tracker of a run called `name`, and tell it the settings. TensorBoard's files go to `logs/`."""
    is_tensorboard = accelerator.log_with[0].value == "tensorboard" if accelerator.log_with else False
    options = {"wandb": {"name": name}, "trackio": {"name": name}}
    accelerator.init_trackers("logs" if is_tensorboard else "mini-ddpm", init_kwargs=options)
    plain = (bool, int, float, str)
    values = {key: value if isinstance(value, plain) else str(value) for key, value in settings.items()}
    for tracker in accelerator.trackers if accelerator.is_main_process else ():
        if tracker.name == "tensorboard":
            # accelerate's own method makes a folder of its own for each start of a run.
            folder = {"run_name" if type(tracker.writer).__module__.startswith("torch") else "name": "."}
            tracker.writer.add_hparams(values, {}, **folder)
        else:
            tracker.store_init_configuration(values)


def track_picture(accelerator: Accelerator, name: str, picture: Image.Image, step: int) -> None:
    """Show an RGB picture in the tracker."""
    for tracker in accelerator.trackers:
        if tracker.name == "trackio":
            trackio = importlib.import_module("trackio")  # one of several trackers, none of which is a dependency
            tracker.log({name: trackio.Image(np.asarray(picture))}, step=step)
        else:
            options = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: np.asarray(picture)[None]}, step=step, **options)


class StopSignals:
    """Notes the first SIGTERM or Ctrl-C of a block instead of acting on it, so that the block can end in good order.

    A second signal acts as it did before the block. In another thread than the main one, and for a signal that the
    process ignores, nothing is changed.

    Attributes:
        received: The signal, or `None`.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                previous = signal.getsignal(number)
                if previous not in (signal.SIG_IGN, None):
                    self._previous[number] = previous
                    signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def _note(self, number: int, _: FrameType | None) -> None:
        self.received = number
        self._restore()
        print("\nStopping after this step. Repeat the signal to stop at once.", flush=True)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()

    def deliver(self) -> None:
        """Act on the signal that was received, if one was, as the process did before the block."""
        if self.received is not None:
            signal.raise_signal(self.received)
