"""Distillation: a student's one step is several of its teacher, by closed form, and round by round in real runs."""

import dataclasses
import itertools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_equal_weights, weights
from PIL import Image

from mini_ddpm import (
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    load_pipeline,
)
from mini_ddpm.training.distill import DDIMTeacher, DistillConfig, _estimate, _step_counts, distill, refined_timesteps
from mini_ddpm.training.loss import compute_loss, saturate
from mini_ddpm.training.train import TrainConfig, train


class Linear(torch.nn.Module):
    """x̂_0 = a_t·z_t, told as x_0 or v; a_t is a parameter for every t."""

    def __init__(self, scheduler, factors):
        super().__init__()
        self.scheduler, self.factors = scheduler, torch.nn.Parameter(factors)
        self.config = type("Config", (), {"num_class_embeds": None})

    def forward(self, sample, timesteps, class_labels=None):
        x0 = self.factors[timesteps].view(-1, 1, 1, 1) * sample
        if self.scheduler.config.prediction_type == "v_prediction":  # v = (α z - x_0) / σ
            alphas_cumprod = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1)
            x0 = (alphas_cumprod.sqrt() * sample - x0) / (1 - alphas_cumprod).sqrt()
        return type("Output", (), {"sample": x0})


def linear_teacher(prediction_type, steps, teacher_timesteps, **config):
    scheduler = MiniDDIMScheduler(prediction_type=prediction_type, clip_sample=False, **config)
    factors = torch.rand(1000, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.2
    pipe = type("Pipe", (), {"unet": Linear(scheduler, factors), "scheduler": scheduler})
    teacher = DDIMTeacher(pipe, steps, teacher_timesteps=teacher_timesteps)
    teacher._coefficients = teacher._coefficients.float()
    return teacher, scheduler, factors.double()


@pytest.mark.parametrize("prediction_type", ["sample", "v_prediction"])
@pytest.mark.parametrize(("steps", "factor"), [(1, 2), (4, 2), (7, 2), (32, 2), (4, 5), (3, 7), (1, 20)])
def test_the_optimum_of_a_linear_students_loss_is_the_steps_of_its_teacher(prediction_type, steps, factor):
    ours, theirs = MiniDDIMScheduler(), MiniDDIMScheduler(prediction_type=prediction_type, clip_sample=False)
    ours.set_timesteps(steps)
    given = None if factor == 2 else refined_timesteps(ours.timesteps, factor)  # by default the teacher takes two
    theirs.set_timesteps(2 * steps if given is None else None, timesteps=given)
    teacher, scheduler, a = linear_teacher(prediction_type, steps, given)
    assert torch.equal(teacher.timesteps, ours.timesteps)
    assert teacher.run_settings["teacher_steps"] == factor * steps
    ours = MiniDDIMScheduler.from_config(scheduler.config)
    ours.set_timesteps(steps)

    # From z_t the steps of x̂_0 = a z lead to a multiple of z_t, and so does one step of x̂_0 = c z: solve for c.
    levels = scheduler.alphas_cumprod.double()
    alpha, sigma = [*levels.sqrt(), 1.0], [*(1 - levels).sqrt(), 0.0]  # at -1, the end, the image

    def multiple(t, s, x0):
        return alpha[s] * x0 + sigma[s] / sigma[t] * (1 - alpha[t] * x0)

    optimum = torch.zeros(1000, dtype=torch.float64)
    times = [*theirs.timesteps.tolist(), -1]
    ways = [times[i : i + factor + 1] for i in range(0, factor * steps, factor)]  # the teacher's way in each step
    for way in ways:
        t, end, there = way[0], way[-1], 1.0
        for start, stop in itertools.pairwise(way):
            there = there * multiple(start, stop, a[start])
        optimum[t] = (there - sigma[end] / sigma[t]) / (alpha[end] - sigma[end] / sigma[t] * alpha[t])

    student = Linear(scheduler, optimum.float())
    generator = torch.Generator().manual_seed(1)
    images, noise = torch.randn(2, steps, 1, 4, 4, generator=generator)
    target, target_noise = teacher(images, noise, ours.timesteps, None)
    loss = compute_loss(student, scheduler, target, target_noise, ours.timesteps, snr_floor=1.0)
    loss.backward()
    assert loss.item() < 1e-9
    assert student.factors.grad.abs().max() < 1e-3
    off = compute_loss(Linear(scheduler, optimum.float() + 0.1), scheduler, target, target_noise, ours.timesteps)
    assert off.item() > 1e-3

    # It is a point of the way through z_t, and the student's step arrives where the teacher's steps do.
    sample = scheduler.add_noise(images, noise, ours.timesteps)
    torch.testing.assert_close(scheduler.add_noise(target, target_noise, ours.timesteps), sample, atol=1e-5, rtol=0)
    z = torch.ones(1, 1, 1, 1)
    for way in ways:
        one, there = ours.step(student(z, torch.tensor(way[:1])).sample, way[0], z).prev_sample, z
        for t in way[:-1]:
            there = theirs.step(teacher.unet(there, torch.tensor([t])).sample, t, there).prev_sample
        torch.testing.assert_close(one, there, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize(("steps", "factor"), [(1, 1), (1, 20), (4, 5), (7, 3), (300, 4), (1000, 2)])
def test_refined_timesteps_divide_each_step_evenly(spacing, steps, factor):
    scheduler = MiniDDIMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    refined = torch.tensor([*refined_timesteps(scheduler.timesteps, factor), -1])
    ends = torch.tensor([*scheduler.timesteps, -1])
    places = torch.isin(refined, ends).nonzero().squeeze(1)
    assert torch.equal(refined[places], ends) and (refined.diff() < 0).all()
    for start, stop, first, last in zip(ends[:-1], ends[1:], places[:-1], places[1:], strict=True):
        assert last - first == min(factor, start - stop)
        lengths = -refined[first : last + 1].diff()
        assert lengths.max() - lengths.min() <= 1


@pytest.mark.parametrize(("steps", "factor"), [(1, 2), (4, 2), (8, 2), (1, 20), (4, 5), (2, 4)])
@pytest.mark.parametrize(
    ("guidance_scale", "interval"),
    [(None, (0, 1)), (1.0, (0, 1)), (2.5, (0, 1)), (2.5, (0.25, 0.6)), (2.5, (0.5, 0.75))],
)
def test_the_targets_are_the_way_of_the_teachers_pipeline(tiny_unet, steps, factor, guidance_scale, interval):
    scheduler = MiniDDIMScheduler(prediction_type="v_prediction", clip_sample_range=1.1)
    labels = None if guidance_scale is None else torch.tensor([3, 0, 10])  # the last asks for no class
    if labels is None:
        pipe = MiniDDPMPipeline(tiny_unet(num_class_embeds=None), scheduler)
        call = {"batch_size": 3}
    else:
        pipe = MiniDDPMClassConditionalPipeline(tiny_unet(), scheduler)
        call = {"class_labels": labels, "guidance_scale": guidance_scale, "guidance_interval": interval}
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = pipe(**call, latents=latents, num_inference_steps=factor * steps, output_type="latent").images

    steps_of_teacher = MiniDDIMScheduler.from_config(scheduler.config)
    steps_of_teacher.set_timesteps(factor * steps)
    given = None if factor == 2 else steps_of_teacher.timesteps.tolist()
    teacher = DDIMTeacher(pipe, steps, guidance_scale or 1.0, interval, teacher_timesteps=given)
    teacher.prepare(torch.device("cpu"), compiled=False)
    saturation = (0.1, False, True)
    saturating = DDIMTeacher(pipe, steps, guidance_scale or 1.0, interval, saturation, given)
    saturating.prepare(torch.device("cpu"), compiled=False)
    assert (saturate(expected, *saturation) != expected).any()
    student = MiniDDIMScheduler.from_config(scheduler.config, prediction_type="sample", clip_sample=False)
    student.set_timesteps(steps)
    sample = latents
    for t in student.timesteps:
        # An image and a noise that are noised to this very sample: zero, and the sample over σ.
        sigma = (1 - student.alphas_cumprod[t]).sqrt()
        target, _ = teacher(torch.zeros_like(sample), sample / sigma, t.expand(3), labels)
        moved, _ = saturating(torch.zeros_like(sample), sample / sigma, t.expand(3), labels)
        assert torch.equal(moved, saturate(target, *saturation) if t == student.timesteps[-1] else target)
        assert target.abs().max() <= 1.1 + 1e-4  # between two images within the teacher's range
        sample = student.step(target, t, sample).prev_sample
    torch.testing.assert_close(sample, expected, atol=1e-4, rtol=0)


def test_nearly_white_and_nearly_black_are_moved_beyond():
    images = torch.tensor([-1.1, -1.0, -0.93, -0.9, 0.0, 0.9, 0.93, 0.96, 0.99, 1.1])
    white = torch.tensor([-1.1, -1.0, -0.93, -0.9, 0.0, 0.9, 0.98, 1.06, 1.09, 1.1])
    torch.testing.assert_close(saturate(images, 0.1, black=False, white=True), white)
    torch.testing.assert_close(saturate(images, 0.1, black=True, white=False), -saturate(-images, 0.1, False, True))
    assert saturate(images, 0.1, black=False, white=False) is images
    assert saturate(images, 0.0, black=True, white=True) is images


def test_a_teacher_that_cannot_teach(tiny_unet):
    unet = tiny_unet(num_class_embeds=None)
    with pytest.raises(ValueError, match=r"prediction_type='epsilon' cannot be distilled.*'v_prediction' or 'sample'"):
        DDIMTeacher(MiniDDPMPipeline(unet, MiniDDIMScheduler(prediction_type="epsilon")), 4)
    leading = MiniDDIMScheduler(prediction_type="v_prediction", timestep_spacing="leading")
    with pytest.raises(
        ValueError,
        match=r"timestep_spacing='leading': the 3 timesteps.*among the 6 of the teacher.*timestep_spacing='trailing'",
    ):
        DDIMTeacher(MiniDDPMPipeline(unet, leading), 3)


def test_without_options_a_teacher_is_neither_guided_nor_saturated(tiny_unet):
    pipe = MiniDDPMClassConditionalPipeline(tiny_unet(), MiniDDIMScheduler(prediction_type="v_prediction"))
    teacher = DDIMTeacher(pipe, 4)
    teacher.prepare(torch.device("cpu"), compiled=False)
    explicit = DDIMTeacher(pipe, 4, 1.0, (0.0, 1.0), (0.0, False, False))
    explicit.prepare(torch.device("cpu"), compiled=False)
    images, noise = torch.randn(2, 4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    batch = (images, noise, teacher.timesteps, torch.tensor([3, 0, 1, 10]))
    assert torch.equal(teacher(*batch)[0], explicit(*batch)[0])
    assert teacher.run_settings == explicit.run_settings
    assert teacher.run_settings == {
        "num_inference_steps": 4,
        "teacher_steps": 8,
        "guidance_scale": 1.0,
        "guidance_interval": (0.0, 1.0),
    }
    assert teacher.pipeline_defaults == {"default_num_inference_steps": 4, "default_guidance_scale": 1.0}
    assert teacher.snr_floor == 1.0


# ---- how long it will take ---------------------------------------------------------------------------------------


class Clock:
    """A clock that networks advance by a time per image; the first two batches take `warm_up` longer."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def time_network(self, unet, seconds, warm_up=0.0):
        def evaluate(module, args):
            self.now += seconds * len(args[0]) + (warm_up if len(self.calls) < 2 else 0.0)
            autocast = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None
            self.calls.append((len(args[0]), module.training, autocast))

        unet.register_forward_pre_hook(evaluate)


@pytest.mark.parametrize(
    ("guidance", "precision", "autocast"),
    [(None, "no", None), (1.0, "bf16", torch.bfloat16), (2.0, "fp16", torch.float16), (2.0, "auto", None)],
)
def test_the_estimate_adds_up_what_is_left(tiny_unet, monkeypatch, tmp_path, guidance, precision, autocast):
    clock, unets = Clock(), []
    monkeypatch.setattr("mini_ddpm.training.distill.time.perf_counter", lambda: clock.now)
    for _ in range(2):
        unets.append(tiny_unet(sample_size=(8, 12), **({"num_class_embeds": None} if guidance is None else {})))
    teacher_unet, student_unet = unets
    clock.time_network(teacher_unet, 1.0, warm_up=1e6)  # the estimate leaves out the first batch
    clock.time_network(student_unet, 0.5)
    kind = MiniDDPMPipeline if guidance is None else MiniDDPMClassConditionalPipeline
    pipe = kind(teacher_unet, MiniDDIMScheduler(prediction_type="v_prediction"))
    config = DistillConfig(
        "mnist",
        output_dir=tmp_path,
        images_per_round=2400,
        train_batch_size=4,
        gradient_accumulation_steps=3,
        device="cpu",
        mixed_precision=precision,
    )
    counts = (8, 4, 2, 1)
    rounds = [config.train_config("mnist", steps, 0.1, guidance is not None) for steps in counts]
    assert [train_config.max_train_steps for train_config in rounds] == [200, 200, 400, 400]
    for checkpoint in ("steps-8/checkpoint-100", "steps-8/checkpoint-150", "steps-2/checkpoint-50"):
        (tmp_path / checkpoint).mkdir(parents=True)
        progress = {"step": int(checkpoint.rpartition("-")[2]), "seconds": 1.0, "files": {}, "pipeline": {}}
        (tmp_path / checkpoint / "progress.json").write_text(json.dumps(progress))
    every = MiniDDIMScheduler()
    every.set_timesteps(16)
    taken = every.timesteps.tolist()
    teachers = [DDIMTeacher(pipe, n, guidance or 1.0, (0.5, 1), (0, False, False), taken) for n in counts]
    seconds = _estimate(config, student_unet, pipe.scheduler, teachers, rounds)

    # An image goes 16/N times through the teacher of N steps, half of the steps guided and so twice, and once through
    # the student. An optimizer step sees twelve images, spread evenly over the student's steps.
    guided = 1.5 if guidance and guidance > 1 else 1
    each = [guided * 16 / n + 0.5 for n in counts]
    assert seconds == pytest.approx(
        12 * sum(left * cost for left, cost in zip((50, 200, 350, 400), each, strict=True))
    )
    # Of sixteen rows the guided ones go through the teacher a second time; the first round is timed twice.
    expected = []
    for n in (8, *counts):
        for k in range(16 // n):
            rows = [16, sum(row % n * (16 // n) + k >= 8 for row in range(16)) if guided > 1 else 0]
            expected += [(number, False, autocast) for number in rows if number]
        expected.append((16, True, autocast))
    assert clock.calls == expected


# ---- whole runs ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def teacher(pictures, tmp_path_factory):
    """A network that has learned the sixteen pictures, with their classes."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    return train(
        TrainConfig(
            dataset_name=str(pictures),
            output_dir=folder,
            class_conditional=True,
            block_out_channels=(32, 64),
            layers_per_block=1,
            train_batch_size=32,
            max_train_steps=300,
            learning_rate=3e-3,
            ema_max_decay=0.9,
            save_images_epochs=0,
            log_with="none",
            device="cpu",
        )
    )


@pytest.fixture
def config(teacher, pictures, tmp_path):
    return DistillConfig(
        teacher=str(teacher),
        dataset_name=str(pictures),
        output_dir=tmp_path / "distilled",
        num_inference_steps=2,
        rounds=2,
        images_per_round=640,
        train_batch_size=32,
        learning_rate=2e-3,
        checkpointing_steps=10,
        log_with="none",
        device="cpu",
        mixed_precision="no",
    )


def test_a_round_brings_the_student_to_its_teachers_steps(tmp_path):
    # Pictures of one brightness each: from noise to picture is then a smooth way, that a tiny network can learn.
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(64):
        Image.fromarray(np.full((8, 8), 60 + 2 * i, dtype=np.uint8)).save(pictures / f"{i:02d}.png")
    shared = {"dataset_name": str(pictures), "log_with": "none", "device": "cpu", "mixed_precision": "no"}
    teacher = train(
        TrainConfig(
            output_dir=tmp_path / "teacher",
            block_out_channels=(32, 32),
            layers_per_block=1,
            train_batch_size=32,
            max_train_steps=200,
            learning_rate=3e-3,
            ema_max_decay=0.9,
            save_images_epochs=0,
            **shared,
        )
    )
    (student,) = distill(
        DistillConfig(
            str(teacher),
            output_dir=tmp_path / "distilled",
            num_inference_steps=2,
            rounds=1,
            images_per_round=9600,
            learning_rate=3e-3,
            **shared,
        )
    )
    assert student == tmp_path / "distilled" / "steps-2"
    settings = json.loads((student / "train_config.json").read_text())
    assert (settings["guidance_scale"], settings["guidance_interval"]) == (1.0, [0.0, 1.0])  # none, as without classes
    assert (settings["num_inference_steps"], settings["teacher_steps"], settings["saturate"]) == (2, 20, True)
    assert settings["distilled_from"] == str(teacher)
    latents = torch.randn(64, 1, 8, 8, generator=torch.Generator().manual_seed(5))

    def draw(where, **options):
        pipe = load_pipeline(where)
        pipe.set_progress_bar_config(disable=True)
        return pipe(64, latents=latents, output_type="latent", **options).images

    target = draw(teacher, num_inference_steps=20)
    before = (draw(teacher, num_inference_steps=2) - target).square().mean()
    after = (draw(student) - target).square().mean()
    assert after < before / 5


def test_the_students_take_their_own_steps_once_each(config, monkeypatch):
    taught = []

    class Teacher(DDIMTeacher):
        def __init__(self, pipe, num_inference_steps, **options):
            super().__init__(pipe, num_inference_steps, **options)
            taught.append((num_inference_steps, len(self.scheduler.timesteps), options["saturation"], pipe.config))

    monkeypatch.setattr("mini_ddpm.training.distill.DDIMTeacher", Teacher)
    folders = distill(config)
    assert [folder.name for folder in folders] == ["steps-4", "steps-2"]
    # Every student learns from the first teacher, and beyond the range: the pictures have both ends.
    assert [about[:3] for about in taught] == [(4, 20, (0.1, True, True)), (2, 20, (0.1, True, True))]
    assert taught[0][3] is taught[1][3]
    settings = [json.loads((folder / "train_config.json").read_text()) for folder in folders]
    assert [each["pretrained_model_name_or_path"] for each in settings] == [config.teacher, str(folders[0])]
    assert [each["distilled_from"] for each in settings] == [config.teacher] * 2
    for folder, steps in zip(folders, (4, 2), strict=True):
        pipe = load_pipeline(folder)
        evaluations = []
        pipe.unet.register_forward_pre_hook(lambda module, args, seen=evaluations: seen.append(len(args[0])))
        pipe.set_progress_bar_config(disable=True)
        pipe([0, 1, 0])
        assert evaluations == [3] * steps  # without guidance, which is in the weights
        pipe([0], num_inference_steps=3, guidance_scale=2.0)  # who asks for something else gets it
        assert evaluations[steps:] == [2] * 3
        log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
        assert log[-1]["images"] == (640 if steps > 2 else 1280)

        # What is saved again keeps it, and the card tells it.
        again = folder.parent / f"again-{steps}"
        pipe.save_pretrained(again)
        assert load_pipeline(again).config["default_num_inference_steps"] == steps
        card = (again / "README.md").read_text()
        assert f"| Distilled | steps per image: {steps}, with one network evaluation each; guidance is" in card
        assert "2210.03142" in card and "images = pipe([0, 1]).images" in card

    # A student can be a teacher, in its own steps and in no others.
    alone = {"teacher": str(folders[0]), "rounds": 1, "saturate": False}
    (one,) = distill(dataclasses.replace(config, num_inference_steps=1, **alone))
    assert one.name == "steps-1" and taught[-1][:3] == (1, 4, (0.0, True, True))
    with pytest.raises(
        ValueError, match=r"=3 with rounds=1 needs a teacher of 6 steps, but .* samples in 4. Use .* of 2, 1."
    ):
        distill(dataclasses.replace(config, teacher=str(folders[0]), num_inference_steps=3, rounds=None))
    with pytest.raises(ValueError, match="teacher_steps=20 must be omitted: .* is distilled, and samples in 4"):
        distill(
            dataclasses.replace(config, teacher=str(folders[0]), num_inference_steps=2, rounds=1, teacher_steps=20)
        )


def test_a_student_is_improved_and_learns_in_as_many_steps_as_asked(config, tmp_path):
    (first,) = distill(dataclasses.replace(config, rounds=1))
    improving = dataclasses.replace(
        config, student=str(first), rounds=None, teacher_steps=9, learning_rate=1e-9, output_dir=tmp_path / "improved"
    )
    (improved,) = distill(improving)
    assert improved == tmp_path / "improved" / "steps-2"
    for key, tensor in weights(improved).items():  # they began with the student's, not with the teacher's
        torch.testing.assert_close(tensor, weights(first)[key], atol=1e-5, rtol=0)
    settings = json.loads((improved / "train_config.json").read_text())
    assert settings["teacher_steps"] == 10  # five for each step of the student
    assert settings["student"] == settings["pretrained_model_name_or_path"] == str(first)
    assert settings["distilled_from"] == config.teacher
    with pytest.raises(
        ValueError, match="student='mnist' does not fit .*: noise schedule, timestep spacing, image size"
    ):
        distill(dataclasses.replace(improving, student="mnist", output_dir=tmp_path / "other"))
    with pytest.raises(ValueError, match=r"holds a run with teacher_steps=10, not 12"):
        distill(dataclasses.replace(improving, teacher_steps=12))


@pytest.mark.parametrize("adversarial_weight", [0.0, 1e-3])  # a critic that has hardly a say, but is trained
def test_two_processes_are_one_with_twice_the_batch(config, two_processes, adversarial_weight):
    config = dataclasses.replace(config, images_per_round=160, adversarial_weight=adversarial_weight)
    (one, *_) = distill(dataclasses.replace(config, rounds=1))
    two = config.output_dir.with_name("two")
    command = [sys.executable, *two_processes, "-m", "mini_ddpm", "distill", config.teacher]
    command += ["--to", "2", "--rounds", "1"]
    command += ["--dataset-name", config.dataset_name, "--output-dir", str(two), "--images-per-round", "160"]
    command += ["--train-batch-size", "16", "--learning-rate", str(config.learning_rate), "--log-with", "none"]
    command += ["--device", "cpu", "--mixed-precision", "no", "--adversarial-weight", str(adversarial_weight)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("distillation finished. Draw images with: mini-ddpm sample") == 1
    assert done.stderr.count(f"{config.teacher}: 20 steps to 2; about ") == 1
    sample, timesteps, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 600, 999]), torch.tensor([0, 1, 1, 0])
    predictions = [load_pipeline(folder).unet(sample, timesteps, labels).sample for folder in (one, two / "steps-2")]
    torch.testing.assert_close(*predictions, atol=1e-3, rtol=0)
    log = (two / "steps-2" / "train_log.jsonl").read_text().splitlines()
    assert (
        json.loads(log[-1])["images"] == json.loads((one / "train_log.jsonl").read_text().splitlines()[-1])["images"]
    )


@pytest.mark.parametrize("calls", [5, 25, 45])  # in the first round; in the second, before and after a checkpoint
def test_cut_off_it_goes_on_exactly(config, monkeypatch, interrupt, calls):
    config = dataclasses.replace(config, checkpointing_steps=8)
    whole = distill(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))
    monkeypatch.setattr("mini_ddpm.training.distill._estimate", lambda *args: 0.0)  # which calls the teacher too
    interrupt(DDIMTeacher, "__call__", calls)
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    cut = distill(config)
    for one, other in zip(whole, cut, strict=True):
        assert_equal_weights(one, other)

    with pytest.raises(ValueError, match=r"holds a run with guidance_scale=1.5, not 3.0"):
        distill(dataclasses.replace(config, guidance_scale=3.0))
    # A round is not resumed as a training without a teacher either.
    with pytest.raises(ValueError, match=r"holds a run with num_inference_steps=4, not None"):
        train(config.train_config(config.teacher, 4, 0.1, True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps=0 must be at least 1"),
        ({"rounds": 0}, "rounds=0 must be at least 1"),
        ({"guidance_interval": (0.6, 0.4)}, r"guidance_interval=\(0.6, 0.4\) must satisfy 0 <= start < end <= 1"),
        (
            {"guidance_interval": (0.11, 0.14)},
            r"guidance_interval=\(0.11, 0.14\): none of the teacher's 20 steps is in",
        ),
        ({"teacher_steps": 0}, "teacher_steps=0 must be at least 1"),
        ({"teacher_steps": 7}, r"teacher_steps=7 must be within \[8, 1000\]: at least twice the steps of the first"),
        ({"teacher_steps": 1001}, r"teacher_steps=1001 must be within \[8, 1000\]"),
        ({"student": "nowhere"}, "nowhere"),
        ({"learning_rate": -1.0}, "learning_rate=-1.0 must be above 0"),
        ({"rounds": 9}, "rounds=9 needs a teacher of 1024 steps, but .* has 1000 noise levels"),
        (
            {"teacher": "mnist", "guidance_scale": 2.0},
            "guidance_scale=2.0: mnist is unconditional and takes no guidance",
        ),
        ({"dataset_name": "nowhere"}, "nowhere"),
        ({"teacher": "mnist-class-conditional"}, r"\(left, right\) are not those of mnist-class-.* \(0, 1, 2, 3,"),
    ],
)
def test_what_cannot_be_distilled(config, change, message):
    with pytest.raises((ValueError, OSError), match=message):
        distill(dataclasses.replace(config, **change))
    assert not config.output_dir.exists()


