"""Training: the noise-prediction loss of DDPM and the loop around it.

    L = E_{x_0, ε, t} [ w_t · || target - model(x_t, t, y) ||² ],   x_t = sqrt(ᾱ_t)·x_0 + sqrt(1-ᾱ_t)·ε

(DDPM, arXiv 2006.11239, eq. 14; the target is ε, x_0 or v by `prediction_type`.) Devices, precision, gradient
accumulation, many processes and checkpoints are accelerate's; the average of the weights is diffusers' `EMAModel`.

Everything random in a step, and which images it sees, is a function of the seed and of the number of the step, drawn
for the batch of all processes together. So a resumed run takes the very steps it would have taken, and two processes
take the step that one would take with twice the batch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data import ImageDataset, image_dataset
from ..hub.card import write_card
from ..hub.load import load_pipeline
from ..models.unet_mini import PRESETS, MiniUNet2DModel
from ..pipelines.pipeline_mini_ddpm import MiniDDPMPipeline
from ..pipelines.pipeline_mini_ddpm_class_conditional import MiniDDPMClassConditionalPipeline
from ..plots import sample_grid
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from .batches import _batches, _noise_batch
from .checkpoints import (
    _checkpoints,
    _claim_folder,
    _clear_write_errors,
    _flush_to_disk,
    _save_checkpoint,
    _truncate_log,
)
from .loss import beyond_saturation, compute_loss, saturated_ends

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

# What a continued run may change; anything else would make another run of it.
_FREE_TO_CHANGE = {
    "output_dir",
    "num_epochs",
    "max_train_steps",
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "save_images_epochs",
    "log_with",
    "device",
    "cache_dataset",
    "dataloader_num_workers",
    "torch_compile",
}


# Fields that say what a pipeline to start from has already.
_FROM_PRETRAINED = (
    "preset",
    "block_out_channels",
    "layers_per_block",
    "num_train_timesteps",
    "beta_schedule",
    "prediction_type",
)


@dataclass(frozen=True)
class TrainConfig:
    """Train a small diffusion model from scratch and write it as a pipeline folder.

    The defaults train on MNIST. Interrupted at any moment, the same command goes on from the last checkpoint.
    """

    dataset_name: str = "ylecun/mnist"
    """Hub id, folder in a Hub dataset's layout, or folder of pictures (one sub-folder per class)."""
    output_dir: Path = Path("runs/mnist")
    """Where the pipeline, its checkpoints, sample grids and logs are written."""
    split: str = "train"
    """Split of the dataset."""
    image_column: str | None = None
    """Column of the pictures. None: the first that holds images."""
    label_column: str | None = None
    """Column of the class indices. None: the first that holds class labels."""
    resolution: int | None = None
    """Crop to a square and resize to this many pixels. None: take pictures as they are."""
    cache_dataset: bool | None = None
    """Keep all images on the device as bytes. None: yes if they take less than 2 GB."""
    dataloader_num_workers: int = 2
    """Processes that decode images when the dataset is not cached."""

    class_conditional: bool = False
    """Train on class labels too, for images of a class asked for."""
    class_dropout_prob: float = 0.1
    """Share of labels replaced by the null label, so that guidance can be used (arXiv 2207.12598)."""

    pretrained_model_name_or_path: str | None = None
    """Start from a pipeline's weights, of its shape and noise schedule: a name that ships, a folder or a Hub id."""
    preset: str = "mini"
    """Shape of the U-Net: mini, tutorial-32 or tutorial-64."""
    block_out_channels: tuple[int, ...] | None = None
    """Width of each level; levels below the first have attention. None: the preset's."""
    layers_per_block: int | None = None
    """Residual blocks per level. None: the preset's."""
    dropout: float = 0.0
    """Dropout in the residual blocks."""

    saturation_margin: float = 0.1
    """Learn black as -1 - this, white as 1 + this, if a tenth of the pixels are: clamping makes them exact."""

    num_train_timesteps: int = 1000
    """Number T of noise levels."""
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid", "laplace"] = "squaredcos_cap_v2"
    """Noise schedule; squaredcos_cap_v2 is the cosine one."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    """What the network predicts: the noise, the clean image or the velocity."""
    snr_gamma: float | None = None
    """Weigh the loss by min-SNR with this gamma (5.0 is usual). None: no weighting."""

    num_epochs: int = 20
    """Passes over the dataset."""
    max_train_steps: int | None = None
    """Optimizer steps. None: as many as num_epochs takes."""
    train_batch_size: int = 128
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_scheduler: str = "cosine"
    """Decay after the warm-up: cosine, linear, constant_with_warmup, polynomial, ..."""
    lr_warmup_steps: int = 200
    """Steps over which the learning rate rises from zero."""
    adam_beta2: float = 0.99
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""
    ema_max_decay: float = 0.9995
    """Decay of the moving average of the weights, reached gradually; the average is what is saved."""
    ema_power: float = 0.75
    """How quickly it is reached: 1 - (1 + step)^-power."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Arithmetic of the network. Auto: bf16 on GPUs that have it, else no. CPUs with AVX512-BF16 gain from bf16."""
    channels_last: bool = True
    """Memory format of the convolutions."""
    torch_compile: bool = False
    """Compile the network: a minute more at the start, a third less afterwards."""
    seed: int = 0
    """Seed of everything random."""

    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    checkpoints_total_limit: int = 2
    """How many checkpoints are kept."""
    save_images_epochs: int = 1
    """Epochs between sample grids; 0 for none."""
    logging_steps: int = 50
    """Optimizer steps between log lines."""
    log_with: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Experiment tracker, beside train_log.jsonl, which is always written."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        for name in (
            "num_train_timesteps",
            "num_epochs",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.max_train_steps is not None and self.max_train_steps < 1:
            raise ValueError(f"max_train_steps={self.max_train_steps} must be at least 1.")
        for name in ("learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be above 0.")
        for name in ("class_dropout_prob", "dropout", "ema_max_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        if not 0 <= self.saturation_margin <= 1:
            raise ValueError(f"saturation_margin={self.saturation_margin} must be in [0, 1].")
        if self.snr_gamma is not None and not self.snr_gamma > 0:
            raise ValueError(f"snr_gamma={self.snr_gamma} must be above 0.")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} must be one of {', '.join(PRESETS)}.")


