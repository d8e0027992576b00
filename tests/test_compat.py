"""Among diffusers' tools: our parts in its pipelines, its schedulers in ours, and each tool on our network.

`docs/compatibility.md` names the test behind every claim; the last tests here hold it to that. What the tests of the
schedulers and pipelines already show is not shown again.
"""

import ast
import importlib.util
import re
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMPipeline, DDPMPipeline, UNet2DModel
from diffusers.models.attention_dispatch import attention_backend
from diffusers.training_utils import EMAModel

from mini_ddpm import (
    PRETRAINED,
    MiniDDIMScheduler,
    MiniDDPMPipeline,
    MiniDDPMScheduler,
    MiniUNet2DModel,
)

ROOT = Path(__file__).parents[1]
OURS = {"beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"}  # our defaults, said to diffusers
PAIRS = {"ddpm": (MiniDDPMScheduler, diffusers.DDPMScheduler), "ddim": (MiniDDIMScheduler, diffusers.DDIMScheduler)}
gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ON_GPU = pytest.param("cuda", marks=gpu)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture
def unet(tiny_unet):
    return tiny_unet(num_class_embeds=None)


@pytest.fixture
def pipe(unet):
    return quiet(MiniDDPMPipeline(unet, MiniDDIMScheduler()))


@pytest.fixture
def sample():
    return torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def predict(unet, sample, timestep=500):
    with torch.no_grad():
        return unet(sample.to(unet.device), timestep).sample.cpu()


def draw(pipe, steps=3):
    return pipe(2, num_inference_steps=steps, generator=seeds(0, 1), output_type="np").images


# ---- Schedulers, on the shipped weights ----------------------------------------------------------------------------

SCHEDULERS = sorted(
    {c.__name__ for c in MiniDDIMScheduler().compatibles if not c.__name__.startswith("EDM")} - {"MiniDDIMScheduler"}
)
NEEDS = {"DPMSolverSDEScheduler": "torchsde", "LMSDiscreteScheduler": "scipy"}
STEPS, IMAGES = 10, 32
# Two draws of DDIM are 0.6 apart, since they are few, and the others' digits up to 1.2; speckled ones begin at 1.5.
CLOSE = 1.3
DIVERGENT = ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler")  # refused from t = T - 1


def frechet_distance(images, others):
    """Between Gaussians fitted to features of 28x28 images: averages of 4x4 pixels, of the grey and of its edges.

    The grey alone does not see speckle; the edges, as a Laplace filter gives them, do.
    """
    laplace = torch.tensor([[[[0.0, -0.5, 0.0], [-0.5, 2.0, -0.5], [0.0, -0.5, 0.0]]]])

    def fit(x):
        edges = F.conv2d(x, laplace).abs()  # (B, 1, 26, 26)
        features = torch.cat([F.avg_pool2d(x, 4).flatten(1), F.avg_pool2d(edges, 4).flatten(1)], dim=1).double()
        return features.mean(0), torch.cov(features.T)

    (mean, cov), (other_mean, other_cov) = fit(images), fit(others)
    root_trace = torch.linalg.eigvals(cov @ other_cov).real.clamp(min=0).sqrt().sum()
    return ((mean - other_mean).square().sum() + cov.trace() + other_cov.trace() - 2 * root_trace).item()


@pytest.fixture(scope="module")
def trained():
    if not (PRETRAINED / "mnist" / "model_index.json").is_file():
        pytest.skip("no trained weights in the package")
    return quiet(MiniDDPMPipeline.from_pretrained(PRETRAINED / "mnist"))


def digits(trained, scheduler, first=0, count=IMAGES):
    pipe = quiet(MiniDDPMPipeline(trained.unet, scheduler))
    generator = seeds(*range(first, first + count))
    return pipe(count, num_inference_steps=STEPS, generator=generator, output_type="pt").images


