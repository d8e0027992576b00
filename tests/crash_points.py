"""Kill a command at every operation on its files, give the same command again, and compare with a run left alone.

    python tests/crash_points.py train FOLDER              # also distill, sample, evaluate
    python tests/crash_points.py train FOLDER --every 8    # every eighth operation

An operation is what Python reports before it happens: opening a file to write, renaming, removing, making a folder.
SIGKILL comes at the k-th of them under FOLDER, for k = 1, 2, ... until a run ends by itself. The program prints one
line of JSON: how many points there were, and what went wrong at each.
"""

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import signal
import sys
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image

# Times differ from run to run.
VOLATILE = {
    "train_log.jsonl",
    "progress.json",
    "evaluation.json",
    "evaluation.md",
    "evaluation.png",
    ".lock",
    "README.md",
}


def pictures(folder):
    rng = np.random.default_rng(0)
    for index in range(12):
        name = ("left", "right")[index % 2]
        (folder / name).mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (8, 8), dtype=np.uint8)).save(folder / name / f"{index}.png")
    return folder


def settings(root):
    shared = {"dataset_name": str(root / "pictures"), "device": "cpu", "mixed_precision": "no", "log_with": "none"}
    return shared | {"train_batch_size": 4, "checkpointing_steps": 2}


def train(root, folder):
    from mini_ddpm.training.train import TrainConfig
    from mini_ddpm.training.train import train as run

    run(
        TrainConfig(
            **settings(root),
            output_dir=folder / "run",
            class_conditional=True,
            block_out_channels=(32,),
            layers_per_block=1,
            max_train_steps=4,
            checkpoints_total_limit=1,
            num_train_timesteps=8,
        )
    )


def distill(root, folder):
    from mini_ddpm.training.distill import DistillConfig
    from mini_ddpm.training.distill import distill as run

    config = DistillConfig(
        str(root / "teacher" / "run"), **settings(root), output_dir=folder / "distilled", num_inference_steps=2,
        rounds=2, images_per_round=16,
    )  # fmt: skip
    run(config)


def sample(root, folder):
    import mini_ddpm_cli

    for out in ("grid.png", "images", "arrays.npz"):
        arguments = ["sample", str(root / "teacher" / "run"), "--out", str(folder / out), "--num-images", "6"]
        if mini_ddpm_cli.main([*arguments, "--batch-size", "2", "--steps", "2", "--device", "cpu"]):
            raise SystemExit(2)


def evaluate(root, folder):
    from mini_ddpm.evaluation import evaluate as evaluation

    os.environ["MINI_DDPM_CACHE"] = str(folder / "cache")
    evaluation.evaluate(
        evaluation.EvaluateConfig(
            str(root / "teacher" / "run"),
            str(root / "pictures"),
            split="train",
            other_split="train",
            num_images=12,
            num_inference_steps=(2,),
            feature_extractor=str(root / "features"),
            device="cpu",
            output_dir=folder / "evaluation",
        )
    )


COMMANDS = {"train": train, "distill": distill, "sample": sample, "evaluate": evaluate}


def prepare(root, command):
    """Make everything that the command reads."""
    pictures(root / "pictures")
    train(root, root / "teacher")  # also for `train` itself: the forks then need not import everything anew
    if command == "evaluate":
        from transformers import ResNetConfig, ResNetModel, ViTImageProcessor

        torch.manual_seed(0)
        config = ResNetConfig(num_channels=3, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
        ResNetModel(config).save_pretrained(root / "features")
        ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(root / "features")


def in_child(call):
    """Run `call` in a fork of this process. Return its exit status; a negative one is the signal that killed it."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
                call()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(point, folder, call):
    """Run `call`, and kill this process at operation number `point` under `folder`."""
    count = 0
    prefix = str(folder)
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event, args):
        nonlocal count
        if event == "open":
            path, mode, flags = args
            if isinstance(path, int) or not (flags & writing if mode is None else set(mode) & set("wax+")):
                return
        elif event in ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate", "shutil.rmtree"):
            path = args[0]
        else:
            return
        if isinstance(path, (str, os.PathLike)) and os.path.abspath(os.fspath(path)).startswith(prefix):
            count += 1
            if count == point:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    call()


def digest(path):
    """The hash of what a file holds, beside times."""
    if path.is_dir() or path.name in VOLATILE or path.suffix in (".bin", ".pkl"):
        return ""
    if path.suffix == ".npz":
        with np.load(path) as arrays:
            parts = [arrays[name].tobytes() for name in sorted(arrays.files) if name != "cost"]
    else:
        parts = [path.read_bytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def content(folder):
    """By name, what a folder holds."""
    return {str(path.relative_to(folder)): digest(path) for path in sorted(folder.rglob("*"))}


def walk(command, root, every):
    """Return the number of points, and what went wrong at which."""
    prepare(root, command)
    whole, folder = root / "whole", root / "killed"
    call = COMMANDS[command]
    if in_child(lambda: call(root, folder)):
        raise SystemExit("the command fails even if it is left alone")
    folder.rename(whole)
    expected, wrong, points, point = content(whole), {}, 0, 1
    while True:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        status = in_child(lambda point=point: killed_at(point, folder, lambda: call(root, folder)))
        if status == 0:
            break
        points += 1
        if status != -signal.SIGKILL:
            wrong[point] = f"before the kill: exit status {status}"
        elif status := in_child(lambda: call(root, folder)):
            wrong[point] = f"the same command again: exit status {status}"
        elif (found := content(folder)) != expected:
            names = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
            wrong[point] = f"other files: {', '.join(names[:5])}"
        point += every
    return {"command": command, "points": points, "wrong": wrong}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=COMMANDS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--every", type=int, default=1)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", category=DeprecationWarning)  # fork in a process with threads
    torch.set_num_threads(1)
    options.folder.mkdir(parents=True, exist_ok=True)
    print(json.dumps(walk(options.command, options.folder.resolve(), options.every)))
