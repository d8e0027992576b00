"""Open a pipeline by its bundled name, from a folder or from the Hub. Every file is checked first.

A folder may be damaged or hostile. So nothing but a regular file of a sensible size is opened, and every value is
checked before a network or a noise schedule is built from it.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import diffusers
import numpy as np
import torch
from accelerate import init_empty_weights
from diffusers import DiffusionPipeline
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from safetensors import SafetensorError, safe_open

from ..models.unet_mini import CONFIG_BOUNDS, MAX_LEVELS
from ..pipelines.pipeline_base import check_interval
from ..pipelines.portable import CHECKSUMS, sha256
from ..schedulers.scheduling_base import MAX_TRAIN_TIMESTEPS
from .download import download, remove_corrupt_files
from .index import components, parts_given

PRETRAINED = Path(__file__).parents[1] / "pretrained"
"""The folder of the pipelines that ship with the package."""

WEIGHTS_FILE = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d{5}-of-\d{5})?\.safetensors")
"""The name of a network's weights file, or of one of its shards. Group 1 is the variant."""

MAX_JSON_BYTES = 10_000_000

# Keys that repositories of the first version lack.
_LATER_KEYS = {"head_channels", "black_level", "white_level"}

# The least and the greatest value of a number, or of each number in a list, by its key in any class's configuration.
_BOUNDS = CONFIG_BOUNDS | {
    "num_train_timesteps": (1, MAX_TRAIN_TIMESTEPS),
    "steps_offset": (0, MAX_TRAIN_TIMESTEPS),
    "trained_betas": (0, 1),
    "beta_start": (1e-9, 1),
    "beta_end": (1e-9, 1),
    "dynamic_thresholding_ratio": (0, 1),
    "clip_sample_range": (1e-3, 1_000),
    "sample_max_value": (1e-3, 1_000),
    "default_num_inference_steps": (1, MAX_TRAIN_TIMESTEPS),
    "default_eta": (0, 1),
    "default_guidance_scale": (1e-6, 1_000),
    "default_guidance_interval": (0, 1),
    "black_level": (0, 255),
    "white_level": (0, 255),
}
# Keys of diffusers itself.
_OTHER_KEYS = {
    "_use_default_values": list[str],
    "_diffusers_version": str,
    "auto_map": dict[str, str],
    "quantization_config": dict[str, Any],
}
# The bounds of numbers in a class of diffusers, whose keys are not all known here.
_OTHER_BOUNDS = (-1e9, 1e9)


def load_pipeline(name_or_path: str | Path, **kwargs: Any) -> DiffusionPipeline:
    """Open a saved mini-ddpm pipeline, whichever of our two classes it has.

    Args:
        name_or_path: The name of a bundled pipeline (a folder in `PRETRAINED`), a folder, or a repository on the Hub,
            "user/name". A bundled name wins over a folder of the same name: write `./mnist` for the folder.
        **kwargs: Arguments of `from_pretrained`: `dtype`, `revision`, `token`, `variant`, `local_files_only`, and
            components that replace the saved ones, such as `scheduler=...`. Weights must be safetensors, unless
            `use_safetensors=False`. A part whose class is neither diffusers' nor ours is given
            (`unet=MyUNet.from_pretrained(folder, subfolder="unet")`), or comes from the code saved with it
            (`trust_remote_code=True`), or has a class that is imported already from the same source.

    Returns:
        The pipeline. Its class is the installed one, not the code saved with it.

    Raises:
        OSError: The folder, a file in it or the repository is missing or cannot be read.
        ValueError: The folder holds another kind of pipeline, or a damaged one. The message is one line, which names
            the file and, in a configuration, the key.
    """
    kwargs.setdefault("use_safetensors", True)
    with parts_given(kwargs):
        folder = _find_folder(str(name_or_path), kwargs)
    with in_one_line(folder), parts_given(kwargs):
        check_folder(folder, kwargs)
        return DiffusionPipeline.from_pretrained(folder, **kwargs)


def is_bundled(name: str) -> bool:
    """Return whether a pipeline of this name ships with the package."""
    return name in _bundled_names()


def local_folder(name_or_path: str | Path) -> Path:
    """Return the folder of a bundled pipeline, or the given folder. A missing one is an `OSError`."""
    folder = PRETRAINED / name_or_path if is_bundled(str(name_or_path)) else Path(os.path.expanduser(name_or_path))
    if not folder.is_dir():
        bundled = ", ".join(_bundled_names())
        raise OSError(f"There is no folder {name_or_path}. Give a folder or a bundled pipeline ({bundled}).")
    return folder


