"""The adversarial loss of a round: what the critic sees, what each part of the loss trains, and whole runs with it."""

import copy
import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_equal_weights, weights

from mini_ddpm import MiniDDIMScheduler, MiniDDPMClassConditionalPipeline, load_pipeline
from mini_ddpm.training.adversarial import LEVELS, AdversarialTeacher
from mini_ddpm.training.distill import DDIMTeacher, DistillConfig, distill
from mini_ddpm.training.loss import compute_loss


@pytest.fixture
def round_of(tiny_unet):
    """The teacher of a round to `steps` steps with a critic, a student, and a batch."""

    def make(steps, weight=0.1, prediction_type="v_prediction"):
        torch.manual_seed(0)
        scheduler = MiniDDIMScheduler(prediction_type=prediction_type, clip_sample_range=1.1)
        pipe = MiniDDPMClassConditionalPipeline(tiny_unet(), scheduler)
        teacher = AdversarialTeacher(DDIMTeacher(pipe, steps), weight)
        teacher.prepare(torch.device("cpu"), compiled=False)
        generator = torch.Generator().manual_seed(1)
        images, noise = torch.randn(2, 8, 1, 8, 8, generator=generator).clamp(-1, 1)
        timesteps = teacher.timesteps.repeat(8)[:8]
        return teacher, tiny_unet(), scheduler, (images, noise, timesteps, torch.arange(8))

    return make


