"""The pipelines: right images from a network whose answer is known, same seed same image, and plain refusals."""

import copy
import functools
import io
import json
import pickle
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor

import diffusers
import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin, UNet2DModel
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

from mini_ddpm import (
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    MiniDDPMPipelineOutput,
    MiniDDPMScheduler,
    load_pipeline,
)
from mini_ddpm.options import resolve_guidance
from mini_ddpm.pipelines.pipeline_base import default_steps, predict_x0

DIGITS = dict(enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))


class GaussianDenoiser(ModelMixin, ConfigMixin):
    """The exact network for data of independent pixels N(mean, std²); class k moves the mean by k·shift.

    With x_t = a x_0 + s ε the best prediction is E[x_0 | x_t] = m + std² a / (a² std² + s²) (x_t - a m).
    """

    @register_to_config
    def __init__(self, mean=0.3, std=0.2, shift=0.0, prediction_type="epsilon", learned_variance=False,
                 sample_size=8, in_channels=1, num_class_embeds=None):  # fmt: skip
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.log_ratio = ((1 / MiniDDPMScheduler().alphas_cumprod.double() - 1) ** 0.5).log()  # log s/a

    def forward(self, sample, timestep, class_labels=None):
        c, t = self.config, timestep.double().clamp(0, 999)
        low = t.floor().long()
        ratio = torch.lerp(self.log_ratio[low], self.log_ratio[(low + 1).clamp(max=999)], t - low).exp()
        a = (1 + ratio**2) ** -0.5
        s, x = a * ratio, sample.double()
        mean = torch.full((len(x), 1, 1, 1), c.mean, dtype=torch.float64)
        if class_labels is not None:  # the null label, last, is the plain mean
            known = class_labels != c.num_class_embeds - 1
            mean = mean + c.shift * (class_labels * known).view(-1, 1, 1, 1)
        x_0 = mean + c.std**2 * a / (a**2 * c.std**2 + s**2) * (x - a * mean)
        eps = (x - a * x_0) / s
        output = {"epsilon": eps, "sample": x_0, "v_prediction": a * eps - s * x_0}[c.prediction_type].float()
        if c.learned_variance:
            output = torch.cat([output, torch.ones_like(output)], dim=1)
        return UNet2DOutput(sample=output)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture
def plain(tiny_unet):
    return quiet(MiniDDPMPipeline(tiny_unet(), MiniDDIMScheduler()))


@pytest.fixture
def labelled(tiny_unet):
    return quiet(MiniDDPMClassConditionalPipeline(tiny_unet(), MiniDDIMScheduler(), DIGITS))


# ---- The loop is right ----------------------------------------------------------------------------------------------


ALL_SCHEDULERS = sorted({cls.__name__ for cls in MiniDDPMScheduler().compatibles + MiniDDIMScheduler().compatibles})


@pytest.mark.parametrize("name", [name for name in ALL_SCHEDULERS if not name.startswith("EDM")])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
# Of diffusers' and its friends' own making: NumPy 2 conversions, Brownian trees, unused config keys.
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Should have t")
def test_any_scheduler_gives_the_distribution(name, prediction_type):
    """From exact predictions every scheduler must reach the data's mean and, in 20 steps nearly, its deviation."""
    cls = getattr(diffusers, name)
    if "SDE" in name:
        pytest.importorskip("torchsde")
    if name == "LMSDiscreteScheduler":
        pytest.importorskip("scipy")
    spacing = {}
    if name == "PNDMScheduler":  # its warm-up extrapolates ε at t = T - 1 and diverges there
        spacing = {"timestep_spacing": "leading"}
        if prediction_type == "sample":
            pytest.skip("PNDM knows no prediction of x_0")
    if name in ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):  # from T - 1 refused, see test_compat.py
        spacing = {"timestep_spacing": "leading"}
    if prediction_type == "sample" and name in ("KDPM2DiscreteScheduler", "KDPM2AncestralDiscreteScheduler",
                                                "HeunDiscreteScheduler", "DPMSolverSDEScheduler",
                                                "EulerAncestralDiscreteScheduler"):  # fmt: skip
        pytest.skip("diffusers raises NotImplementedError")
    ours = MiniDDPMScheduler(prediction_type=prediction_type, clip_sample=False, **spacing)
    pipe = quiet(MiniDDPMPipeline(GaussianDenoiser(prediction_type=prediction_type), cls.from_config(ours.config)))
    output = pipe(
        16, num_inference_steps=20, generator=seeds(*range(16)), output_type="latent", return_trajectory=True
    )
    assert abs(output.images.mean() - 0.3) < 0.03
    assert abs(output.images.std() - 0.2) < 0.06
    # The predicted x_0 is the scheduler's or derived; the last one is nearly the image.
    assert output.pred_original_samples.shape == (pipe.num_timesteps, 16, 1, 8, 8)
    assert abs(output.pred_original_samples[-1].mean() - 0.3) < 0.03
    assert abs(output.pred_original_samples[-1].std() - 0.2) < 0.06


