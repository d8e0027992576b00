"""Training: the settings of a run and the loop.

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
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np
import torch
import tyro
from tqdm.auto import tqdm

from ..data import ImageDataset, image_dataset
from ..files import atomic_write
from ..hub.card import write_card
from ..hub.load import load_pipeline
from ..models.unet_mini import PRESETS, MiniUNet2DModel
from ..options import default_steps, find_device, resolve_precision
from ..pipelines.pipeline_mini_ddpm import MiniDDPMPipeline
from ..pipelines.pipeline_mini_ddpm_class_conditional import MiniDDPMClassConditionalPipeline
from ..plots import sample_grid
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from .batches import image_batches, image_ids, noise_batch
from .checkpoints import (
    FIXED_SETTINGS,
    claim_folder,
    explain_write_errors,
    list_checkpoints,
    save_checkpoint,
    save_pipeline,
    truncate_log,
)
from .loss import Levels, beyond_saturation, compute_loss, saturated_levels

if TYPE_CHECKING:
    from accelerate import Accelerator
    from diffusers.training_utils import EMAModel

# Settings that `pretrained_model_name_or_path` determines.
_SETTINGS_OF_PRETRAINED = (
    "preset",
    "block_out_channels",
    "layers_per_block",
    "num_train_timesteps",
    "beta_schedule",
    "prediction_type",
)


@dataclass(frozen=True)
class RunConfig:
    """The settings that training and distillation share, with the defaults of training."""

    dataset_name: str = "ylecun/mnist"
    """Hub id, folder in a Hub dataset's layout, or folder of pictures (one sub-folder per class)."""
    _: KW_ONLY
    split: str = "train"
    """Split of the dataset."""
    image_column: str | None = None
    """Column of the pictures. Default: the first that holds images."""
    label_column: str | None = None
    """Column of the class indices. Default: the first that holds class labels."""
    resolution: int | None = None
    """Crop pictures to a square and resize them to this many pixels. Default: keep their size."""

    train_batch_size: int = 128
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_warmup_steps: int = 200
    """Steps over which the learning rate rises from zero, at most a tenth of all."""
    class_dropout_prob: float = 0.1
    """Share of labels replaced by the null label; guidance needs it (arXiv 2207.12598)."""
    ema_max_decay: float = 0.9995
    """Largest decay of the moving average of the weights, which is what is saved. The decay rises to it gradually."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. Auto: cuda, else mps, else cpu."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the network. Auto: bf16 on GPUs that support it, else no. bf16 also suits AVX512-BF16 CPUs."""
    torch_compile: bool = False
    """Compile the network: about a minute to start, then a third less time per step."""
    seed: int = 0
    """Seed of everything random."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    log_with: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Experiment tracker. train_log.jsonl is always written too."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train a small diffusion model and write it as a pipeline folder.

    The defaults train on MNIST from scratch. To resume an interrupted run, give the same command again.
    """

    output_dir: Path = Path("runs/mnist")
    """Folder for the pipeline, its checkpoints, sample grids and logs."""
    _: KW_ONLY
    cache_dataset: bool | None = None
    """Keep all images on the device as bytes. Default: yes if they take less than 2 GB."""
    dataloader_num_workers: int = 2
    """Processes that decode images when the dataset is not cached."""

    class_conditional: bool = False
    """Train on class labels too, to generate images of a chosen class."""
    pretrained_model_name_or_path: str | None = None
    """Fine-tune this pipeline (bundled name, folder or Hub id); its network shape and noise schedule are kept.
    Default: train from scratch."""
    preset: str = "mini"
    """Shape of the U-Net: mini, tutorial-32 or tutorial-64."""
    block_out_channels: tuple[int, ...] | None = None
    """Width of each level; all levels but the first have attention. Default: the preset's."""
    layers_per_block: int | None = None
    """Residual blocks per level. Default: the preset's."""
    dropout: float = 0.0
    """Dropout in the residual blocks."""

    saturation_margin: float = 0.1
    """Train black (white) as -1 - margin (1 + margin) if 5 % of pixels are it: clamping makes it exact. 0: off."""

    num_train_timesteps: int = 1000
    """Number T of noise levels."""
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid", "laplace"] = "squaredcos_cap_v2"
    """Noise schedule; squaredcos_cap_v2 is the cosine schedule."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    """What the network predicts: the noise, the clean image or the velocity."""
    snr_gamma: float | None = None
    """Gamma of the min-SNR loss weights; 5.0 is usual. Default: no weights."""

    num_epochs: int = 20
    """Passes over the dataset."""
    max_train_steps: int | None = None
    """Optimizer steps. Default: as many as num_epochs takes."""
    lr_scheduler: str = "cosine"
    """Decay after the warm-up: cosine, linear, constant_with_warmup, polynomial, ..."""
    adam_beta2: tyro.conf.Suppress[float] = 0.99
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    checkpoints_total_limit: int = 2
    """How many checkpoints are kept."""
    save_images_epochs: int = 1
    """Epochs between sample grids; 0: none."""
    logging_steps: int = 50
    """Optimizer steps between log lines."""

    def __post_init__(self) -> None:
        """Raise a `ValueError` for a value that cannot work: it names the field, the value and what is allowed."""
        for name in (
            "num_train_timesteps",
            "num_epochs",
            "max_train_steps",
            "train_batch_size",
            "gradient_accumulation_steps",
            "checkpointing_steps",
            "checkpoints_total_limit",
            "logging_steps",
        ):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        for name in ("learning_rate", "max_grad_norm", "snr_gamma"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"{name}={value} must be above 0.")
        for name in ("class_dropout_prob", "dropout", "ema_max_decay", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be in [0, 1).")
        if not 0 <= self.saturation_margin <= 1:
            raise ValueError(f"saturation_margin={self.saturation_margin} must be in [0, 1].")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} must be one of {', '.join(PRESETS)}.")


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
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import ProjectConfiguration

    config = dataclasses.replace(config, output_dir=Path(config.output_dir).expanduser())
    device = find_device(config.device)
    accelerator = Accelerator(
        cpu=device.type == "cpu",
        mixed_precision=resolve_precision(config.mixed_precision, device),
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        log_with=None if config.log_with == "none" else config.log_with,
        project_config=ProjectConfiguration(project_dir=str(config.output_dir), logging_dir=str(config.output_dir)),
    )
    try:
        _train(config, accelerator, teacher, dataset)
    finally:
        accelerator.end_training()
        # accelerate keeps the precision of the first run in a process; without this a second run could not change it.
        AcceleratorState._reset_state(reset_partial_state=True)
    return config.output_dir


def _train(
    config: TrainConfig, accelerator: Accelerator, teacher: Teacher | None, dataset: ImageDataset | None
) -> None:
    """Take the steps that remain after the last checkpoint; see [`train`]."""
    from accelerate.utils import set_seed
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    output_dir, device, is_main = config.output_dir, accelerator.device, accelerator.is_main_process

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
    null_label = len(dataset.id2label or ()) if config.class_conditional else None
    batch_size = config.train_batch_size * accelerator.num_processes  # of all processes, per forward pass
    step_size = batch_size * config.gradient_accumulation_steps  # images per optimizer step
    total_steps = config.max_train_steps or -(-config.num_epochs * len(dataset) // step_size)

    # 2. The network and its optimizer.
    set_seed(config.seed)
    unet, scheduler = _new_model(config, dataset)
    levels = saturated_levels(dataset) if config.saturation_margin else (None, None)
    clip_sample_range = 1.0 if levels == (None, None) else 1 + config.saturation_margin
    scheduler = MiniDDIMScheduler.from_config(scheduler.config, clip_sample_range=clip_sample_range)
    if teacher is not None:
        teacher.prepare(device, config.torch_compile)
    noise_levels = (teacher.timesteps if teacher else torch.arange(scheduler.config.num_train_timesteps)).to(device)
    unet = unet.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(
        unet.parameters(),
        lr=config.learning_rate,
        betas=(0.9, config.adam_beta2),
        weight_decay=config.adam_weight_decay,
        fused=device.type in ("cpu", "cuda"),
    )
    lr_steps = {"num_warmup_steps": min(config.lr_warmup_steps, total_steps // 10), "num_training_steps": total_steps}
    lr_scheduler = get_scheduler(config.lr_scheduler, optimizer, **lr_steps)
    if config.torch_compile:
        unet.compile()  # in place: the keys of the weights stay, so runs with and without it can share checkpoints
    model, optimizer = accelerator.prepare(unet, optimizer)
    # The decay of step k is min(1 - (1 + k)^-power, ema_max_decay).
    power = FIXED_SETTINGS["ema_power"]
    ema = EMAModel(unet.parameters(), decay=config.ema_max_decay, use_ema_warmup=True, power=power, foreach=True)
    ema.to(device)
    accelerator.register_for_checkpointing(ema, lr_scheduler)
    pipeline = _new_pipeline(config, dataset, levels, unet, scheduler, teacher)

    # 3. The last checkpoint. Nothing was written before this line.
    if is_main:
        settings = vars(config) | {"saturated_levels": levels}
        claim_folder(output_dir, settings | (teacher.run_settings if teacher else {}))
    accelerator.wait_for_everyone()
    first_step, seconds = 0, 0.0
    for checkpoint in list_checkpoints(output_dir)[-1:]:
        accelerator.load_state(str(checkpoint))
        progress = json.loads((checkpoint / "progress.json").read_text(encoding="utf-8"))
        first_step, seconds = progress["step"], progress["seconds"]
        accelerator.print(f"Resuming from {checkpoint} (step {first_step} of {total_steps}).")
    if is_main:
        truncate_log(output_dir, first_step)
    if config.log_with != "none":
        accelerator.init_trackers("logs")

    # 4. The loop.
    accumulation, label_dropout = config.gradient_accumulation_steps, config.class_dropout_prob
    snr_limits = config.snr_gamma, teacher.snr_floor if teacher else None
    micro_steps = range(first_step * accumulation, total_steps * accumulation)
    ids = image_ids(accelerator, config.seed, len(dataset), config.train_batch_size, micro_steps)
    batches = image_batches(accelerator, dataset, ids, config.cache_dataset, config.dataloader_num_workers)
    bar = tqdm(total=total_steps, initial=first_step, desc="Training", unit="step", disable=not is_main)
    started, logged_at, step = time.monotonic() - seconds, time.monotonic(), first_step
    running_loss, running_count = torch.zeros((), device=device), 0
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

        is_last = step == total_steps
        checkpoint_due = is_last or step % config.checkpointing_steps == 0
        epoch, previous_epoch = step * step_size // len(dataset), (step - 1) * step_size // len(dataset)
        grid_due = config.save_images_epochs > 0 and (
            is_last or epoch // config.save_images_epochs > previous_epoch // config.save_images_epochs
        )
        log_due = checkpoint_due or grid_due or step % config.logging_steps == 0
        if log_due:
            entry = {
                "step": step,
                "epoch": round(step * step_size / len(dataset), 4),
                "images": step * step_size,
                "loss": accelerator.reduce(running_loss / running_count, "mean").item(),
                "lr": lr_scheduler.get_last_lr()[0],
                "images_per_second": round(running_count * batch_size / (time.monotonic() - logged_at), 1),
                "seconds": round(time.monotonic() - started, 1),
            }
            _log(config, accelerator, unet, bar, entry)
            running_loss, running_count = torch.zeros((), device=device), 0
        # The checkpoint comes last: a run that is killed before takes these steps again, and writes all of this again.
        if (checkpoint_due or grid_due) and is_main:
            with _averaged_weights(unet, ema):
                _save_pipeline(config, accelerator, pipeline, epoch if grid_due else None)
        if checkpoint_due:
            seconds = time.monotonic() - started
            save_checkpoint(accelerator, output_dir, step, seconds, config.checkpoints_total_limit)
        if log_due:
            accelerator.wait_for_everyone()
            logged_at = time.monotonic()
    bar.close()
    if step == first_step:
        accelerator.print(f"{output_dir} is already trained ({total_steps} steps).")


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
        with (config.output_dir / "train_log.jsonl").open("a", encoding="utf-8") as log:
            log.write(json.dumps(entry) + "\n")
    tracked = {key: entry[key] for key in ("loss", "lr", "images_per_second", "epoch")}
    accelerator.log(tracked, step=entry["step"])


def _new_model(config: TrainConfig, dataset: ImageDataset) -> tuple[MiniUNet2DModel, MiniDDIMScheduler]:
    """Make the network and the scheduler that fit the configuration and the images.

    Images or a setting that do not fit the pipeline to start from are a `ValueError`.
    """
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
        source: Any = load_pipeline(config.pretrained_model_name_or_path)
        if source.unet.config.in_channels != channels or source.unet.config.out_channels != channels:
            raise ValueError(
                f"{config.pretrained_model_name_or_path} generates images of {source.unet.config.in_channels} "
                f"channels, but those of {config.dataset_name!r} have {channels}. Use other images, or omit "
                "pretrained_model_name_or_path to train from scratch."
            )
        source_config = {**source.scheduler.config, **source.unet.config}
        source_config["block_out_channels"] = tuple(source_config["block_out_channels"])
        for name in _SETTINGS_OF_PRETRAINED:
            value = getattr(config, name)
            if value not in (getattr(TrainConfig, name), source_config.get(name)):
                raise ValueError(
                    f"{name}={value!r} conflicts with {config.pretrained_model_name_or_path}, whose network shape and "
                    f"noise schedule are kept. Omit {name}, or omit pretrained_model_name_or_path to train from "
                    "scratch."
                )
        unet = MiniUNet2DModel.from_config(source.unet.config, **overrides)
        _copy_weights(source.unet, unet)
        return unet, MiniDDIMScheduler.from_config(source.scheduler.config)
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
    """Copy the weights of `source`, so that `target` computes the same, whichever classes the two know.

    If the classes differ in number, every label of `target` starts as the null label of `source`. If `target` has no
    classes, the embedding of that null label is added to the bias that follows it.
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


