"""How diffusers' loaders read the index of a saved pipeline while this package is installed."""

from __future__ import annotations

import contextlib
import inspect
import os
import re
import sys
from collections.abc import Collection, Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import diffusers
from diffusers import AutoModel, DiffusionPipeline, ModelMixin, SchedulerMixin

from ..models.unet_mini import MiniUNet2DModel
from ..pipelines.pipeline_mini_ddpm import MiniDDPMPipeline
from ..pipelines.pipeline_mini_ddpm_class_conditional import MiniDDPMClassConditionalPipeline
from ..pipelines.portable import PORTABLE_MODULE, bundle_of
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from ..schedulers.scheduling_mini_ddpm import MiniDDPMScheduler

PIPELINES = (MiniDDPMClassConditionalPipeline, MiniDDPMPipeline)
CLASSES: dict[str, Any] = {
    cls.__name__: cls for cls in (MiniDDIMScheduler, *PIPELINES, MiniDDPMScheduler, MiniUNet2DModel)
}
"""The installed classes that a saved pipeline may name, by name."""

# The components that the caller of a loader gives by hand.
_given: ContextVar[Collection[str]] = ContextVar("_given", default=())

_read_json_file = DiffusionPipeline._dict_from_json_file.__func__
_from_pretrained = DiffusionPipeline.from_pretrained.__func__
_auto_from_pretrained = AutoModel.from_pretrained.__func__


def components(pipeline_class: Any) -> dict[str, Any]:
    """Return the base class of each component of a pipeline class, by the component's name."""
    parameters = inspect.signature(pipeline_class.__init__).parameters.values()
    return {p.name: p.annotation for p in parameters if p.default is p.empty and p.name != "self"}


@contextlib.contextmanager
def parts_given(names: Collection[str]) -> Iterator[None]:
    """Say which components are given by hand while pipelines are loaded in the block."""
    token = _given.set(names)
    try:
        yield
    finally:
        _given.reset(token)


def read_index(cls: Any, json_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Read `model_index.json`, and replace classes that it names with a source file by those that are here already.

    A saved pipeline names its classes as `[file stem, class name]` for people without this package. diffusers runs
    that file, or refuses to without `trust_remote_code`. Three kinds of classes need neither:

    - Ours. The hash at the end of a stem is ignored, so repositories of older and newer versions open too. An index
      that names other classes, or ours from a file with another name (a fork), is left alone.
    - In a pipeline of ours, the class of a part that the caller gives. diffusers would look for the saved class, only
      to compare the base classes.
    - In a pipeline of ours, a class that this process has imported from the very source in the saved file.

    `auto_map`, which makes `AutoModel` run the file, is left out where it is not needed: other loaders warn of it.
    """
    index: dict[str, Any] = _read_json_file(cls, json_file)
    for key, value in index.items():
        match value:
            # diffusers' own pipelines write the module of a part of ours, "mini_ddpm.models.unet_mini".
            case [str(module), str(name)] if name in CLASSES and PORTABLE_MODULE.fullmatch(module.split(".")[-1]):
                index[key] = name if key == "_class_name" else ["diffusers", name]
    pipeline_class = index.get("_class_name")
    if not isinstance(pipeline_class, str) or pipeline_class not in CLASSES:
        return index
    for key, base in components(CLASSES[pipeline_class]).items():
        match index.get(key):
            case [str(stem), str(name)] if stem != "diffusers":
                if key in _given.get():
                    index[key] = ["diffusers", base.__name__]
                elif found := _imported_class(Path(json_file).parent / key, stem, name):
                    # diffusers finds a part's class by name, on its own module. This name is of no other class.
                    setattr(diffusers, f"{stem}_{name}", found)
                    index[key] = ["diffusers", f"{stem}_{name}"]
    match index.get("unet"):
        case [str(library), _] if library == "diffusers" or issubclass(cls, DiffusionPipeline):
            index.pop("auto_map", None)
    return index


def _imported_class(folder: Path, stem: str, name: str) -> Any:
    """Return the class of this process whose source is that of a saved part, byte for byte, or `None`."""
    file = folder / f"{stem}.py"
    if not re.fullmatch(r"\w+", stem) or not file.is_file():
        return None
    for module_name, module in list(sys.modules.items()):
        cls = getattr(module, "__dict__", {}).get(name)
        if isinstance(cls, type) and issubclass(cls, (ModelMixin, SchedulerMixin)) and cls.__module__ == module_name:
            with contextlib.suppress(ValueError):
                own_stem, source = bundle_of(cls)
                if own_stem == stem and file.stat().st_size == len(source) and file.read_bytes() == source:
                    return cls
    return None


def from_pretrained(
    cls: Any, /, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
) -> DiffusionPipeline:
    """Load a pipeline with diffusers' `cls.from_pretrained`, also with parts of a class that only the caller knows."""
    with parts_given(kwargs):
        return _from_pretrained(cls, pretrained_model_name_or_path, **kwargs)


def auto_from_pretrained(
    cls: Any, /, pretrained_model_or_path: str | os.PathLike[str] | None = None, **kwargs: Any
) -> Any:
    """Load a part with diffusers' `AutoModel.from_pretrained`.

    It refuses `trust_remote_code` where there is no code to trust, so the flag is left out for parts of pipelines of
    ours that open without it. And it takes no path but a string.
    """
    path = None if pretrained_model_or_path is None else os.fspath(pretrained_model_or_path)
    if kwargs.get("trust_remote_code"):
        names = ("cache_dir", "local_files_only", "proxies", "revision", "token")
        with contextlib.suppress(OSError):
            options = {name: kwargs[name] for name in names if name in kwargs}
            index = DiffusionPipeline.load_config(path, **options)
            match index.get("_class_name"), index.get(kwargs.get("subfolder")):
                case [str(name), ["diffusers", _]] if name in CLASSES:
                    kwargs.pop("trust_remote_code")
    return _auto_from_pretrained(cls, path, **kwargs)