@pytest.mark.parametrize("name", ["DPMSolverMultistepScheduler", "UniPCMultistepScheduler"])
@pytest.mark.parametrize("karras", [False, True])
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_predicted_x0_is_derived_where_the_scheduler_returns_none(name, karras, prediction_type):
    """These two keep their x_0 to themselves; ours must be the same, also between whole timesteps (Karras)."""
    config = MiniDDPMScheduler(prediction_type=prediction_type, clip_sample=False).config
    scheduler = getattr(diffusers, name).from_config(config, use_karras_sigmas=karras)
    pipe = quiet(MiniDDPMPipeline(GaussianDenoiser(prediction_type=prediction_type), scheduler))
    kept = []
    output = pipe(2, num_inference_steps=10, generator=seeds(0, 1), output_type="latent", return_trajectory=True,
                  callback_on_step_end=lambda pipe, *args: kept.append(pipe.scheduler.model_outputs[-1]))  # fmt: skip
    torch.testing.assert_close(output.pred_original_samples, torch.stack(kept), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("use_clipped_model_output", [False, True])
def test_ddim_equals_diffusers_pipeline(tiny_unet, use_clipped_model_output):
    """Where diffusers is right (a dividing step count, trailing), its own pipeline gives the same images."""
    theirs = diffusers.DDIMScheduler(beta_schedule="squaredcos_cap_v2", timestep_spacing="trailing")
    unet = tiny_unet()
    arguments = {
        "batch_size": 2,
        "num_inference_steps": 10,
        "eta": 1.0,
        "use_clipped_model_output": use_clipped_model_output,
        "output_type": "np",
    }
    expected = quiet(diffusers.DDIMPipeline(unet, theirs))(**arguments, generator=torch.manual_seed(0)).images
    for scheduler in (MiniDDIMScheduler(), theirs):
        images = quiet(MiniDDPMPipeline(unet, scheduler))(**arguments, generator=torch.manual_seed(0)).images
        # Theirs divides by √(1-ᾱ_t) what it multiplies later; in float32 that costs digits.
        np.testing.assert_allclose(images, expected, atol=1e-4 if use_clipped_model_output else 2e-6)


def test_a_unet_of_diffusers():
    unet = UNet2DModel(
        sample_size=(8, 12),
        in_channels=3,
        out_channels=3,
        num_class_embeds=4,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )
    pipe = quiet(MiniDDPMClassConditionalPipeline(unet, diffusers.DDPMScheduler()))
    (image,) = pipe(2, num_inference_steps=2).images
    assert image.size == (12, 8) and image.mode == "RGB"


def test_learned_variance(tiny_unet):
    """Twice the channels: DDPM uses the variance; other schedulers get the prediction alone, also after conversion."""
    ours = MiniDDPMScheduler(variance_type="learned_range", clip_sample=False)
    unet = GaussianDenoiser(learned_variance=True)
    stds = {}
    for cls in (MiniDDPMScheduler, diffusers.DDPMScheduler, MiniDDIMScheduler, diffusers.DDIMScheduler,
                diffusers.EulerDiscreteScheduler, diffusers.UniPCMultistepScheduler):  # fmt: skip
        pipe = quiet(MiniDDPMPipeline(unet, cls.from_config(ours.config)))
        images = pipe(8, num_inference_steps=25, generator=seeds(*range(8)), output_type="latent").images
        assert images.shape == (8, 1, 8, 8) and abs(images.mean() - 0.3) < 0.03
        stds[cls.__name__] = images.std()
    # The variance channel says 1, the largest: DDPM's samples must show it.
    assert stds["MiniDDPMScheduler"] > stds["MiniDDIMScheduler"] + 0.01
    fixed = MiniDDPMScheduler(variance_type="fixed_small", clip_sample=False)
    pipe = quiet(MiniDDPMPipeline(unet, fixed))
    assert pipe(1, num_inference_steps=3, output_type="latent").images.shape == (1, 1, 8, 8)


def test_guidance_is_the_formula():
    """In closed form: guided x_0 = uncond + s (cond - uncond), so the mean lands at mean + s·k·shift."""
    unet = GaussianDenoiser(mean=0.0, std=0.05, shift=0.1, prediction_type="sample", num_class_embeds=5)
    pipe = quiet(
        MiniDDPMClassConditionalPipeline(unet, MiniDDIMScheduler(prediction_type="sample", clip_sample=False))
    )

    def mean(labels, scale):
        images = pipe(labels, guidance_scale=scale, num_inference_steps=50, generator=seeds(*range(len(labels))),
                      output_type="latent").images  # fmt: skip
        return images.mean(dim=(1, 2, 3))

    expected = torch.tensor([0.0, 0.1, 0.3])
    for scale, factor in ((0.0, 1), (1.0, 1), (2.0, 2), (3.0, 3)):  # at 1 and below: none
        torch.testing.assert_close(mean([0, 1, 3], scale), expected * factor, atol=0.02, rtol=0)
    torch.testing.assert_close(mean([4, 4, 4], 3.0), torch.zeros(3), atol=0.02, rtol=0)  # no class, nothing to guide


@pytest.mark.parametrize(
    ("interval", "guided"), [((0.0, 1.0), range(10)), ((0.3, 0.6), range(3, 6)), ((0.55, 1), range(6, 10))]
)
def test_guidance_in_an_interval(labelled, interval, guided):
    """Step i of N is guided where start <= i/N < end, and nowhere else: the same as a callback that does it."""
    labelled.scheduler = MiniDDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    sizes = []
    hook = labelled.unet.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    options = {"num_inference_steps": 10, "latents": torch.ones(1, 1, 8, 8), "output_type": "latent"}
    images = labelled([3], guidance_scale=4.0, guidance_interval=interval, **options).images
    hook.remove()
    assert sizes == [2 if i in guided else 1 for i in range(10)]
    assert labelled.num_timesteps == 10 and labelled.num_guided_timesteps == len(guided)

    def switch(pipe, i, t, tensors):
        pipe._guidance_scale = 4.0 if i + 1 in guided else 1.0
        return {}

    by_hand = labelled([3], guidance_scale=4.0 if 0 in guided else 1.0, callback_on_step_end=switch, **options)
    assert torch.equal(by_hand.images, images)
    assert labelled([3], guidance_scale=1.0, **options).images.sub(images).abs().max() > 1e-3
    assert labelled.num_guided_timesteps == 0


@pytest.mark.parametrize(
    "interval", [(0.6, 0.4), (0.5, 0.5), (-0.1, 1), (0, 1.1), (float("nan"), 1), (0.5,), "ab", 0.5]
)
def test_bad_guidance_interval(labelled, interval):
    with pytest.raises(ValueError, match="`guidance_interval` must be two numbers with 0 <= start < end <= 1"):
        labelled([1], guidance_interval=interval)


def test_guidance_leaves_a_learned_variance_alone():
    unet = GaussianDenoiser(shift=0.1, num_class_embeds=5, learned_variance=True)
    pipe = MiniDDPMClassConditionalPipeline(unet, MiniDDPMScheduler())
    pipe._guidance_scale = 4.0
    output = pipe._predict(torch.randn(2, 1, 8, 8), torch.tensor(500), class_labels=torch.tensor([1, 2]))
    assert output.shape == (2, 2, 8, 8) and (output[:, 1] == 1).all()


# ---- Same seed, same image ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", [MiniDDIMScheduler, MiniDDPMScheduler])
def test_the_split_of_the_batch_does_not_matter(plain, labelled, scheduler):
    labels = [3, 1, 4, 1]
    for pipe, argument in ((plain, len), (labelled, list)):
        pipe.scheduler = scheduler()

        def images(rows, pipe=pipe, argument=argument):
            chosen = argument([labels[row] for row in rows])
            return pipe(chosen, num_inference_steps=5, eta=1.0, generator=seeds(*rows), output_type="pt").images

        whole = images(range(4))
        assert whole.std(dim=0).max() > 1e-3  # the rows do differ
        for rows in ([0], [3], [2, 1], [0, 1, 2]):
            torch.testing.assert_close(images(rows), whole[rows], atol=1e-5, rtol=0)


def test_a_seed_stands_for_its_generator(plain, labelled):
    """Of a batch, and of each image: in a list, a tuple or a range, beside generators, as an integer of numpy."""
    options = {"num_inference_steps": 3, "eta": 1.0, "output_type": "pt"}  # noise at each step
    for pipe, first in ((plain, 2), (labelled, [3, 4])):
        batch = pipe(first, **options, generator=torch.Generator().manual_seed(7)).images
        each = pipe(first, **options, generator=seeds(0, 1)).images
        assert not torch.equal(batch, each)
        for seed in (7, np.int64(7)):
            assert torch.equal(pipe(first, **options, generator=seed).images, batch)
        for given in ([0, 1], (0, 1), range(2), [*seeds(0), 1], [np.uint8(0), 1], tuple(seeds(0, 1))):
            assert torch.equal(pipe(first, **options, generator=given).images, each)
        pipe(first, **options, generator=2**64 - 1)


def test_seed_dtype_and_latents(plain, labelled):
    reference = plain(2, num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images
    again = plain(2, num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images
    other = plain(2, num_inference_steps=4, generator=torch.manual_seed(1), output_type="np").images
    assert np.array_equal(reference, again) and not np.allclose(reference, other, atol=1e-2)
    noise = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(0))
    assert np.array_equal(plain(2, num_inference_steps=4, latents=noise, output_type="np").images, reference)
    plain.to(torch.bfloat16)
    assert plain.dtype == torch.bfloat16
    half = plain(2, num_inference_steps=4, generator=torch.manual_seed(0), output_type="np").images
    assert half.dtype == np.float32 and np.abs(half - reference).max() < 0.05  # the same noise in every dtype
    labelled.to(torch.float16)
    assert np.isfinite(labelled([1], num_inference_steps=2, output_type="np").images).all()


def test_output_types_agree(plain):
    outputs = {
        kind: plain(2, num_inference_steps=3, generator=torch.manual_seed(0), output_type=kind).images
        for kind in ("pil", "np", "pt", "latent")
    }
    assert outputs["np"].shape == (2, 8, 8, 1) and outputs["pt"].shape == (2, 1, 8, 8)
    np.testing.assert_array_equal(outputs["np"].transpose(0, 3, 1, 2), outputs["pt"].numpy())
    torch.testing.assert_close((outputs["latent"] / 2 + 0.5).clamp(0, 1), outputs["pt"])
    for image, array in zip(outputs["pil"], outputs["np"], strict=True):
        assert image.size == (8, 8) and image.mode == "L"
        np.testing.assert_array_equal(np.asarray(image), (array[..., 0] * 255).round().astype("uint8"))
    assert isinstance(plain(1, num_inference_steps=1, return_dict=False), tuple)


def test_sizes(plain):
    assert plain(1, num_inference_steps=2, height=5, width=11, output_type="pt").images.shape == (1, 1, 5, 11)
    assert plain(1, num_inference_steps=2, latents=torch.randn(1, 1, 7, 9), output_type="pt").images.shape == (
        1,
        1,
        7,
        9,
    )


def test_trajectory(plain, labelled):
    """x_T ... x_0 as in the loop, and DDIM's relation between consecutive x_t and the clipped x_0 holds.

    By default diffusers' does not: its noise is that of the network, which a clipped x_0 does not fit.
    """
    plain.scheduler = MiniDDIMScheduler(prediction_type="v_prediction", clip_sample_range=0.5)
    noise = torch.randn(2, 1, 8, 8, generator=torch.manual_seed(0))
    output = plain(2, num_inference_steps=5, latents=noise, output_type="latent", return_trajectory=True)
    trajectory, predicted = output.latents_trajectory, output.pred_original_samples
    assert trajectory.shape == (6, 2, 1, 8, 8) and predicted.shape == (5, 2, 1, 8, 8)
    assert torch.equal(trajectory[0], noise) and torch.equal(trajectory[-1], output.images)
    assert (predicted.abs() == 0.5).any()
    cumprod = plain.scheduler.alphas_cumprod
    for i, (t, s) in enumerate(zip(plain.scheduler.timesteps[:-1], plain.scheduler.timesteps[1:], strict=True)):
        eps = (trajectory[i] - cumprod[t] ** 0.5 * predicted[i]) / (1 - cumprod[t]) ** 0.5
        expected = cumprod[s] ** 0.5 * predicted[i] + (1 - cumprod[s]) ** 0.5 * eps
        torch.testing.assert_close(trajectory[i + 1], expected, atol=1e-4, rtol=1e-4)
    images, *rest = labelled([1, 2], num_inference_steps=3, return_dict=False, return_trajectory=True)
    assert len(images) == 2 and [tuple(tensor.shape) for tensor in rest] == [(4, 2, 1, 8, 8), (3, 2, 1, 8, 8)]


# ---- Callbacks and the host's machinery -----------------------------------------------------------------------------


def test_callback_sees_and_changes(plain, labelled):
    seen = []

    def zero_at_the_end(pipe, i, t, tensors):
        seen.append((i, int(t), set(tensors)))
        return {"latents": torch.zeros_like(tensors["latents"])} if i == pipe.num_timesteps - 1 else {}

    images = plain(1, num_inference_steps=4, output_type="latent", callback_on_step_end=zero_at_the_end).images
    assert not images.any() and plain.num_timesteps == 4
    assert seen == [(i, int(t), {"latents"}) for i, t in enumerate(plain.scheduler.timesteps)]

    def relabel(pipe, i, t, tensors):
        return {"class_labels": torch.full_like(tensors["class_labels"], 7)}

    def unguide(pipe, i, t, tensors):
        pipe._guidance_scale = 0.0

    # With ε and clipping an untrained network makes one and the same image of everything.
    labelled.scheduler = MiniDDIMScheduler(clip_sample=False, prediction_type="v_prediction")
    two = {"num_inference_steps": 2, "latents": torch.ones(1, 1, 8, 8), "output_type": "latent", "guidance_scale": 3.0}
    as_is = labelled([3], **two).images
    relabelled = labelled(
        [3], callback_on_step_end=relabel, callback_on_step_end_tensor_inputs=["class_labels"], **two
    )
    unguided = labelled([3], callback_on_step_end=unguide, **two)
    assert not torch.allclose(as_is, relabelled.images) and not torch.allclose(as_is, unguided.images)
    assert labelled.guidance_scale == 0.0 and not labelled.do_classifier_free_guidance


def test_interrupt(plain):
    steps = []

    def stop(pipe, i, t, tensors):
        steps.append(i)
        pipe._interrupt = i == 1

    output = plain(1, num_inference_steps=5, callback_on_step_end=stop, return_trajectory=True)
    assert steps == [0, 1] and plain.interrupt and len(output.latents_trajectory) == 3
    plain(1, num_inference_steps=3)
    assert not plain.interrupt


def test_from_pipe_shares_the_weights_as_they_are(labelled):
    labelled.to(torch.bfloat16)
    other = MiniDDPMPipeline.from_pipe(labelled)
    assert other.unet is labelled.unet and other.dtype == torch.bfloat16
    back = MiniDDPMClassConditionalPipeline.from_pipe(labelled)
    assert back.config.id2label == DIGITS and back.unet is labelled.unet
    with_scheduler = MiniDDPMPipeline.from_pipe(labelled, scheduler=MiniDDPMScheduler())
    assert type(with_scheduler.scheduler) is MiniDDPMScheduler


def test_compiled_unet_saves(plain, tmp_path):
    plain.unet = torch.compile(plain.unet, backend="eager")
    plain.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "model_index.json").read_text())["unet"][1] == "MiniUNet2DModel"
    MiniDDPMPipeline.from_pretrained(tmp_path)


