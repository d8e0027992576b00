"""Writing files so that a reader finds the old content or the new, never a part of it."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `target`, and rename it to `target` when the block ends without an error.

    The content is flushed to the disk before the rename, so `target` is whole even after a power loss. The temporary
    path is removed if the block fails.

    Args:
        target: The file, or the folder, to write. Its parent is created.
        folder: Whether to write a folder. An existing one is replaced.

    Yields:
        The temporary path, `.NAME.PID.SUFFIX`. It keeps the suffix, which tells some writers their format.

    Raises:
        OSError: The path cannot be written.
    """
    temporary = target.with_name(f".{target.stem}.{os.getpid()}{target.suffix}")
    target.parent.mkdir(parents=True, exist_ok=True)
    remove(temporary)
    try:
        temporary.mkdir() if folder else temporary.touch()
        yield temporary
        flush(temporary)
        if folder:
            remove(target)
        os.replace(temporary, target)
    finally:
        remove(temporary)


def write_text(target: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(target) as file:
        file.write_text(text, encoding="utf-8")


def flush(path: Path) -> None:
    """Write a file, or every file of a folder, through to the disk."""
    for file in path.rglob("*") if path.is_dir() else (path,):
        if file.is_file():
            with file.open("rb") as stream:
                os.fsync(stream.fileno())


def remove(path: Path) -> None:
    """Remove a file or a folder, if there is one."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
