"""Saving and publishing a pipeline so that it opens without this package.

A saved pipeline carries the source code of its classes: one file beside each part, and one at the root. diffusers
runs these files for `trust_remote_code=True`. It fetches one `.py` file per folder and keeps all of them in one flat
folder. So each file is a bundle: the module that defines the class, after the modules of this package that it imports.
A part of the user's own travels in the same way, if its file obeys the rules of [`bundle`].
"""

import ast
import contextlib
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import stat
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any

from diffusers.utils import logging
from huggingface_hub import HfApi

from ..files import atomic_write, write_text

# The name of a module that defines a part or a pipeline: `unet_mini` in the package, `unet_mini_0a1b2c3d` in a saved
# pipeline.
PORTABLE_MODULE = re.compile(r"((?:unet|scheduling|pipeline)_mini(?:_[a-z]+)*?)(_[0-9a-f]{8})?")

# The name of a source file in a saved pipeline, without ".py". It ends in a hash of the content.
BUNDLE = re.compile(r"(\w+)_[0-9a-f]{8}")

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


def bundle(file: Path, needed: str | None = None) -> bytes:
    """Return a module and the modules of the same project that it imports, in import order, as the source of one file.

    Modules of the same project are those that it imports relatively, those in its own package or beside it, and the
    network, schedulers and pipelines of `mini_ddpm`. Imports of other packages stay. What stands behind
    `if __name__ == "__main__"` is left out, with the imports that only it uses. A module without anything of this,
    such as a bundle itself, is returned byte for byte.

    Args:
        file: The module's source file.
        needed: The class that is needed. What it does not use of the file is left out. `None`: all is needed.

    Raises:
        ValueError: An import of a module of the same project is not of the form `from module import name` at the top
            level, or names what cannot travel; two modules define one name differently; or a module does more than
            define things, which would happen again whenever the file is opened. The message is one line.
    """
    whole = file.read_bytes()
    if file.stem.endswith(f"_{_digest(whole)}"):
        return whole  # a bundle
    modules: dict[Path, str] = {}
    definitions: dict[str, str] = {}
    futures: dict[str, None] = {}
    seen: set[Path] = set()
    all_removed: list[ast.stmt] = []
    root = file.resolve().parent
    while (root / "__init__.py").is_file():
        root = root.parent

    def add(path: Path) -> None:
        seen.add(path)
        source = path.read_text(encoding="utf-8")
        lines = source.splitlines(keepends=True)
        body = ast.parse(source).body
        removed: list[ast.stmt] = [node for node in body if _is_main_block(node)]
        if needed is not None and path == file:
            removed += _unused(body, needed)
        body = [node for node in body if node not in removed]
        nodes = [child for node in body for child in ast.walk(node)]
        used = {node.id for node in nodes if isinstance(node, ast.Name)} | {"*"}
        own: dict[str, str] = {}
        for node in nodes:
            if isinstance(node, ast.ImportFrom) and node.module == "__future__":
                futures[ast.unparse(node)] = None
            elif isinstance(node, (ast.Import, ast.ImportFrom)):
                try:
                    imported = _own_modules(path, node, root, used if node in body else None)
                except ValueError as error:
                    raise ValueError(
                        f"{path}, line {node.lineno}: `{ast.unparse(node)}` cannot be saved with a pipeline. {error}"
                    ) from None
                if imported is not None:
                    removed.append(node)
                    for other in imported:
                        if other not in seen:
                            add(other)
        for node in body:
            if _does_more_than_define(node):
                statement = ast.unparse(node).splitlines()[0]
                raise ValueError(
                    f"{path}, line {node.lineno}: `{statement}` would run whenever the pipeline is opened. Put it"
                    ' behind `if __name__ == "__main__":` or in another file.'
                )
            own |= {} if node in removed else _defined_names(node)
        moved = [node for node in body if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
        for node in (*removed, *moved):
            for index in range(node.lineno - 1, node.end_lineno or node.lineno):
                lines[index] = ""
        for name, definition in own.items():
            if definitions.setdefault(name, definition) != definition:
                raise ValueError(f"{path}: {name} is also defined by a module that is saved in the same file.")
        modules[path] = "".join(lines)
        all_removed.extend(removed)

    add(file)
    # diffusers finds imports with regular expressions, in docstrings as well.
    pattern = re.compile(r"^\s*(?:(?:import|from)\s+\.|(?:import|from)\s+mini_ddpm\b).*", re.MULTILINE)
    for path, text in modules.items():
        if match := pattern.search(text):
            raise ValueError(f"{path}: diffusers would take the line `{match[0].strip()}` for an import.")
    if not all_removed:
        return whole
    parts = [f"# ---- {path.name} ----\n\n{text.strip()}\n" for path, text in modules.items()]
    return "\n\n".join(["\n".join(futures) + "\n"] * bool(futures) + parts).encode()


def _own_modules(
    path: Path, node: ast.Import | ast.ImportFrom, root: Path, used: set[str] | None
) -> list[Path] | None:
    """Return the modules to bundle for an import, or `None` if the import stays.

    Args:
        path: The file with the import.
        node: The import.
        root: The folder that the names of the project's modules start from.
        used: The names that the module uses. `None` stands for an import that is not at the top level.
    """
    found: list[Path] = []
    is_own = False
    for alias in node.names:
        name, is_module = alias.name if isinstance(node, ast.Import) else node.module or "", False
        top = name.partition(".")[0]
        if isinstance(node, ast.ImportFrom) and node.level:
            file, top = path.parents[node.level - 1].joinpath(*name.split(".")).with_suffix(".py"), ""
        else:
            module, base = sys.modules.get(name), root.joinpath(*name.split("."))
            file = Path(getattr(module, "__file__", None) or "")
            is_ours = top == "mini_ddpm" and module is not None
            if not is_ours and file.resolve() not in (base.with_suffix(".py"), base / "__init__.py"):
                continue
            if (
                used is not None
                and isinstance(node, ast.ImportFrom)
                and (alias.asname or alias.name) not in {*used, "*"}
            ):
                is_own = True
                continue  # only what stands behind `__name__ == "__main__"` uses it
            value = getattr(module, alias.name, None)
            is_module = isinstance(node, ast.Import) or isinstance(value, ModuleType)
            if hasattr(module, "__path__"):  # a package, which has the name from one of its modules
                name = getattr(value, "__module__", "")
                file = Path(getattr(sys.modules.get(name), "__file__", None) or "")
        is_own = True
        if is_module or not name or used is None or alias.asname or not file.is_file():
            raise ValueError(
                "A module that is saved may only use `from .module import name`, at its top level, for modules of its"
                " own project."
            )
        is_portable = name.split(".")[1:2] in (["models"], ["schedulers"], ["pipelines"])
        if name.partition(".")[0] != (top or name.partition(".")[0]) or (top == "mini_ddpm" and not is_portable):
            raise ValueError(
                f"{alias.name} is not in a module that can travel; of mini_ddpm, those of the network, schedulers and"
                " pipelines can."
            )
        found.append(file)
    return found if is_own else None


def _unused(body: list[ast.stmt], name: str) -> list[ast.stmt]:
    """Return the imports, definitions and assignments of a module that the class `name` does not use."""
    kinds: Any = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    kinds += (ast.Assign, ast.AnnAssign, ast.AugAssign)
    unused = [node for node in body if isinstance(node, kinds) and getattr(node, "module", "") != "__future__"]
    found = [node for node in unused if name in _defined_names(node)]
    found += [node for node in body if node not in unused and not _is_main_block(node)]
    while found:
        nodes = [child for node in found for child in ast.walk(node)]
        used = {node.id for node in nodes if isinstance(node, ast.Name)} | {"*"}
        used |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        unused = [node for node in unused if node not in found]
        found = [node for node in unused if used & _defined_names(node).keys()]
    return unused


def _is_main_block(node: ast.stmt) -> bool:
    """Return whether a statement is `if __name__ == "__main__":`, without an `else`."""
    return isinstance(node, ast.If) and ast.unparse(node.test) == "__name__ == '__main__'" and not node.orelse


def _does_more_than_define(node: ast.AST) -> bool:
    """Return whether a statement of a module does more than import, define and assign."""
    if isinstance(node, (ast.If, ast.Try, ast.ExceptHandler)):
        blocks = (getattr(node, name, []) for name in ("body", "handlers", "orelse", "finalbody"))
        return any(_does_more_than_define(child) for block in blocks for child in block)
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)
    definitions = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return not isinstance(node, (*definitions, ast.Assign, ast.AnnAssign, ast.AugAssign, ast.Pass))


