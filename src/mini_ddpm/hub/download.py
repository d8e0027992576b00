"""Download pipelines from the Hub, and compare the cache with the Hub's checksums."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from huggingface_hub import HfApi
from huggingface_hub.errors import HFValidationError

from .errors import explain_hub_errors

_download_of_diffusers = DiffusionPipeline.download.__func__


def download(cls: type[DiffusionPipeline], /, pretrained_model_name: str | Path, **kwargs: Any) -> Any:
    """Download a pipeline with diffusers' `cls.download`, and replace its errors by an `OSError` of one line."""
    failed = "The download of {} from the Hub failed: {}."
    with explain_hub_errors(str(pretrained_model_name), kwargs.get("revision"), failed):
        return _download_of_diffusers(cls, pretrained_model_name, **kwargs)


def remove_corrupt_files(snapshot: Path) -> list[str]:
    """Delete the corrupt files of a snapshot from the Hub's cache, and return their names.

    The client compares sizes, not contents. But it names each cached file after the hash that the Hub announced:
    SHA-256 for large files, that of a git blob for the others. A cache without symbolic links has no such names, and
    nothing is checked there.
    """
    corrupt = []
    for link in sorted(path for path in snapshot.rglob("*") if path.is_symlink() and path.is_file()):
        blob, content = link.resolve(), link.read_bytes()
        is_git_hash = len(blob.name) == 40
        hashed = hashlib.sha1(b"blob %d\0" % len(content) + content) if is_git_hash else hashlib.sha256(content)
        if len(blob.name) in (40, 64) and hashed.hexdigest() != blob.name:
            corrupt.append(link.relative_to(snapshot).as_posix())
            link.unlink()
            blob.unlink()
    return corrupt


def verify(repo_id: str, *, revision: str | None = None, token: str | bool | None = None) -> tuple[str, int]:
    """Compare the cached files of a repository with the Hub's checksums. Delete those that differ from the cache.

    Return the commit and the number of files that match. A corrupt file or a failure of the Hub is an `OSError`, and a
    cache without files of the repository a `ValueError`.
    """
    with explain_hub_errors(repo_id, revision, "The check of {} failed: {}."):
        try:
            result = HfApi(token=token).verify_repo_checksums(repo_id, revision=revision)
        except HFValidationError:
            raise
        except ValueError as error:
            raise ValueError(
                f"The cache holds no file of {repo_id} (revision {revision or 'main'!r}). Download it first, for"
                f" example with `mini-ddpm sample {repo_id}`."
            ) from error
    for mismatch in result.mismatches:
        file = result.verified_path / mismatch["path"]
        file.resolve().unlink()
        file.unlink(missing_ok=True)
    if result.mismatches:
        names = ", ".join(mismatch["path"] for mismatch in result.mismatches)
        raise OSError(
            f"{repo_id}: {names}: the cached copy is corrupt and has been deleted. Load the pipeline again to download"
            " it."
        )
    return result.revision, result.checked_count
