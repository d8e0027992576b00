"""Progressive distillation: the picture in half as many steps, and half of those again, down to one.

    z_t   = α_t x + σ_t ε                                          an image of the data, noised
    z_t'' = the teacher's two DDIM steps from z_t, over t' to t''
    x̃     = (z_t'' - (σ_t''/σ_t) z_t) / (α_t'' - (σ_t''/σ_t) α_t)    the x_0 that leads there in one step
    L     = E [ max(α_t²/σ_t², 1) ||x̃ - x̂(z_t)||² ]                 the student's loss

(Salimans & Ho, arXiv 2202.00512: algorithm 2, eq. 9, appendix G.) Here α_t² = ᾱ_t and σ_t² = 1 - ᾱ_t. The student
starts as a copy of its teacher; at the end of a round it is the teacher of the next, of half as many steps. x̃ is a
function of z_t, where the x of the data is not, so that one step can hit it: no blur of all images that z_t may have
come from. Not in the papers: where the last step ends, what is nearly black or white in x̃ is moved beyond, see
[`saturate`].

Guidance is distilled in (Meng et al., arXiv 2210.03142): the first teacher is a guided one, and no student needs a
second evaluation. One scale, fixed: to embed it would take another input, and with it another network than the
teacher's, that no pipeline of today would know how to call.

The loop, its checkpoints and its logs are [`train`]'s; a round is a training run with a teacher.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ..data import image_dataset
from ..hub.load import load_pipeline
from ..options import find_device, resolve_guidance
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from .loss import compute_loss, saturate, saturated_ends
from .train import TrainConfig, train

FIRST_STEPS = 32  # of a teacher that was not distilled itself


@dataclass(frozen=True)
class DistillConfig:
    """Distil a pipeline into one that draws in fewer steps, halving them round by round.

    Each round's student is a pipeline in OUTPUT_DIR/steps-N, which takes its N steps without being told. Interrupted
    at any moment, the same command goes on from the last checkpoint.
    """

    teacher: tyro.conf.Positional[str]
    """The pipeline to distil: a name that ships with the package, a folder, or a repository on the Hub."""
    output_dir: Path = Path("runs/distilled")
    """Where the rounds are written, in steps-16, steps-8, ..."""
    num_inference_steps: Annotated[int, tyro.conf.arg(aliases=["--to"])] = 4
    """Steps of the last student."""
    rounds: int | None = None
    """How often the steps are halved. None: from 32 steps of the teacher, or from those that it was distilled to."""
    images_per_round: int = 60_000
    """Images seen in a round; in those to two steps and to one, which are harder, twice as many."""
    guidance_scale: float | None = None
    """Classifier-free guidance to distil in; 1 for none. None: what the teacher takes by itself."""
    guidance_interval: tuple[float, float] | None = None
    """Distil guidance in only between these shares of the way from noise, 0, to image, 1. None: all the way."""
    saturate: bool = True
    """Where images have areas of black or white, learn as quite so what the teacher draws nearly so. Else: mottled."""

    dataset_name: str = "ylecun/mnist"
    """The images that the teacher was trained on: Hub id or folder."""
    split: str = "train"
    """Split of the dataset."""
    image_column: str | None = None
    """Column of the pictures. None: the first that holds images."""
    label_column: str | None = None
    """Column of the class indices. None: the first that holds class labels."""
    resolution: int | None = None
    """Crop to a square and resize to this many pixels, as in the teacher's training."""

    train_batch_size: int = 64
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 4e-4
    """Learning rate of AdamW at the start of a round; it falls to zero linearly."""
    lr_warmup_steps: int = 20
    """Steps over which the learning rate rises from zero."""
    class_dropout_prob: float = 0.1
    """Share of labels replaced by the null label, so that the student can still draw no class in particular."""
    ema_max_decay: float = 0.999
    """Decay of the moving average of the weights; the average is what is saved, and teaches the next round."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Arithmetic of both networks. Auto: bf16 on GPUs that have it, else no. CPUs with AVX512-BF16 gain from bf16."""
    torch_compile: bool = False
    """Compile both networks: two minutes more at the start of each round, a third less afterwards."""
    seed: int = 0
    """Seed of everything random."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    log_with: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Experiment tracker, beside train_log.jsonl, which is always written."""
    num_evaluation_images: int = 0
    """Measure each student on so many images, as `mini-ddpm evaluate` does (it needs mini-ddpm[eval]). 0: do not."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        for name, least in (
            ("num_inference_steps", 1),
            ("rounds", 1),
            ("images_per_round", 1),
            ("num_evaluation_images", 0),
        ):
            value = getattr(self, name)
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")
        self._round(self.teacher, 1, 0.0, False)  # which checks the rest

    def _round(self, teacher: str, steps: int, saturation_margin: float, class_conditional: bool) -> TrainConfig:
        """The training of the student of so many steps."""
        names = {field.name for field in dataclasses.fields(TrainConfig)}
        shared = {name: value for name, value in vars(self).items() if name in names}
        images = self.images_per_round * (2 if steps <= 2 else 1)
        processes = int(os.environ.get("WORLD_SIZE", "1"))
        step_size = max(1, self.train_batch_size * self.gradient_accumulation_steps * processes)
        shared["output_dir"] = self.output_dir / f"steps-{steps}"
        return TrainConfig(
            **shared,
            pretrained_model_name_or_path=teacher,
            class_conditional=class_conditional,
            saturation_margin=saturation_margin,
            max_train_steps=-(-images // step_size),
            lr_scheduler="linear",
        )


class DDIMTeacher:
    """Two DDIM steps of a pipeline as the target of a student's one (2202.00512, algorithm 2).

    Args:
        pipe: The teacher; it is put into evaluation mode, and its weights are frozen.
        num_inference_steps: N, the student's steps; the teacher takes 2N.
        guidance_scale: s > 1 guides the teacher's class-conditional predictions.
        guidance_interval: At which of its steps: i of 2N with start <= i/2N < end.
        saturation: How far beyond black and white what is nearly so is moved, and whether each is; see `saturate`.

    Raises:
        ValueError: The teacher predicts noise, the student's timesteps are not among the teacher's, or none of its
            steps is in the interval.
    """

    # With `max(SNR, 1)` the loss is that of x_0, and does not vanish where z_t is all noise (eq. 9).
    snr_floor = 1.0

    def __init__(
        self,
        pipe: Any,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        saturation: tuple[float, bool, bool] = (0.0, False, False),
    ) -> None:
        scheduler = MiniDDIMScheduler.from_config(pipe.scheduler.config)
        if scheduler.config.prediction_type == "epsilon":
            raise ValueError(
                "The teacher predicts the noise, from which no x_0 follows where all is noise, as it is where a"
                " student of few steps begins. Distil one trained with --prediction-type v_prediction or sample."
            )
        student = MiniDDIMScheduler.from_config(scheduler.config)
        scheduler.set_timesteps(2 * num_inference_steps)
        student.set_timesteps(num_inference_steps)
        every_t = torch.arange(student.config.num_train_timesteps)
        between, end = scheduler.previous_timestep(every_t), student.previous_timestep(every_t)
        here = student.timesteps
        if not torch.equal(scheduler.previous_timestep(between[here]), end[here]):
            raise ValueError(
                f"Of the {num_inference_steps} timesteps not all are among the {2 * num_inference_steps} with"
                f" timestep_spacing={scheduler.config.timestep_spacing!r}. Distil with 'trailing', where they are."
            )
        self.unet, self.scheduler = pipe.unet.eval().requires_grad_(False), scheduler
        self.guidance_scale = guidance_scale
        self.timesteps = here
        self.described: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
        }
        self.defaults: dict[str, Any] = {"default_num_inference_steps": num_inference_steps}
        if self.unet.config.num_class_embeds is not None:
            self.defaults["default_guidance_scale"] = 1.0

        alphas_cumprod = student.alphas_cumprod.double()
        at_end = torch.where(end < 0, student.final_alpha_cumprod.double(), alphas_cumprod[end.clamp(min=0)])
        self._between, self._saturation = between, saturation
        position = torch.arange(2 * num_inference_steps).double() / (2 * num_inference_steps)
        self._guided = torch.zeros(len(every_t), dtype=torch.bool)  # by t
        self._guided[scheduler.timesteps] = (position >= guidance_interval[0]) & (position < guidance_interval[1])
        if not self._guided.any():
            raise ValueError(
                f"guidance_interval={guidance_interval}: none of {2 * num_inference_steps} steps i has start <= "
                f"i/{2 * num_inference_steps} < end. Give two shares of the way, such as 0.35 0.6."
            )
        # α_t, σ_t, α_t'', σ_t'' by t
        self._levels = torch.stack([x.sqrt() for x in (alphas_cumprod, 1 - alphas_cumprod, at_end, 1 - at_end)])

    def prepare(self, device: torch.device, compiled: bool) -> None:
        """Move to `device`, and compile the network if asked to."""
        self.unet = self.unet.to(device=device, memory_format=torch.channels_last)
        self._between, self._levels = self._between.to(device), self._levels.float().to(device)
        self._guided = self._guided.to(device)
        if compiled:
            self.unet.compile()

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x̃ and the noise ε̃ with `z_t = α_t x̃ + σ_t ε̃`, both (B, C, H, W) in float32.

        Args:
            images: x, (B, C, H, W).
            noise: ε, (B, C, H, W).
            timesteps: t, (B,), out of `timesteps`.
            class_labels: y, (B,), or `None`.
        """
        alpha, sigma, alpha_end, sigma_end = self._levels[:, timesteps, None, None, None]  # (B, 1, 1, 1) each
        sample = self.scheduler.add_noise(images, noise, timesteps)
        middle = self._step(sample, timesteps, class_labels)
        end = self._step(middle, self._between[timesteps], class_labels)
        ratio = sigma_end / sigma
        target = (end - ratio * sample) / (alpha_end - ratio * alpha)
        last = (timesteps == self.timesteps[-1])[:, None, None, None]  # the student's step that ends at the image
        target = torch.where(last, saturate(target, *self._saturation), target)
        return target, (sample - alpha * target) / sigma

    def _step(self, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """One DDIM step of the teacher as its pipeline takes it: guided, x̂_0 clipped, the noise what that leaves."""
        if class_labels is not None and self.guidance_scale > 1:
            null_labels = torch.full_like(class_labels, self.unet.config.num_class_embeds - 1)
            labels = torch.cat([class_labels, null_labels])
            output = self.unet(torch.cat([sample, sample]), torch.cat([timesteps, timesteps]), labels).sample
            cond, uncond = output.float().chunk(2)
            guided = self._guided[timesteps][:, None, None, None]
            output = torch.where(guided, uncond + self.guidance_scale * (cond - uncond), cond)
        else:
            output = self.unet(sample, timesteps, class_labels).sample.float()
        stepped = self.scheduler.step(output, timesteps, sample.float(), use_clipped_model_output=True)
        prev_sample: torch.Tensor = stepped.prev_sample
        return prev_sample


def distill(config: DistillConfig) -> list[Path]:
    """Distil a pipeline round by round, or go on with it.

    Under `accelerate launch` every process calls this.

    Args:
        config: Which pipeline, to how many steps, and how.

    Returns:
        The pipeline folder of each round, `output_dir/steps-N`, N falling.

    Raises:
        ValueError: The teacher cannot be distilled, or not to so many steps; a folder holds another run.
        FloatingPointError: The loss became NaN or infinite.
        OSError: Something cannot be read or written.
    """
    config = dataclasses.replace(config, output_dir=Path(config.output_dir).expanduser())
    pipe: Any = load_pipeline(config.teacher)
    conditional = pipe.unet.config.num_class_embeds is not None
    guidance: dict[str, Any] = {"guidance_scale": 1.0, "guidance_interval": (0.0, 1.0)}
    guidance |= resolve_guidance(pipe, config.teacher, config.guidance_scale, config.guidance_interval)
    counts = _step_counts(config, pipe)
    dataset = image_dataset(
        config.dataset_name, config.split, config.image_column, config.label_column, config.resolution
    )
    theirs, classes = dataset.id2label or {}, pipe.config.get("id2label")
    known = pipe.unet.config.num_class_embeds - 1 if conditional else 0  # the last label is the null label
    if conditional and (len(theirs) != known or (classes or theirs) != theirs):
        raise ValueError(
            f"The classes of {config.dataset_name!r} ({', '.join(theirs.values()) or 'none'}) are not those that "
            f"{config.teacher} knows ({', '.join((classes or {}).values()) or known}). Distil on its own images."
        )
    # The margin that the teacher learned saturated pixels with, see `beyond_saturation`.
    margin = round(pipe.scheduler.config.clip_sample_range - 1, 6) if pipe.scheduler.config.clip_sample else 0.0
    margin = min(max(margin, 0.0), 1.0)
    trainings = [config._round(config.teacher, steps, margin, conditional) for steps in counts]
    # MNIST's white is 251 to 255, of 7 % of its pixels.
    first = {**guidance, "saturation": (margin * config.saturate, *saturated_ends(dataset, 5, 0.05))}

    is_main = os.environ.get("RANK", "0") == "0"
    if is_main:
        teaching = DDIMTeacher(load_pipeline(config.teacher), counts[0], **guidance)
        seconds = _estimate(config, pipe.unet, teaching, trainings)
        print(
            f"{config.teacher}: {2 * counts[0]} steps to {', '.join(map(str, counts))}; about "
            f"{seconds / 60:.0f} minutes{' before compilation speeds it up' if config.torch_compile else ''}.",
            file=sys.stderr,
        )
    teacher = config.teacher
    for steps, training in zip(counts, trainings, strict=True):
        training = dataclasses.replace(training, pretrained_model_name_or_path=teacher)
        # The students have the guidance in them, and the ends.
        two_steps = DDIMTeacher(load_pipeline(teacher), steps, **(first if teacher == config.teacher else {}))
        two_steps.described |= {**guidance, "saturate": config.saturate, "distilled_from": config.teacher}
        folder = train(training, two_steps)
        if is_main and config.num_evaluation_images:
            _measure(config, folder)
        teacher = str(folder)
    return [training.output_dir for training in trainings]


def _step_counts(config: DistillConfig, pipe: Any) -> list[int]:
    """The steps of each round's student.

    Raises:
        ValueError: Halving the teacher's steps does not lead there.
    """
    last, total = config.num_inference_steps, pipe.scheduler.config.num_train_timesteps
    own = pipe.config.get("default_num_inference_steps")  # of a distilled teacher, which takes no other number
    rounds = config.rounds or max(1, ((own or min(FIRST_STEPS, total)) // last).bit_length() - 1)
    if own is not None and last * 2**rounds != own:
        allowed = [own >> i for i in range(1, own.bit_length()) if own % 2**i == 0]
        raise ValueError(
            f"{config.teacher} takes {own} steps; {rounds} halvings of {last * 2**rounds} lead to {last}. "
            + (f"Choose --to of {', '.join(map(str, allowed))}." if allowed else "It cannot be halved.")
        )
    if last * 2**rounds > total:
        raise ValueError(f"{rounds} rounds to {last} steps start at {last * 2**rounds}, more than its {total} levels.")
    return [last * 2**i for i in reversed(range(rounds))]


def _estimate(config: DistillConfig, student: Any, teacher: DDIMTeacher, trainings: list[TrainConfig]) -> float:
    """About how many seconds are left of the rounds, from small batches of the first two, without compilation."""
    device = find_device(config.device)
    on_gpu = device.type == "cuda" and torch.cuda.is_bf16_supported()
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(config.mixed_precision, torch.bfloat16)
    cast = on_gpu if config.mixed_precision == "auto" else config.mixed_precision != "no"
    student = student.to(device, memory_format=torch.channels_last).train()
    teacher.prepare(device, compiled=False)
    size = student.config.sample_size
    shape = (16, student.config.in_channels, *((size, size) if isinstance(size, int) else size))
    labels = None if student.config.num_class_embeds is None else torch.zeros(16, dtype=torch.long, device=device)
    timesteps = teacher.timesteps.to(device).repeat(16)[:16]
    total = 0.0
    for index, training in enumerate(trainings):
        if index < 2:  # all rounds after the first are alike: their teachers need no guidance
            if index == 1:
                teacher.guidance_scale = 1.0
            for _ in range(2):  # the first warms up
                started = time.perf_counter()
                images, noise = torch.randn(2, *shape, device=device)
                with torch.autocast(device.type, dtype, enabled=cast):
                    images, noise = teacher(images.clamp(-1, 1), noise, timesteps, labels)
                    loss = compute_loss(student, teacher.scheduler, images, noise, timesteps, labels)
                loss.backward()  # type: ignore[no-untyped-call]
                float(loss.detach())  # waits for the device
                seconds = time.perf_counter() - started
        checkpoints = [int(path.name.split("-")[1]) for path in training.output_dir.glob("checkpoint-*")]
        total += seconds / 16 * ((training.max_train_steps or 0) - max(checkpoints, default=0))
    return total * config.train_batch_size * config.gradient_accumulation_steps


def _measure(config: DistillConfig, folder: Path) -> None:
    """Evaluate a round's student; its figures go into its folder and its card."""
    from ..evaluation.evaluate import EvaluateConfig, evaluate, markdown_table

    rows = evaluate(
        EvaluateConfig(
            str(folder),
            config.dataset_name,
            num_images=config.num_evaluation_images,
            resolution=config.resolution,
            device=config.device,
        )
    )
    print(markdown_table(rows))
