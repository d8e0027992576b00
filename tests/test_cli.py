"""The command line, with real pipelines of a tiny network: what is written, and one clear line for what cannot be."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mini_ddpm_cli
from mini_ddpm import (
    PRETRAINED,
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    MiniUNet2DModel,
)
from mini_ddpm.options import SCHEDULERS, resolve_labels
from mini_ddpm.plots import sample_grid
from mini_ddpm.training.config import TrainConfig

NAMES = ["coat", "ankle boot", "bag"]


def tiny_unet(**config) -> MiniUNet2DModel:
    torch.manual_seed(0)
    unet = MiniUNet2DModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        **config,
    )
    for parameter in unet.parameters():  # the last layers start at zero: without this every output would be the same
        torch.nn.init.normal_(parameter, std=0.2)
    return unet


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A folder with a class-conditional pipeline of three classes."""
    folder = tmp_path_factory.mktemp("conditional")
    unet = tiny_unet(num_class_embeds=len(NAMES) + 1)
    scheduler = MiniDDIMScheduler(prediction_type="v_prediction")
    MiniDDPMClassConditionalPipeline(unet, scheduler, id2label=dict(enumerate(NAMES))).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def unconditional(tmp_path_factory):
    """A folder with an unconditional pipeline."""
    folder = tmp_path_factory.mktemp("unconditional")
    MiniDDPMPipeline(tiny_unet(), MiniDDIMScheduler(prediction_type="v_prediction")).save_pretrained(folder)
    return str(folder)


def run(*arguments: object) -> int:
    return mini_ddpm_cli.main([str(argument) for argument in arguments])


def arrays(tmp_path, pipeline: str, *arguments: object) -> dict[str, np.ndarray]:
    """Draw into an npz file and read it back."""
    out = tmp_path / "arrays.npz"
    assert run("sample", pipeline, "--steps", 2, "--device", "cpu", "--out", out, *arguments) == 0
    with np.load(out) as file:
        return dict(file)