@pytest.fixture(scope="module")
def by_ddim(trained):
    return digits(trained, MiniDDIMScheduler.from_config(trained.scheduler.config), first=1000, count=2 * IMAGES)


def grid(scheduler):
    scheduler.set_timesteps(STEPS)
    return [scheduler.timesteps, torch.as_tensor(getattr(scheduler, "sigmas", 0.0)), scheduler.alphas_cumprod]


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Should have t")
def test_every_compatible_scheduler_draws_digits(name, trained, by_ddim, tmp_path):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    cls = getattr(diffusers, name)
    options = {"timestep_spacing": "leading"} if name in DIVERGENT else {}
    ours = MiniDDIMScheduler.from_config(trained.scheduler.config, **options)
    swapped = cls.from_config(ours.config)
    assert frechet_distance(digits(trained, swapped), by_ddim) < CLOSE
    # There and back by way of files is the same as in memory.
    ours.save_pretrained(tmp_path / "ours")
    swapped.save_pretrained(tmp_path / "theirs")
    for one, other in (
        (swapped, cls.from_pretrained(tmp_path / "ours")),
        (ours, MiniDDIMScheduler.from_config(swapped.config)),
        (ours, MiniDDIMScheduler.from_pretrained(tmp_path / "theirs")),
    ):
        assert other.config.prediction_type == "v_prediction"
        assert all(map(torch.equal, grid(one), grid(other)))


@pytest.mark.parametrize("wrong", [{"beta_schedule": "linear"}, {"prediction_type": "epsilon"}])
def test_the_distance_tells_garbage_from_digits(wrong, trained, by_ddim):
    config = trained.scheduler.config
    assert frechet_distance(digits(trained, MiniDDIMScheduler.from_config(config)), by_ddim) < CLOSE
    garbage = digits(trained, MiniDDIMScheduler.from_config(config, **wrong))
    assert frechet_distance(garbage, by_ddim) > 1.15 * CLOSE


@pytest.mark.parametrize("name", DIVERGENT)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_schedulers_that_would_diverge_are_refused(name, pipe):
    cls = getattr(diffusers, name)
    pipe.scheduler = cls.from_config(MiniDDIMScheduler().config)
    with pytest.raises(ValueError, match=r"diverges.*timestep_spacing='leading'") as raised:
        pipe(1, num_inference_steps=STEPS)
    assert "\n" not in str(raised.value)
    pipe.scheduler = cls.from_config(MiniDDIMScheduler(timestep_spacing="leading").config)
    assert pipe(1, num_inference_steps=STEPS, output_type="pt").images.isfinite().all()


@pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
@pytest.mark.parametrize("network", ["UNet2DModel", "MiniUNet2DModel"])
def test_our_parts_in_diffusers_pipelines(pair, network, unet, tmp_path):
    """In memory and after save and load, the images of diffusers' own scheduler, where that one is right."""
    if network == "UNet2DModel":
        torch.manual_seed(0)
        unet = UNet2DModel(sample_size=8, in_channels=1, out_channels=1, block_out_channels=(4, 8), norm_num_groups=2,
                           down_block_types=("DownBlock2D", "AttnDownBlock2D"), attention_head_dim=4,
                           up_block_types=("AttnUpBlock2D", "UpBlock2D")).eval()  # fmt: skip
    ours, theirs = (cls(**OURS) for cls in pair)
    host = {MiniDDPMScheduler: DDPMPipeline, MiniDDIMScheduler: DDIMPipeline}[pair[0]]

    def images(pipe):
        generator = torch.Generator().manual_seed(0)
        return quiet(pipe)(2, generator=generator, num_inference_steps=5, output_type="np").images

    expected = images(host(unet, theirs))
    np.testing.assert_allclose(images(host(unet, ours)), expected, atol=1e-5)
    host(unet, ours).save_pretrained(tmp_path)
    loaded = host.from_pretrained(tmp_path)
    assert type(loaded.unet) is type(unet)
    np.testing.assert_allclose(images(loaded), expected, atol=1e-5)


