"""Export: one graph draws what the pipeline draws, travels with the pipeline, is refused in words."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from conftest import TOKEN
from diffusers import UNet2DModel

import mini_ddpm
import mini_ddpm.export
import mini_ddpm_cli
from mini_ddpm import (
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    MiniDDPMScheduler,
    export_sampler,
)
from mini_ddpm.hub.card import render_card
from mini_ddpm.hub.facts import read_facts
from mini_ddpm.hub.publish import push, staged_pipeline

NAMES = {0: "coat", 1: "boot", 2: "bag"}


@pytest.fixture(scope="module")
def conditional(tiny_unet, tmp_path_factory):
    """A saved pipeline of three classes that guides by default, and what is known of it."""
    folder = tmp_path_factory.mktemp("conditional")
    scheduler = MiniDDIMScheduler(prediction_type="v_prediction")
    pipe = MiniDDPMClassConditionalPipeline(tiny_unet(num_class_embeds=4), scheduler, NAMES, white_level=253)
    pipe.save_pretrained(folder)
    record = {"metric": "fid", "value": 3.25, "dataset": "user/x", "num_inference_steps": 3, "note": "by hand"}
    (folder / "facts.json").write_text(json.dumps({"license": "mit", "evaluation": [record]}))
    return folder


@pytest.fixture(scope="module")
def exported(conditional):
    """The folder of the pipeline with its graph in it, as `mini-ddpm export FOLDER` leaves it."""
    assert run("export", conditional, "--steps", 3) == 0
    return conditional


@pytest.fixture
def pipe(conditional):
    return opened(conditional)


def run(*arguments: object) -> int:
    return mini_ddpm_cli.main([str(argument) for argument in arguments])


def opened(folder):
    pipe = mini_ddpm.load_pipeline(folder, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def session(file):
    return onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])


def metadata(file):
    return session(file).get_modelmeta().custom_metadata_map


def drawn(file, noise, labels=None):
    inputs = {"noise": noise.numpy()} | ({} if labels is None else {"class_labels": np.array(labels)})
    (images,) = session(file).run(["images"], inputs)
    return torch.from_numpy(images)


def graphs(graph):
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from graphs(attribute.g)


# ---- the graph draws what the pipeline draws ------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"guidance_scale": 3.0, "guidance_interval": (0.2, 0.7)}])
def test_a_guided_sampler(exported, tmp_path, options):
    pipe = opened(exported)
    result = export_sampler(pipe, tmp_path / "x.onnx", num_inference_steps=20, **options)
    assert result.num_inference_steps == 20 and result.difference <= 2e-5
    assert result.num_bytes == (tmp_path / "x.onnx").stat().st_size
    few = (exported / "onnx" / "sampler.onnx").stat().st_size  # 3 steps
    assert abs(result.num_bytes - few) < 5_000  # no copy of network or weights for a step
    labels = [2, 0, 3, 1, 2]  # 3 is the null label
    noise = torch.randn(5, 1, 8, 8)
    images = drawn(tmp_path / "x.onnx", noise, labels)
    expected = pipe(labels, num_inference_steps=20, latents=noise, output_type="pt", **options).images
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-5)
    assert images.max() == torch.tensor(253 / 255) and images.min() == 0  # the levels
    for other in ({"guidance_scale": 1}, {"guidance_scale": 3.0}):
        others = pipe(labels, num_inference_steps=20, latents=noise, output_type="pt", **other).images
        assert (images - others).abs().max() > 1e-3


def test_an_unconditional_sampler_of_colour_pictures_that_are_no_squares(tiny_unet, tmp_path):
    unet = tiny_unet(num_class_embeds=None, in_channels=3, out_channels=3, sample_size=(7, 10))
    pipe = MiniDDPMPipeline(unet, MiniDDIMScheduler(), default_num_inference_steps=2, black_level=3)
    pipe.set_progress_bar_config(disable=True)
    assert export_sampler(pipe, tmp_path / "x.onnx").num_inference_steps == 2
    noise = torch.randn(2, 3, 7, 10)
    expected = pipe(batch_size=2, latents=noise, output_type="pt").images
    torch.testing.assert_close(drawn(tmp_path / "x.onnx", noise), expected, rtol=0, atol=2e-5)
    inputs = {value.name: (value.shape, value.type) for value in session(tmp_path / "x.onnx").get_inputs()}
    assert inputs == {"noise": (["batch", 3, 7, 10], "tensor(float)")}


def test_a_learned_variance_and_a_network_of_diffusers(tmp_path):
    unet = UNet2DModel(
        sample_size=8, in_channels=1, out_channels=2, block_out_channels=(8, 8), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
    ).eval()  # fmt: skip
    scheduler = MiniDDIMScheduler.from_config(MiniDDPMScheduler(variance_type="learned_range").config)
    pipe = MiniDDPMPipeline(unet, scheduler)
    pipe.set_progress_bar_config(disable=True)
    export_sampler(pipe, tmp_path / "x.onnx", num_inference_steps=3)
    noise = torch.randn(4, 1, 8, 8)
    expected = pipe(batch_size=4, num_inference_steps=3, latents=noise, output_type="pt").images
    torch.testing.assert_close(drawn(tmp_path / "x.onnx", noise), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("guidance", [{}, {"guidance_interval": (0.5, 1.0)}])
def test_a_program_of_torch_export(pipe, tmp_path, guidance):
    result = export_sampler(pipe, tmp_path / "x.pt2", num_inference_steps=2, **guidance)
    assert result.difference <= 2e-5
    files = {"metadata.json": ""}
    program = torch.export.load(tmp_path / "x.pt2", extra_files=files).module()
    noise, labels = torch.randn(5, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1])
    expected = pipe(labels, num_inference_steps=2, latents=noise, output_type="pt", **guidance).images
    torch.testing.assert_close(program(noise=noise, class_labels=labels), expected, rtol=0, atol=2e-5)
    assert json.loads(json.loads(files["metadata.json"])["timesteps"]) == [999, 499]


def test_the_network_alone(conditional, pipe, tmp_path):
    shutil.copytree(conditional, tmp_path / "digits", ignore=shutil.ignore_patterns("onnx"))
    assert run("export", tmp_path / "digits", "--unet-only") == 0
    assert os.listdir(tmp_path / "digits" / "onnx") == ["unet.onnx"]
    file = tmp_path / "digits" / "onnx" / "unet.onnx"
    sample, timestep, labels = torch.randn(4, 1, 8, 8), torch.tensor([0, 999, 5, 300]), torch.tensor([0, 1, 2, 3])
    inputs = {"sample": sample.numpy(), "timestep": timestep.numpy(), "class_labels": labels.numpy()}
    (output,) = session(file).run(["model_output"], inputs)
    with torch.no_grad():
        expected = pipe.unet(sample, timestep, class_labels=labels).sample
    assert session(file).get_inputs()[1].shape == ["batch"]
    torch.testing.assert_close(torch.from_numpy(output), expected, rtol=0, atol=2e-5)
    told = metadata(file)
    assert told["prediction_type"] == "v_prediction" and told["null_label"] == "3" and "timesteps" not in told
    levels = torch.tensor(json.loads(told["alphas_cumprod"]))
    torch.testing.assert_close(levels, pipe.scheduler.alphas_cumprod)  # for a loop of one's own


def test_half_precision_halves_the_file_and_loses_nothing_that_was_half_before(tiny_unet, tmp_path):
    unet = tiny_unet(num_class_embeds=None, block_out_channels=(32, 64), norm_num_groups=8).half().float()
    pipe = MiniDDPMPipeline(unet, MiniDDIMScheduler())
    pipe.set_progress_bar_config(disable=True)
    result = export_sampler(pipe, tmp_path / "x.onnx", num_inference_steps=2, dtype="fp16")
    assert result.difference <= 2e-5
    parameters = sum(parameter.numel() for parameter in unet.parameters())
    assert 2 * parameters < result.num_bytes < 2.1 * parameters + 150_000


def test_tracing_freezes_no_batch_size(tiny_unet):
    unet, example = tiny_unet().requires_grad_(False), (torch.randn(2, 1, 8, 8), torch.tensor(5), torch.tensor([1, 2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is deprecated
        traced = torch.jit.trace(lambda *inputs: unet(*inputs, False)[0], example, check_trace=False)
        inputs = torch.randn(5, 1, 8, 8), torch.tensor(700), torch.tensor([0, 1, 2, 3, 10])
        torch.testing.assert_close(traced(*inputs), unet(*inputs).sample, rtol=1e-5, atol=1e-5)


# ---- what the file tells --------------------------------------------------------------------------------------------


def test_metadata(exported):
    file = exported / "onnx" / "sampler.onnx"
    told = metadata(file)
    assert told["license"] == "mit" and told["dtype"] == "fp32" and told["scheduler"] == "MiniDDIMScheduler"
    assert told["mini_ddpm_version"] == mini_ddpm.__version__
    values = {name: json.loads(told[name]) for name in ("num_inference_steps", "timesteps", "guidance_scale", "eta")}
    assert values == {"num_inference_steps": 3, "timesteps": [999, 666, 332], "guidance_scale": 1.5, "eta": 0}
    assert json.loads(told["class_names"]) == ["coat", "boot", "bag"]
    (record,) = json.loads(told["evaluation"])
    assert record["value"] == 3.25 and record["note"] == "by hand"
    model = onnx.load(file)
    assert model.producer_name == "mini-ddpm" and not model.doc_string
    for graph in graphs(model.graph):
        for item in (*graph.node, *graph.initializer):
            assert not item.doc_string and not item.metadata_props
    assert str(Path(mini_ddpm.__file__).parent).encode() not in file.read_bytes()  # no stack traces


def test_what_is_known_of_other_weights_is_not_told(pipe):
    assert {"license", "evaluation", "weights_sha256"} < mini_ddpm.export._metadata(pipe, None, "fp32").keys()
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    assert not {"license", "evaluation", "weights_sha256"} & mini_ddpm.export._metadata(pipe, None, "fp32").keys()


# ---- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"path": "x.pt"}, "must end in .onnx or .pt2"),
        ({"path": "."}, "must end in .onnx or .pt2"),
        ({"path": "folder.onnx"}, "is a folder"),
        ({"dtype": "int8"}, "dtype='int8' must be one of fp32, fp16"),
        ({"dtype": "fp16", "path": "x.pt2"}, "a .pt2 file is written in fp32"),
        ({"num_inference_steps": 0}, "within [1, 1000]"),
        ({"num_inference_steps": 1001}, "within [1, 1000]"),
        ({"guidance_scale": float("nan")}, "guidance_scale=nan must be finite"),
        ({"guidance_interval": (0.5, 0.5)}, "guidance_interval"),
        ({"unet_only": True, "num_inference_steps": 4}, "num_inference_steps=4: the network alone"),
        ({"unet_only": True, "guidance_scale": 1.0}, "guidance_scale=1.0: the network alone"),
    ],
)
def test_arguments_are_refused_in_a_sentence(pipe, tmp_path, monkeypatch, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.onnx").mkdir()
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        export_sampler(pipe, **{"path": "x.onnx", **options})
    assert "\n" not in str(error.value)
    assert os.listdir() == ["folder.onnx"]


def test_noisy_samplers_are_refused_with_the_way_out(tiny_unet, tmp_path, capsys):
    pipe = MiniDDPMPipeline(tiny_unet(num_class_embeds=None), MiniDDPMScheduler())
    with pytest.raises(ValueError, match=r"scheduler=MiniDDPMScheduler .*MiniDDIMScheduler\.from_config"):
        export_sampler(pipe, tmp_path / "x.onnx")
    pipe.save_pretrained(tmp_path / "pipeline")
    command = ("export", tmp_path / "pipeline", "--steps", 1, "--out", tmp_path / "x.pt2")
    assert run(*command) == 2 and "--scheduler ddim" in capsys.readouterr().err
    assert run(*command, "--scheduler", "ddim") == 0


def test_networks_that_cannot_be_compared_are_refused(tiny_unet, tmp_path):
    half = MiniDDPMPipeline(tiny_unet(num_class_embeds=None).half(), MiniDDIMScheduler())
    with pytest.raises(ValueError, match=re.escape('float16 on cpu. Move it first: pipe.to("cpu", torch.float32)')):
        export_sampler(half, tmp_path / "x.onnx")
    sizeless = MiniDDPMPipeline(tiny_unet(num_class_embeds=None, sample_size=None), MiniDDIMScheduler())
    with pytest.raises(ValueError, match="sample_size"):
        export_sampler(sizeless, tmp_path / "x.onnx")
    unconditional = MiniDDPMPipeline(tiny_unet(num_class_embeds=None), MiniDDIMScheduler())
    with pytest.raises(ValueError, match=r"guidance_scale=2.0: MiniDDPMPipeline is unconditional"):
        export_sampler(unconditional, tmp_path / "x.onnx", guidance_scale=2.0)
    assert os.listdir(tmp_path) == []


def test_a_graph_that_draws_something_else_is_not_kept(pipe, tmp_path, monkeypatch):
    (tmp_path / "x.pt2").write_text("an older file")
    forward = mini_ddpm.export._Step.forward
    monkeypatch.setattr(mini_ddpm.export._Step, "forward", lambda *inputs: forward(*inputs) + 1e-3)
    with pytest.raises(ValueError, match=r"x\.pt2 was not written: its result differs from the pipeline's by 0\.0005"):
        export_sampler(pipe, tmp_path / "x.pt2", num_inference_steps=1)
    assert os.listdir(tmp_path) == ["x.pt2"] and (tmp_path / "x.pt2").read_text() == "an older file"


def test_a_missing_package_names_the_extra(pipe, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'mini-ddpm[export]'")):
        export_sampler(pipe, tmp_path / "x.onnx")


# ---- the file travels with the pipeline -----------------------------------------------------------------------------


def test_the_command_says_what_it_wrote_and_where(conditional, tmp_path, monkeypatch, capsys):
    shutil.copytree(conditional, tmp_path / "digits", ignore=shutil.ignore_patterns("onnx"))
    monkeypatch.chdir(tmp_path)
    assert run("export", "digits", "--steps", 2, "--dtype", "fp16", "--guidance-scale", 1) == 0
    out, file = capsys.readouterr().out, tmp_path / "digits" / "onnx" / "sampler.onnx"
    assert f"onnx/sampler.onnx: 2 steps, fp16, {file.stat().st_size / 1e6:.1f} MB" in out.replace(os.sep, "/")
    assert re.search(
        r"at batch 1 and 3: largest difference \S+\. One image takes \d+ ms, with the pipeline \d+ ms", out
    )
    pipe, noise = mini_ddpm.load_pipeline("digits"), torch.randn(2, 1, 8, 8)  # the new folder is no obstacle
    expected = pipe([0, 1], num_inference_steps=2, guidance_scale=1, latents=noise, output_type="pt").images
    difference = (drawn(file, noise, [0, 1]) - expected).abs().max()
    assert 1e-7 < difference < 0.02


def test_the_card_shows_how_to_run_the_file(exported, tmp_path, monkeypatch):
    with staged_pipeline(exported) as folder:
        assert (folder / "onnx" / "sampler.onnx").read_bytes() == (exported / "onnx/sampler.onnx").read_bytes()
        card = (folder / "README.md").read_text(encoding="utf-8")
        published = render_card(read_facts(folder) | {"repo_id": "user/digits", "revision": "0" * 40})
    monkeypatch.chdir(exported)  # as `hf download --local-dir .` leaves the files
    for text in (card.replace("path/to/this/folder", str(exported)), published):
        *_, code = re.findall(r"```python\n(.*?)```", text, flags=re.S)
        assert "torch" not in code and "diffusers" not in code
        names: dict = {}
        exec(code, names)
        assert names["images"].shape == (2, 1, 8, 8) and names["images"].std() > 0.05
        (script,) = re.findall(r"```js\n(.*?)```", text, flags=re.S)
        assert "{ length: 64 }" in script and "[1, 1, 8, 8]" in script and "class_labels" in script
        if node := shutil.which("node"):
            (tmp_path / "card.mjs").write_text(script)
            subprocess.run([node, "--check", tmp_path / "card.mjs"], check=True)
    assert "hf download user/digits onnx/sampler.onnx" in published
    assert "onnx" not in render_card(read_facts(exported) | {"exports": ["unet.onnx"]})


def test_a_graph_of_other_weights_is_not_pushed(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "digits")
    pipe = opened(exported)
    with torch.no_grad():
        pipe.unet.conv_in.bias += 1
    pipe.save_pretrained(tmp_path / "digits")
    with pytest.raises(ValueError, match=r"sampler\.onnx was exported from other weights"):
        push(tmp_path / "digits", "user/digits", token=TOKEN)
    (tmp_path / "link").mkdir()
    shutil.copytree(exported, tmp_path / "linked", ignore=shutil.ignore_patterns("onnx"))
    (tmp_path / "linked" / "onnx").symlink_to(exported / "onnx")
    with (
        pytest.raises(ValueError, match="is a link that leads out of the folder"),
        staged_pipeline(tmp_path / "linked"),
    ):
        pass


def test_the_hub_has_no_graph_of_other_weights(exported, loopback_hub, fresh_process, tmp_path):
    code = f"""