# ---- Labels ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labels", [3, "three", [3], ["three"], np.array([3]), np.int64(3), torch.tensor(3),
                                    torch.tensor([3], dtype=torch.int32)])  # fmt: skip
def test_labels_in_any_form(labelled, labels):
    assert labelled.get_label_ids(labels) == [3]


def test_id2label_survives_json(labelled, tmp_path):
    labelled.save_pretrained(tmp_path)
    again = MiniDDPMClassConditionalPipeline.from_pretrained(tmp_path)
    assert again.config.id2label == DIGITS and again.get_label_ids(["nine", 0]) == [9, 0]


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("cat", ValueError, "Unknown class label 'cat'; it must be one of zero, one, two, .*nine"),
        (["one", "cat"], ValueError, "'cat'"),
        (11, ValueError, "Class label 11 is out of range; it must be 0 to 9, or 10 for no class"),
        (-1, ValueError, "-1 is out of range"),
        (3.0, TypeError, "3.0"),
        (True, TypeError, "True"),
        (None, TypeError, "None"),
        (torch.tensor([0.5]), TypeError, "0.5"),
        (torch.tensor([[1, 2]]), TypeError, r"\[1, 2\]"),
        ([], ValueError, "`class_labels` is empty"),
    ],
)
def test_bad_labels(labelled, labels, error, message):
    with pytest.raises(error, match=message) as raised:
        labelled(labels)
    assert "\n" not in str(raised.value)


