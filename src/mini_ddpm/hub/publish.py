"""Publish a pipeline on the Hub in one commit."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import logging
from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.hf_api import RepoFile

from ..files import write_text
from ..pipelines.portable import BUNDLE, CHECKSUMS, weights_checksums
from .card import is_rendered, render_card, write_card, write_card_like
from .errors import explain_hub_errors
from .facts import EXPORTS, exported_files, read_facts, refuse_links_to_elsewhere
from .load import (
    WEIGHTS_FILE,
    check_checksums,
    check_folder,
    in_one_line,
    load_pipeline,
    local_folder,
    read_checksums,
    read_json,
    weights_by_variant,
)

logger = logging.get_logger(__name__)


def push(name_or_path: str | Path, repo_id: str, *, commit_message: str | None = None, **options: Any) -> CommitInfo:
    """Publish the folder of a pipeline as it is: all variants of its weights, byte for byte, its facts and its card.

    Graphs that `mini-ddpm export` wrote into it, `onnx/sampler.onnx`, are published too.

    Other files in the folder (checkpoints, logs) are not published. The options are those of `publish`.

    Raises:
        OSError: There is no such folder, or the push failed. The message says what was published, if anything.
        ValueError: The folder holds no mini-ddpm pipeline, or a damaged one, or a graph of other weights.
    """
    commit_message = commit_message or f"Upload {Path(name_or_path).resolve().name}"
    with staged_pipeline(name_or_path) as folder:
        return publish(folder, repo_id, commit_message=commit_message, **options)


@contextlib.contextmanager
def staged_pipeline(name_or_path: str | Path) -> Iterator[Path]:
    """Give a temporary folder with the files that `push` publishes."""
    source = local_folder(name_or_path)
    refuse_links_to_elsewhere(source)
    read_json(source / "model_index.json")
    index = DiffusionPipeline._dict_from_json_file(source / "model_index.json")
    foreign = []
    for key in ("unet", "scheduler"):
        match index.get(key):
            case [str(library), str()] if library != "diffusers":
                foreign.append(key)
    variant = next(iter(weights_by_variant(source / "unet")), None)
    if foreign:  # a class of the user's own, whose code is published and not run
        with in_one_line(source):
            check_folder(source, {"use_safetensors": True, "variant": variant, **dict.fromkeys(foreign)})
    else:
        pipe: Any = load_pipeline(source.resolve(), variant=variant)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for file in (*source.glob("unet/*"), *source.glob("scheduler/*"), *source.glob("*")):
            is_part = file.parent != source and file.suffix in (".json", ".safetensors") and file.name[0] != "."
            is_source = file.suffix == ".py" and BUNDLE.fullmatch(file.stem) is not None
            if file.is_file() and (is_part or (foreign and (is_source or file.name == "model_index.json"))):
                check_checksums(source, [file])
                copy = folder / file.relative_to(source)
                copy.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, copy)
        for file in exported_files(source):
            _refuse_other_weights(file, source)
            (folder / "onnx").mkdir(exist_ok=True)
            shutil.copyfile(file, folder / file.relative_to(source))
        if foreign:
            write_card_like(source, folder)
        else:
            pipe.to_json_file(folder / "model_index.json")
            write_card(pipe, folder)
        yield folder


def _refuse_other_weights(file: Path, folder: Path) -> None:
    """Raise a `ValueError` if an exported graph tells in its metadata that it was made from other weights."""
    content = file.read_bytes()
    if b"weights_sha256" in content and not any(
        checksum.encode() in content for checksum in weights_checksums(folder).values()
    ):
        raise ValueError(
            f"{file} was exported from other weights than those in {folder}. Export it again or remove it."
        )


def publish(
    folder: Path,
    repo_id: str,
    *,
    commit_message: str,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    subfolder: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Commit a saved pipeline to the Hub, all files at once. `push` and the pipelines' `push_to_hub` call this.

    Delete repository files that the new ones replace (older code, the same weights sharded differently), and graphs of
    other weights. Keep a card that a person wrote or edited. A rendered card names the commit that holds the pipeline,
    so it follows in a second commit.

    Raises:
        OSError: Nobody is logged in, or the push failed.
    """
    if token is False or not (token or get_token()):
        raise OSError(
            f"To push to {repo_id}, log in with `hf auth login`, or give a token with write access in HF_TOKEN or"
            " `token=`."
        )
    with explain_hub_errors(repo_id, revision, "The push to {} failed: {}. Nothing was published; push again."):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        base = api.model_info(repo_id, revision=revision)
        remote_names = {file.rfilename for file in base.siblings or ()}

        # 1. The card. Keep the remote one if a person wrote it; else render ours, with the commit that it names now.
        card, named_commit = folder / "README.md", None
        if subfolder is not None:
            card.unlink()  # the repository's card is at its root
        elif card.name in remote_names:
            remote_card = Path(api.hf_hub_download(repo_id, card.name, revision=base.sha))
            if match := re.search(
                r'revision="([0-9a-f]{40})"', remote_card.read_text(encoding="utf-8", errors="replace")
            ):
                named_commit = match[1]
            if not is_rendered(remote_card):
                logger.warning(f"The model card of {repo_id} was written or edited by a person and is kept.")
                card.unlink()
        has_rendered_card = card.is_file() and is_rendered(card)
        facts = {**read_facts(folder), "repo_id": repo_id}
        if has_rendered_card:
            write_text(card, render_card({**facts, "revision": named_commit}))

        # 2. All files in one commit. (`upload_folder` splits a large folder into several.)
        prefix = "" if subfolder is None else subfolder.strip("/") + "/"
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {prefix + path.relative_to(folder).as_posix(): path for path in paths}
        keys = {replacement_key(name) for name in files} - {None}
        replaced = sorted(name for name in remote_names - files.keys() if replacement_key(name) in keys)
        index = folder / "model_index.json"
        stay = remote_names - files.keys() - set(replaced)
        kept = {name.removeprefix(prefix) for name in stay if name.startswith(prefix) and WEIGHTS_FILE.search(name)}
        exports = stay & {prefix + name for name in EXPORTS}
        remote_checksums: dict[str, str] = {}
        if (kept or exports) and prefix + index.name in remote_names:
            remote_index = Path(api.hf_hub_download(repo_id, prefix + index.name, revision=base.sha))
            with contextlib.suppress(ValueError):  # it may be damaged, and is replaced
                remote_checksums = read_checksums(remote_index)
        if not set(weights_checksums(folder).values()) & set(remote_checksums.values()):
            replaced += sorted(exports)
        if checksums := {name: value for name, value in remote_checksums.items() if name in kept}:
            content = read_json(index)  # weights of other variants stay, and so do their checksums
            content[CHECKSUMS] = checksums | content.get(CHECKSUMS, {})
            write_text(index, json.dumps(content, indent=2, sort_keys=True) + "\n")
        added = (CommitOperationAdd(name, path) for name, path in sorted(files.items()))
        deleted = (CommitOperationDelete(name) for name in replaced)
        commit = api.create_commit(
            repo_id, [*added, *deleted], commit_message=commit_message, revision=revision, create_pr=create_pr
        )

        # If nothing has changed, the card names the right commit already, unless an earlier push failed at step 3.
        is_named = commit.oid == base.sha and (create_pr or _same_files(api, repo_id, named_commit, commit.oid))

    # 3. The card with the name of that commit.
    if has_rendered_card and not is_named:
        failed = "The pipeline was published on {}, but its model card does not name the new commit: {}. Push again."
        with explain_hub_errors(repo_id, revision, failed):
            write_text(card, render_card({**facts, "revision": commit.oid}))
            api.create_commit(
                repo_id,
                [CommitOperationAdd(card.name, card)],
                commit_message="Name the commit to load in the model card",
                revision=commit.pr_revision or revision,
            )
    return commit


def _same_files(api: HfApi, repo_id: str, first: str | None, second: str) -> bool:
    """Return whether two commits hold the same files but for the card. No commit, or an unknown one, holds none."""

    def files(revision: str) -> set[tuple[str, str]]:
        items = api.list_repo_tree(repo_id, recursive=True, revision=revision)
        return {(item.path, item.blob_id) for item in items if isinstance(item, RepoFile) and item.path != "README.md"}

    try:
        return first is not None and files(first) == files(second)
    except HfHubHTTPError as error:
        if error.response.status_code == 404:
            return False
        raise


def replacement_key(name: str) -> tuple[str, str, str | None] | None:
    """Return the key of the slot that a repository file fills. A new file replaces the old ones with the same key.

    A folder has one slot for code, and one for the weights of each variant. Other files have no key, `None`, and
    replace only a file of the same name.
    """
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.rpartition(".")
    if suffix == "py" and BUNDLE.fullmatch(stem):
        return folder, "code", None
    index = re.fullmatch(r"diffusion_pytorch_model\.safetensors\.index(?:\.(\w+))?\.json", file)
    if match := index or WEIGHTS_FILE.fullmatch(file):
        return folder, "weights", match[1]
    return None