def test_from_pipe_to_and_from_diffusers_pipelines(pipe):
    theirs = DDIMPipeline.from_pipe(pipe, unet=pipe.unet)  # by itself it takes over a `UNet2DModel` only
    assert theirs.unet is pipe.unet and type(theirs.scheduler) is diffusers.DDIMScheduler  # it makes its own
    back = quiet(MiniDDPMPipeline.from_pipe(theirs))
    assert back.unet is pipe.unet
    np.testing.assert_allclose(draw(back, 5), draw(pipe, 5), atol=2e-6)


# ---- Memory --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "device"), [
    ("enable_model_cpu_offload", "cpu"),
    pytest.param("enable_model_cpu_offload", "cuda", marks=gpu),
    pytest.param("enable_sequential_cpu_offload", "cuda", marks=gpu),
])  # fmt: skip
def test_cpu_offload(method, device, pipe):
    """On a GPU the weights are back on the CPU after the call; on the CPU itself only the hooks can be seen."""
    expected = draw(pipe)
    getattr(pipe, method)(device=device)
    for _ in range(2):
        np.testing.assert_allclose(draw(pipe), expected, atol=1e-5)
    assert hasattr(pipe.unet, "_hf_hook")
    if device == "cuda":
        assert {p.device.type for p in pipe.unet.parameters()} <= {"cpu", "meta"}


@pytest.mark.parametrize("device", ["cpu", ON_GPU])
@pytest.mark.parametrize("options", [{"offload_type": "block_level", "num_blocks_per_group": 1},
                                     {"offload_type": "leaf_level"}], ids=["block_level", "leaf_level"])  # fmt: skip
@pytest.mark.parametrize("disk", [False, True], ids=["memory", "disk"])
def test_group_offload(options, disk, device, pipe, tmp_path):
    expected = draw(pipe)
    options |= {"use_stream": True} if device == "cuda" else {}
    options |= {"offload_to_disk_path": str(tmp_path)} if disk else {}
    pipe.enable_group_offload(torch.device(device), **options)
    assert list(tmp_path.glob("*.safetensors")) or not disk
    for _ in range(2):
        np.testing.assert_allclose(draw(pipe), expected, atol=1e-5)


@pytest.mark.parametrize("storage", [torch.float8_e4m3fn, torch.float8_e5m2, torch.bfloat16])
def test_layerwise_casting(storage, unet, sample):
    expected, size = predict(unet, sample), unet.get_memory_footprint()
    unet.enable_layerwise_casting(storage_dtype=storage, compute_dtype=torch.float32)
    assert unet.mid_block.resnets[0].conv1.weight.dtype == storage
    # What is small and has to be exact stays as it is.
    assert unet.norm_out.weight.dtype == unet.conv_out.weight.dtype == torch.float32
    assert unet.get_memory_footprint() < size
    output = predict(unet, sample)
    assert 0 < (output - expected).abs().max() < 0.3 * expected.abs().max()
    assert unet.mid_block.resnets[0].conv1.weight.dtype == storage


@pytest.mark.parametrize("device_map", [{"": "cpu"}, "cpu"])
def test_device_map_of_the_network(device_map, unet, sample, tmp_path):
    unet.save_pretrained(tmp_path)
    loaded = MiniUNet2DModel.from_pretrained(tmp_path, device_map=device_map)
    assert torch.equal(predict(loaded, sample), predict(unet, sample))


def test_device_map_with_parts_on_disk(unet, sample, tmp_path):
    unet.save_pretrained(tmp_path / "unet")
    device_map = {name: "cpu" for name, _ in unet.named_children()} | {"mid_block": "disk"}
    loaded = MiniUNet2DModel.from_pretrained(tmp_path / "unet", device_map=device_map, offload_folder=tmp_path / "off")
    assert {p.device.type for p in loaded.mid_block.parameters()} == {"meta"}
    torch.testing.assert_close(predict(loaded, sample), predict(unet, sample))