def _defined_names(node: ast.stmt) -> dict[str, str]:
    """Return the names that a statement of a module defines, each with its definition."""
    if isinstance(node, ast.Import):  # `import torch.nn` defines `torch`, and `import torch.nn as nn` the module
        return {
            a.asname or a.name.partition(".")[0]: a.name if a.asname else a.name.partition(".")[0] for a in node.names
        }
    if isinstance(node, ast.ImportFrom):
        return {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        return {node.name: ast.dump(node)}
    targets = getattr(node, "targets", [getattr(node, "target", None)])  # of an assignment
    names = [name for target in targets if target is not None for name in ast.walk(target)]
    return {name.id: ast.dump(node) for name in names if isinstance(name, ast.Name)}


@functools.cache  # the file may be edited while a network of its class is trained
def bundle_of(cls: Any) -> tuple[str, bytes]:
    """Return the file stem, `my_net_0a1b2c3d`, and the content of the bundle that defines a class.

    Raises:
        ValueError: There is no such bundle. The message says why, in one line.
    """
    try:
        file = Path(inspect.getfile(cls))
        is_ours = cls.__module__.startswith("mini_ddpm.")
        if not is_ours and {"site-packages", "dist-packages"} & set(file.parts):
            raise ValueError(f"It belongs to the package {cls.__module__.partition('.')[0]}.")
        source = bundle(file, None if is_ours else cls.__name__)
        body = ast.parse(source).body
    except (OSError, TypeError):  # also of classes in a notebook
        raise ValueError("It has no source file.") from None
    except SyntaxError as error:
        raise ValueError(f"{file} is not valid Python: {error}.") from None
    if not any(isinstance(node, ast.ClassDef) and node.name == cls.__name__ for node in body):
        raise ValueError(f"It is not defined at the top level of {file}.")
    digest = _digest(source)
    if file.stem.endswith(f"_{digest}"):
        return file.stem, source
    stem = re.sub(r"\W", "_", file.parent.name if file.stem == "__init__" else file.stem)
    stem = match[1] if (match := BUNDLE.fullmatch(stem)) else stem
    if not is_ours and PORTABLE_MODULE.fullmatch(stem):
        stem = f"own_{stem}"  # else the class of mini_ddpm would take the place of an edited copy of its file
    return f"{stem}_{digest}", source


def portable_problem(cls: Any) -> str | None:
    """Return why a saved pipeline cannot carry the source of a part's class, and what to do, in one sentence.

    Saving, and training before its first step, log the sentence as a warning. All but the source is saved.

    Args:
        cls: The class of a network or a scheduler.

    Returns:
        The sentence, or `None` if a saved pipeline with such a part opens as it is.
    """
    if cls.__module__.partition(".")[0] in ("diffusers", "transformers"):
        return None
    try:
        bundle_of(cls)
    except ValueError as error:
        part = "scheduler" if getattr(cls, "config_name", None) == "scheduler_config.json" else "unet"
        return (
            f"The source of {cls.__name__} cannot be saved with a pipeline ({str(error).rstrip('.')}): put the class"
            " in a file of its own that imports only torch, numpy, diffusers and mini_ddpm's network and schedulers,"
            f" or open the folder with `load_pipeline(folder, {part}={cls.__name__}.from_pretrained(folder,"
            f' subfolder="{part}"))`.'
        )
    return None


@functools.cache
def is_portable(cls: Any) -> bool:
    """Return whether a saved pipeline can carry the source of a part's class; warn once if it cannot."""
    problem = portable_problem(cls)
    if problem is not None:
        logger.warning(problem)
    return problem is None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:8]


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
        index names it as `[file stem, class name]`: diffusers' form for code that comes with the weights. `auto_map`
        says the same of the network to `AutoModel`. A part whose class cannot be bundled is saved without its source,
        with a warning.

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
        index.pop("auto_map", None)
        for key, part in {"_class_name": self, **self.components}.items():
            cls: Any = type(getattr(part, "_orig_mod", part))  # `torch.compile` wraps a part
            target = folder if key == "_class_name" else folder / key
            if part is self:
                if PORTABLE_MODULE.fullmatch(cls.__module__.rpartition(".")[2]) is None:
                    continue
            elif (
                cls.__module__.partition(".")[0] in ("diffusers", "transformers") or index.get(key, [None])[0] is None
            ):
                continue
            elif (config_file := target / cls.config_name).is_file():
                write(config_file, json.loads(config_file.read_text(encoding="utf-8")))
            if not is_portable(cls):
                continue
            stem, source = bundle_of(cls)
            target.mkdir(parents=True, exist_ok=True)
            for old in target.glob("*.py"):
                if BUNDLE.fullmatch(old.stem) and (
                    PORTABLE_MODULE.fullmatch(old.stem) or old.stem.endswith(_digest(old.read_bytes()))
                ):
                    old.unlink()
            with atomic_write(target / f"{stem}.py") as temporary:
                temporary.write_bytes(source)
            index[key] = [stem, cls.__name__]
            if key == "unet":
                index["auto_map"] = {"AutoModel": f"{stem}.{cls.__name__}"}
        if checksums := weights_checksums(folder):
            index[CHECKSUMS] = checksums
        write(Path(json_file_path), index)
        mode = stat.S_IMODE(Path(json_file_path).stat().st_mode)
        for name in checksums:
            if stat.S_IMODE((folder / name).stat().st_mode) == 0o600:
                with contextlib.suppress(PermissionError):  # an older file of another account
                    (folder / name).chmod(mode)

    @classmethod
    def extract_init_dict(
        cls, config_dict: dict[str, Any], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
        """Return the arguments of the pipeline that an index holds, without `auto_map`, which is for `AutoModel`."""
        config_dict = {key: value for key, value in config_dict.items() if key != "auto_map"}
        return super().extract_init_dict(config_dict, **kwargs)  # type: ignore[misc, no-any-return]

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