def test_labels_for_a_network_without_them(tiny_unet):
    pipe = MiniDDPMClassConditionalPipeline(tiny_unet(num_class_embeds=None), MiniDDIMScheduler())
    with pytest.raises(ValueError, match=r"takes no class labels .*Use MiniDDPMPipeline"):
        pipe([1])


def test_a_name_without_names(tiny_unet):
    pipe = MiniDDPMClassConditionalPipeline(tiny_unet(), MiniDDIMScheduler())
    with pytest.raises(ValueError, match=r"Unknown class label 'one'; it must be an integer, since .* no `id2label`"):
        pipe("one")


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2"])
def test_bad_guidance_scale(labelled, scale):
    with pytest.raises(ValueError, match="`guidance_scale` must be a finite number"):
        labelled([1], guidance_scale=scale)


def test_a_pipeline_can_bring_its_defaults(tiny_unet, tmp_path):
    def calls(pipe, *args, **options):
        pipe.set_progress_bar_config(disable=True)
        pipe(*args, **options, output_type="latent")
        return pipe.num_timesteps, getattr(pipe, "guidance_scale", None)

    scheduler = MiniDDIMScheduler()
    conditional = MiniDDPMClassConditionalPipeline(tiny_unet(), scheduler)
    assert calls(conditional, [1]) == (20, 1.5)
    assert "default_num_inference_steps" not in conditional.config  # so that nobody's pipeline meets an unknown key
    few = MiniDDPMClassConditionalPipeline(
        tiny_unet(), scheduler, default_num_inference_steps=2, default_guidance_scale=1.0
    )
    few.save_pretrained(tmp_path)
    for pipe in (few, MiniDDPMClassConditionalPipeline.from_pretrained(tmp_path)):
        assert calls(pipe, [1]) == (2, 1.0)
        assert calls(pipe, [1], num_inference_steps=3, guidance_scale=2.0) == (3, 2.0)
    plain = MiniDDPMPipeline(tiny_unet(num_class_embeds=None), scheduler, default_num_inference_steps=4)
    assert calls(plain) == (4, None)
    for bad in (0, -1, True, "4", float("nan")):
        with pytest.raises(ValueError, match=r"`default_num_inference_steps` must be a number above 0, but is"):
            MiniDDPMPipeline(plain.unet, scheduler, default_num_inference_steps=bad)


def test_a_pipeline_can_bring_its_noise_and_its_guidance_interval(tiny_unet, tmp_path):
    """A call without arguments is the call with the defaults of the configuration, also after saving and loading."""

    def draw(pipe, **options):
        return quiet(pipe)([1, 0], generator=[0, 1], output_type="pt", **options).images

    plain = MiniDDPMClassConditionalPipeline(tiny_unet(), MiniDDIMScheduler())
    own = MiniDDPMClassConditionalPipeline(
        plain.unet, plain.scheduler, default_eta=0.5, default_guidance_scale=2.0, default_guidance_interval=(0.2, 0.6)
    )
    own.save_pretrained(tmp_path)
    loaded = MiniDDPMClassConditionalPipeline.from_pretrained(tmp_path)
    wanted = draw(plain, eta=0.5, guidance_scale=2.0, guidance_interval=(0.2, 0.6))
    assert plain.num_guided_timesteps == 8
    for pipe in (own, loaded):
        assert torch.equal(draw(pipe), wanted)
        assert torch.equal(draw(pipe, eta=0, guidance_interval=(0, 1)), draw(plain, guidance_scale=2.0))
        # What suits the pipeline's own number of steps and its own scale may not suit others.
        other = {"num_inference_steps": 5, "guidance_scale": 3.0}
        assert torch.equal(draw(pipe, **other), draw(plain, **other))
    assert not torch.equal(draw(plain), wanted)
    assert resolve_guidance(loaded, "x") == {"guidance_scale": 2.0, "guidance_interval": (0.2, 0.6)}
    unconditional = MiniDDPMPipeline(tiny_unet(num_class_embeds=None), plain.scheduler, default_eta=1)
    drawn = [quiet(unconditional)(2, **options, generator=0, output_type="pt").images for options in ({}, {"eta": 1})]
    assert torch.equal(*drawn)
    for bad in (-0.1, True, "1", float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"`default_eta` must be a number of at least 0, but is"):
            MiniDDPMPipeline(plain.unet, plain.scheduler, default_eta=bad)
    for bad in (0.5, (0.5, 0.5), (0.6, 0.4), (0, 2), "01"):
        with pytest.raises(ValueError, match=r"`default_guidance_interval` must be two numbers with"):
            MiniDDPMClassConditionalPipeline(plain.unet, plain.scheduler, default_guidance_interval=bad)