@pytest.mark.parametrize("device_map", ["cpu", pytest.param("balanced", marks=gpu), ON_GPU])
def test_device_map_of_the_pipeline(device_map, pipe, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = quiet(MiniDDPMPipeline.from_pretrained(tmp_path, device_map=device_map))
    np.testing.assert_allclose(draw(loaded), draw(pipe), atol=1e-5)


@pytest.mark.skipif(not importlib.util.find_spec("torchao"), reason="needs torchao")
@pytest.mark.filterwarnings("ignore")  # torchao's own
def test_int8_through_torchao(tiny_unet, sample, tmp_path):
    from torchao.quantization import Int8WeightOnlyConfig

    unet = tiny_unet(num_class_embeds=None, block_out_channels=(32, 64), attention_head_dim=32)
    unet.save_pretrained(tmp_path)
    quantized = MiniUNet2DModel.from_pretrained(
        tmp_path, quantization_config=diffusers.TorchAoConfig(Int8WeightOnlyConfig()), dtype=torch.float32
    )
    assert "Int8" in type(quantized.mid_block.attentions[0].to_q.weight).__name__
    expected = predict(unet, sample)
    assert 0 < (predict(quantized, sample) - expected).abs().max() < 0.1 * expected.abs().max()


# ---- Speed ---------------------------------------------------------------------------------------------------------


class CountingBackend:
    """Runs each graph as it was traced, and counts them: what counts is how often torch compiles."""

    graphs = 0

    def __call__(self, graph, example_inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def backend():
    torch._dynamo.reset()
    yield CountingBackend()
    torch._dynamo.reset()


def test_compile_once_for_all_timesteps_and_twice_for_all_batches(unet, backend):
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    # The second size makes the batch a symbol. (From 16 small images on, torch takes another CPU convolution.)
    for batch, graphs in ((2, 1), (3, 2), (4, 2), (7, 2), (15, 2)):
        sample = torch.randn(batch, 1, 8, 8)
        for t in torch.tensor([999, 500, 0]):
            torch.testing.assert_close(predict(compiled, sample, t), predict(unet, sample, t))
        assert backend.graphs == graphs


def test_compile_with_labels_and_timesteps_per_row(tiny_unet, backend):
    unet = tiny_unet()
    compiled = torch.compile(unet, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch in (2, 3, 4, 5):
            sample, labels, timesteps = torch.randn(batch, 1, 8, 8), torch.arange(batch), 100 * torch.arange(batch)
            output = compiled(sample, timesteps, class_labels=labels).sample
            torch.testing.assert_close(output, unet(sample, timesteps, class_labels=labels).sample)
    assert backend.graphs == 2


def test_a_compiled_network_in_the_pipeline(pipe, backend):
    expected = draw(pipe, 5)
    pipe.unet = torch.compile(pipe.unet, fullgraph=True, backend=backend)
    np.testing.assert_allclose(draw(pipe, 5), expected, atol=1e-5)
    draw(pipe, 7)
    assert backend.graphs == 1


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.slow), ON_GPU])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compile_with_inductor(device, unet, sample, backend):
    expected = predict(unet, sample)
    compiled = torch.compile(unet.to(device), fullgraph=True)
    torch.testing.assert_close(predict(compiled, sample), expected, atol=1e-4, rtol=1e-3)


def test_compile_repeated_blocks(unet, sample, backend):
    expected = predict(unet, sample)
    unet.compile_repeated_blocks(fullgraph=True, backend=backend)
    with torch._dynamo.config.patch(recompile_limit=1):
        for _ in range(2):
            torch.testing.assert_close(predict(unet, sample), expected)
    assert len(unet.attn_processors) > 1 and backend.graphs == 1  # all blocks of a kind, one graph


