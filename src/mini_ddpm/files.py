"""Writing files so that a reader finds the old content or the new, never a part of it."""

import contextlib
import os
import platform
import re
import shutil
import time
import zlib
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def atomic_write(target: Path, *, folder: bool = False) -> Iterator[Path]:
    """Give a temporary path beside `target`, and rename it to `target` when the block ends without an error.

    The content is flushed to the disk before the rename, so `target` is whole even after a power loss. Permissions
    follow the umask, also for files that safetensors wrote for their owner alone. The temporary path is removed if the
    block fails. If the process is killed, the next write of `target` removes it.

    Args:
        target: The file, or the folder, to write. Its parent is created.
        folder: Whether to write a folder. An existing one is replaced.

    Yields:
        The temporary path, `.NAME.HOST-PID.SUFFIX`. It keeps the suffix, which tells some writers their format.

    Raises:
        OSError: The path cannot be written.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    remove_leftovers(target)
    temporary = _temporary_path(target, target.suffix)
    remove(temporary)
    try:
        temporary.mkdir() if folder else temporary.touch()
        mode = temporary.stat().st_mode & 0o666
        yield temporary
        for file in temporary.rglob("*") if folder else (temporary,):
            if file.is_file() and not file.is_symlink():
                file.chmod(mode)
        flush(temporary)
        if folder:
            discard(target)
        os.replace(temporary, target)
    finally:
        remove(temporary)


def _temporary_path(target: Path, suffix: str) -> Path:
    """Return a name beside `target` that no other process uses."""
    host = zlib.crc32(platform.node().encode()) & 0xFFFF
    return target.with_name(f".{target.stem}.{host:04x}-{os.getpid()}{suffix}")


def remove_leftovers(target: Path) -> None:
    """Remove the temporary paths of `target` that killed processes left: those of this machine, and old ones."""
    own_host = _temporary_path(target, "").name.rpartition("-")[0]
    name = re.compile(re.escape(f".{target.stem}.") + r"[0-9a-f]{4}-(\d{1,9})(\.\w+)?")
    for path in target.parent.iterdir():
        if match := name.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # another process removes it too
                is_old = time.time() - path.lstat().st_mtime > 24 * 3600
                if is_old or (path.name.startswith(f"{own_host}-") and not is_running(int(match[1]))):
                    remove(path)


def is_running(pid: int) -> bool:
    """Return whether this machine has a process of this number. On Windows, where this is not known: yes."""
    if os.name == "nt":
        return True
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


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


def discard(path: Path) -> None:
    """Remove a file or a folder, if there is one, at once: a reader finds all of it or nothing."""
    if path.is_dir() and not path.is_symlink():
        aside = _temporary_path(path, ".removed")
        remove(aside)
        path.rename(aside)
        path = aside
    remove(path)