# ---- Other arguments ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "`num_inference_steps` must be a whole number, at least 1, but is 0"),
        ({"num_inference_steps": -5}, "-5"),
        ({"num_inference_steps": 2.5}, "2.5"),
        ({"num_inference_steps": True}, "True"),
        ({"num_inference_steps": 1001}, "at most 1000, .* but is 1001"),
        ({"eta": -0.1}, "`eta` must be a number of at least 0, .* but is -0.1"),
        ({"eta": "1"}, "'1'"),
        ({"height": 0}, "`height` must be a whole number"),
        ({"output_type": "jpg"}, "`output_type` must be one of pil, np, pt, latent, but is 'jpg'"),
        ({"callback_on_step_end_tensor_inputs": ["prompt"]}, "may hold latents.* but holds 'prompt'"),
        ({"generator": seeds(0, 1, 2)}, "`generator` is a list of 3 for 2 images"),
        ({"latents": torch.zeros(2, 3, 8, 8)}, r"shape \(2, 1, 8, 8\), but has \(2, 3, 8, 8\)"),
        ({"latents": torch.zeros(3, 1, 8, 8)}, r"but has \(3, 1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8)}, r"but has \(2, 1, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8), "height": 9}, r"shape \(2, 1, 9, 8\)"),
    ],
)
def test_bad_arguments(plain, labelled, arguments, message):
    for call in (lambda **kwargs: plain(2, **kwargs), lambda **kwargs: labelled([1, 2], **kwargs)):
        with pytest.raises(ValueError, match=message) as raised:
            call(**arguments)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"generator": "cuda"}, "`generator` must be a seed, such as 0, a torch.Generator, or a list .* holds 'cuda'"),
        ({"generator": 1.0}, "holds 1.0"),
        ({"generator": True}, "holds True"),
        ({"generator": [torch.Generator(), None]}, "holds None"),
        ({"generator": -1}, "`generator` must be a seed of 0 to .*, but is or holds -1"),
        ({"generator": [0, 2**64]}, "holds 18446744073709551616"),
        ({"generator": np.int64(-1)}, "holds -1"),
        ({"generator": [0, 1, 2]}, "`generator` is a list of 3 for 2 images. Give one seed or generator per image"),
        ({"latents": torch.full((2, 1, 8, 8), float("nan"))}, "`latents` must be finite"),
        ({"latents": torch.full((2, 1, 8, 8), float("inf"))}, "`latents` must be finite"),
        (
            {"latents": torch.zeros(2, 1, 8, 8, dtype=torch.int64)},
            "`latents` must be a tensor of floats, but is torch.int64",
        ),
        ({"latents": np.zeros((2, 1, 8, 8))}, "`latents` must be a tensor of floats, but is ndarray"),
        ({"eta": float("nan")}, "`eta` must be a number"),
        ({"callback_on_step_end": 3}, "`callback_on_step_end` must be a function, but is 3"),
        ({"callback_on_step_end_tensor_inputs": "latents"}, "must be a list, but is 'latents'"),
    ],
)
def test_arguments_of_another_type_are_refused(plain, labelled, arguments, message):
    test_bad_arguments(plain, labelled, arguments, message)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_generator_on_another_device_is_refused(plain):
    elsewhere = torch.Generator("cuda")
    for generator in (elsewhere, [elsewhere, torch.Generator()]):
        with pytest.raises(ValueError, match="`generator` is on .*cuda:0.*, but must be on the CPU"):
            plain(2, generator=generator)
    expected = plain(2, generator=seeds(0, 1), num_inference_steps=2, output_type="np").images
    plain.to("cuda")
    on_gpu = plain(2, generator=seeds(0, 1), num_inference_steps=2, output_type="np").images
    np.testing.assert_allclose(on_gpu, expected, atol=1e-2)
    plain(1, generator=elsewhere, num_inference_steps=2)


@pytest.mark.parametrize("name", ["seed", "manual_seed", "steps", "class_label"])
def test_an_unknown_argument_is_one_line(plain, labelled, name):
    expected = "for the same images again, pass generator=0" if "seed" in name else "num_inference_steps, eta"
    for call in (lambda **kwargs: plain(2, **kwargs), lambda **kwargs: labelled([1, 2], **kwargs)):
        with pytest.raises(TypeError, match=f"no argument `{name}`.*{expected}") as raised:
            call(**{name: 0})
        assert "\n" not in str(raised.value)


def test_the_default_steps_are_at_most_those_trained_on(tiny_unet):
    scheduler = MiniDDIMScheduler(num_train_timesteps=10)
    for changes, steps in (
        ({}, 10),
        ({"default_num_inference_steps": 50}, 10),
        ({"default_num_inference_steps": 4}, 4),
    ):
        pipe = quiet(MiniDDPMPipeline(tiny_unet(), scheduler, **changes))
        pipe(1)
        assert pipe.num_timesteps == default_steps(pipe) == steps
    with pytest.raises(ValueError, match="at most 10, .* but is 20"):
        pipe(1, num_inference_steps=20)


@pytest.mark.parametrize("id2label", ["ab", ["a", "b"], {"cat": 0}, {-1: "cat"}, {1.5: "cat"}])
def test_bad_names_of_classes(tiny_unet, id2label):
    with pytest.raises(ValueError, match="`id2label` must be a dict of names by label, "):
        MiniDDPMClassConditionalPipeline(tiny_unet(), MiniDDIMScheduler(), id2label)
    with pytest.raises(ValueError, match=r"`default_num_inference_steps` must be a whole number, but is 2.5"):
        MiniDDPMPipeline(tiny_unet(), MiniDDIMScheduler(), default_num_inference_steps=2.5)


# ---- NaN, and other float types -------------------------------------------------------------------------------------


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
@pytest.mark.parametrize("scheduler", [MiniDDIMScheduler, MiniDDPMScheduler, diffusers.DPMSolverMultistepScheduler])
def test_nan_ends_in_an_error_and_not_in_black_images(plain, scheduler, output_type):
    plain.scheduler = scheduler()

    def spoil(pipe, i, t, tensors):
        return {"latents": tensors["latents"] * (float("nan") if i == 1 else 1)}

    with pytest.raises(ValueError, match=r"became NaN or infinite .*float32.*step 3 of 3.*`callback_on_step_end`"):
        plain(2, num_inference_steps=3, callback_on_step_end=spoil, output_type=output_type)
    plain.unet.conv_out.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match="became NaN or infinite.*Check the weights") as raised:
        plain(2, num_inference_steps=3, output_type=output_type)
    assert "\n" not in str(raised.value) and "callback" not in str(raised.value)


