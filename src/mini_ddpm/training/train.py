"""Training: the loop.

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
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import ImageDataset, image_dataset
from ..files import atomic_write
from ..hub.card import write_card
from ..models.unet_mini import MiniUNet2DModel
from ..options import default_steps
from ..plots import sample_grid
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from .batches import image_batches, image_ids, noise_batch
from .checkpoints import (
    claimed_folder,
    explain_write_errors,
    is_whole_pipeline,
    keep_last_checkpoints,
    last_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_pipeline,
    truncate_log,
)
from .config import TrainConfig
from .loss import Levels, beyond_saturation, compute_loss, saturated_levels
from .models import new_model, new_pipeline
from .runtime import StopSignals, check_tracker, new_accelerator

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

# The averaged weights follow the network closely at first; see `_take_steps`.
EMA_POWER = 0.75


class Teacher(Protocol):
    """What turns a training run into distillation: it chooses the noise levels and the target at each of them."""

    timesteps: torch.Tensor
    """The noise levels to learn, (N,) int64."""
    run_settings: dict[str, Any]
    """Settings of the distillation for `train_config.json`. A resumed run must not change them."""
    pipeline_defaults: dict[str, Any]
    """`default_...` arguments of the pipeline that is saved."""
    snr_floor: float
    """See [`compute_loss`]."""

    def prepare(self, device: torch.device, compiled: bool) -> None:
        """Move to `device`, and compile the networks if `compiled`. Called once, before the first step."""

    def __call__(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image to predict instead of `images`, and the noise that leads from it to the same x_t."""


def train(config: TrainConfig, teacher: Teacher | None = None, dataset: ImageDataset | None = None) -> Path:
    """Train a pipeline, or resume its training from the last checkpoint.

    Under `accelerate launch` every process calls this. `config.output_dir` becomes a pipeline folder that
    `from_pretrained` opens (with averaged weights). It also holds `checkpoint-N/`, `samples/`, `logs/`,
    `train_config.json` and `train_log.jsonl`.

    Args:
        config: The settings of the run.
        teacher: Gives the targets of a distillation, see [`distill`]. `None`: learn from the images alone.
        dataset: The images. `None`: those of `config.dataset_name`.

    Returns:
        `config.output_dir`.

    Raises:
        ValueError: The configuration does not fit the dataset or this machine, or the folder holds another run.
        FloatingPointError: The loss or the weights became NaN or infinite; the last good checkpoint is kept.
        OSError: A checkpoint or the pipeline cannot be written; the previous one is kept.
    """
    config = dataclasses.replace(config, output_dir=Path(config.output_dir).expanduser())
    check_tracker(config.log_with)
    with new_accelerator(config) as accelerator, StopSignals() as signals:
        _train(config, accelerator, teacher, dataset, signals)
    signals.deliver()
    return config.output_dir


