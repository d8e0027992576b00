"""Saving and publishing a pipeline so that it opens without this package.

A saved pipeline carries the source code of its classes: one file beside each part, and one at the root. diffusers
runs these files for `trust_remote_code=True`. It fetches one `.py` file per folder and keeps all of them in one flat
folder. So each file is a bundle: the module that defines the class, after the modules of this package that it imports.
"""

import ast
import contextlib
import hashlib
import inspect
import json
import os
import re
import shutil
import stat
import tempfile
from pathlib import Path
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi

from ..files import atomic_write, write_text

# The name of a module that defines a part or a pipeline: `unet_mini` in the package, `unet_mini_0a1b2c3d` in a saved
# pipeline.
PORTABLE_MODULE = re.compile(r"((?:unet|scheduling|pipeline)_mini(?:_[a-z]+)*?)(_[0-9a-f]{8})?")

# The key of `model_index.json` with the SHA-256 of each weights file, by its path in the pipeline's folder. diffusers
# ignores keys that start with an underscore.
CHECKSUMS = "_weights_sha256"

# The model card of a pipeline about which nothing else is known. A card with this text counts as generated, not as
# hand-written, so a new text must be added beside it.
CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- mini-ddpm
---

A small denoising diffusion model. `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` opens it with
diffusers alone, `mini_ddpm.load_pipeline(...)` where the package mini-ddpm is installed.
"""

logger = logging.get_logger(__name__)


def bundle(file: Path) -> bytes:
    """Return a module and the modules that it imports relatively, in import order, as the source of one file.

    A module without relative imports, such as a bundle itself, is returned byte for byte.

    Args:
        file: The module's source file.

    Raises:
        ValueError: A relative import is not of the form `from .module import name` at the top level of a module, a
            module uses `from __future__`, or two modules define one name differently.
    """
    modules: dict[Path, str] = {}
    definitions: dict[str, str] = {}

    def add(path: Path) -> None:
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        tree = ast.parse(source)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.level or node.module == "__future__"):
                is_plain = node.level and node.module and node in tree.body and not any(a.asname for a in node.names)
                if not is_plain:
                    raise ValueError(
                        f"{path}, line {node.lineno}: `{ast.unparse(node)}` cannot be saved with a pipeline. A module "
                        "that is saved may only use `from .module import name`, at its top level."
                    )
        own: dict[str, str] = {}
        for node in tree.body:
            if isinstance(node, ast.ImportFrom) and node.level:
                imported = path.parents[node.level - 1].joinpath(*(node.module or "").split("."))
                if (imported := imported.with_suffix(".py")) not in modules:
                    add(imported)
                for index in range(node.lineno - 1, node.end_lineno or node.lineno):
                    lines[index] = ""
                continue
            own |= _defined_names(node)
        for name, definition in own.items():
            if definitions.setdefault(name, definition) != definition:
                raise ValueError(f"{path}: {name} is also defined by a module that is saved in the same file.")
        modules[path] = "".join(lines)

    add(file)
    if len(modules) == 1:
        return file.read_bytes()
    return "\n\n".join(f"# ---- {path.name} ----\n\n{text.strip()}\n" for path, text in modules.items()).encode()


def _defined_names(node: ast.stmt) -> dict[str, str]:
    """Return the names that a statement of a module defines, each with its definition."""
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        module = getattr(node, "module", None)
        return {alias.asname or alias.name: f"{module} {alias.name}" for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name: ast.dump(node)}
    targets = getattr(node, "targets", [getattr(node, "target", None)])  # of an assignment
    names = [name for target in targets if target is not None for name in ast.walk(target)]
    return {name.id: ast.dump(node) for name in names if isinstance(name, ast.Name)}


def sha256(file: Path) -> str:
    """Return the SHA-256 of a file as hexadecimal digits."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def weights_checksums(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of every weights file of a pipeline, by its path in the pipeline's folder."""
    files = sorted(file for file in folder.glob("*/*.safetensors") if file.is_file() and file.name[0] != ".")
    return {file.relative_to(folder).as_posix(): sha256(file) for file in files}


def write_checksums(folder: Path) -> None:
    """Write the checksums of the weights into the `model_index.json` of a pipeline, without any other change."""
    file = folder / "model_index.json"
    index = json.loads(file.read_text(encoding="utf-8"))
    write_text(file, json.dumps(index | {CHECKSUMS: weights_checksums(folder)}, indent=2, sort_keys=True) + "\n")