# ---- help and arguments -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["sample", "--help"]])
def test_help_answers_within_a_second_of_cpu_and_without_torch(arguments):
    code = (
        "import sys, time, mini_ddpm_cli\n"
        f"try: mini_ddpm_cli.main({arguments})\n"
        "except SystemExit as stop: assert not stop.code\n"
        "print(time.process_time(), 'torch' in sys.modules or 'numpy' in sys.modules)"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    seconds, heavy = answer.splitlines()[-1].split()
    assert "usage: mini-ddpm" in answer and "sample" in answer
    assert heavy == "False"
    assert float(seconds) < 1


def test_help_names_every_command_and_option(capsys):
    assert run() == 0
    plain = capsys.readouterr().out
    assert run("--help") == 0
    assert capsys.readouterr().out == plain
    assert all(f"\n  {name} " in plain for name in mini_ddpm_cli.COMMANDS)
    for command in mini_ddpm_cli.COMMANDS:
        with pytest.raises(SystemExit) as stop:
            run(command, "--help")
        assert not stop.value.code
        out = capsys.readouterr().out
        assert f"usage: mini-ddpm {command}" in out
        assert "_" not in "".join(word for word in out.split() if word.startswith("--"))  # dashes


def test_help_names_defaults_in_words_and_the_module_names_every_command(capsys):
    for command in mini_ddpm_cli.COMMANDS:
        with pytest.raises(SystemExit):
            run(command, "--help")
        assert " None:" not in " ".join(capsys.readouterr().out.split())  # "Default:"
        assert f"`{command}`" in mini_ddpm_cli.__doc__.replace("mini-ddpm ", "")


def test_defaults():
    assert vars(mini_ddpm_cli.SampleConfig()) == {
        "pipeline": None,
        "revision": None,
        "class_labels": (),
        "num_images": None,
        "num_inference_steps": None,
        "guidance_scale": None,
        "guidance_interval": None,
        "eta": None,
        "scheduler": None,
        "seed": 0,
        "batch_size": 128,
        "device": "auto",
        "dtype": "fp32",
        "torch_compile": False,
        "out": Path("samples.png"),
    }
    assert vars(mini_ddpm_cli.CardConfig("x")) == {"pipeline": "x", "out": None, "repo_id": None}
    optional = {"private": False, "revision": None, "create_pr": False, "message": None, "dry_run": False}
    assert vars(mini_ddpm_cli.PushConfig("x", "a/b")) == {"folder": "x", "repo_id": "a/b", **optional}
    export = {"revision": None, "num_inference_steps": None, "guidance_scale": None, "guidance_interval": None}
    export |= {"scheduler": None, "dtype": "fp32", "unet_only": False, "out": None}
    assert vars(mini_ddpm_cli.ExportConfig("x")) == {"pipeline": "x", **export}
    assert vars(mini_ddpm_cli.VerifyConfig("a/b")) == {"repo_id": "a/b", "revision": None}


def test_default_number_of_steps(tmp_path, unconditional, capsys):
    """20, or those of a distilled pipeline."""
    for folder, changes, steps in (("plain", {}, 20), ("distilled", {"default_num_inference_steps": 3}, 3)):
        pipe = MiniDDPMPipeline.from_pretrained(unconditional)
        MiniDDPMPipeline(pipe.unet, pipe.scheduler, **changes).save_pretrained(tmp_path / folder)
        assert run("sample", tmp_path / folder, "--num-images", 1, "--device", "cpu", "--out", tmp_path / "x.png") == 0
        assert f", {steps} steps of MiniDDIMScheduler" in capsys.readouterr().out


def test_the_default_number_of_steps_is_at_most_that_of_the_timesteps(tmp_path, unconditional, capsys):
    pipe = MiniDDPMPipeline.from_pretrained(unconditional)
    MiniDDPMPipeline(pipe.unet, MiniDDIMScheduler(num_train_timesteps=10)).save_pretrained(tmp_path / "short")
    command = ("sample", tmp_path / "short", "--num-images", 1, "--device", "cpu", "--out", tmp_path / "x.png")
    assert run(*command) == 0
    assert ", 10 steps of MiniDDIMScheduler" in capsys.readouterr().out
    assert run(*command, "--steps", 20) == 2
    assert "`num_inference_steps` must be at most 10" in capsys.readouterr().err


@pytest.mark.parametrize("out", ["~/x.png", "~/deeper/x.npz", "~/folder"])
def test_the_home_folder_is_found_in_out(tmp_path, unconditional, monkeypatch, out):
    home, here = tmp_path / "home", tmp_path / "here"
    home.mkdir()
    here.mkdir()
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("USERPROFILE", str(home))
    monkeypatch.chdir(here)
    assert run("sample", unconditional, "--steps", 1, "--num-images", 1, "--device", "cpu", f"--out={out}") == 0
    assert (home / out.removeprefix("~/")).exists() and os.listdir(here) == []
    assert mini_ddpm_cli.CardConfig("x", out="~/card").out == home / "card"
    assert mini_ddpm_cli.SampleConfig(out="~no-such-user/x.png").out == Path("~no-such-user/x.png")


CHINESE = ["猫", "собака", "🐱", "line\nbreak", "x" * 300]


@pytest.mark.parametrize(
    "environment",
    [{"PYTHONIOENCODING": "cp1252"}, {"LC_ALL": "C", "LANG": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}],
)
def test_a_terminal_that_cannot_show_a_character_stops_no_command(tmp_path, environment):
    unet = tiny_unet(num_class_embeds=len(CHINESE) + 1)
    pipe = MiniDDPMClassConditionalPipeline(unet, MiniDDIMScheduler(), id2label=dict(enumerate(CHINESE)))
    pipe.save_pretrained(tmp_path / "pipeline")
    small = ["sample", str(tmp_path / "pipeline"), "--steps", "1", "--num-images", "5", "--device", "cpu", "--out"]
    commands = [[*small, str(tmp_path / name)] for name in ("grid.png", "folder", "a\u0107.npz")]
    commands += [["card", str(tmp_path / "pipeline")], ["card", str(tmp_path / "pipeline"), "--out", str(tmp_path)]]
    commands += [["sample", str(tmp_path / "猫")], ["--help"]]
    code = (
        "import json, sys, mini_ddpm_cli\nprint([mini_ddpm_cli.main(command) for command in json.loads(sys.argv[1])])"
    )
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "LC_", "LANG"))}
    arguments = [sys.executable, "-c", code, json.dumps(commands, ensure_ascii=False)]
    answer = subprocess.run(arguments, capture_output=True, env=inherited | environment)
    assert answer.returncode == 0, answer.stderr.decode(errors="replace")
    assert answer.stdout.splitlines()[-1] == b"[0, 0, 0, 0, 0, 2, 0]", answer.stderr.decode(errors="replace")
    assert b"Traceback" not in answer.stderr and b"codec" not in answer.stderr
    assert b"Numbers in place of names: " in answer.stdout
    assert len(list((tmp_path / "folder").iterdir())) == 5
    assert "猫" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_module_runs_as_the_command():
    answer = subprocess.run(
        [sys.executable, "-m", "mini_ddpm", "smaple"], capture_output=True, text=True, env={**os.environ}
    )
    assert answer.returncode == 2
    commands = "sample, train, sharpen, distill, plot, evaluate, export, card, push, verify"
    assert answer.stderr == f"mini-ddpm: unknown command 'smaple'; choose one of {commands}, or --help.\n"


