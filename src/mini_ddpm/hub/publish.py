"""Publishing a pipeline on the Hub, in one commit."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import (
    CommitInfo,
    CommitOperationAdd,
    CommitOperationDelete,
    HfApi,
    get_token,
)

from ..pipelines.pipeline_mini_ddpm import PORTABLE_MODULE
from .card import _is_rendered, render_card, write_card
from .errors import _plain_words
from .facts import read_facts
from .load import _WEIGHTS, _weights, load_pipeline, local_folder

logger = logging.get_logger(__name__)


def push(
    name_or_path: str | Path,
    repo_id: str,
    *,
    commit_message: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    create_pr: bool = False,
    revision: str | None = None,
) -> CommitInfo:
    """Publishes a pipeline's folder as it is: all variants of its weights, byte for byte, and what describes them.

    What else lies there (checkpoints, logs) stays where it is. The arguments are those of `push_to_hub`.

    Raises:
        OSError: There is no such folder, or the Hub refused; nothing is then half published.
        ValueError: The folder is no pipeline, or is damaged.
    """
    with stage(name_or_path) as folder:
        return publish(
            folder,
            repo_id,
            commit_message=commit_message or f"Upload {Path(name_or_path).resolve().name}",
            private=private,
            token=token,
            create_pr=create_pr,
            revision=revision,
        )


@contextlib.contextmanager
def stage(name_or_path: str | Path) -> Iterator[Path]:
    """Gives a temporary folder with the files that `push` publishes."""
    source = local_folder(name_or_path)
    variant = next(iter(_weights(source / "unet")), None)
    pipe: Any = load_pipeline(source.resolve(), variant=variant)
    with tempfile.TemporaryDirectory() as target:
        folder = Path(target)
        for part in pipe.components:
            for file in (source / part).iterdir():
                if file.suffix in (".json", ".safetensors") and not file.name.startswith("."):
                    (folder / part).mkdir(exist_ok=True)
                    shutil.copyfile(file, folder / part / file.name)
        pipe.to_json_file(folder / "model_index.json")
        write_card(pipe, folder)
        yield folder


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
    """Commits a saved pipeline to the Hub, all files at once, for `push` and for the pipelines' `push_to_hub`.

    Files of the repository that the new ones stand in for (older code, the same weights in other shards) go. A card
    that a person wrote stays. Ours names the commit that holds the pipeline, so it follows in a second commit.
    """
    if token is False or not (token or get_token()):
        raise OSError(
            f"To push to {repo_id} you must be logged in to the Hub: `hf auth login`, or a token with the right to"
            " write in HF_TOKEN or `token=`."
        )
    failed = "The Hub did not take {}: {}. Nothing is half published; push again to complete it."
    with _plain_words(repo_id, revision, failed):
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        base = api.model_info(repo_id, revision=revision)
        there = {file.rfilename for file in base.siblings or ()}

        # 1. The card: theirs, or ours with the commit that it named so far.
        card, named = folder / "README.md", None
        if subfolder is None and card.name in there:
            theirs = Path(api.hf_hub_download(repo_id, card.name, revision=base.sha))
            if match := re.search(r'revision="([0-9a-f]{40})"', theirs.read_text(encoding="utf-8")):
                named = match[1]
            if not _is_rendered(theirs):
                logger.warning(f"{repo_id} has a model card that a person wrote or edited; it is kept as it is.")
                card.unlink()
        elif subfolder is not None:
            card.unlink()  # the repository's card is at its root
        is_ours = card.is_file() and _is_rendered(card)
        facts = {**read_facts(folder), "repo_id": repo_id}
        if is_ours:
            card.write_text(render_card({**facts, "revision": named}), encoding="utf-8")

        # 2. Everything in one commit. (`upload_folder` makes several of a large folder.)
        prefix = "" if subfolder is None else subfolder.strip("/") + "/"
        paths = (path for path in folder.rglob("*") if path.is_file())
        files = {prefix + path.relative_to(folder).as_posix(): path for path in paths}
        places = {_place(name) for name in files} - {None}
        stale = sorted(name for name in there - files.keys() if _place(name) in places)
        commit = api.create_commit(
            repo_id,
            [
                *(CommitOperationAdd(name, path) for name, path in sorted(files.items())),
                *(CommitOperationDelete(name) for name in stale),
            ],
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )

        # 3. The name of that commit. Where nothing has changed, the card names the right one already.
        if is_ours and (commit.oid != base.sha or (named is None and not create_pr)):
            card.write_text(render_card({**facts, "revision": commit.oid}), encoding="utf-8")
            api.upload_file(
                path_or_fileobj=card,
                path_in_repo=card.name,
                repo_id=repo_id,
                commit_message="Name the commit to load in the model card",
                revision=commit.pr_revision or revision,
            )
    return commit


def _place(name: str) -> tuple[str, str, str | None] | None:
    """What a file of a repository is of which there can be but one: a folder's code, or its weights of one variant."""
    folder, _, file = name.rpartition("/")
    stem, _, suffix = file.rpartition(".")
    code = PORTABLE_MODULE.fullmatch(stem)
    if suffix == "py" and code is not None and code[2] is not None:
        return folder, "code", None
    index = re.fullmatch(r"diffusion_pytorch_model\.safetensors\.index(?:\.(\w+))?\.json", file)
    if match := index or _WEIGHTS.fullmatch(file):
        return folder, "weights", match[1]
    return None
