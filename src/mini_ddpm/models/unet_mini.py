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
from diffusers.models.attention import AttentionMixin, AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.modeling_utils import ModelMixin
from diffusers.utils import BaseOutput
from huggingface_hub import constants
from torch import nn

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


def timestep_embedding(timesteps: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Return the sinusoidal embedding of the timestep (arXiv 1706.03762, section 3.5; DDPM, appendix B).

    `emb(t) = [cos(t·f_0), ..., cos(t·f_{d/2-1}), sin(t·f_0), ...]`, `f_i = max_period^(-i / (d/2))`.

    Args:
        timesteps: (B,), any int or float type, in [0, num_train_timesteps).
        dim: Even width d of the embedding.
        max_period: The longest period divided by 2π, in timesteps.

    Returns:
        (B, dim) in float32, whatever the model's dtype. In half precision the phase error reaches 0.24 rad at t = 999.
    """
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=timesteps.device) / half
    phase = timesteps.float()[:, None] * torch.exp(-math.log(max_period) * exponent)[None, :]  # (B, dim/2)
    return torch.cat([phase.cos(), phase.sin()], dim=-1)  # (B, dim)


class MiniGroupNorm(nn.GroupNorm):
    """Group normalization (arXiv 1803.08494), scaled and shifted: `(1 + scale)·(w·(x - μ)/√(σ² + eps) + b) + shift`.

    μ and σ² are those of one image and one group of channels. torch's kernel is 3 to 17 times slower for channels-last
    images on a CPU. There, this class uses sums over each channel, one multiplication and one addition.
    """

    def forward(
        self, x: torch.Tensor, scale: torch.Tensor | None = None, shift: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Normalize `x` (B, D, H, W), then scale and shift it by (B, D, 1, 1); returns (B, D, H, W)."""
        if x.is_cpu and not x.is_contiguous() and not torch.compiler.is_compiling():
            pixels = x.flatten(2).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))  # (B, H·W, D)
            sums = torch.stack([pixels.sum(1), pixels.square().sum(1)])  # (2, B, D)
            sums = sums.view(2, len(x), self.num_groups, -1).mean(3) / pixels.shape[1]  # (2, B, groups)
            mean, variance = sums[0], (sums[1] - sums[0] ** 2).clamp(min=0)
            width = x.shape[1] // self.num_groups
            factor = (variance + self.eps).rsqrt().repeat_interleave(width, 1) * self.weight  # (B, D)
            offset = self.bias - mean.repeat_interleave(width, 1) * factor
            factor, offset = factor[:, :, None, None], offset[:, :, None, None]
            if scale is not None and shift is not None:
                factor, offset = factor * (1 + scale), torch.addcmul(shift, offset, 1 + scale)
            return torch.addcmul(offset.to(x.dtype), x, factor.to(x.dtype))
        x = super().forward(x)
        return x if scale is None or shift is None else torch.addcmul(shift, x, 1 + scale)


