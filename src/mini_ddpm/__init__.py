"""A small diffusion model, complete, as a plug-in for diffusers.

The network, two schedulers and two pipelines also run without this package. Importing the package registers them with
diffusers' own loaders:

    >>> import mini_ddpm
    >>> pipe = mini_ddpm.load_pipeline("mnist-class-conditional")
    >>> images = pipe([3, 1, 4], num_inference_steps=20).images
"""

import functools
import importlib
from typing import TYPE_CHECKING, Any

import diffusers
from diffusers import AutoModel, DiffusionPipeline

from mini_ddpm.hub.card import write_card
from mini_ddpm.hub.download import download
from mini_ddpm.hub.index import CLASSES, PIPELINES, auto_from_pretrained, from_pretrained, read_index
from mini_ddpm.hub.load import PRETRAINED, load_pipeline
from mini_ddpm.hub.publish import publish
from mini_ddpm.models.unet_mini import MiniUNet2DModel
from mini_ddpm.pipelines.pipeline_base import MiniDDPMPipelineOutput
from mini_ddpm.pipelines.pipeline_mini_ddpm import MiniDDPMPipeline
from mini_ddpm.pipelines.pipeline_mini_ddpm_class_conditional import MiniDDPMClassConditionalPipeline
from mini_ddpm.schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from mini_ddpm.schedulers.scheduling_mini_ddpm import MiniDDPMScheduler

if TYPE_CHECKING:
    from mini_ddpm.curves import run_curves
    from mini_ddpm.data import ImageDataset, as_image_dataset, image_dataset
    from mini_ddpm.evaluation.evaluate import EvaluateConfig, evaluate
    from mini_ddpm.export import ExportedSampler, export_sampler
    from mini_ddpm.plots import denoising_film, noising_strip, sample_grid
    from mini_ddpm.training.callbacks import TrainCallback, TrainState
    from mini_ddpm.training.config import TrainConfig
    from mini_ddpm.training.distill import DistillConfig, distill
    from mini_ddpm.training.loss import compute_loss
    from mini_ddpm.training.sharpen import SharpenConfig, extrapolate, sharpen
    from mini_ddpm.training.train import train

__version__ = "0.2.0"

# Names that are imported on first use, by module.
_LAZY = {
    "curves": ("run_curves",),
    "data": ("ImageDataset", "as_image_dataset", "image_dataset"),
    "evaluation.evaluate": ("EvaluateConfig", "evaluate"),
    "export": ("ExportedSampler", "export_sampler"),
    "plots": ("denoising_film", "noising_strip", "sample_grid"),
    "training.callbacks": ("TrainCallback", "TrainState"),
    "training.config": ("TrainConfig",),
    "training.distill": ("DistillConfig", "distill"),
    "training.loss": ("compute_loss",),
    "training.sharpen": ("SharpenConfig", "extrapolate", "sharpen"),
    "training.train": ("train",),
}

__all__ = [
    "PRETRAINED",
    "DistillConfig",
    "EvaluateConfig",
    "ExportedSampler",
    "ImageDataset",
    "MiniDDIMScheduler",
    "MiniDDPMClassConditionalPipeline",
    "MiniDDPMPipeline",
    "MiniDDPMPipelineOutput",
    "MiniDDPMScheduler",
    "MiniUNet2DModel",
    "SharpenConfig",
    "TrainCallback",
    "TrainConfig",
    "TrainState",
    "__version__",
    "as_image_dataset",
    "compute_loss",
    "denoising_film",
    "distill",
    "evaluate",
    "export_sampler",
    "extrapolate",
    "image_dataset",
    "load_pipeline",
    "noising_strip",
    "run_curves",
    "sample_grid",
    "sharpen",
    "train",
]


def __getattr__(name: str) -> Any:
    """Import a name of `_LAZY` on first use."""
    module = next((module for module, names in _LAZY.items() if name in names), None)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(importlib.import_module(f"{__name__}.{module}"), name)
    return value


def __dir__() -> list[str]:
    """List the names of `_LAZY` too."""
    return sorted({*globals(), *__all__})


# diffusers looks up classes by name on its own module: a pipeline for the generic `DiffusionPipeline.from_pretrained`,
# a part declared as ["diffusers", name], the class that a scheduler's config came from, and its `compatibles`.
for _name, _class in CLASSES.items():
    setattr(diffusers, _name, _class)

# Loading and downloading read the index through this classmethod of the class they are called on. Set on the generic
# class, it serves that class and, by inheritance, our pipelines. `AutoModel` finds the class of a part there. Models
# and schedulers keep that of their base class.
DiffusionPipeline._dict_from_json_file = AutoModel._dict_from_json_file = classmethod(read_index)
# Both would refuse what there is no reason to refuse: a part that is given by hand, trust in code that is not run.
DiffusionPipeline.from_pretrained = classmethod(functools.wraps(DiffusionPipeline.from_pretrained)(from_pretrained))
AutoModel.from_pretrained = classmethod(functools.wraps(AutoModel.from_pretrained)(auto_from_pretrained))

# The bundles that travel with the weights cannot import this package. With the package, the pipelines write a full
# model card, keep hand-written cards on the Hub, and explain errors in plain words.
_HOOKS = {
    "_write_card": write_card,
    "_publish": staticmethod(publish),
    "download": classmethod(download),
}
for _class in PIPELINES:
    for _name, _hook in _HOOKS.items():
        setattr(_class, _name, _hook)
