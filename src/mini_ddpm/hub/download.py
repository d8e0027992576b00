"""Downloading pipelines from the Hub, and comparing the cache with its checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import (
    HfApi,
)
from huggingface_hub.errors import (
    HFValidationError,
)

from .errors import _plain_words

_download = DiffusionPipeline.download.__func__


def download(cls: type[DiffusionPipeline], /, pretrained_model_name: str | Path, **kwargs: Any) -> Any:
    """Downloads a pipeline as `cls.download` of diffusers does, but fails in plain words."""
    with _plain_words(str(pretrained_model_name), kwargs.get("revision"), "Cannot download {} from the Hub: {}"):
        return _download(cls, pretrained_model_name, **kwargs)


def _damaged(folder: Path) -> list[str]:
    """Removes from the cache, and names, the files of a snapshot that are not what the Hub announced.

    The client compares sizes, not contents. But it names a cached file by the hash that the Hub announced for it:
    SHA-256 for large files, that of a git blob for the others. Where the cache has no links this finds nothing.
    """
    damaged = []
    for link in sorted(path for path in folder.rglob("*") if path.is_symlink() and path.exists()):
        blob, content = link.resolve(), link.read_bytes()
        if len(blob.name) == 64:
            digest = hashlib.sha256(content).hexdigest()
        elif len(blob.name) == 40:
            digest = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
        else:
            continue
        if digest != blob.name:
            damaged.append(link.relative_to(folder).as_posix())
            link.unlink()
            blob.unlink()
    return damaged


def verify(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> tuple[str, int]:
    """Compares what the cache holds of a repository with the Hub's checksums; what differs is removed from the cache.

    Returns:
        The commit, and the number of files that are right.

    Raises:
        OSError: A file is damaged, or the Hub cannot be asked.
        ValueError: The cache holds nothing of the repository.
    """
    with _plain_words(repo_id, revision, "Cannot verify {}: {}"):
        try:
            found = HfApi(token=token).verify_repo_checksums(repo_id, revision=revision)
        except HFValidationError:
            raise
        except ValueError as error:
            raise ValueError(
                f"Nothing of {repo_id} (revision {revision or 'main'!r}) is in the cache to be verified: pull it"
                f" first, as `mini-ddpm sample {repo_id}` does."
            ) from error
    for mismatch in found.mismatches:
        file = found.verified_path / mismatch["path"]
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    if found.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in found.mismatches)
        raise OSError(
            f"{repo_id} is damaged in the cache: {names}. It is removed from there; load the pipeline again, and it is"
            " downloaded anew."
        )
    return found.revision, found.checked_count
