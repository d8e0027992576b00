"""The choices that several commands share: device, precision, processes, number of steps, scheduler, guidance."""

from __future__ import annotations

import inspect
import os
from typing import Any

import diffusers
import torch

from .pipelines.pipeline_base import DEFAULT_NUM_INFERENCE_STEPS

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


def process_rank() -> tuple[int, int]:
    """Return the rank of this process and the number of processes that `accelerate launch` or `torchrun` started."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


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


def resolve_precision(mixed_precision: str, device: torch.device) -> str:
    """Return the mixed precision to train in: `auto` is bf16 on GPUs that support it, else no."""
    if mixed_precision != "auto":
        return mixed_precision
    return "bf16" if device.type == "cuda" and torch.cuda.is_bf16_supported() else "no"


def default_steps(pipe: Any) -> int:
    """Return the number of denoising steps of a call that gives none: a distilled pipeline's own, else 20."""
    return int(pipe.config.get("default_num_inference_steps", DEFAULT_NUM_INFERENCE_STEPS))


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
        interval: The guidance interval, two shares of the steps. `None`: every step.

    Raises:
        ValueError: Guidance was given to an unconditional pipeline, or the interval is invalid.
    """
    if interval is not None and not 0 <= interval[0] < interval[1] <= 1:
        raise ValueError(f"guidance_interval={interval} must satisfy 0 <= start < end <= 1.")
    if "guidance_scale" not in inspect.signature(type(pipe).__call__).parameters:
        for key, value in (("guidance_scale", scale), ("guidance_interval", interval)):
            if value is not None:
                raise ValueError(f"{key}={value}: {name} is unconditional and takes no guidance. Omit it.")
        return {}
    options: dict[str, Any] = {
        "guidance_scale": float(pipe.config.get("default_guidance_scale", 1.5)) if scale is None else scale
    }
    return options | ({} if interval in (None, (0, 1)) else {"guidance_interval": interval})
