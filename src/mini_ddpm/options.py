"""The choices that several commands share: device, precision, processes, steps, scheduler, guidance, settings."""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import json
import math
import os
import platform
import signal
import threading
import types
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import diffusers
import numpy as np
import torch

from .pipelines.pipeline_base import default_eta as default_eta
from .pipelines.pipeline_base import default_steps as default_steps

MAX_SEED = 2**62  # image i is drawn from seed + i, which must be below 2**63
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}

# Short names of schedulers that diffusers knows. Ours are among them once the package is imported.
SCHEDULERS = {
    "ddpm": "MiniDDPMScheduler",
    "ddim": "MiniDDIMScheduler",
    "dpmsolver++": "DPMSolverMultistepScheduler",
    "unipc": "UniPCMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "euler-ancestral": "EulerAncestralDiscreteScheduler",
}


def counted(number: int, noun: str) -> str:
    """Return a number of things as text: "1 step", "4 steps"."""
    return f"{number} {noun}{'s' * (number != 1)}"


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def wait_for_processes(device: torch.device) -> None:
    """Wait until all processes that `accelerate launch` or `torchrun` started are here; alone, return at once."""
    rank, processes = process_rank()
    if processes == 1:
        return
    from accelerate import PartialState

    # No handler of Python's runs meanwhile. By default SIGTERM, by which a launcher ends the other processes when one
    # has failed, ends this one at once.
    is_interruptible = rank > 0 and threading.current_thread() is threading.main_thread()
    handler = signal.signal(signal.SIGTERM, signal.SIG_DFL) if is_interruptible else None
    # The first such call connects the processes. They may wait for hours while one of them computes figures.
    PartialState(cpu=device.type == "cpu", timeout=timedelta(days=7)).wait_for_everyone()
    if handler is not None:
        signal.signal(signal.SIGTERM, handler)


def find_device(name: str) -> torch.device:
    """Return the device called `name`.

    Args:
        name: `auto` (cuda, else mps, else cpu), `cpu`, `cuda`, `cuda:N` or `mps`. With `auto`, each process that
            `accelerate launch` starts gets a GPU of its own.

    Raises:
        ValueError: The name is unknown, or this machine has no such device.
    """
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        kind = next(kind for kind, is_available in available.items() if is_available)
        rank = os.environ.get("LOCAL_RANK")
        if kind == "cuda" and rank is not None:
            return torch.device(kind, int(rank) % torch.cuda.device_count())
        return torch.device(kind)
    kind, _, index = name.partition(":")
    if kind not in available or (index and not index.isdigit()):
        raise ValueError(f"device={name!r} must be auto, cpu, cuda, cuda:N or mps.")
    if not available[kind] or (kind == "cuda" and int(index or 0) >= torch.cuda.device_count()):
        raise ValueError(f"device={name!r}: PyTorch finds no such device on this machine. Use cpu or auto.")
    return torch.device(name)


def device_name(device: torch.device) -> str:
    """Return the name of the machine that drew the images."""
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    if device.type != "cpu":
        return device.type
    return f"{platform.machine()} CPU, {counted(torch.get_num_threads(), 'thread')}"


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """Return the mixed precision to train in.

    `auto` is what `accelerate launch --mixed_precision` says, else bf16 on GPUs that support it, else no.
    """
    if mixed_precision != "auto":
        return mixed_precision
    if (launcher := os.environ.get("ACCELERATE_MIXED_PRECISION")) in ("fp16", "bf16"):
        return launcher
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"


def require(extra: str, *modules: str) -> None:
    """Raise an `ImportError` that names the extra to install if one of the modules cannot be imported."""
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(
                f"{module} cannot be imported ({error}). Install it with: pip install 'mini-ddpm[{extra}]'"
            ) from error


