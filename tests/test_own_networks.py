"""Networks and schedulers of the user's own are saved with their source, open and are pushed. The fifth door."""

import contextlib
import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoModel, DDPMPipeline, DiffusionPipeline, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from test_remote_code import DIGITS, PRELUDE, commit, draw, unet_of_diffusers

import mini_ddpm
from mini_ddpm import MiniDDIMScheduler, MiniDDPMClassConditionalPipeline, MiniDDPMPipeline, load_pipeline
from mini_ddpm.hub.publish import staged_pipeline
from mini_ddpm.pipelines.portable import bundle_of, portable_problem

OWN_NET = '''"""A network of the user's own."""

from __future__ import annotations

import torch.nn as nn
from mini_ddpm import MiniUNet2DModel, train
from mini_ddpm.models.unet_mini import MiniUNet2DOutput


class MyUNet(MiniUNet2DModel):
    """A network that ends in another function."""

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        output = nn.functional.hardtanh(super().forward(sample, timestep, class_labels).sample)
        return MiniUNet2DOutput(sample=output) if return_dict else (output,)


if __name__ == "__main__":
    train(unet=MyUNet())
'''
OWN_SCHEDULER = """from mini_ddpm.schedulers.scheduling_mini_ddim import MiniDDIMScheduler


class MyScheduler(MiniDDIMScheduler):
    pass
"""
# Warnings, but for the host's reminder of what `trust_remote_code` means.
CHECK = r"""
import io, sys
log = io.StringIO()
class Lines(logging.Handler):
    def emit(self, record):
        if record.levelno >= logging.WARNING and "`trust_remote_code` is enabled" not in record.getMessage():
            log.write(record.getMessage() + "\n")
logging.getLogger("diffusers").addHandler(Lines())
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("ignore", "Use 'content=")  # of the Hub's client
warnings.filterwarnings("ignore", "The `local_dir_use_symlinks` argument")  # of AutoModel's own
def refused(function, *args, **kwargs):
    try:
        function(*args, **kwargs)
    except Exception as error:
        return type(error).__name__ + ": " + str(error)
    raise SystemExit("not refused")
"""


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """The folder of `my_net.py` and `my_sched.py`, which can be imported, and the classes in them."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "my_net.py").write_text(OWN_NET)
    (folder / "my_sched.py").write_text(OWN_SCHEDULER)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        net, scheduler = importlib.import_module("my_net").MyUNet, importlib.import_module("my_sched").MyScheduler
        yield folder, net, scheduler
    for name in ("my_net", "my_sched"):
        del sys.modules[name]


@pytest.fixture(scope="module")
def saved(own, tiny_unet, tmp_path_factory):
    """A pipeline with both, saved, and the hash of its image."""
    _, net, scheduler = own
    folder = tmp_path_factory.mktemp("saved") / "mine"
    unet = net.from_config(tiny_unet().config).eval()
    unet.load_state_dict(tiny_unet().state_dict())
    pipe = MiniDDPMClassConditionalPipeline(unet, scheduler(prediction_type="v_prediction"), DIGITS)
    pipe.save_pretrained(folder)
    return folder, draw(pipe)


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_the_source_is_saved(saved, own):
    folder, _ = saved
    names = {re.sub(r"_[0-9a-f]{8}\.py$", "_#.py", name) for name in files(folder)}
    assert {"unet/my_net_#.py", "scheduler/my_sched_#.py", "pipeline_mini_ddpm_class_conditional_#.py"} <= names
    index = json.loads((folder / "model_index.json").read_text())
    stem = index["unet"][0]
    assert index["unet"][1] == "MyUNet" and index["scheduler"][1] == "MyScheduler"
    assert index["auto_map"] == {"AutoModel": f"{stem}.MyUNet"}
    source = (folder / "unet" / f"{stem}.py").read_text()
    assert "mini_ddpm" not in source and "class MiniUNet2DModel(" in source and "train(" not in source
    assert portable_problem(own[1]) is None and portable_problem(mini_ddpm.MiniUNet2DModel) is None
    assert portable_problem(type(unet_of_diffusers())) is None


def test_it_opens_in_the_process_that_knows_the_class(saved, own, tmp_path, caplog):
    """As training opens its own run again: no flag, and no file is run."""
    folder, expected = saved
    _, net, scheduler = own
    for opener in (load_pipeline, MiniDDPMClassConditionalPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        pipe = opener(folder)
        assert type(pipe.unet) is net and type(pipe.scheduler) is scheduler
        assert draw(pipe) == expected
    assert type(AutoModel.from_pretrained(folder, subfolder="unet")) is net
    assert type(AutoModel.from_pretrained(folder, subfolder="unet", trust_remote_code=True)) is net
    pipe.save_pretrained(tmp_path / "again")
    assert files(tmp_path / "again") == files(folder)
    assert not caplog.records


def test_a_class_of_another_source_is_not_used(saved, own, tmp_path):
    """The same name in the same module, but one line differs: a folder of another version of the file."""
    folder, _ = saved
    for path, content in files(folder).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    (source,) = (tmp_path / "unet").glob("*.py")
    source.write_text(source.read_text() + "\n# another version\n")
    with pytest.raises(ValueError, match="the component 'unet' has an unknown class, 'MyUNet' of 'my_net_") as raised:
        load_pipeline(tmp_path)
    message = str(raised.value)
    assert '`load_pipeline(folder, unet=MyUNet.from_pretrained(folder, subfolder="unet"))`' in message
    assert f"If you trust the code in {source}, `trust_remote_code=True` runs it." in message and "\n" not in message


def test_the_checks_hold(saved, tmp_path):
    folder, _ = saved
    for path, content in files(folder).items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(content)
    config = tmp_path / "unet/config.json"
    before = config.read_text()
    for changes, message in (
        ({"dropout": "much"}, "config.json: `dropout` must be"),
        ({"colour": 1}, "config.json: unknown key 'colour'"),
        ({"block_out_channels": [8, 8]}, "does not fit"),
    ):
        config.write_text(json.dumps(json.loads(before) | changes))
        with pytest.raises(ValueError, match=re.escape(message)):
            load_pipeline(tmp_path)
    config.write_text(before)
    weights = tmp_path / "unet/diffusion_pytorch_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match="was changed or damaged"):
        load_pipeline(tmp_path)


def test_doors_of_processes_that_do_not_know_the_class(saved, own, loopback_hub, fresh_process, tmp_path):
    """Refused in a sentence, given by hand, trusted; with the package and without; saved and pushed again."""
    folder, expected = saved
    commit(loopback_hub, "user/own", folder)
    code = PRELUDE + CHECK + f"folder, work = {str(folder)!r}, {str(tmp_path)!r}\n"
    run = fresh_process(
        code
        + """