class MiniAttnProcessor:
    """Multi-head self-attention, `softmax(q k^T / sqrt(d)) v`, by the backend that diffusers selects."""

    _attention_backend = None
    _parallel_config = None

    def __call__(self, attn: "MiniAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        """Mix the tokens. `hidden_states` and the result are (B, H·W, D)."""
        if attn.fused_projections:
            query, key, value = attn.to_qkv(hidden_states).chunk(3, dim=-1)  # type: ignore[operator]
        else:
            query, key, value = attn.to_q(hidden_states), attn.to_k(hidden_states), attn.to_v(hidden_states)
        query, key, value = (x.unflatten(-1, (attn.heads, -1)) for x in (query, key, value))  # (B, H·W, heads, d)
        hidden_states = dispatch_attention_fn(
            query, key, value, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        hidden_states = hidden_states.flatten(2).to(query.dtype)  # (B, H·W, D)
        return attn.to_out[1](attn.to_out[0](hidden_states))  # type: ignore[no-any-return]


class MiniAttention(nn.Module, AttentionModuleMixin):  # type: ignore[misc]
    """Residual self-attention over the pixels of a feature map of width D: `x + out(attention(norm(x)))`."""

    _default_processor_cls = MiniAttnProcessor
    _available_processors = [MiniAttnProcessor]
    use_bias = True

    def __init__(self, channels: int, head_dim: int, norm_num_groups: int, norm_eps: float, dropout: float) -> None:
        super().__init__()
        self.heads = channels // head_dim
        self.norm = MiniGroupNorm(norm_num_groups, channels, eps=norm_eps)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        # A list, since diffusers' tools look for `to_out.0`.
        self.to_out = nn.ModuleList([zero_init(nn.Linear(channels, channels)), nn.Dropout(dropout)])
        self.set_processor(MiniAttnProcessor())  # type: ignore[operator]

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend. `hidden_states` and the result are (B, D, H, W)."""
        tokens = self.norm(hidden_states).flatten(2).transpose(1, 2)  # (B, H·W, D)
        tokens = self.processor(self, tokens)  # type: ignore[operator]  # (B, H·W, D)
        return hidden_states + tokens.transpose(1, 2).reshape(hidden_states.shape)  # type: ignore[no-any-return]


class MiniResnetBlock(nn.Module):
    """Residual block in which the embedding scales and shifts the second norm ("AdaGN", ADM, section 3.1).

    `h = conv1(silu(norm1(x)))`, `h = conv2(dropout(silu((1 + scale)·norm2(h) + shift)))`, returns `skip(x) + h`.
    `conv2` starts at zero, so that a new block is the identity (arXiv 1706.02677, section 5.1). A 1x1 convolution
    adapts the residual if the widths differ.
    """

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, norm_num_groups: int, norm_eps: float,
        dropout: float,
    ) -> None:  # fmt: skip
        super().__init__()
        self.norm1 = MiniGroupNorm(norm_num_groups, in_channels, eps=norm_eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = MiniGroupNorm(norm_num_groups, out_channels, eps=norm_eps)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Transform `hidden_states` (B, in_channels, H, W) under `temb` (B, E) into (B, out_channels, H, W)."""
        residual = self.conv_shortcut(hidden_states)
        hidden_states = self.conv1(F.silu(self.norm1(hidden_states)))
        scale, shift = self.time_emb_proj(temb)[:, :, None, None].chunk(2, dim=1)  # each (B, D, 1, 1)
        hidden_states = F.silu(self.norm2(hidden_states, scale, shift))
        return residual + self.conv2(self.dropout(hidden_states))  # type: ignore[no-any-return]


class MiniLevel(nn.Module):
    """Residual blocks, each followed by attention if the level has it. Base class of down, mid and up blocks.

    Args:
        in_channels: The input width of each residual block.
        out_channels: Width D of the level.
        attention: For each residual block, whether attention follows it.
        embedding_dim, attention_head_dim, norm: See [`MiniUNet2DModel`]; `norm` holds `norm_num_groups`, `norm_eps`
            and `dropout`.
    """

    gradient_checkpointing = False

    def __init__(
        self, in_channels: tuple[int, ...], out_channels: int, attention: tuple[bool, ...], embedding_dim: int,
        attention_head_dim: int, **norm: Any,
    ) -> None:  # fmt: skip
        super().__init__()
        self.resnets = nn.ModuleList(
            MiniResnetBlock(width, out_channels, embedding_dim, **norm) for width in in_channels
        )
        self.attentions = nn.ModuleList(
            MiniAttention(out_channels, attention_head_dim, **norm) if attends else nn.Identity()
            for attends in attention
        )

    def layer(self, index: int, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Run residual block `index` and its attention; with gradient checkpointing, recompute it when needed."""
        if torch.is_grad_enabled() and self.gradient_checkpointing:
            hidden_states = self._gradient_checkpointing_func(self.resnets[index], hidden_states, temb)  # type: ignore[operator]
        else:
            hidden_states = self.resnets[index](hidden_states, temb)
        return self.attentions[index](hidden_states)  # type: ignore[no-any-return]


class MiniDownBlock(MiniLevel):
    """One level of the way down: a strided convolution (not at the top), then the layers. Each leaves a skip."""

    def __init__(self, downsample_from: int | None, **level: Any) -> None:
        super().__init__(**level)
        self.downsampler: nn.Module = nn.Identity()
        if downsample_from is not None:  # 3x3 with stride 2 halves any size, rounding up: 28 -> 14 -> 7 -> 4
            self.downsampler = nn.Conv2d(downsample_from, level["out_channels"], 3, stride=2, padding=1)

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the skips, (B, D, H, W) each: the input and the output of each layer. The last is the result."""
        hidden_states = self.downsampler(hidden_states)  # (B, D, ceil(H/2), ceil(W/2)), or unchanged at the top
        skips = [hidden_states]
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, temb)
            skips.append(hidden_states)
        return tuple(skips)


class MiniMidBlock(MiniLevel):
    """The bottom of the U: two residual blocks with attention between them."""

    def forward(self, hidden_states: torch.Tensor, temb: torch.Tensor) -> torch.Tensor:
        """Transform (B, D, H, W) into the same shape."""
        for index in range(len(self.resnets)):
            hidden_states = self.layer(index, hidden_states, temb)
        return hidden_states


class MiniUpBlock(MiniLevel):
    """One level of the way up: resize to the size of the skips, then run one layer per skip."""

    def __init__(self, upsample_from: int | None, **level: Any) -> None:
        super().__init__(**level)
        self.upsampler = nn.Conv2d(upsample_from, upsample_from, 3, padding=1) if upsample_from is not None else None

    def forward(
        self, hidden_states: torch.Tensor, skips: tuple[torch.Tensor, ...], temb: torch.Tensor
    ) -> torch.Tensor:
        """Use the `skips` of the level, last first. Return (B, D, H, W) with their H and W."""
        if self.upsampler is not None:
            # Resize to the size of the skip, not by a factor of two, so that odd sizes match.
            hidden_states = F.interpolate(hidden_states, size=skips[0].shape[-2:], mode="nearest")
            hidden_states = self.upsampler(hidden_states)
        for index, skip in enumerate(reversed(skips)):
            hidden_states = self.layer(index, torch.cat([hidden_states, skip], dim=1), temb)
        return hidden_states


class MiniHead(nn.Module):
    """Residual block at full resolution: it sees across the borders of the patches, which unfold one by one.

    `y + conv2(silu(conv1([h, x_t])))`, with the prediction y in the first channels of the input and K features h in
    the others. `conv2` starts at zero, so that a new head changes nothing.
    """

    def __init__(self, in_channels: int, out_channels: int, head_channels: int) -> None:
        super().__init__()
        self.out_channels = out_channels
        self.conv1 = nn.Conv2d(head_channels + in_channels, head_channels, 3, padding=1)
        self.conv2 = zero_init(nn.Conv2d(head_channels, out_channels, 3, padding=1))

    def forward(self, hidden_states: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        """Map (B, C_out + K, H, W) and x_t, (B, C, H, W), to the prediction, (B, C_out, H, W)."""
        output, features = hidden_states[:, : self.out_channels], hidden_states[:, self.out_channels :]
        features = F.silu(self.conv1(torch.cat([features, sample], dim=1)))
        return output + self.conv2(features)  # type: ignore[no-any-return]


class MiniTimestepEmbedding(nn.Module):
    """Two-layer perceptron over the sinusoids: `linear_2(silu(linear_1(emb)))`, (B, in_dim) -> (B, E)."""

    def __init__(self, in_dim: int, embedding_dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(in_dim, embedding_dim)
        self.linear_2 = nn.Linear(embedding_dim, embedding_dim)

    def forward(self, emb: torch.Tensor) -> torch.Tensor:
        """Map the sinusoids (B, in_dim) to the embedding (B, E)."""
        return self.linear_2(F.silu(self.linear_1(emb)))  # type: ignore[no-any-return]


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
        if patches.is_cpu:  # convolutions are fastest in channels last on a CPU; the layers below keep the format
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


def zero_init(layer: nn.Module) -> nn.Module:
    """Set a layer's weight and bias to zero, so that its residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