import json, sys, torch, mini_ddpm
from mini_ddpm.hub.publish import push
push({str(exported)!r}, "user/exported")
pipe = mini_ddpm.load_pipeline("user/exported")
images = pipe([0, 1], num_inference_steps=1).images
pipe.push_to_hub("user/exported")
from huggingface_hub import HfApi
names = [HfApi().list_repo_files("user/exported")]
with torch.no_grad():
    pipe.unet.conv_in.bias += 1
pipe.push_to_hub("user/exported")
names.append(HfApi().list_repo_files("user/exported"))
print(json.dumps([len(images), *["onnx/sampler.onnx" in one for one in names]]))
"""
    assert fresh_process(code).result == [2, True, False]


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "megabytes"), [("fp32", 12.5), ("fp16", 6.5)])
def test_the_shipped_student(tmp_path, dtype, megabytes):
    file = tmp_path / "sampler.onnx"
    result = export_sampler(opened("mnist-distilled"), file, dtype=dtype)
    assert result.num_bytes < megabytes * 1e6 and result.difference <= 2e-5
    code = (
        "import sys, time, numpy as np, onnxruntime\n"
        f"session = onnxruntime.InferenceSession({str(file)!r}, providers=['CPUExecutionProvider'])\n"
        "noise = np.random.default_rng(0).standard_normal((1, 1, 28, 28), dtype=np.float32)\n"
        "session.run(None, {'noise': noise, 'class_labels': np.array([3])})\n"
        "print(time.process_time(), 'torch' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert float(answer[0]) < 0.9 and answer[1] == "False"
