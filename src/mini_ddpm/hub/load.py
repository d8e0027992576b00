"""Open a pipeline by its bundled name, from a folder or from the Hub. Every file is checked first."""

from __future__ import annotations

import inspect
import json
import re
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from safetensors import SafetensorError, safe_open

from .download import download, remove_corrupt_files

PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""The folder of the pipelines that ship with the package."""

WEIGHTS_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
"""The name of a network's weights file, or of one of its shards. Group 1 is the variant."""


# Keys that repositories of the first version lack.
_LATER_KEYS = {"head_channels", "black_level", "white_level"}


def load_pipeline(name_or_path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Open a saved mini-ddpm pipeline, whichever of our two classes it has.

    Args:
        name_or_path: The name of a bundled pipeline (a folder in `PRETRAINED`), a folder, or a repository on the Hub,
            "user/name". A bundled name wins over a folder of the same name: write `./mnist` for the folder.
        **kwargs: Arguments of `from_pretrained`: `dtype`, `revision`, `token`, `variant`, `local_files_only`, and
            components that replace the saved ones, such as `scheduler=...`. Weights must be safetensors, unless
            `use_safetensors=False`.

    Returns:
        The pipeline. Its class is the installed one, not the code saved with it.

    Raises:
        OSError: The folder, a file in it or the repository is missing or cannot be read.
        ValueError: The folder holds another kind of pipeline, or a damaged one. The message names the file and, in a
            configuration, the key.
    """
    kwargs.setdefault("use_safetensors", True)
    folder = _find_folder(str(name_or_path), kwargs)
    _check_folder(folder, kwargs)
    return DiffusionPipeline.from_pretrained(folder, **kwargs)


def is_bundled(name: str) -> bool:
    """Return whether a pipeline of this name ships with the package."""
    return name in _bundled_names()


def local_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a bundled pipeline, or the given folder. A missing one is an `OSError`."""
    folder = PRETRAINED / name_or_path if is_bundled(str(name_or_path)) else Path(name_or_path)
    if not folder.is_dir():
        bundled = ", ".join(_bundled_names())
        raise OSError(f"There is no folder {name_or_path}. Give a folder or a bundled pipeline ({bundled}).")
    return folder


def weights_by_variant(folder: Path) -> dict[str | None, list[Path]]:
    """Return the weights files in a network's folder, grouped by variant. The one without a name, `None`, is first."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := WEIGHTS_FILE.fullmatch(file.name):
            found.setdefault(match[1], []).append(file)
    return dict(sorted(found.items(), key=lambda item: item[0] or ""))


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file from a pipeline's folder.

    A missing file is an `OSError`, one that does not hold JSON of this kind, `dict` or `list`, a `ValueError`.
    """
    if not file.is_file():
        raise OSError(f"{file.parent} is not a pipeline: it has no {file.name}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} must hold a JSON {'list' if kind is list else 'object'}.")
    return content


def _bundled_names() -> list[str]:
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model_index.json"))


def _find_folder(name: str, kwargs: dict[str, Any]) -> Path:
    """Return the folder of a pipeline. Download it if it is a repository on the Hub."""
    if is_bundled(name) or Path(name).is_dir():
        return local_folder(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise OSError(
            f"No pipeline {name!r}: it is not a folder, a repository on the Hub (user/name) or a bundled pipeline"
            f" ({', '.join(_bundled_names())})."
        )
    folder = Path(download(DiffusionPipeline, name, **kwargs))
    if corrupt := remove_corrupt_files(folder):
        raise OSError(
            f"{name}: {', '.join(corrupt)}: the download from the Hub was corrupt and has been deleted from the cache."
            " Load the pipeline again."
        )
    return folder


def _check_folder(folder: Path, kwargs: dict[str, Any]) -> None:
    """Raise on the first problem that would otherwise fail with an obscure error or silently give bad images."""
    index_file = folder / "model_index.json"
    read_json(index_file)
    index = DiffusionPipeline._dict_from_json_file(index_file)
    name = index.get("_class_name")
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None or not pipeline_class.__module__.startswith("mini_ddpm."):
        raise ValueError(
            f"{index_file}: the pipeline class is {name!r}, which is not one of mini-ddpm's. Open it with diffusers'"
            " own `DiffusionPipeline.from_pretrained`."
        )
    _check_keys(index_file, index, pipeline_class)

    for component, value in index.items():
        if not isinstance(value, list) or component in kwargs:
            continue
        library, class_name = value
        component_class = getattr(diffusers, str(class_name), None)
        if library != "diffusers" or component_class is None:
            raise ValueError(
                f"{index_file}: the component {component!r} has an unknown class, {class_name!r} of {library!r}. It"
                " must be a class of diffusers or mini-ddpm."
            )
        config_file = folder / component / component_class.config_name
        if not config_file.is_file():
            raise OSError(f"{folder} is an incomplete pipeline: it has no {component}/{config_file.name}.")
        config = read_json(config_file)
        _check_keys(config_file, config, component_class)
        if issubclass(component_class, diffusers.ModelMixin) and kwargs["use_safetensors"]:
            _check_weights(folder / component, config, component_class, kwargs.get("variant"))


def _check_keys(file: Path, config: dict[str, Any], cls: Any) -> None:
    """Raise if a key is unknown to `cls` or missing. A setting that is silently dropped gives a different model."""
    expected = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    known = expected.union({"quantization_config", "auto_map"}, cls.ignore_for_config)
    if cls.has_compatibles:  # a scheduler keeps the keys of the schedulers it was converted from
        known = known.union(*(inspect.signature(other.__init__).parameters for other in cls._get_compatibles()))
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    if unknown:
        raise ValueError(f"{file}: unknown key {unknown[0]!r}. {cls.__name__} has {', '.join(sorted(expected))}.")
    # diffusers adds keys to its classes from version to version, so theirs may be missing. So may `default_*`, which
    # are saved only if they were set, and the keys that came later.
    required = {key for key in expected if not key.startswith("default_")} - _LATER_KEYS
    missing = sorted(required - config.keys()) if cls.__module__.startswith("mini_ddpm.") else []
    if missing:
        raise ValueError(f"{file}: the key {missing[0]!r} is missing.")


def _check_weights(folder: Path, config: dict[str, Any], cls: Any, variant: str | None) -> None:
    """Raise if the weights are missing, truncated or corrupt, or do not fit the network that the config describes."""
    by_variant = weights_by_variant(folder)
    files = by_variant.get(variant) or by_variant.get(None)
    if not files:
        raise OSError(f"{folder} has no weights: there is no diffusion_pytorch_model.safetensors.")
    stored: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                stored |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupt ({error}). Download or save it again.") from error
    with torch.device("meta"):
        network = cls.from_config(config)
    expected = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    for key in sorted(stored.keys() | expected.keys()):
        if stored.get(key) != expected.get(key):
            raise ValueError(
                f"{files[0]} does not fit {folder / cls.config_name}: the shape of {key} is"
                f" {stored.get(key, 'missing')} in the file and {expected.get(key, 'missing')} in the network."
            )