# ---- what is written ----------------------------------------------------------------------------------------------


def test_grid_has_one_labelled_column_per_class(tmp_path, conditional, capsys):
    out = tmp_path / "new" / "grid.png"  # the folder is made
    assert run("sample", conditional, "--steps", 2, "--num-images", 6, "--device", "cpu", "--out", out) == 0
    drawn = arrays(tmp_path, conditional, "--num-images", 6)
    labels = [NAMES[label] for label in drawn["class_labels"]]
    assert labels == NAMES * 2
    with Image.open(out) as grid:
        assert grid.convert("RGB") == sample_grid(drawn["images"], labels, columns=3)
    assert f"{out}: 6 images of 8x8, 2 steps of MiniDDIMScheduler" in capsys.readouterr().out
    assert [path.name for path in out.parent.iterdir()] == ["grid.png"]  # no temporary file is left


def test_numbers_of_images(tmp_path, conditional, unconditional):
    assert arrays(tmp_path, conditional)["class_labels"].tolist() == [0, 1, 2] * 10
    assert arrays(tmp_path, conditional, "--class-labels", "bag", "0")["class_labels"].tolist() == [2, 0]
    cycled = arrays(tmp_path, conditional, "--class-labels", 2, "ankle boot", "--num-images", 3)
    assert cycled["class_labels"].tolist() == [2, 1, 2]
    plain = arrays(tmp_path, unconditional)
    assert plain["images"].shape == (64, 8, 8, 1) and plain["images"].dtype == np.uint8
    assert "class_labels" not in plain and plain["seeds"].tolist() == list(range(64))


@pytest.mark.parametrize(("classes", "columns"), [(20, 20), (21, None)])
def test_a_column_for_each_of_up_to_twenty_classes(classes, columns):
    pipe = MiniDDPMClassConditionalPipeline(tiny_unet(num_class_embeds=classes + 1), MiniDDIMScheduler())
    labels, names, found = resolve_labels(pipe, (), None, 2)
    assert labels == list(range(classes)) * 2 and names == [str(label) for label in labels] and found == columns


@pytest.mark.parametrize("scheduler", ["ddpm", "ddim"])
def test_an_image_depends_on_its_seed_alone(tmp_path, unconditional, scheduler):
    sampler = ("--scheduler", scheduler, "--eta", 1.0)
    whole = arrays(tmp_path, unconditional, *sampler, "--num-images", 5)["images"]
    split = arrays(tmp_path, unconditional, *sampler, "--num-images", 5, "--batch-size", 2)["images"]
    alone = arrays(tmp_path, unconditional, *sampler, "--num-images", 1, "--seed", 3)["images"]
    # one grey level: a convolution over another batch size may round otherwise
    assert np.abs(whole.astype(int) - split).max() <= 1
    assert np.abs(whole[3:4].astype(int) - alone).max() <= 1
    assert np.abs(whole[0].astype(int) - whole[1]).max() > 10


