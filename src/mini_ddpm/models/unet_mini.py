"""The denoising network of mini-ddpm: a small time-conditional U-Net in plain torch, on diffusers' mixins.

    sample x_t (B, C, H, W) ──stem──► down blocks ──► mid block ──► up blocks ──head──► model output (B, C_out, H, W)
    timestep t, class y  ──embedding──► scale and shift of every residual block

Notation: B batch, C channels, H x W image, p patch size, D width of a level, E width of the embedding.
Sources: DDPM (arXiv 2006.11239, appendix B), Improved DDPM (arXiv 2102.09672, section 3), ADM (arXiv 2105.05233,
section 3); the patch stem is that of DiT (arXiv 2212.09748, section 3.2).
"""

import math
import numbers
import os
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.loaders.peft import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from huggingface_hub import constants
from torch import nn

from .blocks import (
    MiniDownBlock,
    MiniGroupNorm,
    MiniHead,
    MiniMidBlock,
    MiniTimestepEmbedding,
    MiniUpBlock,
    is_single,
    timestep_embedding,
)

# Named shapes. "mini" is the default: with a 2x2 patch stem the convolutions run at 14x14 and 7x7, which is cheap.
# The others have the widths of the tutorial that this package grew from (dim 32 or 64, multipliers 1, 2, 4, 8, no
# attention). They correct the tutorial's mistakes:
#   - GroupNorm replaces BatchNorm, whose statistics mix noise levels and whose buffers EMA does not average;
#   - the way up retraces 28 -> 14 -> 7 -> 4 as 4 -> 7 -> 14 -> 28 (the tutorial doubled 4 to 8 and met a skip of 7);
#   - every skip connection is used (the tutorial's loop over `reversed(in_out[1:])` left one out).
_TUTORIAL: dict[str, Any] = {"patch_size": 1, "down_block_types": ("DownBlock2D",) * 4}
_TUTORIAL |= {"layers_per_block": 1, "add_attention": False}
PRESETS: dict[str, dict[str, Any]] = {
    "mini": {"head_channels": 8},
    "tutorial-32": {**_TUTORIAL, "block_out_channels": (32, 64, 128, 256)},
    "tutorial-64": {**_TUTORIAL, "block_out_channels": (64, 128, 256, 512)},
}

# The least and the greatest value of each number in a network's configuration. They are generous, and keep a damaged
# configuration from building a network without end. A bound that is a float allows all numbers, else whole ones.
CONFIG_BOUNDS: dict[str, tuple[float, float]] = {
    "sample_size": (1, 8_192), "in_channels": (1, 4_096), "out_channels": (1, 4_096), "patch_size": (1, 256),
    "head_channels": (0, 4_096), "block_out_channels": (2, 16_384), "layers_per_block": (1, 32),
    "attention_head_dim": (1, 16_384), "norm_num_groups": (1, 16_384), "norm_eps": (1e-12, 1.0),
    "dropout": (0.0, 0.99), "num_class_embeds": (2, 1_000_000),
}  # fmt: skip
MAX_LEVELS = 12


@dataclass
class MiniUNet2DOutput(BaseOutput):  # type: ignore[misc]
    """The output of [`MiniUNet2DModel`].

    Attributes:
        sample: The prediction, (B, out_channels, H, W), not clipped: noise, clean image or velocity, as the
            scheduler's `prediction_type` says.
    """

    sample: torch.Tensor


def check_bounds(name: str, value: Any, low: float, high: float) -> None:
    """Raise a `ValueError` unless a number, or each number in a list, is of the kind of the bounds and within them."""
    kind, word = (numbers.Real, "number") if isinstance(high, float) else (numbers.Integral, "whole number")
    for number in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(number, bool) or not isinstance(number, kind) or not low <= number <= high:  # type: ignore[operator]
            raise ValueError(f"{name}={number!r} must be a {word} from {low:g} to {high:.10g}.")