from diffusers import AutoModel
import mini_ddpm
from mini_ddpm import *
for where, source in dict(folder=folder, hub="user/own").items():
    out["untrusted " + where] = refused(load_pipeline, source)
    refused(DiffusionPipeline.from_pretrained, source)
    refused(AutoModel.from_pretrained, source, subfolder="unet")
assert not [name for name in sys.modules if name.startswith("diffusers_modules.")]
for where, source in dict(folder=folder, hub="user/own").items():
    for door, opener in dict(load=load_pipeline, own=MiniDDPMClassConditionalPipeline.from_pretrained,
                             generic=DiffusionPipeline.from_pretrained).items():
        pipe = opener(source, trust_remote_code=True)
        assert type(pipe) is MiniDDPMClassConditionalPipeline
        out[f"drawn {where} {door} trusted"] = draw(pipe)
    part = AutoModel.from_pretrained(source, subfolder="unet", trust_remote_code=True)
    out[f"drawn {where} auto"] = draw(MiniDDPMClassConditionalPipeline(part, pipe.scheduler, **pipe.parameters))
pipe.save_pretrained(work + "/again")
pipe.push_to_hub("user/own-again")
out["log"] = log.getvalue()
print(json.dumps(out))
"""
    )
    for where in ("folder", "hub"):
        message = run.result[f"untrusted {where}"]
        assert message.startswith("ValueError: ") and "has an unknown class, 'MyUNet' of 'my_net_" in message
        assert "trust_remote_code=True" in message and "load_pipeline(folder, unet=MyUNet.from_pretrained(" in message
    drawn = {key: value for key, value in run.result.items() if key.startswith("drawn")}
    assert len(drawn) == 2 * 4 and set(drawn.values()) == {expected}
    assert run.result["log"] == ""
    again = files(tmp_path / "again")
    assert {k: v for k, v in again.items() if k != "README.md"} == {
        k: v for k, v in files(folder).items() if k != "README.md"
    }
    for path, content in again.items():
        if path.endswith((".py", ".json")) and path != "facts.json":
            assert loopback_hub.files("user/own-again")[path] == content, path

    run = fresh_process(
        code
        + f"""
