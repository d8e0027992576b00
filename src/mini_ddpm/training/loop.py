"""The training loop: the steps of one run, its log, its checkpoints and what is seen of them."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data import ImageDataset
from ..files import atomic_write
from ..hub.card import write_card
from ..options import default_steps
from ..plots import sample_grid
from .batches import image_batches, image_ids, noise_batch, validation_batches
from .callbacks import TrainCallback, TrainState
from .checkpoints import (
    explain_write_errors,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
    save_pipeline,
    truncate_log,
)
from .config import TrainConfig
from .loss import Levels, beyond_saturation
from .runtime import StopSignals, start_tracker, track_picture

if TYPE_CHECKING:
    from accelerate import Accelerator

# The averaged weights follow the network closely at first: the decay of step k is
# min(1 - (1 + k)^-power, ema_max_decay).
EMA_POWER = 0.75
NUM_BANDS = 10  # of noise levels, in the log

LossFunction = Callable[..., torch.Tensor]
"""`loss_fn(unet, scheduler, images, noise, timesteps, class_labels)`, which returns the loss of each image, (B,)."""


class Teacher(Protocol):
    """What turns a training run into distillation: it chooses the noise levels and the target at each of them."""

    timesteps: torch.Tensor
    """The noise levels to learn, (N,) int64."""
    run_settings: dict[str, Any]
    """Settings of the distillation for `train_config.json`. A resumed run must not change them."""
    pipeline_defaults: dict[str, Any]
    """`default_...` arguments of the pipeline that is saved."""
    trained_parts: list[Any]
    """Modules and optimizers that it trains itself. The loop prepares them, and its checkpoints hold them."""

    @property
    def loss(self) -> LossFunction:
        """The loss of the round."""

    def prepare(self, device: torch.device, compiled: bool) -> None:
        """Move to `device`, and compile the networks if `compiled`. Called once, before the first step."""

    def __call__(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the image to predict instead of `images`, and the noise that leads from it to the same x_t."""


@dataclass(frozen=True)
class Run:
    """What a run is made of."""

    config: TrainConfig
    dataset: ImageDataset
    train_ids: torch.Tensor
    """Indices of the images to train on, (N,) int64."""
    validation: tuple[ImageDataset, torch.Tensor]
    """A dataset, and the indices of its images that the validation loss is measured on; maybe none."""
    levels: Levels
    pipeline: Any
    loss_fn: LossFunction
    callbacks: Sequence[TrainCallback]
    teacher: Teacher | None
    step_size: int
    """Images per optimizer step, of all processes."""
    total_steps: int
    settings: dict[str, Any]
    """What `train_config.json` holds."""