def replace_scheduler(scheduler: Any, name: str) -> Any:
    """Make the scheduler called `name` from the configuration of `scheduler`.

    Raises:
        ValueError: `name` is not a key of `SCHEDULERS`.
    """
    if name not in SCHEDULERS:
        raise ValueError(f"scheduler={name!r} must be one of {', '.join(SCHEDULERS)}.")
    return getattr(diffusers, SCHEDULERS[name]).from_config(scheduler.config)


def resolve_guidance(
    pipe: Any, name: str, scale: float | None = None, interval: tuple[float, float] | None = None
) -> dict[str, Any]:
    """Return the guidance arguments for a call of `pipe`; empty for an unconditional pipeline.

    Args:
        pipe: The pipeline.
        name: Its name in an error message.
        scale: The guidance scale. `None`: the pipeline's default.
        interval: The guidance interval, two shares of the steps. `None`: the pipeline's default if `scale` is `None`
            too, else every step.

    Raises:
        ValueError: Guidance was given to an unconditional pipeline, or the scale or the interval is invalid.
    """
    if scale is not None and not math.isfinite(scale):
        raise ValueError(f"guidance_scale={scale} must be finite.")
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval={interval} must satisfy 0 <= start < end <= 1.")
    if "guidance_scale" not in inspect.signature(type(pipe).__call__).parameters:
        for key, value in (("guidance_scale", scale), ("guidance_interval", interval)):
            if value is not None:
                raise ValueError(f"{key}={value}: {name} is unconditional and takes no guidance. Omit it.")
        return {}
    if scale is None and interval is None:
        interval = tuple(pipe.config.get("default_guidance_interval", (0.0, 1.0)))
    scale = float(pipe.config.get("default_guidance_scale", 1.5)) if scale is None else scale
    return {"guidance_scale": scale} | ({} if interval in (None, (0, 1)) else {"guidance_interval": interval})


def distilled_steps(config: Mapping[str, Any]) -> int | None:
    """Return the number of steps that the pipeline of a configuration was distilled to, `None` if it was not.

    A pipeline that draws with noise in its own number of steps is no student: those are deterministic.
    """
    return None if config.get("default_eta") else config.get("default_num_inference_steps")


def resolve_labels(
    pipe: Any, chosen: Sequence[str], count: int | None, rows: int
) -> tuple[list[int] | None, list[str] | None, int | None]:
    """Return the class label of every image, their names, and the number of columns that gives each class a column.

    `chosen` are names and numbers of classes, which `count` images repeat; if there are none, each class has `rows`
    images. All three are `None` for an unconditional pipeline.
    """
    if not hasattr(pipe, "get_label_ids"):
        if chosen:
            raise ValueError(f"--class-labels={' '.join(chosen)}: the pipeline is unconditional. Omit the labels.")
        return None, None, None
    names = pipe.config.id2label or {}
    if chosen:
        cycle = pipe.get_label_ids([int(x) if x.isdecimal() and x not in names.values() else x for x in chosen])
    else:
        cycle = list(range(pipe.unet.config.num_class_embeds - 1))  # the last label is the null label
    labels = [cycle[i % len(cycle)] for i in range(count or len(cycle) * (1 if chosen else rows))]
    return labels, [names.get(label, str(label)) for label in labels], len(cycle) if len(cycle) <= 20 else None


def check_fields(config: Any, ranges: dict[str, tuple[float | None, float | None]]) -> None:
    """Check the types of a configuration's fields, and the ranges of its numbers. Strings become paths where due,
    and paths strings; `~` in a path is expanded.

    Args:
        config: A dataclass with annotations of plain types, `Literal`, `Path`, tuples and `None`.
        ranges: The smallest and the largest value by field; `None` for an open end.

    Raises:
        ValueError: A value has the wrong type or is out of its range. The message names the field and the value.
    """
    hints = get_type_hints(type(config))
    for field in dataclasses.fields(config):
        value, hint = getattr(config, field.name), hints[field.name]
        allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        kind = Path if Path in allowed else str
        if kind in allowed and isinstance(value, (str, Path)):
            value = kind(os.path.expanduser(value) if kind is Path else value)
            object.__setattr__(config, field.name, value)
        mismatches = [_mismatch(value, one) for one in allowed]
        if all(mismatches):
            expected = " or ".join(told for told in mismatches if told not in (None, "None"))
            raise ValueError(f"{field.name}={value!r} must be {expected}.")
        low, high = ranges.get(field.name, (None, None))
        for number in value if isinstance(value, (tuple, list)) else (value,):
            if isinstance(number, str) or number is None:
                continue
            if low is not None and number < low:
                raise ValueError(f"{field.name}={value!r} must be {'above 0' if 0 < low < 1 else f'at least {low}'}.")
            if high is not None and number > high:
                raise ValueError(f"{field.name}={value!r} must be {'below 1' if 0 < high < 1 else f'at most {high}'}.")