class PortablePipelineMixin:
    """The part of a pipeline that saves and publishes it."""

    # Attributes of `DiffusionPipeline`.
    unet: Any
    components: dict[str, Any]
    config_name: str

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Write `model_index.json`, and the source files that make the folder loadable without this package.

        Every way to save or push a pipeline calls this method after its parts are saved and before an upload. For the
        pipeline and each part that a portable module defines, a bundle of the module goes into the folder, and the
        index names it as `[file stem, class name]`: diffusers' form for code that comes with the weights.

        diffusers keeps all such files in one folder, where a file replaces an earlier one of the same name, also for
        models that are in use. A file name therefore ends in a hash of the content. Two versions never collide, and
        saving a pipeline that was loaded from such a file gives the same name again.

        The index also gets the checksums of the weights, which `load_pipeline` compares. The weights, which
        safetensors writes for their owner alone, get the permissions of the index.
        """

        def write(file: Path, config: dict[str, Any]) -> None:
            config.pop("_name_or_path", None)  # do not publish local paths
            write_text(file, json.dumps(config, indent=2, sort_keys=True) + "\n")

        folder = Path(json_file_path).parent
        index = json.loads(self.to_json_string())  # type: ignore[attr-defined]
        for key, part in {"_class_name": self, **self.components}.items():
            cls = type(getattr(part, "_orig_mod", part))  # `torch.compile` wraps a part
            portable = PORTABLE_MODULE.fullmatch(cls.__module__.rpartition(".")[2])
            if portable is None:
                continue
            source = bundle(Path(inspect.getfile(cls)))
            stem = f"{portable[1]}_{hashlib.sha256(source).hexdigest()[:8]}"
            target = folder if key == "_class_name" else folder / key
            target.mkdir(parents=True, exist_ok=True)
            for old in target.glob("*.py"):
                match = PORTABLE_MODULE.fullmatch(old.stem)
                if match is not None and match[2] is not None:
                    old.unlink()
            with atomic_write(target / f"{stem}.py") as temporary:
                temporary.write_bytes(source)
            index[key] = [stem, cls.__name__]
            config_file = target / cls.config_name
            if part is not self and config_file.is_file():
                write(config_file, json.loads(config_file.read_text(encoding="utf-8")))
        if checksums := weights_checksums(folder):
            index[CHECKSUMS] = checksums
        write(Path(json_file_path), index)
        mode = stat.S_IMODE(Path(json_file_path).stat().st_mode)
        for name in checksums:
            if stat.S_IMODE((folder / name).stat().st_mode) == 0o600:
                with contextlib.suppress(PermissionError):  # an older file of another account
                    (folder / name).chmod(mode)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Write the pipeline's folder: weights, configurations, the source files that open it, a model card.

        Args:
            save_directory: The folder. It is created if it does not exist.
            safe_serialization: Ignored: weights are always saved as safetensors.
            variant: A part of the names of the weights files, as in `diffusion_pytorch_model.fp16.safetensors`.
            max_shard_size: Split the weights into files of at most this size, such as "5GB".
            push_to_hub: Whether to publish the pipeline too, see [`push_to_hub`].
            **kwargs: `repo_id` (default: the name of the folder) and further arguments of [`push_to_hub`].
        """
        folder = Path(save_directory)
        if not safe_serialization:
            logger.warning("`safe_serialization=False` is ignored: weights are always saved as safetensors.")
        super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)  # type: ignore[misc]
        self._write_card(folder)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or folder.resolve().name
            self.push_to_hub(repo_id, variant=variant, max_shard_size=max_shard_size, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Publish the pipeline on the Hub, as [`save_pretrained`] writes it.

        Args:
            repo_id: The repository, "user/name". It is created if it does not exist. A hand-written model card in it
                is kept.
            commit_message: Title of the commit.
            private: Whether a new repository is private.
            token: Access token; by default `HF_TOKEN` or the token that `hf auth login` stored.
            create_pr: Whether to open a pull request instead of committing to the branch.
            safe_serialization: Ignored, see [`save_pretrained`].
            variant: See [`save_pretrained`].
            subfolder: Folder in the repository; by default its root.
            revision: Branch to commit to, created if it does not exist; "main" by default.
            max_shard_size: See [`save_pretrained`].

        Returns:
            The address of the commit, with `.oid`, `.pr_url` and `.repo_url`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            return self._publish(
                Path(folder),
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
                revision=revision,
            )

    def _source_folder(self) -> Path | None:
        """Return the pipeline folder that the network was loaded from, if any."""
        folder = Path(self.unet.config.get("_name_or_path") or "unknown").parent
        return folder if (folder / "model_index.json").is_file() else None

    def _write_card(self, folder: Path) -> None:
        """Copy the card of the folder that the pipeline was loaded from, or write a short one. Keep an existing card.

        This method and `_publish` work without the package. The package replaces both in its own classes: it renders a
        full card, and tells its own cards from hand-written ones.
        """
        if (folder / "README.md").is_file():
            return
        write_text(folder / "README.md", CARD)
        source = self._source_folder()
        for name in ("README.md", "facts.json", "samples.png"):
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)

    def _publish(
        self,
        folder: Path,
        repo_id: str,
        *,
        commit_message: str,
        private: bool | None,
        token: str | bool | None,
        create_pr: bool,
        subfolder: str | None,
        revision: str | None,
    ) -> str:
        """Upload a saved pipeline."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        has_card = api.file_exists(repo_id, "README.md", revision=revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=["README.md"] if has_card else None,
        )