def test_infinity_of_the_network_is_not_clipped_away(plain):
    """In half precision an overflow is infinite, which clipping would make white."""
    plain.unet.conv_out.bias.data.fill_(70_000)
    plain.to(torch.float16)
    plain.scheduler = MiniDDIMScheduler(prediction_type="sample")
    with pytest.raises(ValueError, match="a network in float16.* float16 overflows: use bfloat16 or float32"):
        plain(2, num_inference_steps=3, output_type="np")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ([], "must return a dict of new tensors or None, but returned a list"),
        (torch.zeros(2, 1, 8, 8), "but returned a Tensor"),
        (True, "but returned a bool"),
        ({"latent": torch.zeros(2, 1, 8, 8)}, "returned 'latent'. It may return latents"),
        ({"latents": None}, "`latents` that `callback_on_step_end` returned must be a tensor of floats"),
        ({"latents": torch.zeros(1, 1, 8, 8)}, r"must have the shape \(2, 1, 8, 8\), but has \(1, 1, 8, 8\)"),
        ({"latents": torch.zeros(2, 1, 8, 8, dtype=torch.uint8)}, "tensor of floats, but is torch.uint8"),
    ],
)
def test_what_a_callback_returns_is_checked(plain, labelled, changed, message):
    for call in (lambda **kwargs: plain(2, **kwargs), lambda **kwargs: labelled([1, 2], **kwargs)):
        with pytest.raises(ValueError, match=message) as raised:
            call(num_inference_steps=2, callback_on_step_end=lambda *_: changed)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([1, 99]), ValueError, "99 is out of range"),
        (torch.tensor([-1, 0]), ValueError, "-1 is out of range"),
        (torch.tensor([1]), ValueError, "returned 1 class labels for 2 images"),
        (torch.tensor([0.5, 1.0]), TypeError, "0.5"),
        (None, TypeError, "None"),
    ],
)
def test_labels_of_a_callback_are_checked(labelled, labels, error, message):
    with pytest.raises(error, match=message):
        labelled([1, 2], num_inference_steps=2, callback_on_step_end=lambda *_: {"class_labels": labels})

    def spoil(pipe, i, t, tensors):  # in place
        tensors["class_labels"][0] = 99

    inputs = {"callback_on_step_end_tensor_inputs": ["class_labels"]}
    with pytest.raises(ValueError, match="99 is out of range"):
        labelled([1, 2], num_inference_steps=2, callback_on_step_end=spoil, **inputs)


def test_latents_of_a_callback_keep_their_type(plain):
    def images(dtype):
        def change(pipe, i, t, tensors):
            return {"latents": torch.full((1, 1, 8, 8), 0.5, dtype=dtype)}

        return plain(1, num_inference_steps=2, callback_on_step_end=change, output_type="latent").images

    assert images(torch.float64).dtype == torch.float32
    assert torch.equal(images(torch.float64), images(torch.float16))


@pytest.mark.parametrize(
    "scheduler",
    [MiniDDPMScheduler, MiniDDIMScheduler, diffusers.EulerAncestralDiscreteScheduler, diffusers.DDPMScheduler],
)
def test_one_seed_draws_the_same_image_in_double_precision(plain, scheduler):
    config = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}
    plain.scheduler = scheduler(**config, prediction_type="v_prediction")
    options = {"num_inference_steps": 4, "eta": 1.0, "output_type": "np"}
    single = plain(2, generator=seeds(0, 1), **options).images
    plain.to(torch.float64)
    np.testing.assert_allclose(plain(2, generator=seeds(0, 1), **options).images, single, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_image(labelled, folder, dtype):
    def images(pipe):
        return quiet(pipe)([3, 4], num_inference_steps=3, generator=seeds(0, 1), output_type="np").images

    expected, loaded = images(labelled), images(load_pipeline(folder))
    torch.set_default_dtype(dtype)
    try:
        assert np.array_equal(images(labelled), expected)
        assert np.array_equal(images(load_pipeline(folder, dtype=torch.float32)), loaded)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("batch_size", [0, -1, 1.5, None])
def test_bad_batch_size(plain, batch_size):
    with pytest.raises(ValueError, match="`batch_size` must be a whole number"):
        plain(batch_size)


@pytest.mark.parametrize("name", ["EDMEulerScheduler", "EDMDPMSolverMultistepScheduler",
                                  "FlowMatchEulerDiscreteScheduler"])  # fmt: skip
def test_schedulers_of_another_process_are_refused(plain, name):
    plain.scheduler = getattr(diffusers, name)()
    with pytest.raises(ValueError, match=f"{name} does not work with this pipeline: it has no `alphas_cumprod`"):
        plain()


# ---- load_pipeline --------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(labelled, tmp_path):
    labelled.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def test_load_pipeline(folder):
    for name in (folder, str(folder)):
        pipe = load_pipeline(name)
        assert type(pipe) is MiniDDPMClassConditionalPipeline
    pipe = load_pipeline(folder, scheduler=MiniDDPMScheduler(), dtype=torch.bfloat16)
    assert type(pipe.scheduler) is MiniDDPMScheduler and pipe.dtype == torch.bfloat16


def edit(file, **changes):
    content = json.loads(file.read_text())
    for key, value in changes.items():
        content.pop(key, None)
        if value is not None:
            content[key] = value
    file.write_text(json.dumps(content))


def cut(file):
    file.write_bytes(file.read_bytes()[:-100])


def garble(file):
    content = bytearray(file.read_bytes())
    content[8:40] = b"\xff" * 32
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "error", "message"),
    [
        (lambda f: (f / "model_index.json").unlink(), OSError, "is not a pipeline: it has no model_index.json"),
        (lambda f: (f / "model_index.json").write_text("{"), ValueError, "model_index.json is not valid JSON"),
        (lambda f: edit(f / "model_index.json", _class_name="DDPMPipeline"), ValueError, "'DDPMPipeline', which"),
        (lambda f: edit(f / "model_index.json", vae=["diffusers", "VAE"]), ValueError, "unknown key 'vae'"),
        (lambda f: edit(f / "model_index.json", unet=None), ValueError, "model_index.json: the key 'unet' is missing"),
        (lambda f: edit(f / "model_index.json", unet=["their_unet", "UNet"]), ValueError, "unknown class, 'UNet'"),
        (lambda f: shutil.rmtree(f / "scheduler"), OSError, "incomplete pipeline: .*scheduler/scheduler_config.json"),
        (lambda f: edit(f / "unet/config.json", colour=1), ValueError, "unet/config.json: unknown key 'colour'"),
        (lambda f: edit(f / "unet/config.json", sample_size=None), ValueError, "the key 'sample_size' is missing"),
        (lambda f: edit(f / "scheduler/scheduler_config.json", betas_=1), ValueError, "unknown key 'betas_'"),
        (lambda f: cut(f / "unet/diffusion_pytorch_model.safetensors"), ValueError,
         "diffusion_pytorch_model.safetensors is truncated or corrupt"),
        (lambda f: garble(f / "unet/diffusion_pytorch_model.safetensors"), ValueError, "is truncated or corrupt"),
        (lambda f: (f / "unet/diffusion_pytorch_model.safetensors").unlink(), OSError, "has no weights"),
        (lambda f: edit(f / "unet/config.json", block_out_channels=[16, 16]), ValueError, "does not fit .*config"),
    ],
)  # fmt: skip
def test_load_pipeline_says_what_is_wrong(folder, damage, error, message):
    damage(folder)
    with pytest.raises(error, match=message) as raised:
        load_pipeline(folder)
    assert "\n" not in str(raised.value)