def saved_config(config_class: Any, path: str | Path) -> Any:
    """Return the settings of an earlier training run.

    Args:
        config_class: The dataclass to return.
        path: The folder of the run, or its `train_config.json`, whose folder then is the `output_dir`. In a file of
            another name `output_dir` is what it says.

    Raises:
        OSError: There is no such file.
        ValueError: The file does not hold the settings of a run, or not all: a part of the run was given in Python, or
            the run is a round of a distillation.
    """
    file = Path(os.path.expanduser(path))
    file = file / "train_config.json" if file.is_dir() else file
    if not file.is_file():
        raise OSError(f"config={str(path)!r}: there is no {file}. Give the folder of a run, or its train_config.json.")
    try:
        settings = json.loads(file.read_text(encoding="utf-8"))
        is_run = {"output_dir", "dataset_name", "global_batch_size"} <= settings.keys()
    except (ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} is damaged: it holds no settings of a training run.") from error
    if not is_run:
        raise ValueError(f"{file} holds no settings of a training run.")
    if "distilled_from" in settings:
        raise ValueError(
            f"{file} is of a round of a distillation. Repeat it with: mini-ddpm distill {settings['distilled_from']}"
        )
    given = [name for name in ("unet", "scheduler", "loss_fn", "eval_dataset") if name in settings]
    if given or settings["dataset_name"] is None:
        raise ValueError(
            f"{file}: the {given[0] if given else 'dataset'} of this run was given in Python, and no file holds it. "
            "Call mini_ddpm.train with it again."
        )
    if file.name == "train_config.json":
        settings["output_dir"] = str(file.parent)
    # These follow from the others.
    settings = {name: value for name, value in settings.items() if name not in ("global_batch_size", "dataset")}
    if unknown := settings.keys() - {field.name for field in dataclasses.fields(config_class)}:
        raise ValueError(f"{file} has the setting {min(unknown)!r}, which this version does not know.")
    lists_as_tuples = {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}
    try:
        return config_class(**lists_as_tuples)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{file}: {error}") from error


def _mismatch(value: Any, hint: Any) -> str | None:
    """Return what a value of this type hint must be, if `value` is none; else `None`."""
    if get_origin(hint) is Literal:
        return None if value in get_args(hint) else f"one of {', '.join(map(str, get_args(hint)))}"
    if get_origin(hint) is tuple:
        items = get_args(hint)
        count = None if Ellipsis in items else len(items)
        is_tuple = isinstance(value, (tuple, list)) and count in (None, len(value))
        told = _mismatch(value[0] if is_tuple and value else None, items[0])
        if is_tuple and not any(_mismatch(item, items[0]) for item in value):
            return None
        return f"{count or 'several'} values, each {told or _mismatch(None, items[0])}"
    is_number = isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)
    checks = {
        int: (isinstance(value, (int, np.integer)) and not isinstance(value, bool), "a whole number"),
        float: (is_number and math.isfinite(value) if is_number else False, "a finite number"),
        bool: (isinstance(value, bool), "True or False"),
        str: (isinstance(value, str), "text"),
        Path: (isinstance(value, Path), "a path"),
        type(None): (value is None, "None"),
    }
    fits, told = checks.get(hint, (True, ""))
    return None if fits else told
