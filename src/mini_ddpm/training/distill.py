"""Progressive distillation: sample in fewer and fewer steps, round after round, down to one.

    z_t   = α_t x + σ_t ε                                          a noised image of the dataset
    z_t'' = several DDIM steps of the teacher from z_t, down to t''
    x̃     = (z_t'' - (σ_t''/σ_t) z_t) / (α_t'' - (σ_t''/σ_t) α_t)    the x_0 with which one step leads to z_t''
    L     = E [ max(α_t²/σ_t², 1) ||x̃ - x̂(z_t)||² ]                 the student's loss

(arXiv 2202.00512, algorithm 2, eq. 9, appendix G.) Here α_t² = ᾱ_t and σ_t² = 1 - ᾱ_t. The first student starts as a
copy of the teacher, the next one as a copy of the student before, with half as many steps. x̃ is determined by z_t,
while the image x is not: many images lead to the same z_t, and a one-step student trained on x would predict their
blurred mean.

Beyond the paper: every student learns from the first teacher, over as many of its steps as lie within one of the
student's, so that the errors of the rounds do not add up. And in the student's last step, nearly black and nearly
white pixels of x̃ are moved beyond the range, see [`saturate`].

Guidance is distilled too (arXiv 2210.03142): the teacher is guided, so that students need no second evaluation.
The scale is fixed. Conditioning on it would need a new network input, which existing pipelines could not supply.

A round is a training run with a teacher: the loop, the checkpoints and the log are those of [`train`].
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro

from ..data import ImageDataset, as_image_dataset, image_dataset
from ..hub.load import load_pipeline
from ..options import check_fields, distilled_steps, find_device, process_rank, resolve_guidance, resolve_precision
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from .adversarial import AdversarialTeacher
from .callbacks import TrainCallback
from .checkpoints import checkpoint_step, list_checkpoints
from .config import RANGES, RunConfig, TrainConfig
from .loop import Teacher
from .loss import compute_loss, saturate, saturated_levels, trained_margin
from .train import GivenParts, start_run

DEFAULT_TEACHER_STEPS = 20
"""The steps of a teacher by default, if it was not distilled itself."""
FIRST_STUDENT_STEPS = 16
"""The steps of the first student at most by default, if the teacher was not distilled itself."""


@dataclass(frozen=True)
class DistillConfig(RunConfig):
    """Distil a pipeline into one that samples in fewer steps, by halving them round after round.

    Each round writes a complete pipeline to OUTPUT_DIR/steps-N, which samples in N steps by default. To resume an
    interrupted distillation, give the same command again.
    """

    teacher: tyro.conf.Positional[str]
    """The pipeline to distil: a bundled name, a folder, or a repository on the Hub."""
    output_dir: Path = Path("runs/distilled")
    """Folder for the rounds, in steps-16, steps-8, ..."""
    num_inference_steps: Annotated[int, tyro.conf.arg(aliases=["--steps", "--to"])] = 4
    """Steps of the last student."""
    rounds: int | None = None
    """Number of students, each of half as many steps as the one before. Default: the first takes at most 16, or half
    of the teacher's own if that is distilled; one round if --student is given."""
    student: str | None = None
    """Pipeline whose weights the first student starts with. Default: the teacher. Give a student to improve it."""
    teacher_steps: int | None = None
    """Steps from noise to image of the teacher, which every student copies. Default: its own if it is distilled, else
    20, but at least twice the student's."""
    images_per_round: int = 60_000
    """Images seen per round; the rounds to two steps and to one are harder and see twice as many."""
    guidance_scale: float | None = None
    """Classifier-free guidance to distil; 1: none. Default: the teacher's default scale."""
    guidance_interval: tuple[float, float] | None = None
    """Distil guidance only between these shares of the steps (0: noise, 1: image). Default: the pipeline's
    own if --guidance-scale is not given, else every step."""
    adversarial_weight: float = 0.0
    """Weight of the loss of a critic that tells the last student's images from those of the dataset. 0: none."""
    saturate: bool = True
    """Push near-black and near-white targets past the range, so flat areas stay flat. Off: they come out mottled."""

    _: KW_ONLY
    num_evaluation_images: int = 0
    """Evaluate each student on this many images, as `mini-ddpm evaluate` does (needs mini-ddpm[eval]). 0: skip."""

    dataset_name: str = "ylecun/mnist"
    """The images that the teacher was trained on: Hub id or folder."""
    resolution: int | None = None
    """Crop and resize pictures to this many pixels, as in the teacher's training. Default: keep their size."""
    train_batch_size: int = 64
    learning_rate: float = 4e-4
    """Peak learning rate of AdamW in each round; it falls linearly to zero."""
    lr_warmup_steps: int = 20
    class_dropout_prob: float = 0.1
    """Share of labels replaced by the null label, so that the student can still sample without a class."""
    ema_max_decay: float = 0.999
    """Largest decay of the moving average of the weights, which is saved, and with which the next round starts."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of both networks. Auto: bf16 on GPUs that support it, else no. bf16 also suits AVX512-BF16 CPUs."""
    torch_compile: bool = False
    """Compile both networks: about two minutes to start each round, then a third less time per step."""

    def __post_init__(self) -> None:
        """Raise a `ValueError` for a value that cannot work: it names the field, the value and what is allowed."""
        counts = ("num_inference_steps", "rounds", "images_per_round", "teacher_steps")
        own: dict[str, Any] = dict.fromkeys(counts, (1, None)) | {"adversarial_weight": (0, None)}
        check_fields(self, {**RANGES, **own, "num_evaluation_images": (0, None), "guidance_scale": (0, None)})

    def train_config(
        self, teacher: str, num_inference_steps: int, saturation_margin: float, class_conditional: bool
    ) -> TrainConfig:
        """Return the configuration of the round in which a pipeline teaches a student of `num_inference_steps`.

        The other two are facts of the teacher: the margin that it was trained with, and whether it knows classes.
        """
        shared = {field.name: getattr(self, field.name) for field in dataclasses.fields(RunConfig)}
        images = self.images_per_round * (2 if num_inference_steps <= 2 else 1)
        _, world_size = process_rank()
        step_size = max(1, self.train_batch_size * self.gradient_accumulation_steps * world_size)
        return TrainConfig(
            **shared,
            output_dir=Path(self.output_dir) / f"steps-{num_inference_steps}",
            pretrained_model_name_or_path=teacher,
            class_conditional=class_conditional,
            saturation_margin=saturation_margin,
            max_train_steps=-(-images // step_size),
            lr_scheduler="linear",
        )


class DDIMTeacher:
    """The teacher of one round: several of its DDIM steps are the target of one step of the student.

    This is algorithm 2 of arXiv 2202.00512 with any number of steps in place of two. A scale s > 1 guides the
    class-conditional predictions at the timesteps t with start <= 1 - (t + 1)/T < end: the share of the way from noise
    that is done. `saturation` holds `margin`, `black` and `white` of [`saturate`]. The network of `pipe` is put into
    evaluation mode and frozen.

    Args:
        pipe: The pipeline that teaches.
        num_inference_steps: N, the steps of the student.
        guidance_scale: s.
        guidance_interval: Start and end of the interval, 0 to 1.
        saturation: See above.
        teacher_timesteps: The timesteps of the teacher, among them those of the student. `None`: those of 2N steps.

    A teacher that predicts noise, timesteps of the student that are not among the teacher's, and an interval without
    steps are a `ValueError`.
    """

    # With `max(SNR, 1)` the loss is that of x_0, and does not vanish where z_t is all noise (eq. 9).
    snr_floor = 1.0
    loss = staticmethod(functools.partial(compute_loss, snr_floor=snr_floor, reduction="none"))

    def __init__(
        self,
        pipe: Any,
        num_inference_steps: int,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        saturation: tuple[float, bool, bool] = (0.0, False, False),
        teacher_timesteps: Sequence[int] | None = None,
    ) -> None:
        scheduler = MiniDDIMScheduler.from_config(pipe.scheduler.config)
        if scheduler.config.prediction_type == "epsilon":
            raise ValueError(
                "prediction_type='epsilon' cannot be distilled: at the first step, where z_t is all noise, a predicted"
                " noise determines no x_0. Use a teacher trained with prediction_type 'v_prediction' or 'sample'."
            )
        self.student_scheduler = MiniDDIMScheduler.from_config(scheduler.config)
        self.student_scheduler.set_timesteps(num_inference_steps)
        self.timesteps = self.student_scheduler.timesteps
        total = self.student_scheduler.config.num_train_timesteps
        scheduler.set_timesteps(None if teacher_timesteps else 2 * num_inference_steps, timesteps=teacher_timesteps)
        if not torch.isin(self.timesteps, scheduler.timesteps).all():
            raise ValueError(
                f"timestep_spacing={scheduler.config.timestep_spacing!r}: the {num_inference_steps} timesteps of the "
                f"student are not all among the {len(scheduler.timesteps)} of the teacher. Use a teacher with "
                "timestep_spacing='trailing', where they are."
            )
        # By t: the timestep to which the teacher's step leads, and the one to which the student's step leads.
        every_t = torch.arange(total)
        self._previous, self.end = (
            scheduler.previous_timestep(every_t),
            self.student_scheduler.previous_timestep(every_t),
        )
        shares = (total - 1 - scheduler.timesteps).double() / total
        self._is_guided = torch.zeros(total, dtype=torch.bool)  # by t
        self._is_guided[scheduler.timesteps] = (shares >= guidance_interval[0]) & (shares < guidance_interval[1])
        if guidance_scale > 1 and not self._is_guided.any():
            raise ValueError(
                f"guidance_interval={guidance_interval}: none of the teacher's {len(scheduler.timesteps)} steps is in "
                "it. Use a wider interval, such as 0.35 0.6."
            )
        self.unet, self.scheduler = pipe.unet.eval().requires_grad_(False), scheduler
        self.guidance_scale = guidance_scale
        self.run_settings: dict[str, Any] = {
            "num_inference_steps": num_inference_steps,
            "teacher_steps": len(scheduler.timesteps),
            "guidance_scale": guidance_scale,
            "guidance_interval": guidance_interval,
        }
        self.trained_parts: list[Any] = []
        self.pipeline_defaults: dict[str, Any] = {"default_num_inference_steps": num_inference_steps}
        if self.unet.config.num_class_embeds is not None:
            self.pipeline_defaults["default_guidance_scale"] = 1.0

        self._saturation = saturation
        alphas_cumprod = self.student_scheduler.alphas_cumprod.double()
        final_alpha_cumprod = self.student_scheduler.final_alpha_cumprod.double()
        at_end = torch.where(self.end < 0, final_alpha_cumprod, alphas_cumprod[self.end.clamp(min=0)])
        # α_t, σ_t, α_t'', σ_t'' by t
        self._coefficients = torch.stack([x.sqrt() for x in (alphas_cumprod, 1 - alphas_cumprod, at_end, 1 - at_end)])

    def prepare(self, device: torch.device, compiled: bool) -> None:
        """Move to `device`, and compile the network if `compiled`."""
        self.unet = self.unet.to(device=device, memory_format=torch.channels_last)
        self._previous, self.end = self._previous.to(device), self.end.to(device)
        self._is_guided, self._coefficients = self._is_guided.to(device), self._coefficients.float().to(device)
        if compiled:
            self.unet.compile()

    @torch.no_grad()
    def __call__(
        self, images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x̃ and the noise ε̃ with `z_t = α_t x̃ + σ_t ε̃`, both (B, C, H, W) in float32.

        `images` are x, `noise` is ε, both (B, C, H, W); `timesteps` are t, (B,), out of `self.timesteps`.
        """
        alpha, sigma, alpha_end, sigma_end = self._coefficients[:, timesteps, None, None, None]  # (B, 1, 1, 1) each
        sample = self.scheduler.add_noise(images, noise, timesteps)
        end, t = sample.float(), timesteps
        # The steps of the student differ in how many of the teacher's they take: go on with the rows that have not
        # arrived.
        while len(rows := (t > self.end[timesteps]).nonzero().squeeze(1)):
            labels = None if class_labels is None else class_labels[rows]
            end = end.index_copy(0, rows, self._step(end[rows], t[rows], labels))
            t = t.index_copy(0, rows, self._previous[t[rows]])
        ratio = sigma_end / sigma
        target = (end - ratio * sample) / (alpha_end - ratio * alpha)
        is_last = (timesteps == self.timesteps[-1])[:, None, None, None]  # the student's step that ends at the image
        target = torch.where(is_last, saturate(target, *self._saturation), target)
        return target, (sample - alpha * target) / sigma

    def _step(self, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor | None) -> torch.Tensor:
        """Take one DDIM step of the teacher as its pipeline does: guided, x̂_0 clipped, ε recomputed from x̂_0."""
        output = self.unet(sample, timesteps, class_labels).sample.float()
        if class_labels is not None and self.guidance_scale > 1:
            rows = self._is_guided[timesteps].nonzero().squeeze(1)
            if len(rows):
                null_labels = torch.full_like(class_labels[rows], self.unet.config.num_class_embeds - 1)
                uncond = self.unet(sample[rows], timesteps[rows], null_labels).sample.float()
                guided = uncond + self.guidance_scale * (output[rows] - uncond)
                output = output.index_copy(0, rows, guided)
        stepped = self.scheduler.step(output, timesteps, sample, use_clipped_model_output=True)
        prev_sample: torch.Tensor = stepped.prev_sample
        return prev_sample


def refined_timesteps(timesteps: torch.Tensor, factor: int) -> list[int]:
    """Return timesteps that hold the given ones and divide each step between them evenly into `factor` steps.

    The last step leads to -1. `timesteps` are strictly descending, (N,) int64. A step that has fewer than `factor`
    timesteps is divided into as many as it has.
    """
    refined: list[int] = []
    for start, end in itertools.pairwise([*timesteps.tolist(), -1]):
        count = min(factor, start - end)
        refined += [start - round(i * (start - end) / count) for i in range(count)]
    return refined


def distill(config: DistillConfig, *, dataset: Any = None, callbacks: Sequence[TrainCallback] = ()) -> list[Path]:
    """Distil a pipeline round by round, or resume its distillation.

    Under `accelerate launch` every process calls this.

    Args:
        config: The pipeline, the number of steps, and the settings of the rounds.
        dataset: The images, as [`as_image_dataset`] takes them. `None`: those of `config.dataset_name`.
        callbacks: Objects with the methods of [`TrainCallback`]. A callback that stops a round stops the distillation.

    Returns:
        The pipeline folder of each round, `output_dir/steps-N`, with N decreasing.

    Raises:
        ValueError: The teacher cannot be distilled, or not to this number of steps, or a folder holds another run.
        FloatingPointError: The loss or the weights became NaN or infinite.
        OSError: Something cannot be read or written.
    """
    config = dataclasses.replace(config, output_dir=Path(config.output_dir).expanduser())
    pipe: Any = load_pipeline(config.teacher)
    guidance: dict[str, Any] = {"guidance_scale": 1.0, "guidance_interval": (0.0, 1.0)}
    guidance |= resolve_guidance(pipe, config.teacher, config.guidance_scale, config.guidance_interval)
    step_counts = _step_counts(config, pipe)
    columns = config.image_column, config.label_column, config.resolution
    if dataset is None:
        dataset = image_dataset(config.dataset_name, config.split, *columns)
    else:
        dataset = as_image_dataset(dataset, *columns)
    class_conditional = pipe.unet.config.num_class_embeds is not None
    if config.student is not None:
        _check_student(config, pipe)
    if class_conditional:
        _check_classes(config, pipe, dataset)
    margin = trained_margin(pipe.scheduler)
    rounds = [config.train_config(config.teacher, steps, margin, class_conditional) for steps in step_counts]
    black, white = saturated_levels(dataset)
    saturation = (margin * config.saturate, black is not None, white is not None)

    teachers: list[Teacher] = []
    for steps in step_counts:
        timesteps = _teacher_timesteps(config, pipe, steps)
        teacher: Teacher = DDIMTeacher(pipe, steps, **guidance, saturation=saturation, teacher_timesteps=timesteps)
        teacher.run_settings |= {"saturate": config.saturate, "distilled_from": config.teacher}
        if config.student is not None:
            teacher.run_settings["student"] = config.student
        if config.adversarial_weight and steps == step_counts[-1]:
            teacher = AdversarialTeacher(teacher, config.adversarial_weight)
        teachers.append(teacher)

    rank, _ = process_rank()
    if rank == 0:
        minutes = _estimate(config, load_pipeline(config.teacher).unet, pipe.scheduler, teachers, rounds) / 60
        taken = teachers[-1].run_settings["teacher_steps"]
        print(
            f"{config.teacher}: {taken} steps to {', '.join(map(str, step_counts))}; "
            f"about {minutes:.0f} minutes{' before compilation speeds it up' if config.torch_compile else ''}.",
            file=sys.stderr,
        )
    previous = config.student or config.teacher
    for teacher, train_config in zip(teachers, rounds, strict=True):
        train_config = dataclasses.replace(train_config, pretrained_model_name_or_path=previous)
        folder = start_run(train_config, GivenParts(dataset=dataset, callbacks=tuple(callbacks), teacher=teacher))
        if rank == 0 and config.num_evaluation_images:
            _evaluate(config, folder)
        previous = str(folder)
    return [train_config.output_dir for train_config in rounds]


def _step_counts(config: DistillConfig, pipe: Any) -> list[int]:
    """Return the steps of each round's student; a `ValueError` if halving cannot lead to `num_inference_steps`."""
    last, num_train_timesteps = config.num_inference_steps, pipe.scheduler.config.num_train_timesteps
    # A distilled teacher samples in its own number of steps only.
    own = distilled_steps(pipe.config)
    first = own or min(2 * FIRST_STUDENT_STEPS, num_train_timesteps)
    rounds = config.rounds or (1 if config.student else max(1, (first // last).bit_length() - 1))
    start = last * 2**rounds
    if own is not None and own % start:
        allowed = [own >> i for i in range(1, own.bit_length()) if own % 2**i == 0]
        raise ValueError(
            f"num_inference_steps={last} with rounds={rounds} needs a teacher of {start} steps, but {config.teacher} "
            f"samples in {own}. "
            + (f"Use num_inference_steps of {', '.join(map(str, allowed))}." if allowed else "It cannot be halved.")
        )
    if start > num_train_timesteps:
        raise ValueError(
            f"num_inference_steps={last} with rounds={rounds} needs a teacher of {start} steps, but {config.teacher} "
            f"has {num_train_timesteps} noise levels. Use fewer rounds."
        )
    if config.teacher_steps not in (None, own):
        told = f"teacher_steps={config.teacher_steps} must be"
        if own is not None:
            raise ValueError(f"{told} omitted: {config.teacher} is distilled, and samples in {own}.")
        if not start <= config.teacher_steps <= num_train_timesteps:
            raise ValueError(
                f"{told} within [{start}, {num_train_timesteps}]: at least twice the steps of the first student, at "
                "most every one."
            )
    return [last * 2**i for i in reversed(range(rounds))]


def _teacher_timesteps(config: DistillConfig, pipe: Any, steps: int) -> list[int]:
    """Return the teacher's timesteps for a student of `steps` steps: the student's own, with others between them."""
    scheduler = MiniDDIMScheduler.from_config(pipe.scheduler.config)
    own = distilled_steps(pipe.config)
    scheduler.set_timesteps(own or steps)
    if own is not None:
        return scheduler.timesteps.tolist()  # type: ignore[no-any-return]
    count = config.teacher_steps or max(DEFAULT_TEACHER_STEPS, 2 * steps)
    return refined_timesteps(scheduler.timesteps, math.ceil(count / steps))


def _check_student(config: DistillConfig, pipe: Any) -> None:
    """Raise a `ValueError` if the weights of `config.student` were made for other noise levels or other classes."""
    student = load_pipeline(str(config.student))
    if not (
        torch.equal(student.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
        and student.scheduler.config.timestep_spacing == pipe.scheduler.config.timestep_spacing
        and student.unet.config.num_class_embeds == pipe.unet.config.num_class_embeds
        and student.unet.config.sample_size == pipe.unet.config.sample_size
        and student.unet.config.in_channels == pipe.unet.config.in_channels
    ):
        raise ValueError(
            f"student={config.student!r} does not fit {config.teacher}: noise schedule, timestep spacing, image size "
            "and classes must be the same. Use a pipeline that was distilled from it."
        )


def _check_classes(config: DistillConfig, pipe: Any, dataset: ImageDataset) -> None:
    """Raise a `ValueError` if the dataset has another number of classes than the teacher, or names that differ."""
    num_classes = pipe.unet.config.num_class_embeds - 1  # the last label is the null label
    dataset_classes, teacher_classes = dataset.id2label or {}, pipe.config.get("id2label") or {}
    if len(dataset_classes) != num_classes or (teacher_classes and teacher_classes != dataset_classes):
        raise ValueError(
            f"The classes of {config.dataset_name!r} ({', '.join(dataset_classes.values()) or 'none'}) are not those "
            f"of {config.teacher} ({', '.join(teacher_classes.values()) or num_classes}). Use the images that it was "
            "trained on."
        )


def _estimate(
    config: DistillConfig, student: Any, scheduler: Any, teachers: Sequence[Teacher], rounds: Sequence[TrainConfig]
) -> float:
    """Return about how many seconds the rest of the rounds takes, without compilation.

    Small batches of each round are timed. `student`, a network, and the teachers are changed; they are of no use
    afterwards.
    """
    device = find_device(config.device)
    precision = resolve_precision(config.mixed_precision, device)
    dtype = torch.float16 if precision == "fp16" else torch.bfloat16
    student = student.to(device, memory_format=torch.channels_last).train()
    batch_size, size = 16, student.config.sample_size
    shape = (batch_size, student.config.in_channels, *((size, size) if isinstance(size, int) else size))
    class_labels = None
    if student.config.num_class_embeds is not None:
        class_labels = torch.zeros(batch_size, dtype=torch.long, device=device)
    total = 0.0
    for index, (teacher, train_config) in enumerate(zip(teachers, rounds, strict=True)):
        teacher.prepare(device, compiled=False)
        timesteps = teacher.timesteps.to(device).repeat(batch_size)[:batch_size]
        for _ in range(2 if index == 0 else 1):  # the very first batch warms up
            started = time.perf_counter()
            images, noise = torch.randn(2, *shape, device=device)
            with torch.autocast(device.type, dtype, enabled=precision != "no"):
                images, noise = teacher(images.clamp(-1, 1), noise, timesteps, class_labels)
                loss = teacher.loss(student, scheduler, images, noise, timesteps, class_labels).mean()
            loss.backward()  # type: ignore[no-untyped-call]
            float(loss.detach())  # waits for the device
            seconds_per_image = (time.perf_counter() - started) / batch_size
        steps_done = max(map(checkpoint_step, list_checkpoints(train_config.output_dir)), default=0)
        total += seconds_per_image * ((train_config.max_train_steps or 0) - steps_done)
    return total * config.train_batch_size * config.gradient_accumulation_steps


def _evaluate(config: DistillConfig, folder: Path) -> None:
    """Evaluate a round's student; the results go into its folder and its model card."""
    from ..evaluation.evaluate import EvaluateConfig, evaluate, markdown_table

    settings = EvaluateConfig(
        str(folder),
        config.dataset_name,
        image_column=config.image_column,
        label_column=config.label_column,
        resolution=config.resolution,
        device=config.device,
    )
    print(markdown_table(evaluate(dataclasses.replace(settings, num_images=config.num_evaluation_images))))