def test_each_student_is_evaluated_on_request(config, monkeypatch, capsys):
    measured = []

    def evaluate(settings):
        assert (Path(settings.pipeline) / "model_index.json").is_file()
        measured.append(settings)
        return ["row"]

    monkeypatch.setattr("mini_ddpm.evaluation.evaluate.evaluate", evaluate)
    monkeypatch.setattr("mini_ddpm.evaluation.evaluate.markdown_table", lambda rows: f"table of {rows}")
    config = dataclasses.replace(config, images_per_round=32, num_inference_steps=4, rounds=2)
    distill(config)
    assert measured == []
    config = dataclasses.replace(config, output_dir=config.output_dir.with_name("measured"), num_evaluation_images=16)
    folders = distill(config)
    assert [settings.pipeline for settings in measured] == [str(folder) for folder in folders]
    for settings in measured:
        assert (settings.num_images, settings.dataset_name, settings.device) == (16, config.dataset_name, "cpu")
    assert capsys.readouterr().out.count("table of ['row']") == 2


def test_as_many_classes_with_other_names_are_refused(config, pictures, tmp_path):
    for old, new in (("left", "down"), ("right", "up")):
        shutil.copytree(pictures / old, tmp_path / "renamed" / new)
    with pytest.raises(ValueError, match=r"\(down, up\) are not those of .* \(left, right\)"):
        distill(dataclasses.replace(config, dataset_name=str(tmp_path / "renamed")))


def test_the_first_teacher_may_take_every_noise_level(config):
    pipe = load_pipeline(config.teacher)
    config = dataclasses.replace(config, num_inference_steps=125, rounds=3)
    assert pipe.scheduler.config.num_train_timesteps == 1000 and _step_counts(config, pipe) == [500, 250, 125]
    assert _step_counts(dataclasses.replace(config, num_inference_steps=4, rounds=None), pipe) == [16, 8, 4]