# ---- Training ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:It is deprecated to pass:FutureWarning")  # EMAModel's own doing
def test_ema(unet, sample, tmp_path):
    ema = EMAModel(unet.parameters(), decay=0.5, model_cls=MiniUNet2DModel, model_config=unet.config)
    before = [p.clone() for p in unet.parameters()]
    with torch.no_grad():
        for parameter in unet.parameters():
            parameter.add_(1)
    ema.step(unet.parameters())
    for average, old, new in zip(ema.shadow_params, before, unet.parameters(), strict=True):
        torch.testing.assert_close(average, ema.cur_decay_value * old + (1 - ema.cur_decay_value) * new)
    ema.save_pretrained(tmp_path)
    assert EMAModel.from_pretrained(tmp_path, model_cls=MiniUNet2DModel).optimization_step == 1
    averaged = MiniUNet2DModel.from_pretrained(tmp_path)
    ema.copy_to(unet.parameters())
    assert torch.equal(predict(averaged, sample), predict(unet, sample))


def test_lora_through_peft(unet, sample, tmp_path):
    """Add, train one step, save, load, switch off, fuse, unfuse, delete."""
    peft = pytest.importorskip("peft")
    base = predict(unet, sample)
    unet.requires_grad_(False)
    unet.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q", "to_k", "to_v", "to_out.0", "conv1"]))
    torch.testing.assert_close(predict(unet, sample), base)  # LoRA starts as nothing
    trained = [p for p in unet.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) < 0.3 * sum(p.numel() for p in unet.parameters())
    unet(sample, 500).sample.square().mean().backward()
    torch.optim.SGD(trained, lr=1.0).step()
    adapted = predict(unet, sample)
    assert adapted.square().mean() < base.square().mean()

    unet.save_lora_adapter(tmp_path)
    unet.unload_lora()
    assert torch.equal(predict(unet, sample), base)
    unet.load_lora_adapter(tmp_path, prefix=None, adapter_name="one", use_safetensors=True)
    torch.testing.assert_close(predict(unet, sample), adapted)
    unet.disable_lora()
    torch.testing.assert_close(predict(unet, sample), base)
    unet.enable_lora()
    unet.fuse_lora()
    torch.testing.assert_close(predict(unet, sample), adapted, atol=1e-4, rtol=1e-4)
    unet.unfuse_lora()
    unet.delete_adapters("one")
    torch.testing.assert_close(predict(unet, sample), base, atol=1e-4, rtol=1e-4)


# ---- Attention -----------------------------------------------------------------------------------------------------


def test_attention_processors(unet, sample):
    class Loud:
        """Hands the tokens on, unmixed and ten times as large."""

        def __call__(self, attn, hidden_states):
            return 10 * hidden_states

    before, expected = unet.attn_processors, predict(unet, sample)
    assert all(name.endswith(".processor") for name in before)
    unet.set_attn_processor(Loud())
    assert (predict(unet, sample) - expected).abs().max() > 1e-3
    unet.set_attn_processor(dict(before))  # it empties the dict
    assert torch.equal(predict(unet, sample), expected)
    unet.set_attn_processor({name: Loud() for name in before})
    assert {type(p) for p in unet.attn_processors.values()} == {Loud}
    with pytest.raises(ValueError, match="number of processors"):
        unet.set_attn_processor({next(iter(before)): Loud()})


@pytest.mark.parametrize("name", ["native", "_native_math", pytest.param("_native_cudnn", marks=gpu),
                                  pytest.param("_native_flash", marks=gpu)])  # fmt: skip
def test_attention_backends(name, unet, sample):
    expected = predict(unet, sample)
    dtype = torch.bfloat16 if name in ("_native_cudnn", "_native_flash") else torch.float32
    unet.to("cuda" if dtype == torch.bfloat16 else "cpu", dtype)
    tolerance = {"atol": 5e-2, "rtol": 5e-2} if dtype == torch.bfloat16 else {"atol": 1e-5, "rtol": 1e-4}
    with attention_backend("native"):  # puts the process's back, which `set` changes and `reset` leaves as it is
        unet.set_attention_backend(name)
        torch.testing.assert_close(predict(unet, sample.to(dtype)).float(), expected, **tolerance)
        unet.reset_attention_backend()
    with attention_backend(name):
        torch.testing.assert_close(predict(unet, sample.to(dtype)).float(), expected, **tolerance)