class TrainingLoop:
    """The loop of a run in one process.

    The constructor restores the `checkpoint`, if there is one, with its `progress`; `run` takes the remaining steps.
    """

    def __init__(
        self,
        run: Run,
        accelerator: Accelerator,
        signals: StopSignals,
        checkpoint: Path | None,
        progress: dict[str, Any],
    ) -> None:
        from diffusers.training_utils import EMAModel

        config, device = run.config, accelerator.device
        self.setup, self.config, self.accelerator, self.signals = run, config, accelerator, signals
        self.output_dir, self.is_main, self.device = config.output_dir, accelerator.is_main_process, device
        self.pipeline, self.scheduler = run.pipeline, run.pipeline.scheduler
        self.unet = run.pipeline.unet.to(memory_format=torch.channels_last)
        self.optimizer: Any = torch.optim.AdamW(
            [parameter for parameter in self.unet.parameters() if parameter.requires_grad],
            lr=config.learning_rate,
            betas=(0.9, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            fused=device.type in ("cpu", "cuda"),
        )
        if config.torch_compile:
            # In place: the keys of the weights stay, so runs with and without it can share checkpoints.
            self.unet.compile()
        self.model, self.optimizer = accelerator.prepare(self.unet, self.optimizer)
        if run.teacher is not None and run.teacher.trained_parts:
            run.teacher.trained_parts = list(accelerator.prepare(*run.teacher.trained_parts))
        self.ema = EMAModel(
            self.unet.parameters(), decay=config.ema_max_decay, use_ema_warmup=True, power=EMA_POWER, foreach=True
        )
        self.ema.to(device)
        self.names = [name for name, _ in self.unet.named_parameters()]
        self.first_step, self.seconds = 0, 0.0
        if checkpoint is not None:
            averaged_weights = load_checkpoint(accelerator, checkpoint)
            self.first_step, self.seconds = progress["step"], progress["seconds"]
            for name, averaged in zip(self.names, self.ema.shadow_params, strict=True):
                averaged.copy_(averaged_weights[name])
            self.ema.optimization_step = self.first_step
            for callback, state in zip(run.callbacks, progress.get("callbacks", ()), strict=False):
                callback.load_state_dict(state)
        self.state = TrainState(
            config, run.pipeline, run.total_steps, self.first_step, checkpoint=checkpoint,
            is_main_process=self.is_main, _averaged_weights=self.averaged_weights,
        )  # fmt: skip
        self.noise_levels = torch.arange(self.scheduler.config.num_train_timesteps)
        if run.teacher is not None:
            self.noise_levels = run.teacher.timesteps
        self.noise_levels = self.noise_levels.to(device)

    def run(self) -> None:
        """Take the steps that remain."""
        from diffusers.optimization import get_scheduler

        run, config, accelerator, device = self.setup, self.config, self.accelerator, self.device
        total_steps = run.total_steps
        if self.first_step >= total_steps:  # only the pipeline is damaged, or gone
            if self.is_main:
                with self.averaged_weights():
                    self.save_pipeline(None)
            return
        if self.first_step:
            accelerator.print(f"Resuming from {self.state.checkpoint} (step {self.first_step} of {total_steps}).")
        for group in self.optimizer.param_groups:
            group["initial_lr"] = config.learning_rate
        lr_steps = {"num_warmup_steps": min(config.lr_warmup_steps, total_steps // 10)}
        lr_steps["num_training_steps"] = total_steps
        self.lr_scheduler = get_scheduler(
            config.lr_scheduler, self.optimizer, last_epoch=self.first_step - 1, **lr_steps
        )
        if self.is_main:
            truncate_log(self.output_dir, self.first_step)
        if config.log_with != "none":
            start_tracker(accelerator, self.output_dir.resolve().name, run.settings)
        left = total_steps - self.first_step
        accelerator.print(
            f"Training on {device}, {accelerator.num_processes} process{'es' * (accelerator.num_processes > 1)}, "
            f"precision {accelerator.mixed_precision}: {len(run.train_ids):,} images, "
            f"{left:,} step{'s' * (left != 1)} of {run.step_size}."
        )
        accumulation = config.gradient_accumulation_steps
        micro_steps = range(self.first_step * accumulation, total_steps * accumulation)
        ids = image_ids(accelerator, config.seed, len(run.train_ids), config.train_batch_size, micro_steps)
        ids = (run.train_ids[batch] for batch in ids)
        batches = image_batches(accelerator, run.dataset, ids, config.cache_dataset, config.dataloader_num_workers)
        self.started, self.logged_at = time.monotonic() - self.seconds, time.monotonic()
        self._reset_sums()
        self.model.train()
        with tqdm(
            total=total_steps, initial=self.first_step, desc="Training", unit="step", disable=not self.is_main
        ) as self.bar:
            for micro_step, (images, class_labels) in zip(micro_steps, batches, strict=True):
                self._forward_and_backward(micro_step, images, class_labels)
                if accelerator.sync_gradients and self._end_step():
                    break
        if self.state.step != total_steps:
            accelerator.print(
                f"Stopped after step {self.state.step} of {total_steps}. Give the same command again to go on."
            )

    def _forward_and_backward(self, micro_step: int, images: torch.Tensor, class_labels: torch.Tensor | None) -> None:
        """Add the gradient of one batch of this process, and take the optimizer's step after the last of a step."""
        run, config, accelerator = self.setup, self.config, self.accelerator
        null_label = len(run.dataset.id2label or ()) if config.class_conditional else None
        images = beyond_saturation(images, config.saturation_margin, run.levels)
        noise, timesteps, class_labels = noise_batch(
            accelerator, config.seed, micro_step, self.noise_levels, images, class_labels, null_label,
            config.class_dropout_prob,
        )  # fmt: skip
        with accelerator.accumulate(self.model):
            with accelerator.autocast():
                if run.teacher is not None:
                    images, noise = run.teacher(images, noise, timesteps, class_labels)
                losses = run.loss_fn(self.model, self.scheduler, images, noise, timesteps, class_labels)
                if not isinstance(losses, torch.Tensor) or losses.shape != timesteps.shape:
                    raise ValueError(
                        f"loss_fn must return the loss of each image, a tensor of shape {tuple(timesteps.shape)}, but "
                        f"returned {tuple(losses.shape) if isinstance(losses, torch.Tensor) else losses!r:.80}."
                    )
                loss = losses.mean()
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                norm = accelerator.clip_grad_norm_(self.model.parameters(), config.max_grad_norm)
                self.sums[2] += norm.detach()
            self.optimizer.step()
            self.optimizer.zero_grad()
        self.sums[1] += loss.detach()
        self.count += 1
        losses = losses.detach().float()
        band = (timesteps * NUM_BANDS).div(self.scheduler.config.num_train_timesteps, rounding_mode="floor")
        self.sums[3:].view(2, NUM_BANDS).index_add_(1, band, torch.stack([losses, torch.ones_like(losses)]))

    def _end_step(self) -> bool:
        """Finish an optimizer step: average, log, save, tell the callbacks. Return whether the run stops here."""
        run, config, accelerator, state = self.setup, self.config, self.accelerator, self.state
        self.lr_scheduler.step()
        self.ema.step(self.unet.parameters())
        state.step += 1
        step, num_images = state.step, len(run.train_ids)
        self.bar.update()
        epoch, previous_epoch = step * run.step_size // num_images, (step - 1) * run.step_size // num_images
        state.epoch = step * run.step_size / num_images
        for callback in run.callbacks:
            callback.on_step_end(state)

        # Several processes agree on a stop when they meet anyway, to log.
        stops = accelerator.num_processes == 1 and (self.signals.received is not None or state.stops)
        is_last = step == run.total_steps
        checkpoint_due = stops or is_last or step % config.checkpointing_steps == 0
        grid_due = config.save_images_epochs > 0 and (
            is_last or epoch // config.save_images_epochs > previous_epoch // config.save_images_epochs
        )
        log_due = checkpoint_due or grid_due or step % config.logging_steps == 0
        if log_due:
            self.sums[0] = float(self.signals.received is not None or state.stops)
            sums = accelerator.reduce(self.sums, "mean").cpu()
            stops = sums[0].item() > 0
            checkpoint_due = checkpoint_due or stops
            self._log(sums, checkpoint_due or grid_due)
            self._reset_sums()
            for callback in run.callbacks:
                callback.on_log(state)
        if epoch > previous_epoch:
            for callback in run.callbacks:
                callback.on_epoch_end(state)
        if accelerator.num_processes == 1 and state.stops:
            stops = checkpoint_due = True
        # The checkpoint comes last: a run that is killed before takes these steps again, and writes all of this again.
        hashes: dict[str, str | None] = {}
        if (checkpoint_due or grid_due) and self.is_main:
            with self.averaged_weights():
                hashes = self.save_pipeline(epoch if grid_due else None)
        if checkpoint_due:
            progress = {"step": step, "seconds": round(time.monotonic() - self.started, 1), "pipeline": hashes}
            if run.callbacks:
                progress["callbacks"] = [callback.state_dict() for callback in run.callbacks]
            averaged_weights = dict(zip(self.names, self.ema.shadow_params, strict=True))
            state.checkpoint = save_checkpoint(
                accelerator, self.output_dir, progress, averaged_weights, config.checkpoints_total_limit
            )
            for callback in run.callbacks:
                callback.on_checkpoint(state)
        if log_due:
            accelerator.wait_for_everyone()
            self.logged_at = time.monotonic()
        return stops

    def _reset_sums(self) -> None:
        """Start the sums since the last log line anew.

        They are 1 if this process is told to stop, the losses of batches, the norms of gradients, and for each band of
        noise levels the losses of images and their number.
        """
        self.sums = torch.zeros(3 + 2 * NUM_BANDS, dtype=torch.float32, device=self.device)
        self.count = 0

    def _log(self, sums: torch.Tensor, validates: bool) -> None:
        """Write an entry to `train_log.jsonl`, the progress bar and the tracker.

        A loss or a weight that is NaN or infinite is a `FloatingPointError`.
        """
        run, config, state = self.setup, self.config, self.state
        loss, norm = (sums[1] / self.count).item(), (sums[2] / self.count * config.gradient_accumulation_steps).item()
        # The loss belongs to the weights before this step; the weights after it are what is saved next.
        is_finite = torch.stack([parameter.isfinite().all() for parameter in self.unet.parameters()]).all()
        if not (np.isfinite(loss) and is_finite):
            self.bar.close()
            checkpoints = list_checkpoints(self.output_dir)
            raise FloatingPointError(
                f"Training diverged by step {state.step} (loss {loss}). Lower learning_rate (now "
                f"{config.learning_rate:g}) or set mixed_precision to no (now {self.accelerator.mixed_precision}). "
                f"Last good checkpoint: {checkpoints[-1] if checkpoints else 'none was written yet'}."
            )
        total, number = sums[3:].view(2, NUM_BANDS).tolist()
        batch_size = run.step_size // config.gradient_accumulation_steps
        state.log = {
            "step": state.step,
            "epoch": round(state.epoch, 4),
            "images": state.step * run.step_size,
            "loss": loss,
            "loss_by_noise_level": [t / n if n else None for t, n in zip(total, number, strict=True)],
            "lr": self.lr_scheduler.get_last_lr()[0],
            "grad_norm": norm,
            "ema_decay": self.ema.cur_decay_value,
            "images_per_second": round(self.count * batch_size / (time.monotonic() - self.logged_at), 1),
            "seconds": round(time.monotonic() - self.started, 1),
        }
        if validates and len(run.validation[1]) and self.is_main:
            state.log["validation_loss"] = self._validation_loss()
        self.bar.set_postfix(loss=f"{loss:.4f}", images_per_s=f"{state.log['images_per_second']:.0f}")
        if self.is_main:
            with (
                explain_write_errors(self.output_dir),
                (self.output_dir / "train_log.jsonl").open("a", encoding="utf-8") as log,
            ):
                log.write(json.dumps(state.log) + "\n")
        scalars = ("loss", "validation_loss", "lr", "grad_norm", "ema_decay", "images_per_second", "epoch")
        tracked = {key: state.log[key] for key in scalars if key in state.log}
        last = self.scheduler.config.num_train_timesteps
        for band, value in enumerate(state.log["loss_by_noise_level"]):
            if value is not None:
                tracked[f"loss_by_noise_level/{band * last // NUM_BANDS:04d}"] = value
        self.accelerator.log(tracked, step=state.step)

    @torch.no_grad()
    def _validation_loss(self) -> float:
        """Return the mean loss of the averaged weights on the validation images, always with the same noise."""
        run, config, (dataset, ids) = self.setup, self.config, self.setup.validation
        total = 0.0
        with self.averaged_weights(), self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            for batch in validation_batches(dataset, ids, config.seed, config.train_batch_size, self.noise_levels):
                images, noise, timesteps, labels = (None if x is None else x.to(self.device) for x in batch)
                assert images is not None and noise is not None and timesteps is not None
                images = beyond_saturation(images, config.saturation_margin, run.levels)
                labels = labels if config.class_conditional else None
                if run.teacher is not None:
                    images, noise = run.teacher(images, noise, timesteps, labels)
                total += run.loss_fn(self.unet, self.scheduler, images, noise, timesteps, labels).sum().item()
        return total / len(ids)

    @contextlib.contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Put the averaged weights into the network, in evaluation mode, until the block ends."""
        self.ema.store(self.unet.parameters())
        self.ema.copy_to(self.unet.parameters())
        self.unet.eval()
        try:
            yield
        finally:
            self.unet.train()
            self.ema.restore(self.unet.parameters())

    def save_pipeline(self, epoch: int | None) -> dict[str, str | None]:
        """Write the pipeline and its card to `output_dir`, and a grid of samples if `epoch` is given.

        Return the hashes of the pipeline's files. A file that cannot be written is an `OSError`.
        """
        hashes = save_pipeline(self.output_dir, self.pipeline)
        if epoch is not None:
            grid = self._draw_grid()
            with atomic_write(self.output_dir / "samples" / f"epoch-{epoch:04d}.png") as temporary:
                grid.save(temporary)
            track_picture(self.accelerator, "samples", grid, self.state.step)
        with explain_write_errors(self.output_dir):
            write_card(self.pipeline, self.output_dir)
        return hashes

    def _draw_grid(self) -> Image.Image:
        """Draw samples: a column for each of the first ten classes, or 64 without classes."""
        config = self.config
        classes = list(self.pipeline.config.id2label)[:10] if config.class_conditional else []
        call: dict[str, Any] = {"class_labels": classes * 8} if classes else {"batch_size": 64}
        call["num_inference_steps"] = default_steps(self.pipeline)
        # Not compiled: a compiled network would be compiled again for this batch size.
        with self.accelerator.autocast(), torch.compiler.set_stance("force_eager"):
            images = self.pipeline(**call, generator=torch.Generator("cpu").manual_seed(config.seed)).images
        return sample_grid(images, columns=len(classes) or 8)