def weights_by_variant(folder: Path) -> dict[str | None, list[Path]]:
    """Return the weights files in a network's folder, grouped by variant. The one without a name, `None`, is first."""
    found: dict[str | None, list[Path]] = {}
    for file in sorted(folder.glob("*.safetensors")):
        if (match := WEIGHTS_FILE.fullmatch(file.name)) and file.is_file():
            found.setdefault(match[1], []).append(file)
    return dict(sorted(found.items(), key=lambda item: item[0] or ""))


def read_json(file: Path, kind: type = dict) -> Any:
    """Read a JSON file from a pipeline's folder.

    A missing file is an `OSError`, one that does not hold JSON of this kind, `dict` or `list`, a `ValueError`.
    """
    if not file.is_file():
        raise OSError(f"{file.parent} is not a pipeline: it has no {file.name}.")
    if file.stat().st_size > MAX_JSON_BYTES:
        raise ValueError(f"{file} is larger than {MAX_JSON_BYTES:,} bytes, the most that a JSON file may have here.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} must hold a JSON {'list' if kind is list else 'object'}.")
    return content


def read_header(file: Path) -> dict[str, tuple[list[int], str]]:
    """Return the shape and the dtype ("F16") of each tensor in a weights file. A damaged one is a `ValueError`."""
    try:
        with safe_open(file, framework="pt") as weights:
            slices = {key: weights.get_slice(key) for key in weights.keys()}  # noqa: SIM118
            return {key: (tensor.get_shape(), tensor.get_dtype()) for key, tensor in slices.items()}
    except (SafetensorError, ValueError) as error:
        raise ValueError(f"{file} is truncated or corrupt ({error}). Download or save it again.") from error


def read_checksums(index_file: Path) -> dict[str, str]:
    """Return the SHA-256 of each weights file that a `model_index.json` gives. Those of earlier versions give none."""
    checksums = read_json(index_file).get(CHECKSUMS, {})
    if not isinstance(checksums, dict) or not all(re.fullmatch("[0-9a-f]{64}", str(s)) for s in checksums.values()):
        raise ValueError(f"{index_file}: `{CHECKSUMS}` must give 64 hexadecimal digits for each weights file.")
    return checksums


def check_checksums(folder: Path, files: list[Path]) -> None:
    """Raise a `ValueError` for the first weights file whose checksum in the pipeline's `model_index.json` differs."""
    index_file = folder / "model_index.json"
    checksums = read_checksums(index_file)
    for file in files:
        expected = checksums.get(file.relative_to(folder).as_posix())
        if expected is not None and sha256(file) != expected:
            raise ValueError(
                f"{file} was changed or damaged after it was saved: its SHA-256 is not that in {index_file.name}."
                f" Download or save it again. If the change is wanted, remove `{CHECKSUMS}` from {index_file.name}."
            )


def _bundled_names() -> list[str]:
    return sorted(path.parent.name for path in PRETRAINED.glob("*/model_index.json"))


def _find_folder(name: str, kwargs: dict[str, Any]) -> Path:
    """Return the folder of a pipeline. Download it if it is a repository on the Hub."""
    if is_bundled(name) or os.path.isdir(os.path.expanduser(name)):
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


@contextlib.contextmanager
def in_one_line(folder: Path) -> Iterator[None]:
    """Let only `OSError` and `ValueError` of one line that name the folder or a file in it leave the block."""
    try:
        yield
    except Exception as error:
        line = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (OSError, ValueError)) and str(folder) in str(error) == line and len(line) < 1000:
            raise
        line = line if str(folder) in line else f"{folder} cannot be opened: {line}"
        line = line if len(line) < 1000 else f"{line[:1000]} ..."
        raise (OSError if isinstance(error, OSError) else ValueError)(line) from error