def _train(
    config: TrainConfig,
    accelerator: Accelerator,
    teacher: Teacher | None,
    dataset: ImageDataset | None,
    signals: StopSignals,
) -> None:
    """Take the steps that remain after the last checkpoint; see [`train`]."""
    from accelerate.utils import broadcast_object_list, set_seed

    # 1. The data, and the number of steps.
    if dataset is None:
        dataset = image_dataset(
            config.dataset_name, config.split, config.image_column, config.label_column, config.resolution
        )
    if config.class_conditional and dataset.id2label is None:
        raise ValueError(
            f"class_conditional=True needs labels, but {config.dataset_name!r} has none. Set label_column, or "
            "class_conditional=False."
        )
    batch_size = config.train_batch_size * accelerator.num_processes  # of all processes, per forward pass
    step_size = batch_size * config.gradient_accumulation_steps  # images per optimizer step
    total_steps = config.max_train_steps or -(-config.num_epochs * len(dataset) // step_size)

    # 2. The network and the pipeline.
    set_seed(config.seed)
    unet, scheduler = new_model(config, dataset)
    levels = saturated_levels(dataset) if config.saturation_margin else (None, None)
    clip_sample_range = 1.0 if levels == (None, None) else 1 + config.saturation_margin
    scheduler = MiniDDIMScheduler.from_config(scheduler.config, clip_sample_range=clip_sample_range)
    if teacher is not None:
        teacher.prepare(accelerator.device, config.torch_compile)
    pipeline = new_pipeline(config, dataset, levels, unet, scheduler, teacher.pipeline_defaults if teacher else {})

    # 3. The folder. Nothing was written before this line.
    settings = vars(config) | {"global_batch_size": batch_size, "dataset": dataset.fingerprint}
    settings |= teacher.run_settings if teacher else {}
    claim = claimed_folder(config.output_dir, settings) if accelerator.is_main_process else contextlib.nullcontext()
    with claim:
        accelerator.wait_for_everyone()
        found = last_checkpoint(config.output_dir) if accelerator.is_main_process else (None, {})
        ((checkpoint, progress),) = broadcast_object_list([found])
        if checkpoint is not None and progress["step"] >= total_steps:
            accelerator.print(f"{config.output_dir} is already trained ({progress['step']} steps).")
            if accelerator.is_main_process:
                keep_last_checkpoints(config.output_dir, progress["step"], config.checkpoints_total_limit)
            if is_whole_pipeline(config.output_dir, progress):
                return
        _take_steps(
            config, accelerator, teacher, dataset, levels, pipeline, total_steps, signals, checkpoint, progress
        )


def _take_steps(
    config: TrainConfig,
    accelerator: Accelerator,
    teacher: Teacher | None,
    dataset: ImageDataset,
    levels: Levels,
    pipeline: Any,
    total_steps: int,
    signals: StopSignals,
    checkpoint: Path | None,
    progress: dict[str, Any],
) -> None:
    """Train the network of `pipeline` from `checkpoint`, with its `progress`, to `total_steps`; see [`train`]."""
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    output_dir, device, is_main = config.output_dir, accelerator.device, accelerator.is_main_process
    batch_size = config.train_batch_size * accelerator.num_processes
    step_size = batch_size * config.gradient_accumulation_steps

    # 1. The network, its optimizer and its averaged weights, from the last checkpoint if there is one.
    unet, scheduler = pipeline.unet.to(memory_format=torch.channels_last), pipeline.scheduler
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    if config.torch_compile:
        unet.compile()  # in place: the keys of the weights stay, so runs with and without it can share checkpoints
    model, optimizer = accelerator.prepare(unet, optimizer)
    # The decay of step k is min(1 - (1 + k)^-power, ema_max_decay).
    ema = EMAModel(unet.parameters(), decay=config.ema_max_decay, use_ema_warmup=True, power=EMA_POWER, foreach=True)
    ema.to(device)
    names = [name for name, _ in unet.named_parameters()]
    first_step, seconds = 0, 0.0
    if checkpoint is not None:
        averaged_weights = load_checkpoint(accelerator, checkpoint)
        first_step, seconds = progress["step"], progress["seconds"]
        for name, averaged in zip(names, ema.shadow_params, strict=True):
            averaged.copy_(averaged_weights[name])
        ema.optimization_step = first_step
        if first_step < total_steps:
            accelerator.print(f"Resuming from {checkpoint} (step {first_step} of {total_steps}).")
    if first_step >= total_steps:  # only the pipeline is damaged, or gone
        if is_main:
            with _averaged_weights(unet, ema):
                _save_pipeline(config, accelerator, pipeline, None)
        return
    for group in optimizer.param_groups:
        group["initial_lr"] = config.learning_rate
    lr_steps = {"num_warmup_steps": min(config.lr_warmup_steps, total_steps // 10), "num_training_steps": total_steps}
    lr_scheduler = get_scheduler(config.lr_scheduler, optimizer, last_epoch=first_step - 1, **lr_steps)
    if is_main:
        truncate_log(output_dir, first_step)
    if config.log_with != "none":
        accelerator.init_trackers("logs")
    accelerator.print(
        f"Training on {device}, {accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}, "
        f"precision {accelerator.mixed_precision}: {len(dataset):,} images, {total_steps - first_step:,} steps of "
        f"{step_size}."
    )

    # 2. The loop.
    noise_levels = (teacher.timesteps if teacher else torch.arange(scheduler.config.num_train_timesteps)).to(device)
    null_label = len(dataset.id2label or ()) if config.class_conditional else None
    accumulation, label_dropout = config.gradient_accumulation_steps, config.class_dropout_prob
    snr_limits = config.snr_gamma, teacher.snr_floor if teacher else None
    micro_steps = range(first_step * accumulation, total_steps * accumulation)
    ids = image_ids(accelerator, config.seed, len(dataset), config.train_batch_size, micro_steps)
    batches = image_batches(accelerator, dataset, ids, config.cache_dataset, config.dataloader_num_workers)
    bar = tqdm(total=total_steps, initial=first_step, desc="Training", unit="step", disable=not is_main)
    started, logged_at, step = time.monotonic() - seconds, time.monotonic(), first_step
    running_loss, running_count = torch.zeros((), dtype=torch.float32, device=device), 0
    model.train()
    for micro_step, (images, class_labels) in zip(micro_steps, batches, strict=True):
        images = beyond_saturation(images, config.saturation_margin, levels)
        noise, timesteps, class_labels = noise_batch(
            accelerator, config.seed, micro_step, noise_levels, images, class_labels, null_label, label_dropout
        )
        with accelerator.accumulate(model):
            with accelerator.autocast():
                if teacher is not None:
                    images, noise = teacher(images, noise, timesteps, class_labels)
                loss = compute_loss(model, scheduler, images, noise, timesteps, class_labels, *snr_limits)
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        running_loss += loss.detach()
        running_count += 1
        if not accelerator.sync_gradients:
            continue
        lr_scheduler.step()
        ema.step(unet.parameters())
        step += 1
        bar.update()

        # Several processes agree on a stop when they meet anyway, to log.
        stops = accelerator.num_processes == 1 and signals.received is not None
        is_last = step == total_steps
        checkpoint_due = stops or is_last or step % config.checkpointing_steps == 0
        epoch, previous_epoch = step * step_size // len(dataset), (step - 1) * step_size // len(dataset)
        grid_due = config.save_images_epochs > 0 and (
            is_last or epoch // config.save_images_epochs > previous_epoch // config.save_images_epochs
        )
        log_due = checkpoint_due or grid_due or step % config.logging_steps == 0
        if log_due:
            told = torch.tensor([float(signals.received is not None), 0.0], dtype=torch.float32, device=device)
            told[1] = running_loss / running_count
            stopped, loss_value = accelerator.reduce(told, "mean").tolist()
            checkpoint_due = checkpoint_due or stopped > 0
            stops = stopped > 0
            entry = {
                "step": step,
                "epoch": round(step * step_size / len(dataset), 4),
                "images": step * step_size,
                "loss": loss_value,
                "lr": lr_scheduler.get_last_lr()[0],
                "images_per_second": round(running_count * batch_size / (time.monotonic() - logged_at), 1),
                "seconds": round(time.monotonic() - started, 1),
            }
            _log(config, accelerator, unet, bar, entry)
            running_loss, running_count = torch.zeros((), dtype=torch.float32, device=device), 0
        # The checkpoint comes last: a run that is killed before takes these steps again, and writes all of this again.
        hashes: dict[str, str | None] = {}
        if (checkpoint_due or grid_due) and is_main:
            with _averaged_weights(unet, ema):
                hashes = _save_pipeline(config, accelerator, pipeline, epoch if grid_due else None)
        if checkpoint_due:
            progress = {"step": step, "seconds": round(time.monotonic() - started, 1), "pipeline": hashes}
            averaged_weights = dict(zip(names, ema.shadow_params, strict=True))
            save_checkpoint(accelerator, output_dir, progress, averaged_weights, config.checkpoints_total_limit)
        if log_due:
            accelerator.wait_for_everyone()
            logged_at = time.monotonic()
        if stops:
            break
    bar.close()
    if step != total_steps:
        if signals.received is None and accelerator.num_processes == 1:
            raise RuntimeError(f"The run ended after {step} of {total_steps} steps. Please report this.")
        accelerator.print(f"Stopped after step {step} of {total_steps}. Give the same command again to go on.")


def _log(
    config: TrainConfig, accelerator: Accelerator, unet: torch.nn.Module, bar: Any, entry: dict[str, Any]
) -> None:
    """Write an entry to `train_log.jsonl`, the progress bar and the tracker.

    A loss or a weight that is NaN or infinite is a `FloatingPointError`.
    """
    # The loss belongs to the weights before this step; the weights after it are what is saved next.
    is_finite = torch.stack([parameter.isfinite().all() for parameter in unet.parameters()]).all()
    if not (np.isfinite(entry["loss"]) and is_finite):
        bar.close()
        checkpoints = list_checkpoints(config.output_dir)
        raise FloatingPointError(
            f"Training diverged by step {entry['step']} (loss {entry['loss']}). Lower learning_rate (now "
            f"{config.learning_rate:g}) or set mixed_precision to no (now {accelerator.mixed_precision}). "
            f"Last good checkpoint: {checkpoints[-1] if checkpoints else 'none was written yet'}."
        )
    bar.set_postfix(loss=f"{entry['loss']:.4f}", images_per_s=f"{entry['images_per_second']:.0f}")
    if accelerator.is_main_process:
        with (
            explain_write_errors(config.output_dir),
            (config.output_dir / "train_log.jsonl").open("a", encoding="utf-8") as log,
        ):
            log.write(json.dumps(entry) + "\n")
    tracked = {key: entry[key] for key in ("loss", "lr", "images_per_second", "epoch")}
    accelerator.log(tracked, step=entry["step"])


@contextlib.contextmanager
def _averaged_weights(unet: MiniUNet2DModel, ema: EMAModel) -> Iterator[None]:
    """Put the averaged weights into the network, in evaluation mode, until the block ends."""
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    unet.eval()
    try:
        yield
    finally:
        unet.train()
        ema.restore(unet.parameters())


def _save_pipeline(
    config: TrainConfig, accelerator: Accelerator, pipeline: Any, epoch: int | None
) -> dict[str, str | None]:
    """Write the pipeline and its card to `output_dir`, and a grid of samples if `epoch` is given.

    Return the hashes of the pipeline's files. A file that cannot be written is an `OSError`.
    """
    hashes = save_pipeline(config.output_dir, pipeline)
    if epoch is not None:
        classes = list(pipeline.config.id2label)[:10] if config.class_conditional else []
        call: dict[str, Any] = {"class_labels": classes * 8} if classes else {"batch_size": 64}
        call["num_inference_steps"] = default_steps(pipeline)
        generator = torch.Generator("cpu").manual_seed(config.seed)
        # Not compiled: a compiled network would be compiled again for this batch size.
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            images = pipeline(**call, generator=generator).images
        with atomic_write(config.output_dir / "samples" / f"epoch-{epoch:04d}.png") as temporary:
            sample_grid(images, columns=len(classes) or 8).save(temporary)
    with explain_write_errors(config.output_dir):
        write_card(pipeline, config.output_dir)
    return hashes