import sys
sys.path.insert(0, {str(own[0])!r})
import mini_ddpm
from mini_ddpm import *
spare = folder + "/../older"  # a folder of another version of the class: its source differs
import shutil, glob
shutil.copytree(folder, spare)
for file in glob.glob(spare + "/*/my_*.py"):
    open(file, "a").write("# another version\\n")
from my_net import MyUNet
from my_sched import MyScheduler
for source in (spare, "user/own"):
    parts = dict(unet=MyUNet.from_pretrained(source, subfolder="unet"),
                 scheduler=MyScheduler.from_pretrained(source, subfolder="scheduler"))
    for opener in (load_pipeline, MiniDDPMClassConditionalPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
        pipe = opener(source, **parts)
        assert type(pipe.unet) is MyUNet and type(pipe.scheduler) is MyScheduler
        out[f"{{source}} {{opener}}"] = draw(pipe)
print(json.dumps(out))
""",
    )
    assert len(run.result) == 6 and set(run.result.values()) == {expected}

    run = fresh_process(
        code
        + """
from diffusers import AutoModel
for where, source in dict(folder=folder, hub="user/own", pushed="user/own-again").items():
    refused(DiffusionPipeline.from_pretrained, source)
    refused(AutoModel.from_pretrained, source, subfolder="unet")
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    out[f"{where} pipeline"] = draw(pipe)
    pipe.unet = AutoModel.from_pretrained(source, subfolder="unet", trust_remote_code=True)
    out[f"{where} auto"] = draw(pipe)
pipe.save_pretrained(work + "/alone")
out["log"] = log.getvalue()
print(json.dumps(out))
""",
        package=False,
    )
    assert run.result.pop("log") == ""
    assert len(run.result) == 6 and set(run.result.values()) == {expected}
    assert {k: v for k, v in files(tmp_path / "alone").items() if k.endswith((".py", "index.json"))} == {
        k: v for k, v in files(folder).items() if k.endswith((".py", "index.json"))
    }


def test_push_publishes_the_source_and_does_not_run_it(saved, loopback_hub, fresh_process):
    folder, expected = saved
    fresh_process(
        f"""
import sys
from mini_ddpm.hub.publish import push
push({str(folder)!r}, "user/own-by-command")
assert not [name for name in sys.modules if name.startswith("diffusers_modules.")]
"""
    )
    pushed = loopback_hub.files("user/own-by-command")
    for path, content in files(folder).items():
        if path not in ("README.md", "facts.json"):
            assert pushed[path] == content, path
    assert "MyUNet" in pushed["README.md"].decode()


# ---- What cannot travel --------------------------------------------------------------------------------------------


class Inside(ModelMixin, ConfigMixin):
    """A class of this file, which imports what does not travel."""

    @register_to_config
    def __init__(self, width: int = 4):
        super().__init__()
        self.layer = torch.nn.Conv2d(1, 1, 1)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (self.layer(sample),)


@contextlib.contextmanager
def importable(folder, name, source):
    (folder / f"{name}.py").write_text(source)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield importlib.import_module(name)
    del sys.modules[name]


def net(used):
    """The source of a network that uses a name."""
    return NET + f"    used = property(lambda self: {used})\n"


START = "    @register_to_config\n    def __init__(self):\n        super().__init__()\n"
NET = "class Net(ModelMixin, ConfigMixin):\n" + START
HEAD = "from diffusers import ModelMixin, ConfigMixin\nfrom diffusers.configuration_utils import register_to_config\n"


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        (HEAD + "import mini_ddpm\nLAZY = mini_ddpm.load_pipeline\n" + net("LAZY"), "line 3: `import mini_ddpm`"),
        (HEAD + "from mini_ddpm import compute_loss\nLOSS = compute_loss\n" + net("LOSS"), "compute_loss is not in"),
        (HEAD + "from mini_ddpm import PRETRAINED\nFOLDER = PRETRAINED\n" + net("FOLDER"), "PRETRAINED is not in"),
        (HEAD + "from mini_ddpm.models import unet_mini\nM = unet_mini\n" + net("M"), "unet_mini` cannot be saved"),
        (HEAD + NET + "\nNet().train()\n", "`Net().train()` would run whenever the pipeline is opened"),
        (HEAD + net("lazy()") + "\ndef lazy():\n    from mini_ddpm import MiniUNet2DModel\n", "MiniUNet2DModel`"),
        (HEAD + "def make():\n    class Net(ModelMixin, ConfigMixin):\n        pass\n    return Net\nNet = make()\n",
         "It is not defined at the top level of"),
        (HEAD + "from mini_ddpm import *\n" + NET, "import *` cannot be saved"),
        (HEAD + "from mini_ddpm import MiniDDIMScheduler as S\nT = S\n" + net("T"), "MiniDDIMScheduler as S`"),
        (HEAD + "import helper_of_mine\n" + net("helper_of_mine.X"), "`import helper_of_mine`"),
    ],
)  # fmt: skip
def test_why_a_class_cannot_travel(tmp_path, source, reason):
    name = f"net_{abs(hash(source))}"
    with importable(tmp_path, "helper_of_mine", "X = 1\n"), importable(tmp_path, name, source) as module:
        problem = portable_problem(module.Net)
    assert problem is not None and reason in problem and "\n" not in problem
    assert problem.startswith("The source of Net cannot be saved with a pipeline (")
    assert problem.endswith('`load_pipeline(folder, unet=Net.from_pretrained(folder, subfolder="unet"))`.')


def test_only_what_the_class_uses_travels(tmp_path):
    """A script holds a network, a loss, a callback and a plot; only the network's part is needed to open it."""
    source = (
        '"""All in one file."""\n'
        + HEAD
        + "import matplotlib.pyplot as plt\nimport math\nfrom mini_ddpm import TrainCallback, compute_loss, train\n"
        "WIDTH = 4\nDOUBLE = 2 * WIDTH\nNAMES = []\nNAMES += ['a']\n"
        "def twice(x):\n    return DOUBLE * math.pi * x\n"
        "class Watch(TrainCallback):\n    figure = plt\n"
        "def loss(*parts):\n    return compute_loss(*parts)\n" + NET + "        self.width = twice(1)\n"
    )
    with importable(tmp_path, "all_in_one", source) as module:
        assert portable_problem(module.Net) is None
        bundled = bundle_of(module.Net)[1].decode()
    for kept in ("All in one file", "import math", "WIDTH = 4", "DOUBLE = 2", "def twice", "class Net", "ConfigMixin"):
        assert kept in bundled
    for left in ("matplotlib", "mini_ddpm", "NAMES", "Watch", "def loss"):
        assert left not in bundled
    namespace = {"__name__": "bundled"}
    exec(compile(bundled, "bundled.py", "exec"), namespace)


def test_a_file_beside_it_travels_too(tmp_path):
    source = HEAD + "from blocks_of_mine import WIDTH\n" + NET + "        self.width = WIDTH\n"
    with importable(tmp_path, "blocks_of_mine", "WIDTH = 12\n"), importable(tmp_path, "net_of_mine", source) as module:
        stem, content = bundle_of(module.Net)
    assert stem.startswith("net_of_mine_") and b"WIDTH = 12" in content and b"import WIDTH" not in content


def test_an_edited_copy_of_our_network_is_not_taken_for_ours(tiny_unet, tmp_path):
    """A researcher's `unet_mini.py` with another `MiniUNet2DModel`: the installed class would give other images."""
    source = Path(mini_ddpm.models.unet_mini.__file__).read_text(encoding="utf-8")
    source = source.replace("from .blocks import", "from mini_ddpm.models.blocks import")
    (tmp_path / "code").mkdir()
    with importable(tmp_path / "code", "unet_mini", source + "\n\nEDITED = True\n") as module:
        unet = module.MiniUNet2DModel.from_config(tiny_unet().config)
        MiniDDPMPipeline(unet, MiniDDIMScheduler()).save_pretrained(tmp_path / "x")
        index = json.loads((tmp_path / "x/model_index.json").read_text())
        assert re.fullmatch("own_unet_mini_[0-9a-f]{8}", index["unet"][0])
        assert type(load_pipeline(tmp_path / "x").unet) is module.MiniUNet2DModel
    with pytest.raises(ValueError, match="unknown class, 'MiniUNet2DModel' of 'own_unet_mini"):
        load_pipeline(tmp_path / "x")


BLOCK = """
import torch
from diffusers import ModelMixin, ConfigMixin
from diffusers.configuration_utils import register_to_config


class Net(ModelMixin, ConfigMixin):
    @register_to_config
    def __init__(self, rates: list[float] = [0.0] * 20, in_channels: int = 1, out_channels: int = 1,
                 sample_size: int = 8):
        super().__init__()
        self.scale = torch.linspace(0.5, 1, 3)[1].item()
        self.norm = torch.nn.BatchNorm2d(in_channels)

    def forward(self, sample, timestep, class_labels=None, return_dict=True):
        return (self.norm(sample) * self.scale,)
"""


def test_what_other_networks_hold(tmp_path):
    """Counters, more entries than a network of ours has levels, numbers that the constructor computes."""
    with importable(tmp_path, "net_of_blocks", BLOCK) as module:
        MiniDDPMPipeline(module.Net(), MiniDDIMScheduler()).save_pretrained(tmp_path / "x")
        state = torch.get_rng_state()
        assert type(load_pipeline(tmp_path / "x").unet) is module.Net
        assert torch.equal(torch.get_rng_state(), state)


def test_saving_goes_on_without_the_source(tmp_path, caplog):
    """A long training is not lost: one warning, and the folder opens with the part given by hand."""
    pipe = MiniDDPMPipeline(Inside(), MiniDDIMScheduler())
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        pipe.save_pretrained(tmp_path)
    finally:
        logger.removeHandler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == [portable_problem(Inside)]
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["unet"] == [__name__, "Inside"] and "auto_map" not in index
    unet = Inside.from_pretrained(tmp_path, subfolder="unet")
    assert type(load_pipeline(tmp_path, unet=unet).unet) is Inside
    with pytest.raises(ValueError, match=re.escape("unknown class, 'Inside' of 'test_own_networks'")) as raised:
        load_pipeline(tmp_path, trust_remote_code=True)
    assert 'unet=Inside.from_pretrained(folder, subfolder="unet")' in str(raised.value)
    with staged_pipeline(tmp_path) as staged:
        assert files(staged)["unet/config.json"] == files(tmp_path)["unet/config.json"]


def test_classes_of_scripts_and_notebooks(tmp_path):
    """A class of `__main__` travels from a script whose training stands behind `__main__`, and not from a notebook."""
    script = tmp_path / "run-mine.py"
    script.write_text(
        HEAD + "from mini_ddpm.pipelines.portable import bundle_of, portable_problem\n" + NET + "\n"
        'if __name__ == "__main__":\n    print(portable_problem(Net), bundle_of(Net)[0])\n'
    )
    env = os.environ | {"PYTHONPATH": str(Path(mini_ddpm.__file__).parents[1])}
    run = [sys.executable, str(script)]
    answer = subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout
    assert re.fullmatch(r"None run_mine_[0-9a-f]{8}\n", answer)
    run = [sys.executable, "-c", script.read_text().replace(", bundle_of(Net)[0]", "")]
    answer = subprocess.run(run, capture_output=True, text=True, check=True, env=env).stdout
    assert answer.startswith(
        "The source of Net cannot be saved with a pipeline (It has no source file): put the class"
    )


def test_the_source_is_that_of_the_first_look(tmp_path):
    """The file may be edited while a network of its class is trained."""
    with importable(tmp_path, "net_edited", HEAD + NET) as module:
        assert portable_problem(module.Net) is None
        first = bundle_of(module.Net)
        (tmp_path / "net_edited.py").write_text(HEAD + NET + "\nX = 1\n")
        assert bundle_of(module.Net) == first and b"X = 1" not in first[1]


# ---- The fifth door ------------------------------------------------------------------------------------------------


def test_auto_model(tiny_unet, loopback_hub, fresh_process, tmp_path):
    """With the package, with the flag and without; without the package, with it. And no door warns of `auto_map`."""
    pipe = MiniDDPMPipeline(tiny_unet(), MiniDDIMScheduler(prediction_type="v_prediction"))
    pipe.save_pretrained(tmp_path / "new")
    expected = draw(pipe)
    commit(loopback_hub, "user/auto", tmp_path / "new")
    index = json.loads((tmp_path / "new/model_index.json").read_text())
    assert index["auto_map"] == {"AutoModel": f"{index['unet'][0]}.MiniUNet2DModel"}
    for path, content in files(tmp_path / "new").items():  # as earlier versions saved it
        (tmp_path / "old" / path).parent.mkdir(exist_ok=True, parents=True)
        (tmp_path / "old" / path).write_bytes(content)
    (tmp_path / "old/model_index.json").write_text(json.dumps({k: v for k, v in index.items() if k != "auto_map"}))
    code = (
        PRELUDE
        + CHECK
        + f"""
import glob
from diffusers import AutoModel, DDPMPipeline
new, old = {str(tmp_path / "new")!r}, {str(tmp_path / "old")!r}
"""
    )
    run = fresh_process(
        code
        + """
from mini_ddpm import *
for source in (new, old, "user/auto"):
    for flag in ({}, {"trust_remote_code": True}):
        unet = AutoModel.from_pretrained(source, subfolder="unet", **flag)
        assert type(unet) is MiniUNet2DModel, type(unet)
        for opener in (load_pipeline, MiniDDPMPipeline.from_pretrained, DiffusionPipeline.from_pretrained):
            pipe = opener(source, **flag)
            assert "auto_map" not in pipe.config
        pipe.unet = unet
        out[f"{source} {flag}"] = draw(pipe)
    MiniUNet2DModel.from_pretrained(source, subfolder="unet")
    MiniDDIMScheduler.from_pretrained(source, subfolder="scheduler")
    DDPMPipeline.from_pretrained(source)
assert type(AutoModel.from_pretrained(PRETRAINED / "mnist", subfolder="unet")) is MiniUNet2DModel
# diffusers' own pipeline is annotated with its own network
lines = [line for line in log.getvalue().splitlines() if not line.startswith("Expected types for unet")]
assert not lines, lines
print(json.dumps(out))
"""
    )
    assert len(run.result) == 6 and set(run.result.values()) == {expected}
    run = fresh_process(
        code
        + """
for source in (new, "user/auto"):
    message = refused(AutoModel.from_pretrained, source, subfolder="unet")
    assert "trust_remote_code=True" in message, message
    unet = AutoModel.from_pretrained(source, subfolder="unet", trust_remote_code=True)
    pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
    assert "auto_map" not in pipe.config
    pipe.unet = unet
    out[source] = draw(pipe)
(file,) = glob.glob(new + "/pipeline_mini_*.py")
out["custom"] = draw(DiffusionPipeline.from_pretrained(new, custom_pipeline=file, trust_remote_code=True))
out["old"] = draw(DiffusionPipeline.from_pretrained(old, trust_remote_code=True))
assert not log.getvalue(), log.getvalue()
print(json.dumps(out))
""",
        package=False,
    )
    assert len(run.result) == 4 and set(run.result.values()) == {expected}


def test_auto_model_of_others_is_left_alone(tmp_path, tiny_unet):
    DDPMPipeline(unet_of_diffusers(), MiniDDIMScheduler()).save_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path, subfolder="unet")).__name__ == "UNet2DModel"
    with pytest.raises(ValueError, match="does not appear to have any custom code"):
        AutoModel.from_pretrained(tmp_path, subfolder="unet", trust_remote_code=True)
    fork = {"_class_name": ["p", "P"], "unet": ["u", "U"], "auto_map": {"AutoModel": "u.U"}}
    (tmp_path / "model_index.json").write_text(json.dumps(fork))
    for cls in (AutoModel, DiffusionPipeline):
        assert cls._dict_from_json_file(tmp_path / "model_index.json") == fork


