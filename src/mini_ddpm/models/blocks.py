"""The parts of [`MiniUNet2DModel`]: embedding of time, norm, attention, residual blocks, levels, head.

Notation: B batch, C channels, H x W image, D width of a level, E width of the embedding.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import dispatch_attention_fn
from torch import nn


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
        """Normalize `x` (B, D, H, W), then scale and shift it by (B, D) each; returns (B, D, H, W)."""
        if x.is_cpu and not x.is_contiguous() and not torch.compiler.is_compiling():
            return self._channels_last(x, scale, shift)
        if scale is None or shift is None:
            return super().forward(x)
        if is_single(x):  # w and b take the scale and the shift of the only image
            weight = torch.addcmul(self.weight, self.weight, scale[0])
            bias = torch.addcmul(self.bias + shift[0], self.bias, scale[0])
            return F.group_norm(x, self.num_groups, weight, bias, self.eps)
        return torch.addcmul(shift[:, :, None, None], super().forward(x), 1 + scale[:, :, None, None])

    def _channels_last(self, x: torch.Tensor, scale: torch.Tensor | None, shift: torch.Tensor | None) -> torch.Tensor:
        """Compute `forward` by operations that are fast for channels-last images on a CPU."""
        batch, channels = x.shape[:2]
        pixels = x.flatten(2).transpose(1, 2).to(torch.promote_types(x.dtype, torch.float32))  # (B, H·W, D)
        moments = torch.stack([pixels.mean(1), pixels.square().mean(1)])  # (2, B, D), of each channel
        by_group = moments.view(2, batch, self.num_groups, -1)
        mean, second = by_group.mean(3, keepdim=True).expand_as(by_group).reshape(2, batch, channels).unbind()
        variance = torch.addcmul(second, mean, mean, value=-1).clamp(min=0)
        factor = (variance + self.eps).rsqrt() * self.weight  # (B, D)
        offset = torch.addcmul(self.bias, mean, factor, value=-1)
        if scale is not None and shift is not None:
            factor, offset = torch.addcmul(factor, factor, scale), torch.addcmul(offset + shift, offset, scale)
        return torch.addcmul(offset[:, :, None, None].to(x.dtype), x, factor[:, :, None, None].to(x.dtype))


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
        scale, shift = self.time_emb_proj(temb).chunk(2, dim=1)  # each (B, D)
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


def zero_init(layer: nn.Module) -> nn.Module:
    """Set a layer's weight and bias to zero, so that its residual branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def is_single(images: torch.Tensor) -> bool:
    """Return whether a batch on a CPU is one image, for which other operations are the fastest.

    Not in a graph that is compiled or traced for any batch.
    """
    is_traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    return images.is_cpu and not is_traced and images.shape[0] == 1
