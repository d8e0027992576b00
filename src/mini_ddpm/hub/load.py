"""Opening pipelines: by bundled name, from a folder, from the Hub; every file is checked first."""

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

from .download import _damaged, download

# The file of a network's weights, or one of its shards; group 1 is the variant.
_WEIGHTS = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")


PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""The folder of the pipelines that ship with the package."""


def load_pipeline(name_or_path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Opens a pipeline of this package, of whichever class it was saved.

    Args:
        name_or_path: The name of a bundled pipeline (a folder in `PRETRAINED`; write `./mnist` for a folder of that
            name), a folder, or a repository on the Hub, "user/name".
        **kwargs: For `from_pretrained`: `dtype`, `revision`, `token`, `variant`, `local_files_only`, parts to replace
            such as `scheduler=` ... Weights are read from safetensors unless `use_safetensors=False` is given.

    Returns:
        The pipeline, of the installed class.

    Raises:
        OSError: The folder, a file in it or the repository is not there or cannot be read.
        ValueError: What is there is no pipeline of this package, or is damaged; the message names the file and,
            in a config, the key.
    """
    kwargs.setdefault("use_safetensors", True)
    folder = _find(str(name_or_path), kwargs)
    _check_folder(folder, kwargs)
    return DiffusionPipeline.from_pretrained(folder, **kwargs)


def _find(name: str, kwargs: dict[str, Any]) -> Path:
    """Returns the folder of a pipeline, downloaded if need be."""
    if is_bundled(name) or Path(name).is_dir():
        return local_folder(name)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise OSError(
            f"No pipeline {name!r}: it is not a folder, not a repository on the Hub (user/name),"
            f" and not bundled ({', '.join(_bundled()) or 'none are'})."
        )
    folder = Path(download(DiffusionPipeline, name, **kwargs))
    if damaged := _damaged(folder):
        raise OSError(
            f"{name}: {', '.join(damaged)} came damaged from the Hub, and is removed from the cache; load it again."
        )
    return folder


def _bundled() -> list[str]:
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model_index.json"))


def is_bundled(name: str) -> bool:
    """Whether a pipeline of this name ships with the package."""
    return name in _bundled()


def local_folder(name_or_path: str | Path) -> Path:
    """Returns the folder of a bundled pipeline, or the folder that was given.

    Raises:
        OSError: There is no such folder.
    """
    folder = PRETRAINED / name_or_path if is_bundled(str(name_or_path)) else Path(name_or_path)
    if not folder.is_dir():
        raise OSError(f"There is no folder {name_or_path}.")
    return folder


def _check_folder(folder: Path, kwargs: dict[str, Any]) -> None:
    """Raises for the first thing in a pipeline's folder that would fail obscurely, or pass and give bad images."""
    index_file = folder / "model_index.json"
    if not index_file.is_file():
        raise OSError(f"{folder} is no pipeline: it has no model_index.json.")
    index = _read_config(index_file, DiffusionPipeline)
    name = index.get("_class_name")
    pipeline_class = getattr(diffusers, name, None) if isinstance(name, str) else None
    if pipeline_class is None or not pipeline_class.__module__.startswith("mini_ddpm."):
        raise ValueError(f"{index_file}: the pipeline's class is {name!r}, which is not one of this package.")
    _check_keys(index_file, index, pipeline_class)

    for part, value in index.items():
        if not isinstance(value, list) or part in kwargs:
            continue
        library, class_name = value
        part_class = getattr(diffusers, str(class_name), None)
        if library != "diffusers" or part_class is None:
            raise ValueError(f"{index_file}: the part {part!r} is of an unknown class, {class_name!r} of {library!r}.")
        config_file = folder / part / part_class.config_name
        if not config_file.is_file():
            raise OSError(f"{folder} is an incomplete pipeline: it has no {part}/{config_file.name}.")
        config = _read_config(config_file, part_class)
        _check_keys(config_file, config, part_class)
        if issubclass(part_class, diffusers.ModelMixin) and kwargs["use_safetensors"]:
            _check_weights(folder / part, config, part_class, kwargs.get("variant"))


def _read_config(file: Path, cls: Any) -> dict[str, Any]:
    """Reads a JSON object as `cls` does."""
    try:
        config = cls._dict_from_json_file(file)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(config, dict):
        raise ValueError(f"{file} is not a JSON object.")
    return config


def _check_keys(file: Path, config: dict[str, Any], cls: Any) -> None:
    """Raises for a key that `cls` does not know, or lacks: a setting lost in silence gives a different model."""
    expected = set(inspect.signature(cls.__init__).parameters) - {"self", "kwargs"}
    known = expected.union({"quantization_config", "auto_map"}, cls.ignore_for_config)
    if cls.has_compatibles:  # a scheduler keeps the keys of those it was converted from
        known = known.union(*(inspect.signature(other.__init__).parameters for other in cls._get_compatibles()))
    unknown = sorted(key for key in config if key not in known and not key.startswith("_"))
    if unknown:
        raise ValueError(f"{file}: unknown key {unknown[0]!r}; {cls.__name__} has {', '.join(sorted(expected))}.")
    # Classes of diffusers gain keys with its versions; theirs may be absent, and so may defaults that nobody set.
    required = {key for key in expected if not key.startswith("default_")}
    missing = sorted(required - config.keys()) if cls.__module__.startswith("mini_ddpm.") else []
    if missing:
        raise ValueError(f"{file}: the key {missing[0]!r} is missing.")


def _check_weights(folder: Path, config: dict[str, Any], cls: Any, variant: str | None) -> None:
    """Raises for a weights file that is truncated or corrupt, or that is not of the network the config describes."""
    by_variant = _weights(folder)
    files = by_variant.get(variant) or by_variant.get(None)
    if not files:
        raise OSError(f"{folder} has no weights: no diffusion_pytorch_model.safetensors.")
    stored: dict[str, list[int]] = {}
    for file in files:
        try:
            with safe_open(file, framework="pt") as weights:
                stored |= {key: weights.get_slice(key).get_shape() for key in weights.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupt ({error}); download or save it again.") from error
    with torch.device("meta"):
        network = cls.from_config(config)
    expected = {key: list(tensor.shape) for key, tensor in network.state_dict().items()}
    for key in sorted(stored.keys() | expected.keys()):
        if stored.get(key) != expected.get(key):
            raise ValueError(
                f"{files[0]} does not fit {folder / cls.config_name}: the tensor {key} has the shape"
                f" {stored.get(key)} in the file and {expected.get(key)} in the network."
            )


def _weights(folder: Path) -> dict[str | None, list[Path]]:
    """Returns the files of a network's weights by variant, that without a name (None) first."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if match := _WEIGHTS.fullmatch(file.name):
            found.setdefault(match[1], []).append(file)
    return dict(sorted(found.items(), key=lambda item: item[0] or ""))