def test_an_interrupted_command_resumes(tmp_path, conditional, monkeypatch, capsys):
    out, arguments = tmp_path / "cut.npz", ("--num-images", 9, "--batch-size", 2, "--steps", 2, "--device", "cpu")
    whole = arrays(tmp_path, conditional, *arguments)
    call, calls = MiniDDPMClassConditionalPipeline.__call__, []

    def counted(self, **options):
        if len(calls) == 2 and interrupting:
            raise KeyboardInterrupt
        calls.append(options["class_labels"])
        return call(self, **options)

    monkeypatch.setattr(MiniDDPMClassConditionalPipeline, "__call__", counted)
    interrupting = True
    assert run("sample", conditional, *arguments, "--out", out) == 130
    message = f"Finished batches are saved in {tmp_path / '.cut.npz.parts'}. Run the same command again to resume."
    assert message in capsys.readouterr().err
    assert not out.exists() and len(list(tmp_path.glob(".cut.npz.parts/*/*.npz"))) == 2
    interrupting = False
    calls.clear()
    assert run("sample", conditional, *arguments, "--seed", 1, "--out", out) == 0
    assert len(calls) == 5  # another seed has other images
    assert "images/s" not in capsys.readouterr().out  # some of these could have been there
    assert run("sample", conditional, *arguments, "--out", out) == 0
    assert "images/s" in capsys.readouterr().out
    with np.load(out) as file:
        assert all((file[name] == whole[name]).all() for name in ("images", "seeds", "class_labels"))
    assert not list(tmp_path.glob(".cut*"))


def test_a_resumed_command_draws_no_batch_again(tmp_path, unconditional, monkeypatch):
    arguments = ("sample", unconditional, "--num-images", 7, "--batch-size", 2, "--steps", 2, "--device", "cpu")
    call, calls = MiniDDPMPipeline.__call__, []

    def until(self, **options):
        calls.append(options["batch_size"])
        if len(calls) == 3:
            raise RuntimeError("out of memory")
        return call(self, **options)

    monkeypatch.setattr(MiniDDPMPipeline, "__call__", until)
    assert run(*arguments, "--out", tmp_path / "x") == 2
    assert run(*arguments, "--out", tmp_path / "x") == 0
    assert calls == [2, 2, 2, 2, 1]
    assert len(list((tmp_path / "x").iterdir())) == 7
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_processes_share_the_images_and_make_the_same(tmp_path, conditional, two_processes):
    arguments = ("--num-images", 7, "--batch-size", 2, "--steps", 2, "--eta", 1)
    whole = arrays(tmp_path, conditional, *arguments)
    command = [sys.executable, *two_processes, "-m", "mini_ddpm", "sample", conditional, *map(str, arguments)]
    command += ["--device", "cpu", "--out", str(tmp_path / "shared.npz")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.count("7 images of 8x8") == 1  # one process speaks
    with np.load(tmp_path / "shared.npz") as file:
        assert all((file[name] == whole[name]).all() for name in ("images", "seeds", "class_labels"))
    assert not list(tmp_path.glob(".*"))


def test_guidance_and_precision_reach_the_pipeline(tmp_path, conditional):
    draw = lambda *arguments: arrays(tmp_path, conditional, "--num-images", 3, *arguments)["images"].astype(int)  # noqa: E731
    plain = draw("--guidance-scale", 1)
    guided = draw("--guidance-scale", 20)
    assert np.abs(guided - plain).max() > 5
    assert (draw("--guidance-scale", 20, "--guidance-interval", 0, 1) == guided).all()
    assert (draw("--guidance-scale", 20, "--guidance-interval", 0.1, 0.4) == plain).all()  # between the two steps
    assert 0 < np.abs(draw("--guidance-scale", 1, "--dtype", "bf16") - plain).max() < 32
    assert (draw("--guidance-scale", 1, "--num-inference-steps", 2) == plain).all()  # both spellings of --steps


def test_help_names_every_scheduler():
    """Written out in the command line, whose help must not import what knows them."""
    assert f"'{'|'.join(SCHEDULERS)}'" in mini_ddpm_cli.SampleConfig.__annotations__["scheduler"]


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_every_scheduler_draws(tmp_path, unconditional, scheduler, capsys):
    images = arrays(tmp_path, unconditional, "--scheduler", scheduler, "--num-images", 2, "--steps", 5)["images"]
    assert SCHEDULERS[scheduler] in capsys.readouterr().out
    assert images.std() > 1


def test_folder_holds_one_png_per_image_and_is_replaced_as_a_whole(tmp_path, conditional):
    out = tmp_path / "images"
    draw = ("sample", conditional, "--steps", 2, "--out", out)
    assert run(*draw, "--num-images", 4) == 0
    assert sorted(os.listdir(out)) == ["00000_coat.png", "00001_ankle-boot.png", "00002_bag.png", "00003_coat.png"]
    with Image.open(out / "00001_ankle-boot.png") as image:
        assert (image.mode, image.size) == ("L", (8, 8))
        expected = arrays(tmp_path, conditional, "--num-images", 4)["images"][1, :, :, 0]
        assert (np.asarray(image) == expected).all()
    assert run(*draw, "--num-images", 1) == 0
    assert os.listdir(out) == ["00000_coat.png"]


def test_folder_with_other_files_is_left_alone(tmp_path, unconditional, capsys):
    (tmp_path / "00000.png").write_bytes(b"an image of ours")
    (tmp_path / "thesis.tex").write_text("years of work")
    assert run("sample", unconditional, "--out", tmp_path) == 2
    assert "thesis.tex" in capsys.readouterr().err
    assert sorted(os.listdir(tmp_path)) == ["00000.png", "thesis.tex"]


@pytest.mark.parametrize("suffix", [".gif", ".webp"])
def test_film_has_a_frame_per_step(tmp_path, conditional, unconditional, suffix, capsys):
    out = tmp_path / f"film{suffix}"
    assert run("sample", conditional, "--steps", 3, "--batch-size", 4, "--out", out) == 0
    assert f"{out}: 6 images of 8x8, 3 steps" in capsys.readouterr().out
    with Image.open(out) as film:
        assert film.n_frames == 4
        grid = sample_grid(np.zeros((6, 8, 8, 1), dtype=np.uint8), columns=3)  # two of each class, below each other
        assert 10 < film.height - grid.height < 30  # the rest is the title
    assert run("sample", unconditional, "--steps", 1, "--batch-size", 4, "--out", out) == 0
    assert f"{out}: 16 images of 8x8, 1 step of" in capsys.readouterr().out
    with Image.open(out) as film:
        grid = sample_grid(np.zeros((16, 8, 8, 1), dtype=np.uint8), columns=4)
        assert 10 < film.height - grid.height < 30
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        ([], "mnist-distilled"),
        (["--class-labels", "3", "--num-images", "5", "--seed", "1"], "mnist-distilled"),
        (["--steps", "20"], "mnist-class-conditional"),
        (["--scheduler", "unipc"], "mnist-class-conditional"),
        (["--guidance-scale", "2"], "mnist-class-conditional"),
        (["--guidance-interval", "0.3", "0.6"], "mnist-class-conditional"),
        (["--eta", "1"], "mnist-class-conditional"),
        (["--out", "film.webp"], "mnist-class-conditional"),
        (["mnist-distilled", "--steps", "20"], "mnist-distilled"),
    ],
)
def test_the_pipeline_that_is_taken_by_default(flags, name):
    assert mini_ddpm_cli.pipeline_to_sample(mini_ddpm_cli.parse(["sample", *flags])) == name