def test_a_converted_scheduler_keeps_the_keys_of_others(folder):
    """diffusers stores the keys of the scheduler that a config came from; they are not mistakes."""
    pipe = load_pipeline(folder)
    solver = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config, solver_order=3)
    pipe.scheduler = MiniDDIMScheduler.from_config(solver.config)
    expected = quiet(pipe)(1, num_inference_steps=3, generator=seeds(0), output_type="pt").images
    pipe.save_pretrained(folder)
    loaded = load_pipeline(folder)
    assert type(loaded.scheduler) is MiniDDIMScheduler and loaded.scheduler.config["solver_order"] == 3
    assert torch.equal(loaded.scheduler.alphas_cumprod, pipe.scheduler.alphas_cumprod)
    again = quiet(loaded)(1, num_inference_steps=3, generator=seeds(0), output_type="pt").images
    assert torch.equal(again, expected)


@pytest.mark.parametrize("name", ["no-such-thing", "a/b/c", "bad name/x"])
def test_load_pipeline_of_nothing(name):
    with pytest.raises(OSError, match=f"No pipeline {name!r}: it is not a folder"):
        load_pipeline(name)


def test_load_pipeline_from_the_hub_in_plain_words(fresh_process, loopback_hub):
    loopback_hub.commit("user/empty", {"README.md": b"nothing"})
    loopback_hub.commit("user/private", {"model_index.json": b"{}"})
    loopback_hub.repos["user/private"]["private"] = True
    code = """
import json, mini_ddpm
out = {}
for name, kwargs in {
    "user/missing": {}, "user/private": {}, "user/empty": {}, "user/empty@": {"revision": "v9"},
    "user/offline": {"local_files_only": True}}.items():
    try:
        mini_ddpm.load_pipeline(name.rstrip("@"), **kwargs)
    except OSError as error:
        out[name] = [str(error), type(error.__cause__).__name__]
print(json.dumps(out))
"""
    run = fresh_process(code, token=None)
    for name, message in {
        "user/missing": "The repository user/missing does not exist, or it is private",
        "user/private": "The repository user/private does not exist, or it is private",
        "user/empty": "The repository user/empty holds no pipeline: it has no model_index.json",
        "user/empty@": "The repository user/empty has no revision 'v9'",
        "user/offline": "The repository user/offline (revision 'main') is not in the local cache",
    }.items():
        line, cause = run.result[name]
        assert line.startswith(message) and "\n" not in line, line
        assert cause != "NoneType"


# ---- A call keeps its state to itself ------------------------------------------------------------------------------


def in_threads(calls, workers=8):
    """The images of all calls, made at once by as many threads, each of which starts with another call."""
    with ThreadPoolExecutor(workers) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


@pytest.mark.parametrize("name", ["MiniDDIMScheduler", "MiniDDPMScheduler", "DDIMScheduler",
                                  "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "EulerDiscreteScheduler",
                                  "PNDMScheduler", "DEISMultistepScheduler"])  # fmt: skip
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_threads_get_the_images_that_they_would_get_alone(labelled, name):
    """One pipeline, eight threads, other labels, steps and guidance in each call, set by callbacks too."""
    labelled.scheduler = getattr(diffusers, name).from_config(labelled.scheduler.config)

    def call(i):
        grids = []

        def callback(pipe, step, t, tensors):
            grids.append(pipe.scheduler.timesteps)
            if i % 3 == 0 and step == 1:
                pipe._guidance_scale = 1.0 + i  # through the argument
            if i % 3 == 1 and step == 2:
                labelled._interrupt = True  # through the variable
            assert pipe is labelled and pipe.num_timesteps == len(pipe.scheduler.timesteps)
            return {}

        images = labelled(
            [i % 10, (3 * i) % 10],
            num_inference_steps=4 + i % 5,
            guidance_scale=1 + i % 4,
            guidance_interval=((i % 3) / 10, 0.9),
            generator=seeds(i, i + 1),
            output_type="pt",
            callback_on_step_end=callback,
        ).images
        assert (len(grids) == 3) == (i % 3 == 1) and all(grid is grids[0] for grid in grids)
        return images

    calls = [functools.partial(call, i) for i in range(16)]
    alone = [call() for call in calls]
    assert len({images.numpy().tobytes() for images in alone}) == len(alone)  # so that a mix-up shows
    for images, expected in zip(in_threads(calls), alone, strict=True):
        assert torch.equal(images, expected)
    assert not labelled._running_calls and labelled._calls.get() == ()


def test_a_call_within_a_call_keeps_its_own_state(labelled):
    inner = []

    def callback(pipe, step, t, tensors):
        if step == 1:
            inner.append(
                pipe([5], num_inference_steps=2, guidance_scale=3, generator=seeds(5), output_type="pt").images
            )
            assert pipe.num_timesteps == 4 and pipe.guidance_scale == 2.0
        return {}

    options = {"num_inference_steps": 4, "guidance_scale": 2.0, "generator": seeds(1), "output_type": "pt"}
    nested = labelled([3], **options, callback_on_step_end=callback).images
    assert torch.equal(nested, labelled([3], **(options | {"generator": seeds(1)})).images)
    alone = labelled([5], num_inference_steps=2, guidance_scale=3, generator=seeds(5), output_type="pt").images
    assert torch.equal(inner[0], alone)


def test_a_stop_button_in_another_thread_ends_all_running_calls(plain):
    started, pressed = threading.Barrier(3), threading.Event()

    def call():
        steps = []

        def callback(pipe, step, t, tensors):
            steps.append(step)
            if step == 0:
                started.wait(30)
                pressed.wait(30)
            return {}

        plain(1, num_inference_steps=5, callback_on_step_end=callback)
        return steps

    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(call) for _ in range(2)]
        started.wait(30)
        plain._interrupt = True
        pressed.set()
        assert [future.result() for future in futures] == [[0], [0]]
    assert len(plain(1, num_inference_steps=3, return_trajectory=True).latents_trajectory) == 4  # the next one runs


