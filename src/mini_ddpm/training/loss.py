"""The training loss, and how it treats pixels at the ends of the range: pure black and pure white."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from ..data import ImageDataset


def compute_loss(
    unet: nn.Module,
    scheduler: Any,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None = None,
    snr_gamma: float | None = None,
    snr_floor: float | None = None,
    reduction: Literal["mean", "none"] = "mean",
) -> torch.Tensor:
    """Return the training loss of one batch (arXiv 2006.11239, eq. 14; SNR weights: arXiv 2303.09556, section 3.4).

    `mean_i w(t_i) · mean_pixels (target_i - prediction_i)²`. By default `w = 1`. With `snr_gamma` or `snr_floor`, the
    signal-to-noise ratio `SNR = ᾱ/(1-ᾱ)` is clamped to `[snr_floor, snr_gamma]`, and `w` is the clamped SNR for x_0,
    clamped SNR / SNR for ε, clamped SNR / (SNR + 1) for v. `snr_gamma` alone gives min-SNR weights; `snr_floor=1`
    alone gives the truncated SNR of arXiv 2202.00512, eq. 9.

    Args:
        unet: The network, called as `unet(x_t, t, class_labels=y).sample`; without labels as `unet(x_t, t).sample`.
        scheduler: Gives ᾱ and `prediction_type`; any DDPM-like diffusers scheduler.
        images: x_0, (B, C, H, W) in [-1, 1].
        noise: ε, (B, C, H, W), standard normal.
        timesteps: t, (B,) int64 in [0, num_train_timesteps).
        class_labels: y, (B,) int64, or `None`.
        snr_gamma: γ > 0, the upper limit of the SNR, or `None`.
        snr_floor: The lower limit of the SNR, or `None`.
        reduction: "mean" over the batch, or "none".

    Returns:
        The mean, a scalar in float32; without reduction the loss of each image, (B,).

    Raises:
        ValueError: The network's output and the target differ in shape (a learned variance is not supported).
    """
    _, prediction = noise_and_predict(unet, scheduler, images, noise, timesteps, class_labels)
    losses = prediction_losses(prediction, scheduler, images, noise, timesteps, snr_gamma, snr_floor)
    return losses.mean() if reduction == "mean" else losses


def noise_and_predict(
    unet: nn.Module,
    scheduler: Any,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    class_labels: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x_t and what the network predicts from it, (B, C, H, W) each; see [`compute_loss`]."""
    noisy_images = scheduler.add_noise(images, noise, timesteps)
    labels = {} if class_labels is None else {"class_labels": class_labels}
    return noisy_images, unet(noisy_images, timesteps, **labels).sample


def prediction_losses(
    prediction: torch.Tensor,
    scheduler: Any,
    images: torch.Tensor,
    noise: torch.Tensor,
    timesteps: torch.Tensor,
    snr_gamma: float | None = None,
    snr_floor: float | None = None,
) -> torch.Tensor:
    """Return the loss of each image, (B,), of what a network predicted; see [`compute_loss`]."""
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        target = noise
    elif prediction_type == "sample":
        target = images
    else:
        target = scheduler.get_velocity(images, noise, timesteps)
    if prediction.shape != target.shape:
        raise ValueError(
            f"The network predicts {tuple(prediction.shape)}, but the target is {tuple(target.shape)}. Use a network "
            "whose out_channels equal the channels of the images."
        )
    losses = F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)
    if snr_gamma is not None or snr_floor is not None:
        alphas_cumprod = scheduler.alphas_cumprod.to(timesteps.device)[timesteps]
        snr = alphas_cumprod / (1 - alphas_cumprod)
        divisor = {"epsilon": snr, "sample": torch.ones_like(snr), "v_prediction": snr + 1}[prediction_type]
        # Without any signal, where SNR = 0, clamped SNR / SNR is 0 / 0: its limit is 1.
        losses = losses * (snr.clamp(min=snr_floor, max=snr_gamma) / divisor).nan_to_num(1.0, posinf=float("inf"))
    return losses


Levels = tuple[int | None, int | None]
"""The bytes that a dataset means by black and by white; `None` where it has no such level."""


def saturated_levels(dataset: ImageDataset, share: float = 0.05) -> Levels:
    """Return the bytes that stand for black and for white in a dataset, or `None` where no level does.

    An end of the range is saturated if at least `share` of all pixels lie within 5 levels of it. The commonest of
    these levels is what the dataset means by that end: MNIST's black is 0, and its white is 253. At most 1,000
    pictures are read, evenly spread over the dataset.
    """
    pixels = np.stack([dataset.pixels(index) for index in range(0, len(dataset), -(-len(dataset) // 1000))])
    counts = np.bincount(pixels.reshape(-1), minlength=256)
    black, white = counts[:6], counts[250:]
    return (
        int(black.argmax()) if black.sum() >= share * pixels.size else None,
        int(white.argmax()) + 250 if white.sum() >= share * pixels.size else None,
    )


def beyond_saturation(images: torch.Tensor, margin: float, levels: Levels) -> torch.Tensor:
    """Move black and white pixels of real images beyond [-1, 1], the range that samples are clamped to.

    A byte of 0 means "as dark as can be shown, or darker". A network that learns exactly -1 predicts -1 ± its error,
    and the half of it above -1 is a faint grey: invisible, but every metric counts it. A network that learns
    -1 - margin, with a margin of a few times its error, predicts values below -1, which are clamped to black.

    `levels` are those of [`saturated_levels`]. Levels up to twice as far from the end are black or white too: from 251
    on, if white is 253. Black becomes -1 - margin, white 1 + margin. The shape, (B, C, H, W), stays.
    """
    black, white = levels
    if black is not None:
        images = images.masked_fill(images < (2 * black + 0.5) / 127.5 - 1, -1 - margin)
    if white is not None:
        images = images.masked_fill(images > (2 * white - 255 - 0.5) / 127.5 - 1, 1 + margin)
    return images


def trained_margin(scheduler: Any) -> float:
    """Return the margin beyond [-1, 1] with which the network of a scheduler was trained, see `beyond_saturation`."""
    clipping = scheduler.config
    margin = round(clipping.get("clip_sample_range", 1.0) - 1, 6) if clipping.get("clip_sample") else 0.0
    return min(max(margin, 0.0), 1.0)


def saturate(images: torch.Tensor, margin: float, black: bool, white: bool) -> torch.Tensor:
    """Move nearly black and nearly white pixels of predicted images beyond [-1, 1], the range of samples.

    MNIST's strokes are one flat level, 253 of 255. A few-step student errs more than its teacher, so strokes that it
    learns at that level come out mottled; learned beyond white, they are clamped to a flat white. This is
    [`beyond_saturation`] for images that a network predicts, which never reach the ends exactly: values up to 0.9
    (absolute) stay, values from 0.96 move by the whole margin, and values in between move by a part of it. Images
    are (B, C, H, W) in [-1 - margin, 1 + margin], before and after; `images` itself is returned if nothing moves.
    """
    if not (margin and (black or white)):
        return images
    shift = margin * ((images.abs() - 0.9) / 0.06).clamp(0, 1)
    below, above = shift * (images < 0) * black, shift * (images > 0) * white
    return (images + above - below).clamp(-1 - margin, 1 + margin)
