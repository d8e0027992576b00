"""A small diffusion model of handwritten digits, complete, as a plug-in for diffusers.

The network, two schedulers and two pipelines, each in a file of its own that also runs without this package. Importing
the package makes diffusers' own loaders know them:

    >>> import mini_ddpm
    >>> pipe = mini_ddpm.load_pipeline("mnist-class-conditional")
    >>> images = pipe([3, 1, 4], num_inference_steps=20).images
"""

import os
from typing import Any

import diffusers
from diffusers import DiffusionPipeline

from mini_ddpm.hub.card import write_card
from mini_ddpm.hub.download import download
from mini_ddpm.hub.load import PRETRAINED, load_pipeline
from mini_ddpm.hub.publish import publish
from mini_ddpm.models.unet_mini import MiniUNet2DModel
from mini_ddpm.pipelines.pipeline_mini_ddpm import PORTABLE_MODULE, MiniDDPMPipeline, MiniDDPMPipelineOutput
from mini_ddpm.pipelines.pipeline_mini_ddpm_class_conditional import MiniDDPMClassConditionalPipeline
from mini_ddpm.schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from mini_ddpm.schedulers.scheduling_mini_ddpm import MiniDDPMScheduler

__version__ = "0.1.0"

__all__ = [
    "PRETRAINED",
    "MiniDDIMScheduler",
    "MiniDDPMClassConditionalPipeline",
    "MiniDDPMPipeline",
    "MiniDDPMPipelineOutput",
    "MiniDDPMScheduler",
    "MiniUNet2DModel",
    "__version__",
    "load_pipeline",
]

_CLASSES = {
    cls.__name__: cls
    for cls in (
        MiniDDIMScheduler,
        MiniDDPMClassConditionalPipeline,
        MiniDDPMPipeline,
        MiniDDPMScheduler,
        MiniUNet2DModel,
    )
}

# diffusers looks classes up by name on its own module: a pipeline for the generic `DiffusionPipeline.from_pretrained`,
# a part declared as ["diffusers", name], the class that a scheduler's config came from and its `compatibles`.
for _name, _class in _CLASSES.items():
    setattr(diffusers, _name, _class)

_read_json_file = DiffusionPipeline._dict_from_json_file.__func__


def _dict_from_json_file(cls: type[DiffusionPipeline], json_file: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads `model_index.json` and, where it names a class of ours with its source file, names the installed class.

    A saved pipeline says `[file stem, class name]` for the sake of those who do not have this package, and diffusers
    then runs that file, or refuses to without `trust_remote_code`. With the package there is no need for either. The
    hash at a stem's end is not looked at: repositories written by an older or newer version open too. An index that
    names other classes, or ours from a file that is not one of ours (a fork), is left alone.
    """
    index: dict[str, Any] = _read_json_file(cls, json_file)
    for key, value in index.items():
        match value:
            # What diffusers' own pipelines write for a part of ours, "mini_ddpm.unet_mini", is put right as well.
            case [str(module), str(name)] if name in _CLASSES and PORTABLE_MODULE.fullmatch(module.split(".")[-1]):
                index[key] = name if key == "_class_name" else ["diffusers", name]
    return index


# Both the loading and the download read the index through this classmethod of the class they are called on. Set on the
# generic class, it serves that one and, by inheritance, our pipelines; models and schedulers have the base's.
DiffusionPipeline._dict_from_json_file = classmethod(_dict_from_json_file)

# The copies of the pipelines' files that travel with the weights cannot import this package. Here they write a full
# model card, keep what people wrote on the Hub, and say in plain words what went wrong.
_HOOKS = {
    "_write_card": write_card,
    "_publish": staticmethod(publish),
    "download": classmethod(download),
}
for _class in (MiniDDPMPipeline, MiniDDPMClassConditionalPipeline):
    for _name, _hook in _HOOKS.items():
        setattr(_class, _name, _hook)