@pytest.mark.parametrize("prediction_type", ["v_prediction", "sample"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_the_critic_compares_where_the_student_arrives_with_images_at_the_same_level(
    round_of, monkeypatch, steps, prediction_type
):
    teacher, student, scheduler, batch = round_of(steps, prediction_type=prediction_type)
    seen = []
    target, noise = teacher(*batch)
    teacher.teacher.unet.register_forward_pre_hook(lambda module, args: seen.append(args))
    added = []
    monkeypatch.setattr(torch, "randn_like", lambda x: added.append(torch.full_like(x, 0.5)) or added[-1])
    teacher.loss(student, scheduler, target, noise, *batch[2:])
    (real, levels, labels), (generated, same_levels, same_labels) = seen
    assert torch.equal(levels, same_levels) and torch.equal(labels, batch[3]) and torch.equal(labels, same_labels)

    ours = MiniDDIMScheduler.from_config(scheduler.config)
    ours.set_timesteps(steps)
    for i, t in enumerate(batch[2].tolist()):
        z = scheduler.add_noise(batch[0][i : i + 1], batch[1][i : i + 1], batch[2][i : i + 1])
        output = student(z, t, batch[3][i : i + 1]).sample
        arrived = ours.step(output, t, z, use_clipped_model_output=True).prev_sample
        level = levels[i : i + 1]
        if (end := int(ours.previous_timestep(t))) >= 0:
            assert level == end
        else:  # a finished image: both are noised to a random level
            assert LEVELS[0] * 1000 <= level < LEVELS[1] * 1000
            arrived = scheduler.add_noise(arrived, torch.full_like(arrived, 0.5), level)
        torch.testing.assert_close(generated[i : i + 1], arrived, atol=1e-4, rtol=0)
        expected = scheduler.add_noise(batch[0][i : i + 1], torch.full_like(arrived, 0.5), level)
        torch.testing.assert_close(real[i : i + 1], expected, atol=1e-5, rtol=0)
    assert len(set(levels[[i for i, t in enumerate(batch[2]) if t == batch[2].min()]].tolist())) > 1


def test_the_loss_is_that_of_distillation_less_what_the_critic_says(round_of):
    teacher, student, scheduler, batch = round_of(1, weight=0.25)
    target, noise = teacher(*batch)
    plain = compute_loss(student, scheduler, target, noise, *batch[2:], snr_floor=1.0, reduction="none")
    with torch.no_grad():  # as a validation loss is measured: neither a critic nor random numbers
        state = torch.get_rng_state()
        assert torch.equal(teacher.loss(student, scheduler, target, noise, *batch[2:]), plain)
        assert torch.equal(torch.get_rng_state(), state)

    critic, optimizer = teacher.trained_parts
    said, gradients, twin = [], {}, copy.deepcopy(critic)
    critic.register_forward_hook(lambda module, args, output: said.append((args[0], output)))
    optimizer.register_step_post_hook(
        lambda *args: gradients.update({name: p.grad.clone() for name, p in critic.named_parameters()})
    )
    losses = teacher.loss(student, scheduler, target, noise, *batch[2:])
    (real, _), (generated, _), (_, says) = said
    # The critic takes its step by the hinge loss, and then tells the student's loss.
    hinge = [F.relu(1 - each).mean() for each in twin(real)] + [F.relu(1 + each).mean() for each in twin(generated)]
    sum(hinge).backward()
    for name, parameter in twin.named_parameters():
        torch.testing.assert_close(gradients[name], parameter.grad)
    assert not all(map(torch.equal, critic.parameters(), twin.parameters()))
    expected = plain - 0.25 * torch.stack([each.mean(dim=(1, 2, 3)) for each in says]).mean(0)
    torch.testing.assert_close(losses, expected)

    losses.mean().backward()  # trains the student alone
    assert all(parameter.grad is not None for parameter in student.parameters())
    assert all(parameter.grad is None for parameter in teacher.teacher.unet.parameters())
    for name, parameter in critic.named_parameters():
        assert torch.equal(parameter.grad, gradients[name]) and parameter.requires_grad


def test_the_critic_learns_to_tell_images_from_what_the_student_draws(round_of):
    teacher, student, scheduler, (_, noise, timesteps, labels) = round_of(1)
    images = torch.ones(8, 1, 8, 8) * torch.linspace(-1, 1, 8)  # stripes, which an untrained student does not draw
    critic, said = teacher.trained_parts[0], []
    critic.register_forward_hook(lambda module, args, output: said.append(float(output[1].detach().mean())))
    for _ in range(60):
        said.clear()
        target, target_noise = teacher(images, noise, timesteps, labels)
        teacher.loss(student, scheduler, target, target_noise, timesteps, labels)
    assert said[0] > 0.5 > -0.5 > said[1]


def test_networks_without_the_blocks_are_refused(round_of):
    teacher, *_ = round_of(1)
    del teacher.teacher.unet.mid_block
    with pytest.raises(ValueError, match="adversarial_weight needs a network with mid_block and up_blocks"):
        AdversarialTeacher(teacher.teacher, 0.1)


@pytest.fixture
def config(pictures, tmp_path, tiny_teacher):
    return DistillConfig(
        teacher=str(tiny_teacher),
        dataset_name=str(pictures),
        output_dir=tmp_path / "distilled",
        num_inference_steps=1,
        rounds=2,
        images_per_round=160,
        train_batch_size=16,
        adversarial_weight=0.05,
        checkpointing_steps=8,
        log_with="none",
        device="cpu",
        mixed_precision="no",
    )


@pytest.fixture
def tiny_teacher(tiny_unet, tmp_path):
    pipe = MiniDDPMClassConditionalPipeline(
        tiny_unet(num_class_embeds=3),
        MiniDDIMScheduler(prediction_type="v_prediction"),
        id2label={0: "left", 1: "right"},
    )
    pipe.save_pretrained(tmp_path / "teacher")
    return tmp_path / "teacher"


def test_the_last_round_has_a_critic_and_resumes_exactly(config, monkeypatch, interrupt):
    whole = distill(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))
    settings = [json.loads((folder / "train_config.json").read_text()) for folder in whole]
    assert [each.get("adversarial_weight") for each in settings] == [None, 0.05]
    plain = distill(dataclasses.replace(config, adversarial_weight=0, output_dir=config.output_dir.with_name("plain")))
    same = [all(torch.equal(a, b) for a, b in zip(weights(x).values(), weights(y).values(), strict=True))
            for x, y in zip(whole, plain, strict=True)]  # fmt: skip
    assert same == [True, False]

    monkeypatch.setattr("mini_ddpm.training.distill._estimate", lambda *args: 0.0)
    interrupt(AdversarialTeacher, "loss", 13)  # after a checkpoint of the second round
    with pytest.raises(KeyboardInterrupt):
        distill(config)
    cut = distill(config)
    for one, other in zip(whole, cut, strict=True):
        assert_equal_weights(one, other)
    assert load_pipeline(cut[-1]).config["default_num_inference_steps"] == 1
    with pytest.raises(ValueError, match=r"holds a run with adversarial_weight=0.05, not 0.1"):
        distill(dataclasses.replace(config, adversarial_weight=0.1))
    with pytest.raises(ValueError, match=r"adversarial_weight=-1.0 must be at least 0"):
        dataclasses.replace(config, adversarial_weight=-1.0)