class Teacher(Protocol):
    """What makes a run one of distillation: it chooses the noise levels and what is to be predicted there."""

    timesteps: torch.Tensor
    """The noise levels to learn, (N,) int64."""
    described: dict[str, Any]
    """What a continued run may not change, for `train_config.json`."""
    defaults: dict[str, Any]
    """`default_...` arguments of the pipeline that is saved."""
    snr_floor: float
    """See [`compute_loss`]."""

    def prepare(self, device: torch.device, compiled: bool) -> None:
        """Called once, before the first step."""

    def __call__(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image to predict in place of the true one, and the noise that leads from it to the same x_t."""


def train(config: TrainConfig, teacher: Teacher | None = None) -> Path:
    """Train a pipeline, or go on training it from its last checkpoint.

    Under `accelerate launch` every process calls this. `config.output_dir` becomes a pipeline folder that
    `from_pretrained` opens (averaged weights), with `checkpoint-N/`, `samples/`, `logs/`, `train_config.json` and
    `train_log.jsonl` beside it.

    Args:
        config: What to train on what, and how.
        teacher: What to learn from, if not from the images alone; see [`distill`].

    Returns:
        `config.output_dir`.

    Raises:
        ValueError: The configuration cannot work with this dataset, or the folder holds another run.
        FloatingPointError: The loss became NaN or infinite; the last good weights are kept.
        OSError: A checkpoint or the pipeline could not be written; the previous one is kept.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    config = dataclasses.replace(config, output_dir=Path(config.output_dir).expanduser())
    _check_device(config.device)
    accelerator = Accelerator(
        cpu=config.device == "cpu",
        mixed_precision=_mixed_precision(config),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.log_with == "none" else config.log_with,
        project_config=ProjectConfiguration(project_dir=str(config.output_dir), logging_dir=str(config.output_dir)),
    )
    try:
        _train(config, accelerator, teacher)
    finally:
        accelerator.end_training()
        AcceleratorState._reset_state(reset_partial_state=True)  # or another run could not have another precision
    return config.output_dir


def _train(config: TrainConfig, accelerator: Accelerator, teacher: Teacher | None) -> None:
    """Take the steps that are left after the last checkpoint; see [`train`]."""
    from accelerate.utils import set_seed
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    output_dir, device, is_main = config.output_dir, accelerator.device, accelerator.is_main_process

    # 1. The data, and how many steps it takes to see it num_epochs times.
    dataset = image_dataset(
        config.dataset_name, config.split, config.image_column, config.label_column, config.resolution
    )
    if config.class_conditional and dataset.id2label is None:
        raise ValueError(f"class_conditional needs labels, and {config.dataset_name!r} has none. Pass --label-column.")
    null_label = len(dataset.id2label or ()) if config.class_conditional else None
    batch_size = config.train_batch_size * accelerator.num_processes  # of all processes, per forward pass
    step_size = batch_size * config.gradient_accumulation_steps  # images per optimizer step
    total_steps = config.max_train_steps or -(-config.num_epochs * len(dataset) // step_size)

    # 2. The network and its optimizer.
    set_seed(config.seed)
    unet, scheduler = _new_model(config, dataset)
    ends = saturated_ends(dataset) if config.saturation_margin else (False, False)
    clip_sample_range = 1 + config.saturation_margin if any(ends) else 1.0
    scheduler = MiniDDIMScheduler.from_config(scheduler.config, clip_sample_range=clip_sample_range)
    levels = torch.arange(scheduler.config.num_train_timesteps) if teacher is None else teacher.timesteps
    levels = levels.to(device)
    if teacher is not None:
        teacher.prepare(device, config.torch_compile)
    if config.channels_last:
        unet = unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    lr_scheduler = get_scheduler(
        config.lr_scheduler,
        optimizer,
        num_warmup_steps=min(config.lr_warmup_steps, total_steps),
        num_training_steps=total_steps,
    )
    if config.torch_compile:
        unet.compile()  # in place, so that checkpoints fit a run without it
    model, optimizer = accelerator.prepare(unet, optimizer)
    ema = EMAModel(
        unet.parameters(), decay=config.ema_max_decay, use_ema_warmup=True, power=config.ema_power, foreach=True
    )
    ema.to(device)
    accelerator.register_for_checkpointing(ema, lr_scheduler)

    # 3. Where an earlier run got to. Nothing was written before this line.
    if is_main:
        _claim_folder(config.output_dir, vars(config) | (teacher.described if teacher else {}))
    accelerator.wait_for_everyone()
    first_step, seconds = 0, 0.0
    for checkpoint in _checkpoints(output_dir)[-1:]:
        accelerator.load_state(str(checkpoint))
        progress = json.loads((checkpoint / "progress.json").read_text())
        first_step, seconds = progress["step"], progress["seconds"]
        accelerator.print(f"Going on from {checkpoint} (step {first_step} of {total_steps}).")
    if is_main:
        _truncate_log(output_dir, first_step)
    if config.log_with != "none":
        accelerator.init_trackers("logs")

    # 4. The loop.
    micro_steps = range(
        first_step * config.gradient_accumulation_steps, total_steps * config.gradient_accumulation_steps
    )
    batches = _batches(config, dataset, accelerator, micro_steps)
    bar = tqdm(total=total_steps, initial=first_step, desc="Training", unit="step", disable=not is_main)
    started, logged_at, step = time.monotonic() - seconds, time.monotonic(), first_step
    running_loss, running_count = torch.zeros((), device=device), 0
    model.train()
    for micro_step, (images, class_labels) in zip(micro_steps, batches, strict=True):
        images = beyond_saturation(images, config.saturation_margin, *ends)
        noise, timesteps, class_labels = _noise_batch(
            config, accelerator, levels, micro_step, images, class_labels, null_label
        )
        with accelerator.accumulate(model):
            with accelerator.autocast():
                if teacher is not None:
                    images, noise = teacher(images, noise, timesteps, class_labels)
                snr_floor = teacher.snr_floor if teacher else None
                loss = compute_loss(
                    model, scheduler, images, noise, timesteps, class_labels, config.snr_gamma, snr_floor
                )
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

        last = step == total_steps
        checkpoint_due = last or step % config.checkpointing_steps == 0
        epoch, epoch_before = step * step_size // len(dataset), (step - 1) * step_size // len(dataset)
        images_due = config.save_images_epochs > 0 and (
            last or epoch // config.save_images_epochs > epoch_before // config.save_images_epochs
        )
        if step % config.logging_steps == 0 or checkpoint_due or images_due:
            mean_loss = accelerator.reduce(running_loss / running_count, "mean").item()
            # The loss is that of the weights before this step; what is about to be saved is looked at too.
            finite = torch.stack([parameter.isfinite().all() for parameter in unet.parameters()]).all()
            if not (np.isfinite(mean_loss) and finite):
                bar.close()
                kept = [str(path) for path in _checkpoints(output_dir)[-1:]] or ["none was written yet"]
                raise FloatingPointError(
                    f"Training diverged by step {step} (loss {mean_loss}). Lower learning_rate (now "
                    f"{config.learning_rate:g}) or set mixed_precision to no (now {accelerator.mixed_precision}). "
                    f"Last good weights: {kept[0]}."
                )
            now = time.monotonic()
            speed = running_count * batch_size / (now - logged_at)
            entry = {
                "step": step,
                "epoch": round(step * step_size / len(dataset), 4),
                "images": step * step_size,
                "loss": mean_loss,
                "lr": lr_scheduler.get_last_lr()[0],
                "images_per_second": round(speed, 1),
                "seconds": round(now - started, 1),
            }
            bar.set_postfix(loss=f"{mean_loss:.4f}", images_per_s=f"{speed:.0f}")
            if is_main:
                with (output_dir / "train_log.jsonl").open("a") as log:
                    log.write(json.dumps(entry) + "\n")
            accelerator.log({key: entry[key] for key in ("loss", "lr", "images_per_second", "epoch")}, step=step)
            running_loss, running_count = torch.zeros((), device=device), 0
        if checkpoint_due:
            _save_checkpoint(accelerator, config, step, time.monotonic() - started)
        if (checkpoint_due or images_due) and is_main:
            defaults = teacher.defaults if teacher else {}
            _save_pipeline(config, accelerator, dataset, scheduler, unet, ema, epoch if images_due else None, defaults)
        if checkpoint_due or images_due:
            accelerator.wait_for_everyone()
            logged_at = time.monotonic()
        elif running_count == 0:
            logged_at = now
    bar.close()
    if step == first_step:
        accelerator.print(f"{output_dir} is trained already ({total_steps} steps).")


def _check_device(device: str) -> None:
    """Refuse a device that this machine lacks, in place of silently training on another."""
    available = {
        "auto": True,
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    if not available[device]:
        raise ValueError(f"device={device!r} was asked for, but torch finds none here. Use --device cpu or auto.")


def _mixed_precision(config: TrainConfig) -> str:
    """Resolve "auto"."""
    if config.mixed_precision != "auto":
        return config.mixed_precision
    on_gpu = config.device in ("auto", "cuda") and torch.cuda.is_available()
    return "bf16" if on_gpu and torch.cuda.is_bf16_supported() else "no"


def _new_model(config: TrainConfig, dataset: ImageDataset) -> tuple[MiniUNet2DModel, MiniDDIMScheduler]:
    """Build the network and the noise schedule that fit the configuration and the images."""
    channels, height, width = dataset.shape
    overrides: dict[str, Any] = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        "dropout": config.dropout,
        # the last is the null label
        "num_class_embeds": len(dataset.id2label or ()) + 1 if config.class_conditional else None,
    }
    unet: MiniUNet2DModel
    if config.pretrained_model_name_or_path is not None:
        pipe: Any = load_pipeline(config.pretrained_model_name_or_path)
        if pipe.unet.config.in_channels != channels or pipe.unet.config.out_channels != channels:
            raise ValueError(
                f"{config.pretrained_model_name_or_path} draws images of {pipe.unet.config.in_channels} channels, and "
                f"those of {config.dataset_name!r} have {channels}. Train from scratch, or on images of its kind."
            )
        theirs = {**pipe.scheduler.config, **pipe.unet.config}
        theirs["block_out_channels"] = tuple(theirs["block_out_channels"])
        for name in _FROM_PRETRAINED:
            value = getattr(config, name)
            if value not in (getattr(TrainConfig, name), theirs.get(name)):
                raise ValueError(
                    f"{name}={value!r} cannot be had: the shape and the noise schedule are those of "
                    f"{config.pretrained_model_name_or_path}. Leave it out, or train from scratch."
                )
        unet = MiniUNet2DModel.from_config(pipe.unet.config, **overrides)
        _copy_weights(pipe.unet, unet)
        return unet, MiniDDIMScheduler.from_config(pipe.scheduler.config)
    if config.block_out_channels is not None:
        levels = len(config.block_out_channels)
        overrides["block_out_channels"] = config.block_out_channels
        overrides["down_block_types"] = ("DownBlock2D",) + ("AttnDownBlock2D",) * (levels - 1)
    if config.layers_per_block is not None:
        overrides["layers_per_block"] = config.layers_per_block
    unet = MiniUNet2DModel.from_preset(config.preset, **overrides)
    return unet, MiniDDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
    )


@torch.no_grad()
def _copy_weights(source: MiniUNet2DModel, target: MiniUNet2DModel) -> None:
    """Make `target` compute what `source` does, whichever classes the two know.

    Other classes than the source's, and those of a source that knows none, begin as its null label. A target without
    classes computes what the source does for the null label, whose embedding goes into the bias that it is added to.
    """
    weights = source.state_dict()
    embedding = weights.pop("class_embedding.weight", None)  # (classes + 1, E)
    bias = weights["time_embedding.linear_2.bias"]
    if target.class_embedding is None:
        if embedding is not None:
            weights["time_embedding.linear_2.bias"] = bias + embedding[-1]
    elif embedding is not None and embedding.shape == target.class_embedding.weight.shape:
        weights["class_embedding.weight"] = embedding
    else:
        null = torch.zeros_like(bias) if embedding is None else embedding[-1]
        weights["class_embedding.weight"] = null.expand_as(target.class_embedding.weight)
    target.load_state_dict(weights)


def _save_pipeline(
    config: TrainConfig,
    accelerator: Accelerator,
    dataset: ImageDataset,
    scheduler: MiniDDIMScheduler,
    unet: MiniUNet2DModel,
    ema: EMAModel,
    epoch: int | None,
    defaults: dict[str, Any],
) -> None:
    """Write the averaged weights as a pipeline, file by file in place of the last, and draw a grid after `epoch`."""
    ema.store(unet.parameters())
    ema.copy_to(unet.parameters())
    unet.eval()
    temporary = config.output_dir / ".pipeline.tmp"
    try:
        pipeline: Any
        if config.class_conditional:
            pipeline = MiniDDPMClassConditionalPipeline(unet, scheduler, id2label=dataset.id2label, **defaults)
        else:
            pipeline = MiniDDPMPipeline(unet, scheduler, **defaults)
        with _clear_write_errors(temporary):
            pipeline.save_pretrained(temporary)
            _flush_to_disk(temporary)
            (temporary / "README.md").unlink()  # a later one tells more, and may have been edited
            for file in sorted(path for path in temporary.rglob("*") if path.is_file()):
                target = config.output_dir / file.relative_to(temporary)
                target.parent.mkdir(exist_ok=True)
                os.replace(file, target)
            shutil.rmtree(temporary)
        if epoch is not None:
            (config.output_dir / "samples").mkdir(exist_ok=True)
            pipeline.set_progress_bar_config(disable=True)
            if config.class_conditional:
                classes = list(dataset.id2label or ())[:10]
                call: dict[str, Any] = {"class_labels": [label for _ in range(8) for label in classes]}
            else:
                call = {"batch_size": 64}
            generator = torch.Generator("cpu").manual_seed(config.seed)
            steps = defaults.get("default_num_inference_steps", min(25, scheduler.config.num_train_timesteps))
            # A compiled network would be compiled anew for this batch size.
            with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
                images = pipeline(**call, generator=generator, num_inference_steps=steps).images
            grid = sample_grid(images, columns=len(classes) if config.class_conditional else 8)
            grid.save(config.output_dir / "samples" / f"epoch-{epoch:04d}.png")
        with _clear_write_errors(temporary):
            write_card(pipeline, config.output_dir)
    finally:
        unet.train()
        ema.restore(unet.parameters())