# ---- Files and surroundings ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_and_variant_files(variant, unet, sample, tmp_path):
    unet.save_pretrained(tmp_path, max_shard_size="20KB", variant=variant)
    shards = sorted(path.name for path in tmp_path.glob("*.safetensors"))
    assert len(shards) > 1 and all((".fp16-" in name) == (variant == "fp16") for name in shards)
    loaded = MiniUNet2DModel.from_pretrained(tmp_path, variant=variant)
    assert torch.equal(predict(loaded, sample), predict(unet, sample))


def test_a_pipeline_in_half_precision_files(pipe, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path, variant="fp16")
    assert (tmp_path / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    loaded = quiet(MiniDDPMPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16))
    assert loaded.dtype == torch.float16
    np.testing.assert_array_equal(draw(loaded), draw(pipe))


def test_progress_bar(pipe, capfd):
    draw(pipe)
    assert capfd.readouterr().err == ""
    pipe.set_progress_bar_config(desc="drawing", ncols=60)
    draw(pipe, 4)
    assert re.search(r"drawing.*4/4", capfd.readouterr().err)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_pipelines_return_every_type(dtype, pipe):
    pipe.to(dtype)
    expected = draw(pipe)
    for output_type in ("pt", "pil"):
        images = pipe(2, num_inference_steps=3, generator=seeds(0, 1), output_type=output_type).images
        if output_type == "pt":
            np.testing.assert_array_equal(images.permute(0, 2, 3, 1).numpy(), expected)
        else:
            pixels = np.stack([np.array(image, dtype=np.float32) for image in images])[..., None]
            np.testing.assert_allclose(pixels / 255, expected, atol=0.51 / 255)
    assert expected.std() > 0


def test_diffusers_still_errs(unet):
    """Where this fails, diffusers has improved: take the row off the page."""
    theirs = diffusers.DDPMScheduler(**OURS)
    theirs.set_timesteps(61)
    assert len(theirs.timesteps) == 62 and theirs.timesteps[-1] == -1
    zeros = torch.zeros(1, 1, 8, 8, dtype=torch.bfloat16)
    assert not theirs.add_noise(zeros, zeros + 1, torch.tensor([3])).any()
    zero_snr = diffusers.DDIMScheduler(rescale_betas_zero_snr=True, **OURS)
    zero_snr.set_timesteps(10)
    assert zero_snr.step(zeros.float(), 999, zeros.float()).prev_sample.isnan().all()
    with pytest.raises(TypeError, match="BFloat16"):
        quiet(DDPMPipeline(unet.to(torch.bfloat16), theirs))(1, num_inference_steps=2)


# ---- The page ------------------------------------------------------------------------------------------------------


def rows():
    """The table rows of the page, each as its cells."""
    text = (ROOT / "docs" / "compatibility.md").read_text(encoding="utf-8")
    tables = re.findall(r"(?:^\|.*\n)+", text, flags=re.MULTILINE)
    return [[cell.strip() for cell in line.strip("| ").split("|")] for t in tables for line in t.splitlines()[2:]]


def functions(file):
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_tests_are_named_in_every_row_of_the_page():
    assert len(rows()) > 30
    for row in rows():
        named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", row[-1])
        assert named, row
        for file, function in named:
            assert function in functions(file), (file, function)


def test_every_test_of_this_file_is_in_the_page():
    page = " ".join(row[-1] for row in rows())
    tests = {name for name in functions("test_compat.py") if name.startswith("test_") and not name.endswith("_page")}
    assert {name for name in tests if f"test_compat.py::{name}`" not in page} == set()