# ---- The host's command line ---------------------------------------------------------------------------------------

HOST = [sys.executable, "-c", "import sys; from diffusers.commands.diffusers_cli import main; sys.exit(main())"]


def host(*words, package=False, home):
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1"}
    code = HOST[2]
    code = "import mini_ddpm; " + code if package else "import sys; sys.modules['mini_ddpm'] = None; " + code
    return subprocess.run([*HOST[:2], code, *words], env=env, cwd=home, capture_output=True, text=True, timeout=200)


def test_the_hosts_command_line_draws(tiny_unet, tmp_path):
    folder = tmp_path / "x"
    MiniDDPMClassConditionalPipeline(tiny_unet(), MiniDDIMScheduler(), DIGITS).save_pretrained(folder)
    options = json.dumps({"class_labels": [3, 1, 4], "num_inference_steps": 2})
    words = ("--model", str(folder), "--trust-remote-code", "--pipeline-kwargs", options, "--output", "drawn")
    done = host("run", *words, home=tmp_path)
    assert done.returncode == 0, done.stderr
    assert sorted(file.name for file in tmp_path.glob("*.png")) == [f"drawn-000{i}.png" for i in range(3)]


def test_the_hosts_schema_needs_the_package(tiny_unet, tmp_path):
    """It reads the index as if no pipeline had code of its own. With ours imported, the class is a name again."""
    folder = tmp_path / "x"
    MiniDDPMClassConditionalPipeline(tiny_unet(), MiniDDIMScheduler(), DIGITS).save_pretrained(folder)
    done = host("schema", "--model", str(folder), package=True, home=tmp_path)
    assert done.returncode == 0 and "class_labels" in done.stdout, done.stderr
    alone = host("schema", "--model", str(folder), home=tmp_path)  # when this passes, the page can say so
    assert alone.returncode != 0 and "attribute name must be string" in alone.stderr


class WithConstructor(mini_ddpm.MiniUNet2DModel):
    @register_to_config
    def __init__(self, width=8, num_class_embeds=None):
        super().__init__(sample_size=8, block_out_channels=(width, 2 * width), num_class_embeds=num_class_embeds)


def test_a_subclass_with_a_constructor_of_its_own_opens_without_a_warning(tmp_path, caplog):
    MiniDDPMPipeline(WithConstructor(width=12), MiniDDIMScheduler()).save_pretrained(tmp_path)
    caplog.clear()  # it was told that the source stays here
    logger = logging.getLogger("diffusers")
    logger.addHandler(caplog.handler)
    try:
        unet = WithConstructor.from_pretrained(tmp_path, subfolder="unet")
        pipe = load_pipeline(tmp_path, unet=unet)
    finally:
        logger.removeHandler(caplog.handler)
    assert not caplog.records
    assert unet.config.block_out_channels == pipe.unet.config.block_out_channels == (12, 24)