@pytest.mark.parametrize("name", ["mnist", "mnist-class-conditional", "mnist-distilled", "mnist-one-step"])
def test_shipped_weights_draw_strokes_on_black(tmp_path, name):
    if not (PRETRAINED / name).is_dir():
        pytest.skip(f"the weights {name} are not in this checkout")
    steps = ["--steps", 10] if name in ("mnist", "mnist-class-conditional") else []
    images = arrays(tmp_path, name, "--num-images", 4, *steps)["images"]
    assert images.shape == (4, 28, 28, 1)
    # Of real digits 19 % of the pixels carry ink and the outermost ring carries none.
    assert 0.08 < (images > 64).mean() < 0.3
    assert (np.concatenate([images[:, 0], images[:, -1]]) < 64).mean() > 0.95


# ---- what goes wrong ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "0"], "num_inference_steps"),
        (["--steps", "-1"], "num_inference_steps"),
        (["--steps", "2.5"], "'2.5'"),
        (["--steps", "1001"], "at most 1000"),
        (["--stpes", "5"], "--stpes"),
        (["--num-images", "0"], "--num-images=0 must be at least 1."),
        (["--batch-size", "0"], "--batch-size=0 must be at least 1."),
        (["--class-labels", "hat"], "'hat'; it must be one of coat, ankle boot, bag"),
        (["--class-labels", "4"], "4 is out of range"),
        (["--class-labels", "-1"], "-1"),
        (["--scheduler", "pndm"], "scheduler='pndm' must be one of ddpm, ddim"),
        (["--device", "gpu"], "device='gpu' must be auto, cpu"),
        (["--dtype", "fp8"], "'fp32', 'fp16', 'bf16'"),
        (["--guidance-scale", "nan"], "guidance_scale"),
        (["--eta", "nan"], "eta=nan must be a finite number"),
        (["--seed", "-1"], "seed=-1 must be at least 0"),
        (["--seed", "99999999999999999999"], "seed=99999999999999999999 must be at most"),
        (["--guidance-interval", "0.6", "0.4"], "guidance_interval"),
        (["--out", "samples.jpg"], "--out=samples.jpg must end in .png"),
        (["--out", "/dev/null/samples.png"], "--out=/dev/null/samples.png cannot be written"),
        (["--out", "/"], "--out=/ holds other files"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(conditional, capsys, monkeypatch, tmp_path, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert run("sample", conditional, *arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("mini-ddpm: ") and captured.err.count("\n") == 1
    assert message in captured.err
    assert captured.out == "" and os.listdir(tmp_path) == []


HINTS = [
    ("sample 3", "unexpected argument '3'. Did you mean --class-labels 3?"),
    ("sample 3 1 4 --steps 5", "unexpected argument '3'. Did you mean --class-labels 3 1 4?"),
    ("sample mnist coat", "unexpected argument 'coat'. Did you mean --class-labels coat?"),
    ("sample --class-label 3", "unknown option --class-label. Did you mean --class-labels 3?"),
    ("sample --class_label=3 --seed 1", "unknown option --class_label. Did you mean --class-labels 3?"),
    ("sample --num-steps 20", "unknown option --num-steps. Did you mean --num-inference-steps 20?"),
    ("sample --stpes 20", "unknown option --stpes. Did you mean --num-inference-steps 20?"),
    ("sample --num 20", "unknown option --num. Did you mean one of --num-images, --num-inference-steps?"),
    ("sample --pipeline mnist", "unknown option --pipeline."),
    ("sample --ab 1", "unknown option --ab."),
    ("train ylecun/mnist", "unexpected argument 'ylecun/mnist'. Did you mean --dataset-name ylecun/mnist?"),
    ("train --batch-size 8", "unknown option --batch-size. Did you mean --train-batch-size 8?"),
    ("evaluate mnist my/set", "unexpected argument 'my/set'. Did you mean --dataset-name my/set?"),
    ("evaluate mnist --dataset x", "unknown option --dataset. Did you mean --dataset-name x?"),
    ("distill mnist --image-colum x", "unknown option --image-colum. Did you mean --image-column x?"),
    ("push a b c", "unexpected argument 'c'."),
]


@pytest.mark.parametrize(("command", "message"), HINTS)
def test_words_that_no_flag_takes_are_answered_with_the_flag_that_is_meant(tmp_path, monkeypatch, command, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError) as error:
        mini_ddpm_cli.parse(command.split())
    assert str(error.value) == f"{message} See mini-ddpm {command.split()[0]} --help."


def test_a_folder_may_be_called_by_a_number(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "3").mkdir()
    assert mini_ddpm_cli.parse(["sample", "3"]).pipeline == "3"


@pytest.mark.parametrize("command", [["sample"], ["evaluate", "mnist"], ["distill", "mnist"]])
def test_steps_have_one_name_in_every_command(command):
    one, other = (mini_ddpm_cli.parse([*command, flag, "4"]) for flag in ("--num-inference-steps", "--steps"))
    assert one == other and one.num_inference_steps in (4, (4,))


def test_labels_and_guidance_need_a_conditional_pipeline(unconditional, capsys, tmp_path):
    out = tmp_path / "x.png"
    assert run("sample", unconditional, "--class-labels", 3, "--out", out) == 2
    assert "--class-labels=3: the pipeline is unconditional" in capsys.readouterr().err
    for option in (["--guidance-scale", 3], ["--guidance-interval", 0.2, 0.5]):
        assert run("sample", unconditional, *option, "--out", out) == 2
        assert f"{unconditional} is unconditional and takes no guidance" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_absent_cuda_device(conditional, capsys, tmp_path):
    assert run("sample", conditional, "--device", "cuda", "--out", tmp_path / "x.png") == 2
    assert capsys.readouterr().err.startswith("mini-ddpm: device='cuda': PyTorch finds no such device")


def test_unknown_pipelines_and_folders(capsys, tmp_path):
    for pipeline, message in (("no-such-name", "no-such-name"), (tmp_path, "model_index.json")):
        assert run("sample", pipeline, "--out", tmp_path / "x.png") == 2
        err = capsys.readouterr().err
        assert message in err and err.count("\n") == 1


def test_out_that_cannot_be_replaced(conditional, capsys, tmp_path):
    (tmp_path / "folder.png").mkdir()
    assert run("sample", conditional, "--out", tmp_path / "folder.png") == 2
    assert "is a folder" in capsys.readouterr().err
    (tmp_path / "file").write_text("mine")
    assert run("sample", conditional, "--out", tmp_path / "file") == 2
    assert "is a file" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


def test_debug_shows_the_traceback(conditional, monkeypatch, tmp_path):
    monkeypatch.setenv("MINI_DDPM_DEBUG", "1")
    with pytest.raises(ValueError, match="num_inference_steps"):
        run("sample", conditional, "--steps", 0, "--out", tmp_path / "x.png")


@pytest.fixture
def ctrl_c():
    """Ctrl-C interrupts, also where a shell has started the tests in the background, deaf to it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_leaves_the_previous_picture(unconditional, tmp_path, capsys):
    out = tmp_path / "samples.png"
    out.write_bytes(b"the previous picture")
    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    assert run("sample", unconditional, "--num-images", 100_000, "--steps", 1000, "--out", out) == 130
    timer.join()
    assert capsys.readouterr().err.endswith("mini-ddpm: interrupted\n")
    assert os.listdir(tmp_path) == ["samples.png"]
    assert out.read_bytes() == b"the previous picture"


# ---- train --------------------------------------------------------------------------------------------------------


def test_train_makes_a_pipeline_that_sample_draws_from(tmp_path, capsys):
    for i in range(4):
        folder = tmp_path / "pictures" / f"class-{i % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("L", (8, 8), 60 * i).save(folder / f"{i}.png")
    run_folder = tmp_path / "run"
    assert (
        run(
            *("train", "--dataset-name", tmp_path / "pictures", "--output-dir", run_folder, "--class-conditional"),
            *("--max-train-steps", 2, "--train-batch-size", 4, "--block-out-channels", 32, 32),
            *("--layers-per-block", 1, "--device", "cpu"),
        )
        == 0
    )
    assert capsys.readouterr().out.endswith(f"Draw images with: mini-ddpm sample {run_folder}\n")
    drawn = arrays(tmp_path, str(run_folder), "--class-labels", "class-1")
    assert drawn["class_labels"].tolist() == [1] and drawn["images"].shape == (1, 8, 8, 1)
    card = (run_folder / "README.md").read_text()
    assert "2 steps of AdamW with a batch size of 4" in card and "](samples/epoch-0002.png)" in card
    assert str(tmp_path) not in card and "Training data" not in card  # do not publish local paths


def test_train_without_images_is_one_line(tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    assert run("train", "--dataset-name", tmp_path / "empty", "--output-dir", tmp_path / "run") == 2
    err = capsys.readouterr().err
    assert err.splitlines()[-1].startswith("mini-ddpm: ") and "empty" in err


# ---- train --config -----------------------------------------------------------------------------------------------


def settings_of(config: TrainConfig, **more) -> dict:
    """What a run writes to its train_config.json."""
    settings = vars(config) | {"global_batch_size": 8, "dataset": {"images": 16}}
    return json.loads(json.dumps(settings | more, default=str))


@pytest.fixture
def saved(tmp_path):
    """Write a train_config.json, and return its folder."""

    def write(config: TrainConfig = TrainConfig(), name: str = "train_config.json", **more) -> Path:  # noqa: B008
        folder = tmp_path / "mine"
        folder.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps(settings_of(config, **more)))
        return folder

    return write


MINE = TrainConfig(
    "some/data",
    output_dir=Path("runs/elsewhere"),
    resolution=16,
    train_batch_size=8,
    cache_dataset=False,
    class_conditional=True,
    block_out_channels=(32, 64, 64),
    snr_gamma=5.0,
    log_with="none",
    adam_beta2=0.95,
)


@pytest.mark.parametrize("config", [TrainConfig(), MINE])
def test_the_settings_of_a_run_are_given_back(saved, config):
    folder = saved(config)
    for path in (folder, folder / "train_config.json"):
        for flags in (["--config", str(path)], [f"--config={path}"]):
            # Without an output folder it is the same run, also after its folder was moved.
            assert mini_ddpm_cli.parse(["train", *flags]) == dataclasses.replace(config, output_dir=folder)
            again = mini_ddpm_cli.parse(["train", *flags, "--output-dir", "again"])
            assert again == dataclasses.replace(config, output_dir=Path("again"))
            assert settings_of(again) == settings_of(config) | {"output_dir": "again"}
    saved(config, "best.json")
    assert mini_ddpm_cli.parse(["train", "--config", str(folder / "best.json")]) == config


def test_flags_beside_the_settings_of_a_run_win(saved):
    flags = [
        "--seed",
        "7",
        "--no-class-conditional",
        "--block-out-channels",
        "8",
        "16",
        "--dataset-name",
        "other",
    ]
    expected = dataclasses.replace(
        MINE, seed=7, class_conditional=False, block_out_channels=(8, 16), dataset_name="other"
    )
    config = ["--config", str(saved(MINE) / "train_config.json")]
    for order in ([*config, *flags], [*flags, *config]):
        assert mini_ddpm_cli.parse(["train", *order, "--output-dir", "runs/elsewhere"]) == expected


def test_help_tells_of_the_settings_of_a_run(capsys):
    with pytest.raises(SystemExit):
        run("train", "--help")
    assert "--config PATH starts from the settings of a run: its folder or train_config.json" in " ".join(
        capsys.readouterr().out.split()
    )


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"unet": "MyUNet"}, "the unet of this run was given in Python, and no file holds it. Call mini_ddpm.train"),
        ({"loss_fn": "my.loss"}, "the loss_fn of this run was given in Python"),
        ({"dataset_name": None}, "the dataset of this run was given in Python"),
        ({"distilled_from": "mnist", "num_inference_steps": 4}, "Repeat it with: mini-ddpm distill mnist"),
        ({"colour": 1}, "has the setting 'colour', which this version does not know"),
        ({"seed": "one"}, "train_config.json: seed='one' must be a whole number"),
        ({"beta_schedule": "steep"}, "train_config.json: beta_schedule='steep' must be one of"),
    ],
)
def test_settings_that_make_no_run_are_one_line(saved, capsys, more, message):
    folder = saved(**more)
    assert run("train", "--config", folder, "--output-dir", folder / "x") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and str(folder / "train_config.json") in err
    assert os.listdir(folder) == ["train_config.json"]


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"seed": 1}', "[" * 100_000])
def test_files_that_hold_no_settings_are_one_line(tmp_path, capsys, content):
    (tmp_path / "x.json").write_text(content)
    for path, message in ((tmp_path / "x.json", "holds no settings of a training run"), (tmp_path, "there is no")):
        assert run("train", "--config", path, "--output-dir", tmp_path / "out") == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1 and message in err
    assert run("train", "--output-dir", tmp_path / "out", "--config") == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_run_is_repeated_from_its_own_settings(tmp_path, pictures):
    flags = ("--max-train-steps", 2, "--train-batch-size", 4, "--block-out-channels", 8, 16, "--layers-per-block", 1)
    flags += ("--device", "cpu", "--log-with", "none", "--save-images-epochs", 0, "--beta-schedule", "cosine")
    assert run("train", "--dataset-name", pictures, "--output-dir", tmp_path / "mine", *flags) == 0
    assert run("train", "--config", tmp_path / "mine", "--output-dir", tmp_path / "again") == 0
    mine, again = (json.loads((tmp_path / name / "train_config.json").read_text()) for name in ("mine", "again"))
    assert again == mine | {"output_dir": str(tmp_path / "again")}
    weights = [tmp_path / name / "unet/diffusion_pytorch_model.safetensors" for name in ("mine", "again")]
    assert weights[0].read_bytes() == weights[1].read_bytes()
    assert run("train", "--config", tmp_path / "again", "--max-train-steps", 3) == 0  # the same folder goes on
    assert sorted(path.name for path in (tmp_path / "again").glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
