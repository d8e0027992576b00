"""What a training run tells while it goes on, and how it is stopped from outside."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from .config import TrainConfig


@dataclass
class TrainState:
    """The state of a run, as its callbacks see it.

    Attributes:
        config: The settings.
        pipeline: The pipeline that is saved. Its network has the weights of the current step.
        total_steps: Optimizer steps of the whole run.
        step: Optimizer steps done, 1 to `total_steps`.
        epoch: Passes over the training images done, a fraction too.
        log: The newest entry of `train_log.jsonl`: `step`, `epoch`, `images`, `loss`, `loss_by_noise_level`, `lr`,
            `grad_norm`, `ema_decay`, `images_per_second`, `seconds`, and where it was measured `validation_loss`.
        checkpoint: The folder of the newest checkpoint, or `None`.
        is_main_process: Whether this process writes the files. Every process calls the callbacks.
        stops: Whether the run stops, see [`TrainState.stop`].
    """

    config: TrainConfig
    pipeline: Any
    total_steps: int
    step: int = 0
    epoch: float = 0.0
    log: dict[str, Any] = field(default_factory=dict)
    checkpoint: Path | None = None
    is_main_process: bool = True
    stops: bool = False
    _averaged_weights: Callable[[], contextlib.AbstractContextManager[None]] = contextlib.nullcontext

    @property
    def unet(self) -> torch.nn.Module:
        """The network that is trained."""
        return self.pipeline.unet  # type: ignore[no-any-return]

    def averaged_weights(self) -> contextlib.AbstractContextManager[None]:
        """In a `with` block: give the network its averaged weights, those that are saved, in evaluation mode."""
        return self._averaged_weights()

    def stop(self) -> None:
        """End the run after this step, with a checkpoint. With several processes: at the next log line."""
        self.stops = True


class TrainCallback:
    """Base class of callbacks: every method does nothing. Override those that you need.

    A method is called in every process. An exception in it ends the run; the last checkpoint is kept.
    """

    def on_step_end(self, state: TrainState) -> None:
        """Called after each optimizer step."""

    def on_log(self, state: TrainState) -> None:
        """Called after a log line was written, every `logging_steps` steps and before a checkpoint."""

    def on_epoch_end(self, state: TrainState) -> None:
        """Called after the step that completes a pass over the training images, before the checkpoint of that step."""

    def on_checkpoint(self, state: TrainState) -> None:
        """Called after a checkpoint was written, `state.checkpoint`."""

    def state_dict(self) -> dict[str, Any]:
        """Return what the callback must remember, as JSON. It is saved in every checkpoint."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take back what `state_dict` returned. Called before the first step of a resumed run."""
