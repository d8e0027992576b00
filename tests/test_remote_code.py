"""The doors: the same saved pipeline opens with the package and without it, from a folder and from the Hub."""

import hashlib
import importlib.util
import inspect
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DiffusionPipeline, UNet2DModel
from diffusers.utils.dynamic_modules_utils import find_pipeline_class, get_relative_imports

from mini_ddpm import (
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    MiniDDPMScheduler,
    MiniUNet2DModel,
)
from mini_ddpm.pipelines.portable import CHECKSUMS, bundle

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
    weights = "unet/diffusion_pytorch_model.safetensors"
    assert index[CHECKSUMS] == {weights: hashlib.sha256((folder / "labels" / weights).read_bytes()).hexdigest()}
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


def test_a_class_inside_a_function_is_saved_without_its_source(saved, tmp_path):
    """See test_own_networks.py for those that travel."""

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


# ---- Bundles -------------------------------------------------------------------------------------------------------


def write(folder, **modules):
    """Modules of a package with rooms: `room__name="source"`."""
    for name, source in modules.items():
        file = folder.joinpath(*name.split("__")).with_suffix(".py")
        file.parent.mkdir(exist_ok=True)
        file.write_text(source, encoding="utf-8")
    return folder


def test_a_bundle_is_the_modules_in_import_order(tmp_path):
    write(
        tmp_path,
        base='"""Base."""\n\nimport math\n\nTWO = 2\n',
        rooms__middle="import math\n\nfrom ..base import (\n    TWO,\n)\n\nFOUR = TWO * 2\n",
        rooms__top="from ..base import TWO\nfrom .middle import FOUR\n\n\ndef top():\n    return FOUR + TWO\n",
    )
    assert bundle(tmp_path / "rooms/top.py").decode() == (
        '# ---- base.py ----\n\n"""Base."""\n\nimport math\n\nTWO = 2\n\n\n'
        "# ---- middle.py ----\n\nimport math\n\n\nFOUR = TWO * 2\n\n\n"
        "# ---- top.py ----\n\ndef top():\n    return FOUR + TWO\n"
    )
    names = {}
    exec(bundle(tmp_path / "rooms/top.py"), names)
    assert names["top"]() == 6
    (tmp_path / "alone.py").write_bytes(b"import math\r\n\r\n\r\nX = 1")  # not a byte is changed
    assert bundle(tmp_path / "alone.py") == b"import math\r\n\r\n\r\nX = 1"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("from .base import X as Y\n", "line 1: `from .base import X as Y` cannot be saved with a pipeline"),
        ("X = 1\nfrom . import base\n", "line 2: `from . import base` cannot be saved"),
        ("from .missing import X\n", "line 1: `from .missing import X` cannot be saved"),
        ("import math\n\nprint(math.pi)\n", "line 3: `print(math.pi)` would run whenever the pipeline is opened"),
        ("for i in range(3):\n    pass\n", "line 1: `for i in range(3):` would run whenever"),
        ("if __name__ == '__main__':\n    pass\nelse:\n    print(1)\n", "line 1: `if __name__ == '__main__':` would"),
        (
            '"""Example.\n\nfrom .base import X\n"""\n',
            "diffusers would take the line `from .base import X` for an import",
        ),
        ("def f():\n    from .base import X\n    return X\n", "line 2: `from .base import X` cannot be saved"),
        ("if True:\n    from .base import X\n", "line 2: `from .base import X` cannot be saved"),
        ("from .base import X\n\ndef g():\n    return 2\n", "top.py: g is also defined by a module"),
        ("from .base import X\n\nlogger: int = 2\n", "top.py: logger is also defined by a module"),
        ("from .base import X\n\na, (b, Z) = 1, (2, 3)\n", "top.py: Z is also defined by a module"),
        ("from .base import X\nfrom cmath import sqrt\n", "top.py: sqrt is also defined by a module"),
        ("from .base import X\n\nclass sqrt:\n    pass\n", "top.py: sqrt is also defined by a module"),
    ],
)
def test_what_cannot_be_bundled_is_refused(tmp_path, source, message):
    base = "from math import sqrt\n\nX, Z = 1, 2\nlogger = 1\n\ndef g():\n    return 1\n"
    write(tmp_path, base=base, top=source)
    with pytest.raises(ValueError, match=re.escape(message)) as raised:
        bundle(tmp_path / "top.py")
    assert "\n" not in str(raised.value)
    assert bundle(write(tmp_path, top="from .base import X\nfrom math import sqrt\n\ny = X\n") / "top.py")


def test_two_ways_to_import_a_module_are_one(tmp_path):
    write(
        tmp_path,
        base="from torch import nn\n\nX = 1\n",
        top='"""Top."""\n\nfrom __future__ import annotations\n\nimport torch.nn as nn\nfrom .base import X\n\nY = X\n'
        '\nif __name__ == "__main__":\n    print(Y)\n',
    )
    source = bundle(tmp_path / "top.py").decode()
    assert source.startswith("from __future__ import annotations\n\n\n# ---- base.py ----") and "print" not in source
    (tmp_path / "again.py").write_text(source)
    assert bundle(tmp_path / "again.py").decode() == source
    names = {}
    exec(compile(source, "bundle", "exec"), names)
    assert names["Y"] == 1


@pytest.mark.parametrize(
    "cls",
    [MiniDDIMScheduler, MiniDDPMClassConditionalPipeline, MiniDDPMPipeline, MiniDDPMScheduler, MiniUNet2DModel],
)
def test_bundles_stand_alone(cls, tmp_path):
    """What diffusers looks for in a bundle: no relative import, no unknown package, one pipeline, a base class."""
    file = tmp_path / "bundled.py"
    file.write_bytes(bundle(Path(inspect.getfile(cls))))
    assert bundle(file) == file.read_bytes()  # what was saved is saved again byte for byte
    assert get_relative_imports(file) == []
    text = file.read_text(encoding="utf-8")
    # diffusers looks for imports with regular expressions, in docstrings as well
    found = re.findall(r"^\s*(?:import|from)\s+(\S+)", text, flags=re.MULTILINE)
    # Pillow and huggingface_hub are dependencies of diffusers itself
    allowed = set(sys.stdlib_module_names) | {"torch", "numpy", "diffusers", "PIL", "huggingface_hub"}
    assert {name.partition(".")[0] for name in found} <= allowed
    spec = importlib.util.spec_from_file_location("bundled", file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert hasattr(module, "ModelMixin" if cls is MiniUNet2DModel else "SchedulerMixin")
    assert hasattr(module, cls.__name__)
    if issubclass(cls, DiffusionPipeline):
        assert find_pipeline_class(module) is getattr(module, cls.__name__)  # as `custom_pipeline=FILE` finds it


def test_custom_pipeline_takes_the_saved_file(saved, fresh_process):
    """`custom_pipeline=FILE` names no class, so a bundle may hold one pipeline only."""
    folder, expected = saved
    run = fresh_process(
        PRELUDE
        + f"""
import glob
for name in ("plain", "labels"):
    source = {str(folder)!r} + "/" + name
    (file,) = glob.glob(source + "/pipeline_mini_*.py")
    pipe = DiffusionPipeline.from_pretrained(source, custom_pipeline=file, trust_remote_code=True)
    out[name] = draw(pipe)
print(json.dumps(out))
""",
        package=False,
    )
    assert run.result == expected


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