def check_folder(folder: Path, kwargs: dict[str, Any]) -> None:
    """Raise on the first problem that would otherwise fail with an obscure error or silently give bad images."""
    index_file = folder / "model_index.json"
    read_json(index_file)
    index = DiffusionPipeline._dict_from_json_file(index_file)
    name = index.get("_class_name")
    pipeline_class = _find_class(name, DiffusionPipeline)
    if pipeline_class is None or not pipeline_class.__module__.startswith("mini_ddpm."):
        raise ValueError(
            f"{index_file}: the pipeline class is {_short(name)}, which is not one of mini-ddpm's. Open it with"
            " diffusers' own `DiffusionPipeline.from_pretrained`."
        )
    _check_keys(index_file, index, pipeline_class)

    configs: dict[str, Any] = {}
    for component, base in components(pipeline_class).items():
        if component in kwargs:
            continue
        component_class = _component_class(index_file, component, index[component], base, kwargs)
        config_file = folder / component / component_class.config_name
        if not config_file.is_file():
            raise OSError(f"{folder} is an incomplete pipeline: it has no {component}/{config_file.name}.")
        config = configs[component] = read_json(config_file)
        _check_keys(config_file, config, component_class)
        if issubclass(component_class, diffusers.ModelMixin):
            # A constructor of the user's own may compute with other tensors than parameters.
            known = _is_known(component_class)
            with torch.device("meta") if known else init_empty_weights(), _prefixed(config_file):
                network = component_class.from_config(config)
            if kwargs["use_safetensors"]:
                _check_weights(folder / component, network, kwargs.get("variant"))
    _check_pipeline(index_file, index, configs)


def _component_class(index_file: Path, component: str, value: Any, base: Any, kwargs: dict[str, Any]) -> Any:
    """Return the class of a component, from the file saved with it if the caller trusts that."""
    library, name = value if isinstance(value, list) and len(value) == 2 else (None, value)
    found = _find_class(name, base) if library == "diffusers" else None
    if found is not None:
        return found
    advice = "."
    if library != "diffusers" and isinstance(name, str) and name.isidentifier():
        given = f'{component}={name}.from_pretrained(folder, subfolder="{component}")'
        advice = f", or be given: `load_pipeline(folder, {given})`."
        source = index_file.parent / component / f"{library}.py"
        if isinstance(library, str) and re.fullmatch(r"\w+", library) and source.is_file():
            if kwargs.get("trust_remote_code"):
                found = get_class_from_dynamic_module(
                    source.parent, source.name, class_name=name, trust_remote_code=True
                )
                if isinstance(found, type) and issubclass(found, base):
                    return found
            advice = f"{advice[:-1]}. If you trust the code in {source}, `trust_remote_code=True` runs it."
    raise ValueError(
        f"{index_file}: the component {component!r} has an unknown class, {_short(name)} of {_short(library)}. It must"
        f" be a class of diffusers or mini-ddpm{advice}"
    )


def _is_known(cls: Any) -> bool:
    """Return whether a class is one of diffusers or of ours, not of the user's own."""
    return cls.__module__.partition(".")[0] in ("diffusers", "mini_ddpm")


def _find_class(name: Any, base: Any) -> Any:
    """Return the class of diffusers or of ours that has this name and base class, or `None`."""
    found = getattr(diffusers, name, None) if isinstance(name, str) and name.isidentifier() else None
    return found if isinstance(found, type) and issubclass(found, base) else None


@contextlib.contextmanager
def _prefixed(file: Path) -> Iterator[None]:
    """Name the file in an error of the block."""
    try:
        yield
    except Exception as error:
        raise ValueError(f"{file}: {error}") from error