def _new_pipeline(
    config: TrainConfig,
    dataset: ImageDataset,
    levels: Levels,
    unet: MiniUNet2DModel,
    scheduler: MiniDDIMScheduler,
    teacher: Teacher | None,
) -> Any:
    """Make the pipeline that is saved."""
    defaults = dict(teacher.pipeline_defaults if teacher else {})
    # A level at the very end of the range needs no entry.
    defaults |= {name: level for name, level in zip(("black_level", "white_level"), levels, strict=True)
                 if level not in (None, 0, 255)}  # fmt: skip
    if config.class_conditional:
        defaults = {**defaults, "id2label": dataset.id2label}
    pipeline_class: Any = MiniDDPMClassConditionalPipeline if config.class_conditional else MiniDDPMPipeline
    pipeline = pipeline_class(unet, scheduler, **defaults)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


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


def _save_pipeline(config: TrainConfig, accelerator: Accelerator, pipeline: Any, epoch: int | None) -> None:
    """Write the pipeline and its card to `output_dir`, and a grid of samples if `epoch` is given.

    A file that cannot be written is an `OSError`.
    """
    save_pipeline(config.output_dir, pipeline)
    if epoch is not None:
        classes = list(pipeline.config.id2label)[:10] if config.class_conditional else []
        call: dict[str, Any] = {"class_labels": classes * 8} if classes else {"batch_size": 64}
        call["num_inference_steps"] = min(default_steps(pipeline), pipeline.scheduler.config.num_train_timesteps)
        generator = torch.Generator("cpu").manual_seed(config.seed)
        # Not compiled: a compiled network would be compiled again for this batch size.
        with accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            images = pipeline(**call, generator=generator).images
        with atomic_write(config.output_dir / "samples" / f"epoch-{epoch:04d}.png") as temporary:
            sample_grid(images, columns=len(classes) or 8).save(temporary)
    with explain_write_errors(config.output_dir):
        write_card(pipeline, config.output_dir)
