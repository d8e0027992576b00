"""The folder of a training run: its settings, its lock, its log, its checkpoints and its pipeline.

Nothing that is read from it can execute code: weights are safetensors, and accelerate reads the states of the
optimizer and of the random generators with `weights_only=True`.
"""

from __future__ import annotations

import contextlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..files import atomic_write, discard, flush, is_running, remove, write_text
from ..pipelines.portable import sha256

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that a resumed run may change. With any other change it would be another run.
CHANGEABLE_SETTINGS = {
    "output_dir",
    "num_epochs",
    "max_train_steps",
    "train_batch_size",  # of each process; that of all processes must stay
    "checkpointing_steps",
    "checkpoints_total_limit",
    "logging_steps",
    "save_images_epochs",
    "log_with",
    "device",
    "cache_dataset",
    "dataloader_num_workers",
    "torch_compile",
}

_CHECKPOINT = re.compile(r"checkpoint-(\d{1,18})")
_AVERAGED_WEIGHTS = "averaged_weights.safetensors"

# Names of unfinished files and folders: those of `atomic_write`, and those of earlier versions.
_UNFINISHED = re.compile(r"\..+\.([0-9a-f]{4}-)?\d+(\.\w+)?|\.pipeline\.tmp|train_config\.json\.tmp")
_LOCK = ".lock"


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first: folders `checkpoint-NUMBER` that hold a `progress.json` of ours.

    Anything else with such a name belongs to somebody else.
    """
    return [path for path in _numbered_folders(output_dir) if _read_progress(path) is not None]


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def last_checkpoint(output_dir: Path) -> tuple[Path | None, dict[str, Any]]:
    """Return the newest whole checkpoint and its progress; `None` and no progress if there is none.

    Each newer one that is damaged is named on stderr, with its damaged file. If all are, that is a `ValueError`. So is
    a checkpoint of an earlier version.
    """
    damages: list[Path] = []
    for checkpoint in reversed(_numbered_folders(output_dir)):
        progress = _read_progress(checkpoint)
        if progress is None and not any((checkpoint / name).exists() for name in ("progress.json", _AVERAGED_WEIGHTS)):
            continue  # somebody else's
        damage = "progress.json" if progress is None else _damaged_file(checkpoint, progress["files"])
        if damage is None and progress is not None:
            for other in damages:
                print(f"{other} is damaged. Going on from {checkpoint}.", file=sys.stderr)
            return checkpoint, progress
        if (checkpoint / "custom_checkpoint_0.pkl").exists():
            raise ValueError(
                f"{checkpoint} was written by an earlier version, which this one cannot resume. Use another "
                f"output_dir. To go on from its weights, set pretrained_model_name_or_path={output_dir}."
            )
        damages.append(checkpoint / str(damage))
    if damages:
        raise ValueError(
            f"{damages[0]} is damaged, and there is no whole checkpoint. Use another output_dir, or delete the "
            "damaged checkpoint to start again."
        )
    return None, {}


def _numbered_folders(output_dir: Path) -> list[Path]:
    """Return the folders called `checkpoint-NUMBER`, sorted by number. Links are none."""
    found = [path for path in output_dir.glob("checkpoint-*") if _CHECKPOINT.fullmatch(path.name)]
    return sorted((path for path in found if path.is_dir() and not path.is_symlink()), key=checkpoint_step)


def _read_progress(checkpoint: Path) -> dict[str, Any] | None:
    """Return what `progress.json` of a checkpoint says, or `None` if it is none of ours."""
    file = checkpoint / "progress.json"
    if not file.is_file():
        return None
    try:
        progress = json.loads(file.read_text(encoding="utf-8"))
        is_ours = progress["step"] == checkpoint_step(checkpoint) and progress["seconds"] >= 0
        is_ours &= all(isinstance(progress[key], dict) for key in ("files", "pipeline"))
    except (ValueError, KeyError, TypeError, OSError, RecursionError):
        return None
    return progress if is_ours else None


def _damaged_file(folder: Path, hashes: dict[str, str]) -> str | None:
    """Return the name of the first file of `hashes` that is missing or has another hash, or `None`."""
    return next((name for name, digest in hashes.items() if file_hash(folder / name) != digest), None)


def file_hash(file: Path) -> str | None:
    """Return the SHA-256 of a file, or `None` if it is no regular file or cannot be read."""
    if not file.is_file():
        return None
    with contextlib.suppress(OSError):
        return sha256(file)
    return None


@contextlib.contextmanager
def claimed_folder(folder: Path, settings: dict[str, Any]) -> Iterator[None]:
    """Create the run's folder, or check that it holds the run with these settings, and keep it for this process.

    Until the block ends, no other process can claim the folder. Unfinished files of a killed run are removed, and
    `train_config.json` is written. A folder that is in use, that holds another run, or that holds something else is a
    `ValueError`, and nothing is written to it; one that cannot be written is an `OSError`.
    """
    settings = json.loads(json.dumps(settings, default=str))  # as read back: tuples as lists, paths as strings
    _check_folder(folder, settings)
    with explain_write_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with _locked(folder):
        _check_folder(folder, settings)  # it may have changed while this process waited
        for path in (*folder.glob("*"), *folder.glob("*/.*")):
            if _UNFINISHED.fullmatch(path.name):
                remove(path)
        with explain_write_errors(folder):
            write_text(folder / "train_config.json", json.dumps(settings, indent=2) + "\n")
        yield


def _check_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Raise a `ValueError` if the folder holds another run, or something else."""
    config_file = folder / "train_config.json"
    if not config_file.is_file():
        if folder.exists() and not folder.is_dir():
            raise ValueError(f"{folder} is a file. Use another output_dir.")
        foreign = [path for path in folder.glob("*") if path.name != _LOCK and not _UNFINISHED.fullmatch(path.name)]
        if foreign:
            raise ValueError(f"{folder} holds no run of mini-ddpm, but {foreign[0].name}. Use another output_dir.")
        return
    if not list_checkpoints(folder):
        return  # the run failed before its first checkpoint, and can be started otherwise
    try:
        saved = json.loads(config_file.read_text(encoding="utf-8"))
        images = saved["dataset"].items()
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{config_file} is damaged. Use another output_dir.") from error
    for name, value in images:
        if settings["dataset"].get(name) != value:
            raise ValueError(
                f"{folder} holds a run on other images: their {name} was {value!r} and is "
                f"{settings['dataset'].get(name)!r}. Use the same images to resume it, or another output_dir to start "
                "a new run."
            )
    for key in settings | saved:
        if key not in CHANGEABLE_SETTINGS and saved.get(key) != settings.get(key):
            raise ValueError(
                f"{folder} holds a run with {key}={saved.get(key)!r}, not {settings.get(key)!r}. Use the same value "
                "to resume it, or another output_dir to start a new run."
            )


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder. The operating system releases it when the process ends, however it ends."""
    from filelock import FileLock, Timeout

    file = folder / _LOCK
    lock = FileLock(file)
    deadline = time.monotonic() + 10.0
    while True:
        owner = file.read_text(encoding="utf-8", errors="replace").split() if file.is_file() else []
        try:
            lock.acquire(timeout=0)
            break
        except Timeout as error:
            # A killed process may have left children, which hold its lock until they notice that it is gone.
            is_dead = len(owner) == 2 and owner[1] == platform.node() and not is_running(int(owner[0]))
            if not is_dead or time.monotonic() > deadline:
                name = f"process {owner[0]} on {owner[1]}" if len(owner) == 2 else "another process"
                raise ValueError(
                    f"{folder} is in use by {name}. Wait until it ends, stop it, or use another output_dir."
                ) from error
            time.sleep(0.1)
    try:
        with explain_write_errors(folder):
            file.write_text(f"{os.getpid()} {platform.node()}\n", encoding="utf-8")
        yield
    finally:
        lock.release()


def truncate_log(output_dir: Path, step: int) -> None:
    """Remove the lines of `train_log.jsonl` that belong to steps after `step`, which will be taken again."""
    log = output_dir / "train_log.jsonl"
    if not log.exists():
        return
    lines = []
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            if entry["step"] <= step:
                lines.append(line + "\n")
        except (ValueError, KeyError, TypeError):  # a killed run was writing this line
            continue
    with explain_write_errors(output_dir):
        write_text(log, "".join(lines))


def save_checkpoint(
    accelerator: Accelerator,
    output_dir: Path,
    progress: dict[str, Any],
    averaged_weights: dict[str, torch.Tensor],
    limit: int,
) -> Path:
    """Write the state of all processes to `checkpoint-STEP`, complete or not at all, and keep the last `limit`.

    Every process calls this. `progress` holds the `step`, the `seconds` of training, and the hashes of the files of
    the `pipeline`; the hashes of the checkpoint's own files are added to it. A checkpoint that cannot be written, for
    example because the disk is full, is an `OSError`; earlier ones are kept. Return its folder.
    """
    from accelerate.utils import broadcast_object_list
    from safetensors.torch import save_file

    is_main, checkpoint = accelerator.is_main_process, output_dir / f"checkpoint-{progress['step']}"
    with explain_write_errors(output_dir):
        if is_main:
            if checkpoint.exists() and _read_progress(checkpoint) is None:
                set_aside(checkpoint)
            if (log := output_dir / "train_log.jsonl").is_file():
                flush(log)
        with atomic_write(checkpoint, folder=True) if is_main else contextlib.nullcontext(checkpoint) as own:
            (folder,) = broadcast_object_list([own])  # every process writes to the main process's temporary folder
            accelerator.save_state(str(folder))
            accelerator.wait_for_everyone()
            if is_main:
                contiguous = {name: tensor.contiguous() for name, tensor in averaged_weights.items()}
                save_file(contiguous, folder / _AVERAGED_WEIGHTS)
                hashes = {file.name: file_hash(file) for file in sorted(folder.iterdir())}
                text = json.dumps({**progress, "files": hashes}, indent=2) + "\n"
                (folder / "progress.json").write_text(text, encoding="utf-8")
        if is_main:
            keep_last_checkpoints(output_dir, progress["step"], limit)
    return checkpoint


def keep_last_checkpoints(output_dir: Path, step: int, limit: int) -> None:
    """Remove the checkpoints up to `step`, the last whole one, but for the last `limit`."""
    checkpoints = list_checkpoints(output_dir)
    for old in [path for path in checkpoints if checkpoint_step(path) <= step][:-limit]:
        discard(old)


def load_checkpoint(accelerator: Accelerator, checkpoint: Path) -> dict[str, torch.Tensor]:
    """Restore the state that `save_checkpoint` wrote. Return the averaged weights by name."""
    from safetensors.torch import load_file

    accelerator.load_state(str(checkpoint))
    return load_file(checkpoint / _AVERAGED_WEIGHTS)


def set_aside(path: Path) -> None:
    """Rename what is in the way of a checkpoint: `checkpoint-4` to `checkpoint-4.old`, or `checkpoint-4.old2`."""
    names = (path.with_name(f"{path.name}.old{index or ''}") for index in (0, *range(2, 1000)))
    target = next(name for name in names if not name.exists())
    path.rename(target)
    print(f"{path} was no whole checkpoint of this run, and is {target} now.", file=sys.stderr)


def save_pipeline(output_dir: Path, pipeline: Any) -> dict[str, str | None]:
    """Write the pipeline to `output_dir`, file by file over the previous one, but without its `README.md`.

    Return the hash of each file. A file that cannot be written is an `OSError`.
    """
    hashes = {}
    temporary_folder = output_dir / ".pipeline.tmp"
    try:
        with explain_write_errors(output_dir):
            remove(temporary_folder)
            pipeline.save_pretrained(temporary_folder)
            (temporary_folder / "README.md").unlink()  # `hub.card.write_card` writes one that knows more
            for file in sorted(path for path in temporary_folder.rglob("*") if path.is_file()):
                name = file.relative_to(temporary_folder).as_posix()
                hashes[name] = file_hash(file)
                with atomic_write(output_dir / name) as temporary:
                    file.replace(temporary)
    finally:
        remove(temporary_folder)
    return hashes


def is_whole_pipeline(output_dir: Path, progress: dict[str, Any]) -> bool:
    """Return whether the folder holds the pipeline that was written before the checkpoint with this progress."""
    return bool(progress["pipeline"]) and _damaged_file(output_dir, progress["pipeline"]) is None


@contextlib.contextmanager
def explain_write_errors(output_dir: Path) -> Iterator[None]:
    """Turn each error of a failed write into an `OSError` that says what to do and which checkpoint is kept."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # safetensors raises its own, and torch RuntimeError
        if isinstance(error, RuntimeError) and not re.search("PytorchStreamWriter|inline_container", str(error)):
            raise
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        checkpoints = list_checkpoints(output_dir)
        raise OSError(
            f"Cannot write to {output_dir}: {reason}. Free some space or use another "
            f"output_dir, then start again. Last checkpoint: {checkpoints[-1] if checkpoints else 'none'}."
        ) from error
