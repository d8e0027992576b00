"""The network, the scheduler and the pipeline that a run starts with: new ones, given ones, or those of a pipeline."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from diffusers import ModelMixin

from ..data import ImageDataset
from ..hub.load import load_pipeline
from ..models.unet_mini import MiniUNet2DModel
from ..pipelines.pipeline_mini_ddpm import MiniDDPMPipeline
from ..pipelines.pipeline_mini_ddpm_class_conditional import MiniDDPMClassConditionalPipeline
from ..pipelines.portable import is_portable
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler
from .loss import Levels

if TYPE_CHECKING:
    from .config import TrainConfig

# Settings that a given network or scheduler, and `pretrained_model_name_or_path`, determine.
_SETTINGS_OF_UNET = ("preset", "block_out_channels", "layers_per_block", "dropout")
_SETTINGS_OF_SCHEDULER = ("num_train_timesteps", "beta_schedule", "prediction_type")


def new_model(config: TrainConfig, dataset: ImageDataset, unet: Any = None, scheduler: Any = None) -> tuple[Any, Any]:
    """Return the network and the scheduler of a run: the given ones, else those that the configuration describes.

    Images or a setting that do not fit a given part, or the pipeline to start from, are a `ValueError`.
    """
    channels, height, width = dataset.shape
    overrides: dict[str, Any] = {
        "sample_size": height if height == width else (height, width),
        "in_channels": channels,
        "out_channels": channels,
        # the last is the null label
        "num_class_embeds": len(dataset.id2label or ()) + 1 if config.class_conditional else None,
    }
    if unet is not None or scheduler is not None:
        if config.pretrained_model_name_or_path is not None:
            raise ValueError(
                f"pretrained_model_name_or_path={config.pretrained_model_name_or_path!r} determines the network and "
                "the scheduler. Omit it, or omit unet and scheduler."
            )
        given = (("unet", unet, _SETTINGS_OF_UNET), ("scheduler", scheduler, _SETTINGS_OF_SCHEDULER))
        for name, part, settings in given:
            _check_settings(config, settings if part is not None else (), {}, f"the {name} that was given", name)
    if unet is not None:
        _check_network(unet, overrides)
        unet = unet.float()
    if scheduler is not None:
        _check_scheduler(scheduler)
        scheduler = type(scheduler).from_config(scheduler.config)
    if config.pretrained_model_name_or_path is not None:
        source: Any = load_pipeline(config.pretrained_model_name_or_path)
        if source.unet.config.in_channels != channels or source.unet.config.out_channels != channels:
            raise ValueError(
                f"{config.pretrained_model_name_or_path} generates images of {source.unet.config.in_channels} "
                f"channels, but those of {config.dataset_name!r} have {channels}. Use other images, or omit "
                "pretrained_model_name_or_path to train from scratch."
            )
        source_config = {**source.scheduler.config, **source.unet.config}
        _check_settings(
            config,
            (*_SETTINGS_OF_UNET[:-1], *_SETTINGS_OF_SCHEDULER),
            source_config,
            f"{config.pretrained_model_name_or_path}, whose network shape and noise schedule are kept",
            "pretrained_model_name_or_path",
        )
        overrides["dropout"] = config.dropout
        unet = type(source.unet).from_config(source.unet.config, **overrides).float()  # whatever the default dtype is
        _copy_weights(source.unet, unet)
        return unet, MiniDDIMScheduler.from_config(source.scheduler.config)
    if unet is None:
        overrides["dropout"] = config.dropout
        if config.block_out_channels is not None:
            overrides |= {"block_out_channels": config.block_out_channels, "down_block_types": "auto"}
        if config.layers_per_block is not None:
            overrides["layers_per_block"] = config.layers_per_block
        unet = MiniUNet2DModel.from_preset(config.preset, **overrides).float()
    if scheduler is None:
        scheduler = MiniDDIMScheduler(
            num_train_timesteps=config.num_train_timesteps,
            beta_schedule=config.beta_schedule,
            prediction_type=config.prediction_type,
        )
    return unet, scheduler


def _check_settings(
    config: TrainConfig, names: tuple[str, ...], determined: dict[str, Any], by: str, argument: str
) -> None:
    """Raise a `ValueError` for the first setting that is neither the default nor what is `determined`."""
    for name in names:
        value, known = getattr(config, name), determined.get(name)
        known = tuple(known) if isinstance(known, list) else known
        if value not in (getattr(type(config), name), known):
            raise ValueError(f"{name}={value!r} conflicts with {by}. Omit {name}, or omit {argument}.")


def describe(part: Any) -> dict[str, Any]:
    """Return what tells a given network or scheduler from another: its class and its configuration."""
    config = {key: value for key, value in part.config.items() if not key.startswith("_")}
    return {"_class": f"{type(part).__module__}.{type(part).__qualname__}", **config}


def _check_network(unet: Any, needed: dict[str, Any]) -> None:
    """Raise unless a network has the configuration that the images need, and can be trained and saved."""
    if not isinstance(unet, ModelMixin):
        raise TypeError(
            f"unet is of type {type(unet).__name__}, but must be a diffusers ModelMixin and ConfigMixin, so that it "
            "can be saved. Subclass MiniUNet2DModel, or both of these."
        )
    if unet.config.get("sample_size") is None:
        unet.register_to_config(sample_size=needed["sample_size"])
    known, needed = ({**part, "sample_size": _height_and_width(part["sample_size"])} for part in (unet.config, needed))
    for key, value in needed.items():
        if known.get(key) != value:
            null = ", one for each class and one for no class" if key == "num_class_embeds" and value else ""
            raise ValueError(
                f"unet has {key}={known.get(key)}, but these images with class_conditional="
                f"{needed['num_class_embeds'] is not None} need {key}={value}{null}."
            )
    if getattr(unet, "_hf_peft_config_loaded", False):
        raise ValueError(
            "unet has LoRA adapters, which a pipeline's folder cannot hold. Merge them first: unet.fuse_lora(), then "
            "unet.unload_lora(). Or train them with a loop of your own."
        )
    if not any(parameter.requires_grad for parameter in unet.parameters()):
        raise ValueError("unet has no parameter with requires_grad=True, so nothing could be trained.")
    network: Any = type(unet)
    is_portable(network)  # warns now, not at the end


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def _check_scheduler(scheduler: Any) -> None:
    """Raise a `ValueError` unless a scheduler noises images as a DDPM does: x_t = √ᾱ_t·x_0 + √(1-ᾱ_t)·ε."""
    problem = None
    alphas_cumprod = getattr(scheduler, "alphas_cumprod", None)
    needed = ["add_noise", "from_config"]
    prediction_type = getattr(scheduler, "config", {}).get("prediction_type")
    needed += ["get_velocity"] if prediction_type == "v_prediction" else []
    missing = [name for name in needed if not hasattr(scheduler, name)]
    if alphas_cumprod is None or missing or prediction_type not in ("epsilon", "sample", "v_prediction"):
        problem = f"it has no {[*missing, 'alphas_cumprod and prediction_type'][0]}"
    else:
        images, noise = torch.full((3, 1, 1, 1), 0.5), torch.full((3, 1, 1, 1), -2.0)
        timesteps = torch.tensor([0, len(alphas_cumprod) // 2, len(alphas_cumprod) - 1])
        alpha = alphas_cumprod[timesteps].float().view(3, 1, 1, 1)
        expected = alpha.sqrt() * images + (1 - alpha).sqrt() * noise
        if not torch.allclose(scheduler.add_noise(images, noise, timesteps), expected, atol=1e-3):
            problem = "its x_t is not √ᾱ_t·x_0 + √(1-ᾱ_t)·ε"
    if problem is not None:
        raise ValueError(
            f"A network cannot be trained with {type(scheduler).__name__}: {problem}. Train with MiniDDIMScheduler, "
            "DDPMScheduler or the like, and replace the scheduler when you draw."
        )


@torch.no_grad()
def _copy_weights(source: torch.nn.Module, target: torch.nn.Module) -> None:
    """Copy the weights of `source`, so that `target` computes the same, whichever classes the two know.

    If the classes differ in number, every label of `target` starts as the null label of `source`. If `target` has no
    classes, the embedding of that null label is added to the bias that follows it. Only our network can change them.
    """
    weights = source.state_dict()
    if source.config.get("num_class_embeds") == target.config.get("num_class_embeds"):  # type: ignore[operator, union-attr]
        target.load_state_dict(weights)
        return
    if not isinstance(target, MiniUNet2DModel):
        raise ValueError(
            f"{type(target).__name__} knows {source.config.get('num_class_embeds')} labels, but this run needs "  # type: ignore[operator, union-attr]
            f"{target.config.get('num_class_embeds')}. Only MiniUNet2DModel can change its number of classes."  # type: ignore[operator, union-attr]
        )
    embedding = weights.pop("class_embedding.weight", None)  # (classes + 1, E)
    bias = weights["time_embedding.linear_2.bias"]
    if target.class_embedding is None:
        weights["time_embedding.linear_2.bias"] = bias + embedding[-1]
    else:
        null = torch.zeros_like(bias) if embedding is None else embedding[-1]
        weights["class_embedding.weight"] = null.expand_as(target.class_embedding.weight)
    target.load_state_dict(weights)


def new_pipeline(
    config: TrainConfig,
    dataset: ImageDataset,
    levels: Levels,
    unet: Any,
    scheduler: Any,
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