class MiniUNet2DModel(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):  # type: ignore[misc]
    """A small time-conditional U-Net, with or without class labels: ε_θ(x_t, t, y), x_θ or v_θ.

    It takes images of any height, width and number of channels, and keeps their size.

    Args:
        sample_size: Height and width in pixels of the images that a pipeline draws by default; one int for squares.
        in_channels: Channels C of the sample.
        out_channels: Channels of the prediction: `in_channels`, or twice as many for a learned variance.
        patch_size: Side p of the square patches that the stem folds into channels, `(C, H, W) -> (C·p², H/p, W/p)`;
            1 for single pixels. Other sizes than multiples of p are padded by repeating the edge, then cropped.
        head_channels: Width K of the head at full resolution, which smooths the seams between patches; 0 for none.
        down_block_types: One name per level, "DownBlock2D" or "AttnDownBlock2D" (with self-attention). The way up
            mirrors the way down. "auto": all levels but the first have attention.
        block_out_channels: Width D of each level, finest first. Each level after the first halves H and W, rounded up.
        layers_per_block: Residual blocks in each level of the way down. The way up has one more.
        attention_head_dim: Width of one attention head, a divisor of the widths with attention. "auto": at most 32.
        add_attention: Whether the mid block has self-attention.
        norm_num_groups: Groups of every GroupNorm, a divisor of all widths. "auto": the largest one up to 32. The
            configuration holds what "auto" chose.
        norm_eps: Epsilon of every GroupNorm.
        dropout: Dropout probability in residual blocks and attention, in [0, 1).
        num_class_embeds: Number of class embeddings. The last one is the null label ("no class"). `None` for an
            unconditional network.

    Raises:
        ValueError: A value is of the wrong type or outside `CONFIG_BOUNDS`, a width is not divisible by its groups or
            heads, or lists have unequal lengths.
    """

    _supports_gradient_checkpointing = True
    _no_split_modules = ["MiniResnetBlock", "MiniAttention"]
    # The attention blocks of a level share one graph. Residual blocks differ in width: "tutorial-32" has more kinds
    # than the 8 that dynamo compiles of one function.
    _repeated_blocks = ["MiniAttention"]
    _skip_layerwise_casting_patterns = ["norm", "time_embedding", "class_embedding", "conv_in", "conv_out", "head"]

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        sample_size: int | tuple[int, int] | None = 28,
        in_channels: int = 1,
        out_channels: int = 1,
        patch_size: int = 2,
        head_channels: int = 0,
        down_block_types: tuple[str, ...] | Literal["auto"] = "auto",
        block_out_channels: tuple[int, ...] = (64, 96),
        layers_per_block: int = 2,
        attention_head_dim: int | Literal["auto"] = "auto",
        add_attention: bool = True,
        norm_num_groups: int | Literal["auto"] = "auto",
        norm_eps: float = 1e-5,
        dropout: float = 0.0,
        num_class_embeds: int | None = None,
    ) -> None:
        super().__init__()
        self._complete_config()
        widths = tuple(block_out_channels)
        attends = tuple(name == "AttnDownBlock2D" for name in self.config.down_block_types)

        embedding_dim = 4 * widths[0]
        shared = {key: self.config[key] for key in ("attention_head_dim", "norm_num_groups", "norm_eps", "dropout")}
        shared["embedding_dim"] = embedding_dim

        self.time_embedding = MiniTimestepEmbedding(widths[0], embedding_dim)
        self.class_embedding = nn.Embedding(num_class_embeds, embedding_dim) if num_class_embeds is not None else None
        self.conv_in = nn.Conv2d(in_channels * patch_size**2, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        for level, width in enumerate(widths):
            self.down_blocks.append(MiniDownBlock(
                downsample_from=widths[level - 1] if level > 0 else None, in_channels=(width,) * layers_per_block,
                out_channels=width, attention=(attends[level],) * layers_per_block, **shared,
            ))  # fmt: skip
        self.mid_block = MiniMidBlock(
            in_channels=(widths[-1], widths[-1]), out_channels=widths[-1], attention=(add_attention, False), **shared
        )
        self.up_blocks = nn.ModuleList()
        for level in reversed(range(len(widths))):
            width, below = widths[level], widths[min(level + 1, len(widths) - 1)]
            self.up_blocks.append(MiniUpBlock(
                upsample_from=below if level < len(widths) - 1 else None,
                in_channels=(below + width,) + (2 * width,) * layers_per_block,
                out_channels=width, attention=(attends[level],) * (layers_per_block + 1), **shared,
            ))  # fmt: skip

        self.norm_out = MiniGroupNorm(self.config.norm_num_groups, widths[0], eps=norm_eps)
        self.conv_out = nn.Conv2d(widths[0], (out_channels + head_channels) * patch_size**2, 3, padding=1)
        # A new network predicts almost zero, so its first loss is that of predicting the mean. Exactly zero would give
        # no other layer a gradient in the first step, and an adapter on them would have no effect.
        with torch.no_grad():
            for parameter in self.conv_out.parameters():
                parameter.mul_(0.3)
        self.head = MiniHead(in_channels, out_channels, head_channels) if head_channels else None

    def _complete_config(self) -> None:
        """Check the configuration before anything is built, and replace "auto". A `ValueError` names the bad key."""
        config, allowed = self.config, ("DownBlock2D", "AttnDownBlock2D")
        widths, types, auto = config.block_out_channels, config.down_block_types, "auto"
        for name, value in (("block_out_channels", widths), ("down_block_types", types if types != auto else ())):
            if not isinstance(value, (list, tuple)):
                raise ValueError(f"{name}={value!r} must be a list with one entry per level.")
        if not 0 < len(widths) <= MAX_LEVELS:
            raise ValueError(f"block_out_channels has {len(widths)} levels; it needs 1 to {MAX_LEVELS}.")
        if types == auto:
            types = (allowed[0],) + (allowed[1],) * (len(widths) - 1)
        if unknown := [name for name in types if name not in allowed]:
            raise ValueError(f"down_block_types holds {unknown}; allowed are {allowed}.")
        if len(types) != len(widths):
            told = f"down_block_types has {len(types)} entries and block_out_channels {len(widths)}; both need one per"
            raise ValueError(f'{told} level. down_block_types="auto" derives it.')
        lengths = {"block_out_channels": len(widths), "sample_size": 2}  # of the values that may be lists
        optional = {"sample_size": None, "num_class_embeds": None, "attention_head_dim": auto, "norm_num_groups": auto}
        for name, bounds in CONFIG_BOUNDS.items():
            value = config[name]
            if isinstance(value, (list, tuple)) and len(value) != lengths.get(name):
                raise ValueError(f"{name}={value!r} has the wrong length.")
            if name not in optional or value != optional[name]:
                check_bounds(name, value, *bounds)
        if odd := [width for width in widths if width % 2]:
            raise ValueError(f"block_out_channels has {odd[0]}, which must be even.")
        if not isinstance(config.add_attention, bool):
            raise ValueError(f"add_attention={config.add_attention!r} must be True or False.")
        attended = [width for width, name in zip(widths, types, strict=True) if name == allowed[1]]
        attended += [widths[-1]] if config.add_attention else []
        derived: dict[str, Any] = {"down_block_types": types}
        for name, divided in (("norm_num_groups", widths), ("attention_head_dim", attended)):
            divisor = config[name]
            if divisor == auto:
                divisor = max(number for number in range(1, 33) if math.gcd(*divided) % number == 0)
            for width in divided:
                if width % divisor:
                    place = " with attention" if divided is attended else ""
                    told = f"block_out_channels has {width}{place}, not divisible by {name}={divisor}."
                    raise ValueError(f'{told} {name}="auto" derives it.')
            derived[name] = divisor
        self.register_to_config(**derived)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> "MiniUNet2DModel":
        """Load the network as diffusers does, but from a pickle only with `use_safetensors=False`.

        diffusers falls back to a pickle if there are no safetensors, and contacts the Hub for the list of shards even
        if `HF_HUB_OFFLINE` is set.
        """
        if kwargs.get("use_safetensors") is None:  # the default that pipelines pass
            kwargs["use_safetensors"] = True
        if constants.HF_HUB_OFFLINE:
            kwargs["local_files_only"] = True
        return super().from_pretrained(pretrained_model_name_or_path, **kwargs)  # type: ignore[no-any-return]

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Leave out the keys that a subclass with a constructor of its own sets. diffusers would warn of them."""
        own, known = MiniUNet2DModel._get_init_keys(MiniUNet2DModel), cls._get_init_keys(cls)
        config_dict = {key: value for key, value in config_dict.items() if key in known or key not in own}
        return super().extract_init_dict(config_dict, **kwargs)

    @classmethod
    def from_preset(cls, name: str, **overrides: Any) -> "MiniUNet2DModel":
        """Build a new network of a named shape.

        Args:
            name: A key of `PRESETS`: "mini", "tutorial-32" or "tutorial-64".
            **overrides: Config keys that replace the preset's, such as `num_class_embeds=11`.

        Raises:
            ValueError: The name is unknown.
        """
        if name not in PRESETS:
            raise ValueError(f"preset={name!r} must be one of {', '.join(PRESETS)}.")
        return cls(**{**PRESETS[name], **overrides})  # type: ignore[no-any-return]

    def forward(
        self,
        sample: torch.Tensor,
        timestep: torch.Tensor | float | int,
        class_labels: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MiniUNet2DOutput | tuple[torch.Tensor]:
        """Predict noise, clean image or velocity from a noisy image.

        Args:
            sample: x_t, (B, in_channels, H, W), any H and W.
            timestep: t in [0, num_train_timesteps): an int or float, or a 0-d, (1,) or (B,) tensor of those.
            class_labels: (B,) int64 in [0, num_class_embeds). `None`: the null label for every image.
            return_dict: Whether to return an output object instead of a tuple.

        Returns:
            [`MiniUNet2DOutput`] or `(sample,)` with `sample` (B, out_channels, H, W).

        Raises:
            ValueError: An unconditional network gets labels, or the sample has the wrong number of channels.
        """
        if sample.shape[1] != self.config.in_channels:
            raise ValueError(f"sample has {sample.shape[1]} channels; this U-Net takes {self.config.in_channels}.")
        batch, (height, width), patch = sample.shape[0], sample.shape[-2:], self.config.patch_size

        # 1. Embed time and class.
        if not torch.is_tensor(timestep):
            timestep = torch.tensor(timestep, device=sample.device)
        timesteps = timestep.to(sample.device).reshape(-1).expand(batch)  # (B,)
        sinusoids = timestep_embedding(timesteps, self.config.block_out_channels[0])
        temb = self.time_embedding(sinusoids.to(sample.dtype))  # (B, E)
        if self.class_embedding is not None:
            if class_labels is None:
                class_labels = torch.full((batch,), self.config.num_class_embeds - 1, device=sample.device)
            temb = temb + self.class_embedding(class_labels).to(temb.dtype)
        elif class_labels is not None:
            raise ValueError("class_labels were given, but this U-Net is unconditional (num_class_embeds is None).")
        temb = F.silu(temb)

        # 2. Stem: fold patches into channels.
        pad_h, pad_w = -height % patch, -width % patch
        if pad_h or pad_w:
            sample = F.pad(sample, (0, pad_w, 0, pad_h), mode="replicate")
        patches = F.pixel_unshuffle(sample, patch)
        # On a CPU convolutions are fastest in channels last, but for a single image. The layers below keep the format.
        if patches.is_cpu and not is_single(patches):
            patches = patches.contiguous(memory_format=torch.channels_last)
        hidden_states = self.conv_in(patches)  # (B, D_0, H/p, W/p)

        # 3. Down, middle, up.
        skips: list[tuple[torch.Tensor, ...]] = []
        for down_block in self.down_blocks:
            skips.append(down_block(hidden_states, temb))
            hidden_states = skips[-1][-1]
        hidden_states = self.mid_block(hidden_states, temb)
        for up_block, level_skips in zip(self.up_blocks, reversed(skips), strict=True):
            hidden_states = up_block(hidden_states, level_skips, temb)

        # 4. Head: unfold channels into patches.
        hidden_states = self.conv_out(F.silu(self.norm_out(hidden_states)))  # (B, C_out·p², H/p, W/p)
        output = F.pixel_shuffle(hidden_states, patch)  # (B, C_out + K, H, W)
        if self.head is not None:
            output = self.head(output, sample)  # (B, C_out, H, W)
        output = output[..., :height, :width]
        if not return_dict:
            return (output,)
        return MiniUNet2DOutput(sample=output)
