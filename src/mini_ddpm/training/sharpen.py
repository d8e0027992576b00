"""Extrapolate the weights of a pipeline away from what training on its own samples teaches (arXiv 2510.03597).

    θ_s = θ_r after a short training on samples of θ_r
    θ   = (1 + w)·θ_r - w·θ_s

Own samples hold the errors of the network: lines are a little too smooth and too thin, and rare shapes are too rare.
Training on them enlarges these errors, so the opposite step reduces them. Sampling costs what it did before.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ..data import ImageDataset
from ..hub.load import load_pipeline, read_json
from ..options import check_fields, distilled_steps, find_device, process_rank, replace_scheduler
from ..sampling import cache_folder, draw
from .checkpoints import claimed_folder, save_pipeline
from .config import RANGES, TrainConfig
from .loss import trained_margin
from .train import train

OWN_SEED = 10**6
"""The first seed of the own samples: far from 0, so that no sample of an evaluation was learned."""


@dataclass(frozen=True)
class SharpenConfig:
    """Improve a trained pipeline with samples of its own: train on them briefly, then take the opposite step.

    No real images are needed. The pipeline that results is in OUTPUT_DIR, that of the training in OUTPUT_DIR/own.
    To resume an interrupted run, give the same command again.
    """

    pipeline: tyro.conf.Positional[str]
    """The pipeline to improve: a bundled name, a folder, or a repository on the Hub."""
    output_dir: Path = Path("runs/sharpened")
    """Folder for the improved pipeline."""
    _: KW_ONLY
    weight: float = 0.35
    """w, the length of the opposite step: 0 changes nothing; too much makes strange images."""
    num_images: int = 10_000
    """Number of own samples, drawn without guidance and without noise in the steps."""
    num_inference_steps: Annotated[int, tyro.conf.arg(aliases=["--steps"])] = 20
    """Steps that draw the own samples."""
    max_train_steps: int = 300
    """Optimizer steps on the own samples."""
    train_batch_size: int = 128
    """Images per process and forward pass."""
    learning_rate: float = 1e-4
    """Learning rate of AdamW."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to draw and train. Auto: cuda, else mps, else cpu."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the training. Auto: bf16 on GPUs that support it, else no. bf16 also suits AVX512-BF16 CPUs."""
    seed: int = 0
    """Seed of the training."""

    def __post_init__(self) -> None:
        """Raise a `ValueError` for a value that cannot work: it names the field, the value and what is allowed."""
        check_fields(self, {**RANGES, "weight": (0, None), "num_images": (1, None), "num_inference_steps": (1, None)})


def sharpen(config: SharpenConfig) -> Path:
    """Improve a pipeline with samples of its own, or resume this work.

    Under `accelerate launch` every process calls this. The samples are kept in the cache, by the hash of the weights.

    Args:
        config: The pipeline and the settings.

    Returns:
        `config.output_dir`, a pipeline folder.

    Raises:
        ValueError: The pipeline was distilled, or a folder holds another run.
        FloatingPointError: The loss or the weights became NaN or infinite.
        OSError: Something cannot be read or written.
    """
    folder = Path(config.output_dir).expanduser()
    pipe: Any = load_pipeline(config.pipeline, dtype=torch.float32)
    if distilled_steps(pipe.config) is not None:
        raise ValueError(
            f"{config.pipeline} is distilled: it learned what its teacher predicts, not images. Sharpen the teacher "
            "before you distil it."
        )
    file = folder / "train_config.json"
    if file.is_file() and read_json(file).get("sharpened_from") != config.pipeline:
        raise ValueError(f"{folder} holds another run. Use another output_dir.")
    settings = {"sharpened_from": config.pipeline, "sharpening_weight": config.weight, "dataset": {}}
    with claimed_folder(folder, settings) if process_rank()[0] == 0 else contextlib.nullcontext():
        own = _own_images(config, pipe)
        tuned: Any = load_pipeline(str(train(_train_config(config, folder, pipe), dataset=own)), dtype=torch.float32)
        if process_rank()[0] == 0:
            weights = extrapolate(pipe.unet.state_dict(), tuned.unet.state_dict(), config.weight)
            pipe.unet.load_state_dict(weights)
            save_pipeline(folder, pipe)
    return folder


def _own_images(config: SharpenConfig, pipe: Any) -> ImageDataset:
    """Draw the own samples, all classes equally often, without guidance and with deterministic steps."""
    drawing = copy.copy(pipe)
    drawing.scheduler = replace_scheduler(pipe.scheduler, "ddim")
    drawing.unet = copy.deepcopy(pipe.unet).to(find_device(config.device))
    drawing.set_progress_bar_config(disable=True)
    options: dict[str, Any] = {"num_inference_steps": config.num_inference_steps, "eta": 0.0}
    labels, num_classes = None, (pipe.unet.config.num_class_embeds or 1) - 1  # the last label is the null label
    if num_classes:
        labels = [index % num_classes for index in range(config.num_images)]
        options["guidance_scale"] = 1.0
    samples: dict[str, Any] = {"labels": labels, "seed": OWN_SEED, "folder": cache_folder() / "samples"}
    draw(drawing, config.num_images, options, **samples, shared=True, title="Own samples")
    images, _, _ = draw(drawing, config.num_images, options, **samples)  # every process reads them
    if labels is None:
        return ImageDataset.from_tensors(images)
    return ImageDataset.from_tensors(images, torch.tensor(labels), pipe.config.id2label)


def _train_config(config: SharpenConfig, folder: Path, pipe: Any) -> TrainConfig:
    """Return the settings of the training on the own samples."""
    return TrainConfig(
        output_dir=folder / "own",
        pretrained_model_name_or_path=config.pipeline,
        class_conditional=pipe.unet.config.num_class_embeds is not None,
        saturation_margin=trained_margin(pipe.scheduler),
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=0,
        ema_max_decay=0.0,
        max_train_steps=config.max_train_steps,
        train_batch_size=config.train_batch_size,
        learning_rate=config.learning_rate,
        device=config.device,
        mixed_precision=config.mixed_precision,
        seed=config.seed,
        save_images_epochs=0,
        log_with="none",
    )


def extrapolate(
    weights: dict[str, torch.Tensor], tuned: dict[str, torch.Tensor], weight: float
) -> dict[str, torch.Tensor]:
    """Return `(1 + w)·weights - w·tuned` for w = `weight`, by name, computed in float64 (arXiv 2510.03597).

    Both hold the same names and shapes; each result has the type of `weights`. Other names are a `ValueError`.
    """
    if weights.keys() != tuned.keys():
        raise ValueError(f"The weights differ in their names: {min(weights.keys() ^ tuned.keys())}.")
    return {
        name: ((1 + weight) * value.double() - weight * tuned[name].double()).to(value.dtype)
        for name, value in weights.items()
    }
