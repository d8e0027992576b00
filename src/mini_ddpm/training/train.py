"""Training.

    L = E_{x_0, ε, t} [ w_t · || target - model(x_t, t, y) ||² ],   x_t = sqrt(ᾱ_t)·x_0 + sqrt(1-ᾱ_t)·ε

(arXiv 2006.11239, eq. 14; the target is ε, x_0 or v, by `prediction_type`.) accelerate handles devices, precision,
gradient accumulation, several processes and checkpoints; diffusers' `EMAModel` averages the weights.

The images and all random numbers of a step depend only on the seed and the number of the step, and are drawn for the
batch of all processes together. So a resumed run takes the same steps as an uninterrupted one, and two processes take
the same step as one process with twice the batch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..data import ImageDataset, as_image_dataset, image_dataset
from .batches import split_ids
from .callbacks import TrainCallback
from .checkpoints import claimed_folder, is_whole_pipeline, keep_last_checkpoints, last_checkpoint
from .config import TrainConfig
from .loop import LossFunction, Run, Teacher, TrainingLoop
from .loss import compute_loss, saturated_levels
from .models import describe, new_model, new_pipeline
from .runtime import StopSignals, check_tracker, new_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator

_MAX_VALIDATION_IMAGES = 1000


@dataclass(frozen=True)
class GivenParts:
    """What a caller gives to a run in place of what its configuration describes; see [`train`]."""

    unet: Any = None
    scheduler: Any = None
    dataset: Any = None
    eval_dataset: Any = None
    loss_fn: LossFunction | None = None
    callbacks: Sequence[TrainCallback] = ()
    teacher: Teacher | None = None


def train(
    config: TrainConfig,
    *,
    unet: Any = None,
    scheduler: Any = None,
    dataset: Any = None,
    eval_dataset: Any = None,
    loss_fn: LossFunction | None = None,
    callbacks: Sequence[TrainCallback] = (),
) -> Path:
    """Train a pipeline, or resume its training from the last checkpoint.

    Under `accelerate launch` every process calls this. `config.output_dir` becomes a pipeline folder that
    `from_pretrained` opens (with averaged weights). It also holds `checkpoint-N/`, `samples/`, `logs/`,
    `train_config.json` and `train_log.jsonl`.

    A resumed run takes the same steps as an uninterrupted one. It must be given the same parts: their classes and
    configurations are compared, not the code of `loss_fn`, of `callbacks` or of a network of your own.

    Args:
        config: The settings of the run.
        unet: The network: ours, a subclass, or any diffusers `ModelMixin` with the call and the configuration of
            `UNet2DModel`. It is trained in place, in float32; the averaged weights are in the pipeline folder. `None`:
            a new one, as `config` describes it.
        scheduler: The noise schedule, and the sampler of the pipeline: ours or any scheduler of diffusers that noises
            images as a DDPM does. `None`: `MiniDDIMScheduler`, as `config` describes it.
        dataset: The images, as [`as_image_dataset`] takes them: an `ImageDataset`, a `datasets.Dataset`, a torch
            dataset, or tensors. Pictures that random transforms change are read anew for each batch. `None`: those of
            `config.dataset_name`.
        eval_dataset: Images of the validation loss, of the same kinds; up to 1,000 of them are used, evenly spread.
            `None`: those that `config.validation_share` holds out, if it does.
        loss_fn: `loss_fn(unet, scheduler, images, noise, timesteps, class_labels)` returns the loss of each image,
            (B,). The arguments are those of [`compute_loss`]. `None`: `compute_loss`.
        callbacks: Objects with the methods of [`TrainCallback`], which are called while the run goes on.

    Returns:
        `config.output_dir`.

    Raises:
        ValueError: The configuration or a part does not fit the dataset or this machine, or the folder holds another
            run.
        TypeError: A part is of a type that cannot be used.
        FloatingPointError: The loss or the weights became NaN or infinite; the last good checkpoint is kept.
        OSError: A checkpoint or the pipeline cannot be written; the previous one is kept.
    """
    return start_run(config, GivenParts(unet, scheduler, dataset, eval_dataset, loss_fn, tuple(callbacks)))


def start_run(config: TrainConfig, given: GivenParts) -> Path:
    """Train with the parts that are given; see [`train`]. With a teacher it is a round of a distillation."""
    config = dataclasses.replace(config, output_dir=Path(config.output_dir).expanduser())
    check_tracker(config.log_with)
    for callback in given.callbacks:
        if not isinstance(callback, TrainCallback):
            raise TypeError(f"callbacks holds {callback!r}, which is no TrainCallback. Derive its class from that.")
    with new_accelerator(config) as accelerator, StopSignals() as signals:
        _train(config, accelerator, given, signals)
    signals.deliver()
    return config.output_dir


def _train(config: TrainConfig, accelerator: Accelerator, given: GivenParts, signals: StopSignals) -> None:
    """Take the steps that remain after the last checkpoint; see [`train`]."""
    from accelerate.utils import broadcast_object_list, set_seed

    # 1. The data, and the number of steps.
    columns = config.image_column, config.label_column, config.resolution
    is_main, teacher = accelerator.is_main_process, given.teacher
    if given.dataset is None:
        dataset = image_dataset(config.dataset_name, config.split, *columns)
    else:
        dataset = as_image_dataset(given.dataset, *columns, progress=is_main)
    if config.class_conditional and dataset.id2label is None:
        source = repr(config.dataset_name) if given.dataset is None else "the dataset that was given"
        raise ValueError(
            f"class_conditional=True needs labels, but {source} has none. Set label_column, or "
            "class_conditional=False."
        )
    train_ids, held_out = split_ids(config.seed, len(dataset), config.validation_share)
    if not len(train_ids):
        raise ValueError(f"validation_share={config.validation_share} leaves none of the {len(dataset)} images.")
    validation = (dataset, held_out[:: max(1, -(-len(held_out) // _MAX_VALIDATION_IMAGES))])
    if given.eval_dataset is not None:
        validation = _validation_images(given.eval_dataset, columns, dataset, config)
    batch_size = config.train_batch_size * accelerator.num_processes  # of all processes, per forward pass
    step_size = batch_size * config.gradient_accumulation_steps  # images per optimizer step
    total_steps = config.max_train_steps or -(-config.num_epochs * len(train_ids) // step_size)

    # 2. The network and the pipeline.
    set_seed(config.seed)
    unet, scheduler = new_model(config, dataset, given.unet, given.scheduler)
    levels = saturated_levels(dataset) if config.saturation_margin else (None, None)
    if "clip_sample_range" in scheduler.config:
        clip_sample_range = 1.0 if levels == (None, None) else 1 + config.saturation_margin
        scheduler = type(scheduler).from_config(scheduler.config, clip_sample_range=clip_sample_range)
    if teacher is not None:
        teacher.prepare(accelerator.device, config.torch_compile)
    pipeline = new_pipeline(config, dataset, levels, unet, scheduler, teacher.pipeline_defaults if teacher else {})
    loss_fn = given.loss_fn or (
        teacher.loss if teacher else functools.partial(compute_loss, snr_gamma=config.snr_gamma, reduction="none")
    )

    # 3. The folder. Nothing was written before this line.
    settings = vars(config) | {"global_batch_size": batch_size, "dataset": dataset.fingerprint}
    settings |= teacher.run_settings if teacher else {}
    settings |= _settings_of_parts(given, validation[0])
    run = Run(
        config, dataset, train_ids, validation, levels, pipeline, loss_fn, given.callbacks, teacher, step_size,
        total_steps, settings,
    )  # fmt: skip
    with claimed_folder(config.output_dir, settings) if is_main else contextlib.nullcontext():
        accelerator.wait_for_everyone()
        found = last_checkpoint(config.output_dir) if is_main else (None, {})
        ((checkpoint, progress),) = broadcast_object_list([found])
        if checkpoint is not None and progress["step"] >= total_steps:
            accelerator.print(f"{config.output_dir} is already trained ({progress['step']} steps).")
            if is_main:
                keep_last_checkpoints(config.output_dir, progress["step"], config.checkpoints_total_limit)
            if is_whole_pipeline(config.output_dir, progress):
                return
        if is_main and not dataset.is_fixed and not config.cache_dataset:
            print(
                "The pictures of the dataset differ each time they are read (random transforms). They are read anew "
                "for each batch, and a resumed run sees other ones than an uninterrupted run.",
                file=sys.stderr,
            )
        TrainingLoop(run, accelerator, signals, checkpoint, progress).run()


def _validation_images(
    given: Any, columns: tuple[str | None, str | None, int | None], dataset: ImageDataset, config: TrainConfig
) -> tuple[ImageDataset, torch.Tensor]:
    """Return the validation dataset, and the indices of its images that are used, after a check that they fit."""
    images = as_image_dataset(given, *columns)
    if images.shape != dataset.shape:
        raise ValueError(f"eval_dataset holds images of shape {images.shape}, but dataset of {dataset.shape}.")
    if config.class_conditional and images.id2label != dataset.id2label:
        raise ValueError(f"eval_dataset has the classes {images.id2label}, but dataset has {dataset.id2label}.")
    if config.validation_share:
        raise ValueError(f"validation_share={config.validation_share} and eval_dataset exclude each other. Omit one.")
    return images, torch.arange(0, len(images), -(-len(images) // _MAX_VALIDATION_IMAGES))


def _settings_of_parts(given: GivenParts, validation_dataset: ImageDataset) -> dict[str, Any]:
    """Return what `train_config.json` says of the parts that the caller gave."""
    settings: dict[str, Any] = {}
    for name in ("unet", "scheduler"):
        if (part := getattr(given, name)) is not None:
            settings[name] = describe(part)
    if given.dataset is not None and given.teacher is None:
        settings["dataset_name"] = None  # not what the configuration names
    if given.eval_dataset is not None:
        settings["eval_dataset"] = validation_dataset.fingerprint
    if given.loss_fn is not None:
        function = given.loss_fn.func if isinstance(given.loss_fn, functools.partial) else given.loss_fn
        name = getattr(function, "__qualname__", type(function).__qualname__)
        settings["loss_fn"] = f"{getattr(function, '__module__', '')}.{name}"
    return settings