def _short(value: Any) -> str:
    """Return a value as a message shows it."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _check_keys(file: Path, config: dict[str, Any], cls: Any) -> None:
    """Raise if a key is unknown to `cls` or missing, or has a value of the wrong type or out of range.

    A setting that is silently dropped gives a different model.
    """
    own = dict(inspect.signature(cls.__init__).parameters)
    expected = own.keys() - {"self", "kwargs"}
    known = {key: [own[key]] for key in expected}
    if not _is_known(cls):  # `register_to_config` of the constructor of a base class adds its keys
        for base in cls.__mro__[1:]:
            for key, parameter in inspect.signature(base.__init__).parameters.items():
                known.setdefault(key, []).append(parameter)
    if cls.has_compatibles:  # a scheduler keeps the keys of the schedulers it was converted from
        for other in cls._get_compatibles():
            for key, parameter in inspect.signature(other.__init__).parameters.items():
                if key not in own:
                    known.setdefault(key, []).append(parameter)
    allowed = known.keys() | _OTHER_KEYS.keys() | set(cls.ignore_for_config)
    unknown = sorted(key for key in config if key not in allowed and not key.startswith("_"))
    if unknown:
        raise ValueError(
            f"{file}: unknown key {_short(unknown[0])}. {cls.__name__} has {', '.join(sorted(expected))}."
        )
    # diffusers adds keys to its classes from version to version, so theirs may be missing. So may `default_*`, which
    # are saved only if they were set, and the keys that came later.
    is_ours = cls.__module__.startswith("mini_ddpm.")
    required = {key for key in expected if not key.startswith("default_")} - _LATER_KEYS
    missing = sorted(required - config.keys()) if is_ours else []
    if missing:
        raise ValueError(f"{file}: the key {missing[0]!r} is missing.")
    # An index may name the class as [file, class]. It was looked up before.
    name = config.get("_class_name", cls.__name__)
    if name != cls.__name__:
        raise ValueError(f"{file}: `_class_name` must be {cls.__name__}, as in the index, but is {_short(name)}.")
    for key, annotation in _OTHER_KEYS.items():
        if key in config and not _fits(config[key], annotation):
            raise ValueError(f"{file}: `{key}` must be {_describe(annotation)}, but is {_short(config[key])}.")
    for key in sorted(config.keys() & known.keys() - components(cls).keys()):
        value = config[key]
        _check_value(file, key, value, known[key], is_ours and key in own)
        is_network = issubclass(cls, diffusers.ModelMixin) and _is_known(cls)
        longest = MAX_LEVELS if is_network else MAX_TRAIN_TIMESTEPS
        if isinstance(value, list) and len(value) > longest:
            raise ValueError(f"{file}: `{key}` has {len(value):,} entries; at most {longest:,} are allowed.")


def _check_value(file: Path, key: str, value: Any, parameters: list[inspect.Parameter], is_strict: bool) -> None:
    """Raise if a value of a configuration fits no annotation of the key's parameters, or is out of range.

    What diffusers annotates is less strict than ours: its classes keep each other's choices, and some numbers that are
    null by default are `bool | None`.
    """
    if any(type(p.default) is type(value) and p.default == value for p in parameters):  # also -inf
        return
    annotations = [p.annotation for p in parameters]
    is_exempt = (key == "variance_type" and value is None) or any(  # DPM-Solver has null
        not is_strict and bool in get_args(p.annotation) and p.default is None for p in parameters
    )
    if not is_exempt and not any(_fits(value, annotation, is_strict) for annotation in annotations):
        allowed = " or ".join(dict.fromkeys(map(_describe, annotations)))
        raise ValueError(f"{file}: `{key}` must be {allowed}, but is {_short(value)}.")
    low, high = _BOUNDS.get(key, _OTHER_BOUNDS)
    for item in value if isinstance(value, list) else [value]:
        if isinstance(item, (int, float)) and not isinstance(item, bool) and not low <= item <= high:
            raise ValueError(f"{file}: `{key}` must be from {low:g} to {high:.10g}, but is {_short(item)}.")


def _fits(value: Any, annotation: Any, is_strict: bool = True) -> bool:
    """Return whether a value that was read from JSON fits an annotation. Whatever is unknown here fits.

    Unless `is_strict`, any text fits a choice.
    """
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return any(_fits(value, argument, is_strict) for argument in arguments)
    if origin is Literal:
        return isinstance(value, str) and (not is_strict or value in arguments)
    if annotation in (None, NoneType):
        return value is None
    if annotation is np.ndarray:
        return False
    if annotation in (bool, str):
        return isinstance(value, annotation)
    if annotation in (int, float):
        return isinstance(value, (int, annotation)) and not isinstance(value, bool) and abs(value) < float("inf")
    if origin is dict:
        return isinstance(value, dict)
    if origin in (list, tuple):
        is_fixed = origin is tuple and ... not in arguments
        return (
            isinstance(value, list)
            and (not is_fixed or len(value) == len(arguments))
            and all(_fits(item, arguments[0], is_strict) for item in value)
        )
    return True


def _describe(annotation: Any) -> str:
    """Return what an annotation allows, in words."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return " or ".join(_describe(argument) for argument in arguments if argument is not np.ndarray)
    if origin is Literal:
        return f"one of {', '.join(map(str, arguments))}"
    if origin in (list, tuple):
        return f"a list ({_describe(arguments[0])})"
    words = {bool: "true or false", int: "a whole number", float: "a finite number", str: "a text", NoneType: "null"}
    return words.get(annotation, "an object" if origin is dict else str(annotation))


