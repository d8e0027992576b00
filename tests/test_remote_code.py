"""The doors: the same saved pipeline opens with the package and without it, from a folder and from the Hub."""

import hashlib
import inspect
import json
import re
import shutil

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel

from mini_ddpm import (
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    MiniDDPMScheduler,
)
from mini_ddpm import pipeline_mini_ddpm as unconditional
from mini_ddpm import pipeline_mini_ddpm_class_conditional as conditional

DIGITS = dict(enumerate(["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]))

# What the processes share: an image's hash, and how the pipelines are called.
PRELUDE = """
import hashlib, json, logging, os, torch
from diffusers import DDIMScheduler, DiffusionPipeline
import diffusers
diffusers.utils.logging.disable_progress_bar()

def draw(pipe):
    pipe.set_progress_bar_config(disable=True)
    first = [["three", 1]] if "Class" in type(pipe).__name__ else [2]
    images = pipe(*first, num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="np").images
    # As bytes of a picture: where tensors lie in memory decides the last bit of a float.
    return hashlib.sha256((images * 255).round().astype("uint8").tobytes()).hexdigest()

def listing(folder):
    return {os.path.relpath(os.path.join(at, name), folder): hashlib.sha256(open(os.path.join(at, name), "rb").read())
            .hexdigest() for at, _, names in os.walk(folder) for name in names}
out = {}
"""


def draw(pipe):
    names = {}
    exec(PRELUDE, names)  # the very function that the processes use
    return names["draw"](pipe)


def unet_of_diffusers():
    return UNet2DModel(
        sample_size=8,
        in_channels=1,
        out_channels=1,
        block_out_channels=(4, 8),
        norm_num_groups=2,
        down_block_types=("DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D"),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_unet):
    """Both pipelines, saved: {name: (folder, hash of the images)}."""
    folder = tmp_path_factory.mktemp("saved")
    pipes = {
        "plain": MiniDDPMPipeline(tiny_unet(), MiniDDIMScheduler(prediction_type="v_prediction")),
        "labels": MiniDDPMClassConditionalPipeline(
            tiny_unet(), MiniDDPMScheduler(prediction_type="v_prediction"), DIGITS
        ),
    }
    for name, pipe in pipes.items():
        pipe.save_pretrained(folder / name)
    return folder, {name: draw(pipe) for name, pipe in pipes.items()}


def test_saved_files(saved):
    folder, _ = saved
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    without_hash = {re.sub(r"_[0-9a-f]{8}\.py$", "_#.py", name) for name in files}
    assert without_hash == {
        "plain/README.md",
        "plain/model_index.json",
        "plain/pipeline_mini_ddpm_#.py",
        "plain/scheduler/scheduler_config.json",
        "plain/scheduler/scheduling_mini_ddim_#.py",
        "plain/unet/config.json",
        "plain/unet/diffusion_pytorch_model.safetensors",
        "plain/unet/unet_mini_#.py",
        "labels/README.md",
        "labels/model_index.json",
        "labels/pipeline_mini_ddpm_class_conditional_#.py",
        "labels/scheduler/scheduler_config.json",
        "labels/scheduler/scheduling_mini_ddpm_#.py",
        "labels/unet/config.json",
        "labels/unet/diffusion_pytorch_model.safetensors",
        "labels/unet/unet_mini_#.py",
    }
    for path in folder.rglob("*.py"):
        assert path.stem.endswith(hashlib.sha256(path.read_bytes()).hexdigest()[:8])
    index = json.loads((folder / "labels/model_index.json").read_text())
    assert "_name_or_path" not in index
    assert index["_class_name"][1] == "MiniDDPMClassConditionalPipeline"


def test_parts_of_diffusers_are_left_alone(saved, tmp_path):
    unet = unet_of_diffusers()
    MiniDDPMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == ["diffusers", "UNet2DModel"] and index["scheduler"] == ["diffusers", "DDIMScheduler"]
    assert [path.parent for path in tmp_path.rglob("*.py")] == [tmp_path]
    again = MiniDDPMPipeline.from_pretrained(tmp_path)
    assert type(again.unet) is UNet2DModel and type(again.scheduler) is DDIMScheduler


def test_saving_over_replaces_the_source_files(saved, tmp_path):
    folder, _ = saved
    shutil.copytree(folder / "plain", tmp_path / "x")
    (tmp_path / "x/unet/unet_mini_00000000.py").write_text("# of an older version")
    (tmp_path / "x/unet/mine.py").write_text("# not ours")
    pipe = MiniDDPMPipeline.from_pretrained(tmp_path / "x")
    pipe.scheduler = MiniDDPMScheduler.from_config(pipe.scheduler.config)
    pipe.save_pretrained(tmp_path / "x")
    sources = sorted(re.sub(r"_[0-9a-f]{8}$", "", path.stem) for path in (tmp_path / "x").rglob("*.py"))
    assert sources == ["mine", "pipeline_mini_ddpm", "scheduling_mini_ddpm", "unet_mini"]
    assert type(MiniDDPMPipeline.from_pretrained(tmp_path / "x").scheduler) is MiniDDPMScheduler


def test_a_class_of_the_users_own_is_not_published(saved, tmp_path):
    """Only files of this family are copied: nobody expects `save_pretrained` to take their own modules along."""

    class Mine(MiniDDIMScheduler):
        pass

    folder, _ = saved
    pipe = MiniDDPMPipeline.from_pretrained(folder / "plain", scheduler=Mine())
    pipe.save_pretrained(tmp_path)
    assert not list((tmp_path / "scheduler").glob("*.py"))


def test_doors_of_the_installed_package(saved, loopback_hub, fresh_process, tmp_path):
    """Push; doors 1, 2 and 4 from folder and Hub; save again from each; offline from the cache."""
    folder, expected = saved
    run = fresh_process(
        PRELUDE
        + f"""
import mini_ddpm
from mini_ddpm import *
folder, work = {str(folder)!r}, {str(tmp_path)!r}
for name, cls in dict(plain=MiniDDPMPipeline, labels=MiniDDPMClassConditionalPipeline).items():
    repo = "user/" + name
    cls.from_pretrained(f"{{folder}}/{{name}}").push_to_hub(repo)
    for where, source in dict(folder=f"{{folder}}/{{name}}", hub=repo).items():
        for door, opener in dict(own=cls, generic=DiffusionPipeline).items():
            pipe = opener.from_pretrained(source)
            assert type(pipe) is cls and type(pipe.unet) is MiniUNet2DModel, type(pipe)
            out[f"{{name}} {{where}} {{door}}"] = draw(pipe)
            pipe.save_pretrained(f"{{work}}/{{name}}-{{where}}-{{door}}")
        unet = MiniUNet2DModel.from_pretrained(source, subfolder="unet")
        scheduler = type(pipe.scheduler).from_pretrained(source, subfolder="scheduler")
        out[f"{{name}} {{where}} parts"] = draw(cls(unet, scheduler, **pipe.parameters))
        swapped = DiffusionPipeline.from_pretrained(source, scheduler=DDIMScheduler())
        assert type(swapped.scheduler) is DDIMScheduler
    out[f"{{name}} hub cached"] = draw(DiffusionPipeline.from_pretrained(repo, local_files_only=True))
    out[f"{{name}} hub load_pipeline"] = draw(load_pipeline(repo))
    out[f"{{name}} hub trusting"] = draw(DiffusionPipeline.from_pretrained(repo, trust_remote_code=True))
print(json.dumps(out))
"""
    )
    assert len(run.result) == 2 * (2 * 3 + 3)
    for door, image in run.result.items():
        assert image == expected[door.split()[0]], door
    for name in ("plain", "labels"):
        files = {path.relative_to(folder / name).as_posix(): path.read_bytes()
                 for path in (folder / name).rglob("*") if path.is_file() and path.name != "README.md"}  # fmt: skip
        pushed = loopback_hub.files(f"user/{name}")
        assert {path for path in pushed if path not in ("README.md", ".gitattributes")} == set(files)
        for path, content in files.items():
            assert pushed[path] == content, path
        for again in tmp_path.glob(f"{name}-*"):
            for path, content in files.items():
                assert (again / path).read_bytes() == content, (again, path)


@pytest.fixture(scope="module")
def other_version(saved, tmp_path_factory):
    """The plain pipeline as a version of this package would have saved it whose U-Net gives twice the output."""
    folder, _ = saved
    target = tmp_path_factory.mktemp("other") / "plain"
    shutil.copytree(folder / "plain", target)
    (source,) = (target / "unet").glob("unet_mini_*.py")
    code = source.read_text(encoding="utf-8") + (
        "\n_forward = MiniUNet2DModel.forward\n"
        "def _doubled(self, *args, **kwargs):\n"
        "    output = _forward(self, *args, **kwargs)\n"
        "    output.sample = output.sample * 2\n"
        "    return output\n"
        "MiniUNet2DModel.forward = _doubled\n"
    )
    source.unlink()
    stem = "unet_mini_" + hashlib.sha256(code.encode()).hexdigest()[:8]
    (target / "unet" / f"{stem}.py").write_text(code, encoding="utf-8")
    index = json.loads((target / "model_index.json").read_text())
    index["unet"][0] = stem
    (target / "model_index.json").write_text(json.dumps(index))
    return target


def commit(hub, repo, folder):
    hub.commit(repo, {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()})


def test_doors_without_the_package(saved, other_version, loopback_hub, fresh_process, tmp_path):
    """Door 3 from folder and Hub; refused without trust; saved and pushed again; two versions side by side."""
    folder, expected = saved
    for name in ("plain", "labels"):
        commit(loopback_hub, f"user/{name}-remote", folder / name)
    commit(loopback_hub, "user/other-remote", other_version)
    run = fresh_process(
        PRELUDE
        + f"""
folder, work = {str(folder)!r}, {str(tmp_path)!r}
try:
    import mini_ddpm
except ImportError:
    pass
else:
    raise SystemExit("the package is importable")
pipes = {{}}
for name in ("plain", "labels"):
    repo = f"user/{{name}}-remote"
    for where, source in dict(folder=f"{{folder}}/{{name}}", hub=repo).items():
        try:
            DiffusionPipeline.from_pretrained(source)
        except ValueError as error:
            assert "trust_remote_code=True" in str(error), error
        else:
            raise SystemExit("loaded without trust")
        pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
        assert type(pipe.unet).__module__.startswith("diffusers_modules."), type(pipe.unet)
        out[f"{{name}} {{where}}"] = draw(pipe)
        pipe.save_pretrained(f"{{work}}/{{name}}-{{where}}")
        again = DiffusionPipeline.from_pretrained(f"{{work}}/{{name}}-{{where}}", trust_remote_code=True)
        out[f"{{name}} {{where}} again"] = draw(again)
        again.save_pretrained(f"{{work}}/{{name}}-{{where}}-twice")
        again.push_to_hub(f"user/{{name}}-again-{{where}}")
        again = DiffusionPipeline.from_pretrained(f"user/{{name}}-again-{{where}}", trust_remote_code=True)
        out[f"{{name}} {{where}} pushed again"] = draw(again)
        pipes[name, where] = pipe
    out[f"{{name}} hub cached"] = draw(
        DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, local_files_only=True))

# Another version of the code, in the same process: it is itself, and those already open stay what they were.
for where, source in dict(folder={str(other_version)!r}, hub="user/other-remote").items():
    out[f"other {{where}}"] = draw(DiffusionPipeline.from_pretrained(source, trust_remote_code=True))
for (name, where), pipe in pipes.items():
    out[f"{{name}} {{where}} after"] = draw(pipe)
print(json.dumps(out))
""",
        package=False,
    )
    others = {run.result.pop(f"other {where}") for where in ("folder", "hub")}
    assert len(others) == 1 and expected["plain"] not in others
    assert len(run.result) == 2 * (2 * 4 + 1)
    for door, image in run.result.items():
        assert image == expected[door.split()[0]], door
    for name in ("plain", "labels"):
        for again in tmp_path.glob(f"{name}-*"):
            for path in (folder / name).rglob("*"):
                if path.is_file() and path.name != "README.md":
                    assert (again / path.relative_to(folder / name)).read_bytes() == path.read_bytes(), (again, path)
        commit(loopback_hub, f"user/{name}-back", tmp_path / f"{name}-hub-twice")

    # What was saved and pushed without the package opens with it, and so does what another version saved.
    run = fresh_process(
        PRELUDE
        + f"""
import mini_ddpm
from mini_ddpm import *
for name, cls in dict(plain=MiniDDPMPipeline, labels=MiniDDPMClassConditionalPipeline).items():
    for source in (f"{tmp_path!s}/{{name}}-hub-twice", f"user/{{name}}-back", f"user/{{name}}-again-hub"):
        for opener in (cls, DiffusionPipeline):
            pipe = opener.from_pretrained(source)
            assert type(pipe) is cls and type(pipe.unet) is MiniUNet2DModel
            out[f"{{name}} {{source}} {{opener}}"] = draw(pipe)
for source in ({str(other_version)!r}, "user/other-remote"):
    for opener in (MiniDDPMPipeline, DiffusionPipeline):
        pipe = opener.from_pretrained(source)
        assert type(pipe.unet) is MiniUNet2DModel
        out[f"plain {{source}} {{opener}}"] = draw(pipe)
print(json.dumps(out))
"""
    )
    assert len(run.result) == 2 * 3 * 2 + 4
    for door, image in run.result.items():
        assert image == expected[door.split()[0]], door


@pytest.mark.parametrize(
    "name",
    ["num_timesteps", "interrupt", "_check_inputs", "_prepare_latents", "_denoise", "_pred_original_sample",
     "from_pipe", "to_json_file", "save_pretrained", "push_to_hub", "_source_folder"],
)  # fmt: skip
def test_twin_methods(name):
    def source(cls):
        member = inspect.getattr_static(cls, name)
        return inspect.getsource(getattr(member, "fget", None) or getattr(member, "__func__", member))

    assert source(MiniDDPMPipeline) == source(MiniDDPMClassConditionalPipeline)


def test_twin_modules():
    assert inspect.getsource(unconditional.MiniDDPMPipelineOutput) == inspect.getsource(
        conditional.MiniDDPMPipelineOutput
    )
    assert unconditional.PORTABLE_MODULE == conditional.PORTABLE_MODULE
    assert unconditional.OUTPUT_TYPES == conditional.OUTPUT_TYPES
    assert unconditional.CARD == conditional.CARD
    # What follows the marker is the same to the last character, so that nothing is added to one of them alone.
    tails = [inspect.getsource(module).partition("    # ---- From here")[2] for module in (unconditional, conditional)]
    assert tails[0] == tails[1] != ""


def test_registration_leaves_other_pipelines_alone(tmp_path):
    for index in (
        {"_class_name": "DDIMPipeline", "unet": ["diffusers", "UNet2DModel"]},
        {"_class_name": ["my_pipeline", "MiniDDPMPipeline"], "unet": ["my_unet", "MiniUNet2DModel"]},  # a fork
        {"_class_name": ["pipeline_mini_ddpm_00000000", "PipelineOfTheFuture"]},
    ):
        (tmp_path / "model_index.json").write_text(json.dumps(index))
        assert DiffusionPipeline._dict_from_json_file(tmp_path / "model_index.json") == index
    assert DDIMPipeline._dict_from_json_file.__func__ is DiffusionPipeline._dict_from_json_file.__func__
    unet = unet_of_diffusers()
    DDIMPipeline(unet, DDIMScheduler()).save_pretrained(tmp_path)
    assert type(DiffusionPipeline.from_pretrained(tmp_path)) is DDIMPipeline


def test_our_parts_in_a_pipeline_of_diffusers(tiny_unet, tmp_path):
    """diffusers' own pipelines write "mini_ddpm.unet_mini" for our parts; that loads too, once we are imported."""
    DDPMPipeline(tiny_unet(), MiniDDPMScheduler()).save_pretrained(tmp_path)
    pipe = DiffusionPipeline.from_pretrained(tmp_path)
    assert type(pipe) is DDPMPipeline and type(pipe.unet).__name__ == "MiniUNet2DModel"
    assert all(map(torch.equal, pipe.unet.state_dict().values(), tiny_unet().state_dict().values()))
