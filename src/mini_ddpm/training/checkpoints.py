"""The folder of a training run: its configuration, checkpoints and log."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .train import _FREE_TO_CHANGE, TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def _checkpoints(output_dir: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted(output_dir.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))


def _claim_folder(folder: Path, described: dict[str, Any]) -> None:
    """Make the run's folder, or see that what is in it is the run of this description.

    Raises:
        ValueError: The folder holds something else than this run.
        OSError: It cannot be written.
    """
    described = json.loads(json.dumps(described, default=str))  # as it is read back: lists for tuples, texts for paths
    config_file = folder / "train_config.json"
    if _checkpoints(folder) and config_file.exists():
        before = json.loads(config_file.read_text())
        differing = [key for key in described if key not in _FREE_TO_CHANGE and described[key] != before.get(key)]
        if differing:
            key = differing[0]
            raise ValueError(
                f"{folder} holds a run with {key}={before.get(key)!r}, not {described[key]!r}. Go on with the same "
                "value, or use another output_dir."
            )
    elif folder.exists() and not config_file.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and holds no run of mini-ddpm. Use another output_dir.")
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / "train_config.json.tmp"
    temporary.write_text(json.dumps(described, indent=2) + "\n")
    os.replace(temporary, config_file)


def _truncate_log(output_dir: Path, step: int) -> None:
    """Drop the log lines of steps that will be taken again."""
    log = output_dir / "train_log.jsonl"
    if log.exists():
        lines = []
        for line in log.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:  # the line that a killed run was writing
                break
            if entry["step"] <= step:
                lines.append(line + "\n")
        log.write_text("".join(lines))


def _save_checkpoint(accelerator: Accelerator, config: TrainConfig, step: int, seconds: float) -> None:
    """Write all state under a temporary name, then rename it: a checkpoint is whole or absent.

    Raises:
        OSError: It could not be written, for example because the disk is full. Earlier checkpoints are untouched.
    """
    folder = config.output_dir / f"checkpoint-{step}"
    temporary = config.output_dir / f".checkpoint-{step}.tmp"
    with _clear_write_errors(temporary):
        shutil.rmtree(temporary, ignore_errors=True)
        accelerator.wait_for_everyone()
        accelerator.save_state(str(temporary))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            (temporary / "progress.json").write_text(json.dumps({"step": step, "seconds": round(seconds, 1)}) + "\n")
            _flush_to_disk(temporary)
            shutil.rmtree(folder, ignore_errors=True)
            os.replace(temporary, folder)
            for old in _checkpoints(config.output_dir)[: -config.checkpoints_total_limit]:
                shutil.rmtree(old)


class _clear_write_errors:
    """Turn the many ways in which writing `folder` fails into one `OSError` that says what is kept, and tidy up."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        from safetensors import SafetensorError

        # torch reports a failed write as RuntimeError, safetensors as its own.
        if isinstance(error, (OSError, RuntimeError, SafetensorError)):
            shutil.rmtree(self.folder, ignore_errors=True)
            kept = _checkpoints(self.folder.parent)
            raise OSError(
                f"Could not write {self.folder.parent} ({str(error).strip().splitlines()[0]}). Free some space or "
                f"choose another output_dir, then run the same command. Last checkpoint: {kept[-1] if kept else None}."
            ) from error


def _flush_to_disk(folder: Path) -> None:
    """Make the files durable before the rename that puts them in place."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