def _check_pipeline(index_file: Path, index: dict[str, Any], configs: dict[str, Any]) -> None:
    """Raise if values of the pipeline do not fit one another or those of its components' configurations."""
    labels = index.get("id2label") or {}
    for label, name in labels.items():
        if not re.fullmatch(r"0|[1-9]\d{0,8}", label) or not isinstance(name, str):
            raise ValueError(
                f"{index_file}: `id2label` must give a text for each label, but has {_short({label: name})}."
            )
    count, last = configs.get("unet", {}).get("num_class_embeds"), max(map(int, labels), default=0)
    if count is not None and last >= count:
        raise ValueError(f"{index_file}: `id2label` has the label {last}, but the network has 0 to {count - 1}.")
    black, white = (index.get(key, default) for key, default in (("black_level", 0), ("white_level", 255)))
    if black is not None and white is not None and black >= white:
        raise ValueError(f"{index_file}: `black_level` must be below `white_level`, but they are {black} and {white}.")
    if (interval := index.get("default_guidance_interval")) is not None:
        try:
            check_interval("default_guidance_interval", interval)
        except ValueError as error:
            raise ValueError(f"{index_file}: {error}") from error
    scheduler = configs.get("scheduler", {})
    total, betas = scheduler.get("num_train_timesteps"), scheduler.get("trained_betas")
    steps = index.get("default_num_inference_steps")
    if steps is not None and total is not None and steps > total:
        raise ValueError(
            f"{index_file}: `default_num_inference_steps` must be at most {total}, the scheduler's"
            f" `num_train_timesteps`, but is {steps}."
        )
    if betas is not None and total is not None and len(betas) != total:
        raise ValueError(
            f"{index_file.parent / 'scheduler' / 'scheduler_config.json'}: `trained_betas` must have {total} numbers,"
            f" `num_train_timesteps`, but has {len(betas)}."
        )


def _weights_files(folder: Path, variant: str | None) -> tuple[list[Path], dict[str, str] | None]:
    """Return the files that diffusers reads a network's weights from, and the file name of each tensor in shards."""
    by_variant = weights_by_variant(folder)
    variant = variant if variant in by_variant else None
    suffix = "" if variant is None else f".{variant}"
    found = {file.name: file for file in by_variant.get(variant, [])}
    whole = f"diffusion_pytorch_model{suffix}.safetensors"
    index_file = folder / f"diffusion_pytorch_model.safetensors.index{suffix}.json"
    if not os.path.lexists(index_file):
        if whole not in found:
            raise OSError(f"{folder} has no weights: {whole} is missing or is not a regular file.")
        return [found[whole]], None
    index = read_json(index_file)
    files = index.get("weight_map")
    if not isinstance(files, dict) or not isinstance(index.get("metadata"), dict) or not files:
        raise ValueError(f"{index_file} must hold the objects `metadata` and `weight_map`.")
    for name in files.values():
        if not isinstance(name, str) or name not in found:
            raise OSError(f"{index_file} names {_short(name)}, which is missing or is not a regular file.")
    return [found[name] for name in sorted(set(files.values()))], files


def _check_weights(folder: Path, network: Any, variant: str | None) -> None:
    """Raise if the weights are missing, were damaged or changed, or do not fit the network of the config."""
    files, places = _weights_files(folder, variant)
    tensors = network.state_dict()
    stored: dict[str, list[int]] = {}
    for file in files:
        for key, (shape, dtype) in read_header(file).items():
            stored[key] = shape
            is_float = key not in tensors or tensors[key].is_floating_point()  # unlike the counters of a BatchNorm
            if is_float and not dtype.startswith(("F", "BF")):
                raise ValueError(f"{file}: {key} is stored as {dtype}. Weights must be floating point numbers.")
            if places is not None and places.get(key) != file.name:
                raise ValueError(f"{file} holds {key}, which its index file does not say.")
    expected = {key: list(tensor.shape) for key, tensor in tensors.items()}
    for key in sorted(stored.keys() | expected.keys()):
        if stored.get(key) != expected.get(key):
            raise ValueError(
                f"{files[0]} does not fit {folder / network.config_name}: the shape of {key} is"
                f" {stored.get(key, 'missing')} in the file and {expected.get(key, 'missing')} in the network."
            )
    check_checksums(folder.parent, files)
