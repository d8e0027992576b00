"""The training loss, and the saturated ends of the data range."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import ImageDataset
from ..schedulers.scheduling_mini_ddim import MiniDDIMScheduler

if TYPE_CHECKING:
    pass


def compute_loss(
    unet: nn.Module,
    scheduler: MiniDDIMScheduler,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    snr_gamma: float | None = None,
    snr_floor: float | None = None,
) -> torch.Tensor:
    """The training loss of one batch (DDPM, eq. 14; min-SNR weights: arXiv 2303.09556, section 3.4).

    `mean_i w(t_i) · mean_pixels (target_i - prediction_i)²`, with `w = 1`, or for `snr_gamma = γ` and
    `SNR = ᾱ/(1-ᾱ)`: `min(SNR, γ)` for x_0, `min(SNR, γ)/SNR` for ε, `min(SNR, γ)/(SNR + 1)` for v. With `snr_floor`
    in place of `snr_gamma` the same with max: 1 makes it the truncated SNR of 2202.00512, eq. 9.

    Args:
        unet: The network, called as `unet(x_t, t, class_labels).sample`.
        scheduler: Gives ᾱ and `prediction_type`; any DDPM-like diffusers scheduler.
        images: x_0, (B, C, H, W) in [-1, 1].
        noise: ε, (B, C, H, W), standard normal.
        timesteps: t, (B,) int64 in [0, num_train_timesteps).
        class_labels: y, (B,) int64, or `None`.
        snr_gamma: γ > 0, which SNR is limited to from above, or `None`.
        snr_floor: What SNR is limited to from below, or `None`.

    Returns:
        A scalar in float32.

    Raises:
        ValueError: The network's output has another shape than the target (a learned variance has no loss here).
    """
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "sample":
        target = images
    else:
        target = scheduler.get_velocity(images, noise, timesteps)

    prediction = unet(noisy_images, timesteps, class_labels).sample
    if prediction.shape != target.shape:
        raise ValueError(f"The network predicts {tuple(prediction.shape)}, the target is {tuple(target.shape)}.")
    losses = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if snr_gamma is not None or snr_floor is not None:
        alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
        losses = losses * snr.clamp(min=snr_floor, max=snr_gamma) / divisor
    return losses.mean()


def beyond_saturation(images: torch.Tensor, margin: float, black: bool, white: bool) -> torch.Tensor:
    """Move pixels that are all black, or all white, beyond the range that images are clamped to in the end.

    A byte of 0 says that a pixel is as dark as can be shown, or darker. Learned as exactly -1 it comes out as -1 ± the
    network's error, half of that above -1: a faint grey that the eye does not see, but every measure does. Learned as
    -1 - margin it comes out below -1, and is clamped to black.

    Args:
        images: (B, C, H, W) in [-1, 1].
        margin: How far beyond; a few times the network's error.
        black: Whether to move what is -1 to -1 - margin.
        white: Whether to move what is 1 to 1 + margin.

    Returns:
        (B, C, H, W) in [-1 - margin, 1 + margin].
    """
    if black:
        images = images.masked_fill(images <= -1, -1 - margin)
    if white:
        images = images.masked_fill(images >= 1, 1 + margin)
    return images


def saturated_ends(dataset: ImageDataset, tolerance: int = 0, share: float = 0.1) -> tuple[bool, bool]:
    """Whether so large a share of the pixels, of up to a thousand pictures, is all black, and all white.

    Args:
        dataset: The images.
        tolerance: How many bytes a level may be from 0, or from 255, to be counted.
        share: Of all pixels, in [0, 1].
    """
    pixels = np.stack([dataset.pixels(index) for index in range(0, len(dataset), -(-len(dataset) // 1000))])
    return bool((pixels <= tolerance).mean() >= share), bool((pixels >= 255 - tolerance).mean() >= share)


def saturate(images: torch.Tensor, margin: float, black: bool, white: bool) -> torch.Tensor:
    """Move what is nearly black, and nearly white, beyond the range that images are clamped to in the end.

    The strokes of MNIST are of one level from edge to edge, 253 of 255. A student of few steps errs by more than its
    teacher did, and strokes that it learned at that level come out mottled. Learned beyond white they come out white,
    as black does by [`beyond_saturation`]; here it is a network's images that are moved, whose ends are not exact:
    those up to 0.9 of the way from grey stay, those from 0.96 are moved all the way.

    Args:
        images: (B, C, H, W) in [-1 - margin, 1 + margin].
        margin: How far beyond; a few times the student's error.
        black: Whether to move what is nearly black.
        white: Whether to move what is nearly white.

    Returns:
        (B, C, H, W) in [-1 - margin, 1 + margin]; `images` if neither end is to be moved.
    """
    if not (margin and (black or white)):
        return images
    nearly = margin * ((images.abs() - 0.9) / 0.06).clamp(0, 1)
    below, above = nearly * (images < 0) * black, nearly * (images > 0) * white
    return (images + above - below).clamp(-1 - margin, 1 + margin)
