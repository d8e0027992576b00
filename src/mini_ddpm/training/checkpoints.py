"""The folder of a training run: its settings, its log, its checkpoints and its pipeline."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic_write, remove, write_text

if TYPE_CHECKING:
    from accelerate import Accelerator

# Settings that a resumed run may change. With any other change it would be another run.
CHANGEABLE_SETTINGS = {
    "output_dir",
    "num_epochs",
    "max_train_steps",
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

# Settings of earlier versions that are constants now.
FIXED_SETTINGS = {"channels_last": True, "ema_power": 0.75}

# Names of unfinished files and folders: those of `atomic_write`, and those of earlier versions.
_UNFINISHED = re.compile(r"\..+\.(\d+(\.\w+)?|tmp)|train_config\.json\.tmp")


def list_checkpoints(output_dir: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first. Each is complete."""
    return sorted(output_dir.glob("checkpoint-*"), key=checkpoint_step)


def checkpoint_step(checkpoint: Path) -> int:
    """Return the number of optimizer steps after which a checkpoint was written."""
    return int(checkpoint.name.split("-")[1])


def claim_folder(folder: Path, settings: dict[str, Any]) -> None:
    """Create the run's folder, or check that it holds the run with these settings, and write `train_config.json`.

    Unfinished files of a killed run are removed. A folder that holds another run, or something else, is a
    `ValueError`; one that cannot be written is an `OSError`.
    """
    settings = json.loads(json.dumps(settings, default=str))  # as read back: tuples as lists, paths as strings
    config_file = folder / "train_config.json"
    if list_checkpoints(folder) and config_file.exists():
        saved = FIXED_SETTINGS | json.loads(config_file.read_text(encoding="utf-8"))
        current = FIXED_SETTINGS | settings
        for key in current | saved:
            if key in CHANGEABLE_SETTINGS or saved.get(key) == current.get(key):
                continue
            held = f"{folder} holds a run with {key}={saved.get(key)!r}"
            if key in FIXED_SETTINGS:
                raise ValueError(f"{held}, but this version always uses {current[key]!r}. Use another output_dir.")
            raise ValueError(
                f"{held}, not {current.get(key)!r}. Use the same value to resume it, or another output_dir to start "
                "a new run."
            )
    elif folder.exists() and not config_file.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and holds no run of mini-ddpm. Use another output_dir.")
    for path in (*folder.glob("*"), *folder.glob("*/.*")):
        if _UNFINISHED.fullmatch(path.name):
            remove(path)
    write_text(config_file, json.dumps(settings, indent=2) + "\n")


def truncate_log(output_dir: Path, step: int) -> None:
    """Remove the lines of `train_log.jsonl` that belong to steps after `step`, which will be taken again."""
    log = output_dir / "train_log.jsonl"
    if not log.exists():
        return
    lines = []
    for line in log.read_text(encoding="utf-8").splitlines():
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:  # a killed run was writing this line
            break
        if entry["step"] <= step:
            lines.append(line + "\n")
    write_text(log, "".join(lines))


def save_checkpoint(accelerator: Accelerator, output_dir: Path, step: int, seconds: float, limit: int) -> None:
    """Write the state of all processes to `checkpoint-STEP`, complete or not at all, and keep the last `limit`.

    Every process calls this, after `step` optimizer steps and `seconds` of training. A checkpoint that cannot be
    written, for example because the disk is full, is an `OSError`; earlier ones are kept.
    """
    from accelerate.utils import broadcast_object_list

    is_main, checkpoint = accelerator.is_main_process, output_dir / f"checkpoint-{step}"
    with explain_write_errors(output_dir):
        with atomic_write(checkpoint, folder=True) if is_main else contextlib.nullcontext(checkpoint) as own:
            (folder,) = broadcast_object_list([own])  # every process writes to the main process's temporary folder
            accelerator.save_state(str(folder))
            accelerator.wait_for_everyone()
            if is_main:
                progress = {"step": step, "seconds": round(seconds, 1)}
                (folder / "progress.json").write_text(json.dumps(progress) + "\n", encoding="utf-8")
        for old in list_checkpoints(output_dir)[:-limit] if is_main else ():
            remove(old)


def save_pipeline(output_dir: Path, pipeline: Any) -> None:
    """Write the pipeline to `output_dir`, file by file over the previous one, but without its `README.md`.

    A file that cannot be written is an `OSError`.
    """
    temporary_folder = output_dir / ".pipeline.tmp"
    try:
        with explain_write_errors(output_dir):
            remove(temporary_folder)
            pipeline.save_pretrained(temporary_folder)
            (temporary_folder / "README.md").unlink()  # `hub.card.write_card` writes one that knows more
            for file in sorted(path for path in temporary_folder.rglob("*") if path.is_file()):
                with atomic_write(output_dir / file.relative_to(temporary_folder)) as temporary:
                    file.replace(temporary)
    finally:
        remove(temporary_folder)


@contextlib.contextmanager
def explain_write_errors(output_dir: Path) -> Iterator[None]:
    """Turn each error of a failed write into an `OSError` that says what to do and which checkpoint is kept."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, RuntimeError, SafetensorError) as error:  # torch raises RuntimeError, safetensors its own
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        checkpoints = list_checkpoints(output_dir)
        raise OSError(
            f"Cannot write to {output_dir}: {reason}. Free some space or use another "
            f"output_dir, then start again. Last checkpoint: {checkpoints[-1] if checkpoints else 'none'}."
        ) from error