def test_what_a_call_leaves_behind(labelled):
    """The pipeline tells of its latest call, its scheduler stays the same object, and copies work."""
    assert (labelled.guidance_scale, labelled._guidance_interval, labelled.num_guided_timesteps) == (
        1.0,
        (0.0, 1.0),
        0,
    )
    assert (labelled.num_timesteps, labelled.interrupt, labelled.do_classifier_free_guidance) == (0, False, False)
    scheduler = labelled.scheduler
    expected = labelled([3], num_inference_steps=3, generator=seeds(0), output_type="pt").images
    assert labelled.scheduler is scheduler and scheduler.num_inference_steps == 3
    assert (labelled.num_timesteps, labelled.num_guided_timesteps, labelled.guidance_scale) == (3, 3, 1.5)
    for copied in (copy.deepcopy(labelled), pickle.loads(pickle.dumps(labelled))):
        assert copied.scheduler is not scheduler and copied.num_timesteps == 3
        again = copied([3], num_inference_steps=3, generator=seeds(0), output_type="pt").images
        assert torch.equal(again, expected)

    def fail(*_):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        labelled([3], num_inference_steps=4, callback_on_step_end=fail)
    assert not labelled._running_calls and labelled._calls.get() == ()


def test_a_step_that_was_replaced_on_the_object_is_used(plain):
    """`scheduler.step = torch.compile(scheduler.step)` is bound to that very object, so it is not copied."""
    step, seen = plain.scheduler.step, []
    plain.scheduler.step = functools.wraps(step)(lambda *args, **kwargs: seen.append(args[1]) or step(*args, **kwargs))
    images = plain(1, num_inference_steps=3, generator=seeds(0), output_type="pt").images
    del plain.scheduler.step
    assert len(seen) == 3
    assert torch.equal(images, plain(1, num_inference_steps=3, generator=seeds(0), output_type="pt").images)


def test_only_the_first_argument_needs_no_name(plain, labelled):
    for pipe, arguments, message in (
        (plain, (1, 3), r"only `batch_size` without a name.*: num_inference_steps=3\.$"),
        (
            labelled,
            (3, 20),
            "only `class_labels` .*: num_inference_steps=20 or guidance_scale=20. Several labels are a ",
        ),
        (labelled, (3, torch.Generator(), 1), "num_inference_steps=20 or"),
    ):
        with pytest.raises(TypeError, match=message) as raised:
            pipe(*arguments)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize("output_type", ["pil", "np", "pt", "latent"])
def test_a_notebook_shows_the_images_of_a_call(plain, output_type):
    shown = plain(3, num_inference_steps=2, generator=0, output_type=output_type)._repr_png_()
    with Image.open(io.BytesIO(shown)) as picture:
        assert (picture.format, picture.mode, picture.size) == (
            "PNG",
            "RGB",
            (3 * 68, 68),
        )  # 8 times 8 pixels, a border
        pixels = np.asarray(picture)
    expected = np.stack(plain(3, num_inference_steps=2, generator=0).images)  # (3, 8, 8)
    tiles = pixels.reshape(68, 3, 68, 3)[2:-2:8, :, 2:-2:8, 0].transpose(1, 0, 2)
    np.testing.assert_allclose(tiles.astype(int), expected, atol=output_type == "latent")


def test_a_notebook_shows_a_big_call_in_rows_and_only_pictures():
    output = MiniDDPMPipelineOutput(torch.ones(70, 3, 99, 99))
    with Image.open(io.BytesIO(output._repr_png_())) as picture:
        assert picture.size == (10 * 103, 7 * 103)  # of 64 images
    few = MiniDDPMPipelineOutput([Image.new("L", (64, 64))] * 11)
    with Image.open(io.BytesIO(few._repr_png_())) as picture:
        assert picture.size == (10 * 68, 2 * 68)
        assert [picture.getpixel((x, 100))[0] for x in (30, 100, 500)] == [0, 255, 255]
    assert MiniDDPMPipelineOutput(torch.ones(2, 4, 8, 8))._repr_png_() is None


# ---- What faults planted at random were not noticed in --------------------------------------------------------------


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction"])
def test_predicted_x0_inverts_the_forward_process(prediction_type):
    """PNDM returns no x_0 and has no grid of sigmas."""
    scheduler = diffusers.PNDMScheduler(prediction_type=prediction_type)
    assert not hasattr(scheduler, "_sigma_to_alpha_sigma_t")
    x0, noise = torch.randn(2, 2, 1, 4, 4, generator=torch.manual_seed(0))
    for t in (torch.tensor(0), torch.tensor(400), torch.tensor(900)):
        sample = scheduler.add_noise(x0, noise, t[None])
        prediction = noise if prediction_type == "epsilon" else MiniDDPMScheduler(
            beta_schedule="linear").get_velocity(x0, noise, t)  # fmt: skip
        predicted = predict_x0(scheduler, prediction, 0, t, sample)
        torch.testing.assert_close(predicted, x0, atol=1e-3, rtol=1e-3)


def test_a_network_without_a_size_of_its_own():
    pipe = quiet(MiniDDPMPipeline(GaussianDenoiser(sample_size=None), MiniDDIMScheduler()))
    for size in ({}, {"height": 5}, {"width": 5}):
        with pytest.raises(ValueError, match="no `sample_size`. Pass `height` and `width`"):
            pipe(1, num_inference_steps=1, **size)
    options = {"num_inference_steps": 1, "output_type": "pt"}
    assert pipe(1, height=5, width=6, **options).images.shape == (1, 1, 5, 6)
    assert pipe(1, latents=torch.randn(1, 1, 7, 3), **options).images.shape == (1, 1, 7, 3)


def test_the_defaults_of_a_call(plain, labelled):
    for pipe, first in ((plain, ()), (labelled, ([1],))):
        pipe.scheduler = MiniDDIMScheduler(prediction_type="v_prediction", clip_sample_range=0.5)
        output = pipe(*first, generator=seeds(0))
        (image,) = output.images
        assert (image.mode, image.size, pipe.num_timesteps) == ("L", (8, 8), 20)
        assert output.latents_trajectory is None and output.pred_original_samples is None
        options = {"eta": 0.0, "use_clipped_model_output": True, "num_inference_steps": 20}
        explicit = pipe(*first, **options, generator=seeds(0), return_dict=False)
        assert len(explicit) == 1 and np.array_equal(np.asarray(explicit[0][0]), np.asarray(image))
        for change in ({"eta": 1.0}, {"use_clipped_model_output": False}):
            other = pipe(*first, **(options | change), generator=seeds(0)).images[0]
            assert not np.array_equal(np.asarray(other), np.asarray(image))
