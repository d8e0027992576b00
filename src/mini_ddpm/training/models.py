"""The network, the scheduler and the pipeline that a run starts with: new ones, or those of a saved pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from ..data import ImageDataset
from ..hub.load import load_pipeline
from ..models.unet_mini import MiniUNet2DModel
from ..pipelines.pipeline_mini_ddpm import MiniDDPMPipeline
from ..pipelines.pipeline_mini_ddpm_class_conditional import MiniDDPMClassConditionalPipeline
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from .loss import Levels

if TYPE_CHECKING:
    from .config import TrainConfig

# Settings that `pretrained_model_name_or_path` determines.
_SETTINGS_OF_PRETRAINED = (
    "preset",
    "block_out_channels",
    "layers_per_block",
    "num_train_timesteps",
    "beta_schedule",
    "prediction_type",
)


def new_model(config: TrainConfig, dataset: ImageDataset) -> tuple[MiniUNet2DModel, MiniDDIMScheduler]:
    """Make the network and the scheduler that fit the configuration and the images.

    Images or a setting that do not fit the pipeline to start from are a `ValueError`.
    """
    channels, height, width = dataset.shape
    overrides: dict[str, Any] = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        "dropout": config.dropout,
        # the last is the null label
        "num_class_embeds": len(dataset.id2label or ()) + 1 if config.class_conditional else None,
    }
    unet: MiniUNet2DModel
    if config.pretrained_model_name_or_path is not None:
        source: Any = load_pipeline(config.pretrained_model_name_or_path)
        if source.unet.config.in_channels != channels or source.unet.config.out_channels != channels:
            raise ValueError(
                f"{config.pretrained_model_name_or_path} generates images of {source.unet.config.in_channels} "
                f"channels, but those of {config.dataset_name!r} have {channels}. Use other images, or omit "
                "pretrained_model_name_or_path to train from scratch."
            )
        source_config = {**source.scheduler.config, **source.unet.config}
        source_config["block_out_channels"] = tuple(source_config["block_out_channels"])
        for name in _SETTINGS_OF_PRETRAINED:
            value = getattr(config, name)
            if value not in (getattr(type(config), name), source_config.get(name)):
                raise ValueError(
                    f"{name}={value!r} conflicts with {config.pretrained_model_name_or_path}, whose network shape and "
                    f"noise schedule are kept. Omit {name}, or omit pretrained_model_name_or_path to train from "
                    "scratch."
                )
        unet = MiniUNet2DModel.from_config(source.unet.config, **overrides).float()  # whatever the default dtype is
        _copy_weights(source.unet, unet)
        return unet, MiniDDIMScheduler.from_config(source.scheduler.config)
    if config.block_out_channels is not None:
        levels = len(config.block_out_channels)
        overrides["block_out_channels"] = config.block_out_channels
        overrides["down_block_types"] = ("DownBlock2D",) + ("AttnDownBlock2D",) * (levels - 1)
    if config.layers_per_block is not None:
        overrides["layers_per_block"] = config.layers_per_block
    unet = MiniUNet2DModel.from_preset(config.preset, **overrides).float()
    return unet, MiniDDIMScheduler(
        num_train_timesteps=config.num_train_timesteps,
        beta_schedule=config.beta_schedule,
        prediction_type=config.prediction_type,
    )


@torch.no_grad()
def _copy_weights(source: MiniUNet2DModel, target: MiniUNet2DModel) -> None:
    """Copy the weights of `source`, so that `target` computes the same, whichever classes the two know.

    If the classes differ in number, every label of `target` starts as the null label of `source`. If `target` has no
    classes, the embedding of that null label is added to the bias that follows it.
    """
    weights = source.state_dict()
    embedding = weights.pop("class_embedding.weight", None)  # (classes + 1, E)
    bias = weights["time_embedding.linear_2.bias"]
    if target.class_embedding is None:
        if embedding is not None:
            weights["time_embedding.linear_2.bias"] = bias + embedding[-1]
    elif embedding is not None and embedding.shape == target.class_embedding.weight.shape:
        weights["class_embedding.weight"] = embedding
    else:
        null = torch.zeros_like(bias) if embedding is None else embedding[-1]
        weights["class_embedding.weight"] = null.expand_as(target.class_embedding.weight)
    target.load_state_dict(weights)


def new_pipeline(
    config: TrainConfig,
    dataset: ImageDataset,
    levels: Levels,
    unet: MiniUNet2DModel,
    scheduler: MiniDDIMScheduler,
    defaults: dict[str, Any],
) -> Any:
    """Make the pipeline that is saved, with these `default_...` arguments."""
    # A level at the very end of the range needs no entry.
    defaults = defaults | {name: level for name, level in zip(("black_level", "white_level"), levels, strict=True)
                 if level not in (None, 0, 255)}  # fmt: skip
    if config.class_conditional:
        defaults = {**defaults, "id2label": dataset.id2label}
    pipeline_class: Any = MiniDDPMClassConditionalPipeline if config.class_conditional else MiniDDPMPipeline
    pipeline = pipeline_class(unet, scheduler, **defaults)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
