"""Distances and shares, computed from features or from pixels.

Results are cached under a hash of this module's code (`evaluate.code_hash`): everything a cached figure depends on,
apart from its inputs and libraries, stands here.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

NEIGHBOURS = 5  # k of precision, recall, density and coverage, as in arXiv 2002.09797
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as in arXiv 1801.01401


# One process has all features. By default torchmetrics would wait for those of the other processes.
LOCAL: dict[str, Any] = {"sync_on_compute": False}


class _Precomputed(nn.Module):
    """Take the place of the feature network in torchmetrics: the features are already computed."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Return the Fréchet distance between features (N, D) and (M, D) (arXiv 1706.08500, eq. 6); FID for Inception's.

    It is `||μ_r - μ_g||² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)`, at least 0, computed in float64. The bias is positive and
    shrinks as 1/M.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Precomputed(real.shape[1]), **LOCAL)
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """Return KID, the unbiased squared MMD with the kernel `(x·y/D + 1)³` (arXiv 1801.01401, section 3).

    The figures are the mean and standard deviation over 100 subsets of at most 1,000 features, which `seed` chooses
    from `real` (N, D) and `generated` (M, D).
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # a warning about the memory that the features need
        options: dict[str, Any] = {"subsets": KID_SUBSETS, "subset_size": size, **LOCAL}
        metric = KernelInceptionDistance(feature=_Precomputed(real.shape[1]), **options)
        torch.manual_seed(seed)  # torchmetrics draws the subsets with torch's global generator
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def nearest(
    points: torch.Tensor, others: torch.Tensor, k: int = 1, without_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Find the k-th nearest neighbour of each of `points` (N, D) among `others` (M, D); k = 1 is the nearest.

    Return distances (N,) and indices (N,) into `others`. If `others` are `points`, set `without_self` to skip the
    nearest candidate.
    """
    rank = k + without_self
    distances, indices = [], []
    for chunk in torch.split(points, 1000):
        found = torch.cdist(chunk, others).topk(rank, dim=1, largest=False)
        distances.append(found.values[:, -1])
        indices.append(found.indices[:, -1])
    return torch.cat(distances), torch.cat(indices)


def precision_recall_density_coverage(
    real: torch.Tensor, generated: torch.Tensor, k: int = NEIGHBOURS
) -> dict[str, float]:
    """Return fidelity and diversity by nearest neighbours (arXiv 1904.06991, eq. 1, 2; arXiv 2002.09797, eq. 3, 5).

    Features are (N, D) and (M, D), with N and M above k. The ball of a point reaches to its k-th nearest neighbour in
    its own set. Precision: share of generated points that lie in a real ball. Recall: share of real points that lie in
    a generated ball. Density: mean number of real balls that a generated point lies in, divided by k; it can exceed 1.
    Coverage: share of real balls that contain a generated point.
    """
    real_radii, _ = nearest(real, real, k, without_self=True)
    generated_radii, _ = nearest(generated, generated, k, without_self=True)
    balls_around_points, precise_points = 0, 0
    covered = torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = torch.zeros_like(covered)
    for points, radii in zip(torch.split(generated, 1000), torch.split(generated_radii, 1000), strict=True):
        distances = torch.cdist(points, real)  # (m, N)
        inside = distances < real_radii
        balls_around_points += int(inside.sum())
        precise_points += int(inside.any(dim=1).sum())
        covered |= inside.any(dim=0)
        recalled |= (distances < radii[:, None]).any(dim=0)
    return {
        "precision": precise_points / len(generated),
        "recall": float(recalled.float().mean()),
        "density": balls_around_points / (k * len(generated)),
        "coverage": float(covered.float().mean()),
    }


def memorization(images: torch.Tensor, train_images: torch.Tensor, train_radii: torch.Tensor) -> float:
    """Return the share of uint8 images (N, C, H, W) that are memorized (arXiv 2102.08921, section 3.3).

    An image counts if it lies closer to some training image than that training image lies to its own nearest
    neighbour, in pixel distance (`train_radii = pixel_radii(train_images)`). Copies of training images score 1. Unseen
    images score the probability that two points are each other's nearest neighbours, about 1/2 in many dimensions.
    Compare with real images that were not trained on.
    """
    distances, neighbours = nearest(images.flatten(1).float(), train_images.flatten(1).float())
    return float((distances < train_radii[neighbours]).float().mean())


def pixel_radii(images: torch.Tensor) -> torch.Tensor:
    """Return the distance of each image of (N, C, H, W) to its nearest neighbour in the same set, (N,)."""
    pixels = images.flatten(1).float()
    return nearest(pixels, pixels, without_self=True)[0]


def compare_features(real: torch.Tensor, generated: torch.Tensor, seed: int = 0) -> dict[str, float]:
    """Return all figures that compare features (N, D) and (M, D); `kid` and `kid_std` are multiplied by 1,000."""
    kid, kid_std = kernel_distance(real, generated, seed)
    return {
        "frechet_distance": frechet_distance(real, generated),
        "kid": 1000 * kid,
        "kid_std": 1000 * kid_std,
        **precision_recall_density_coverage(real, generated),
    }
