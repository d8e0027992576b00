"""Distances and shares, computed from features or pixels."""

from __future__ import annotations

import warnings

import torch
from torch import nn

NEIGHBOURS = 5  # k of precision, recall, density and coverage, as in arXiv 2002.09797


KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000  # as in arXiv 1801.01401


class _Precomputed(nn.Module):
    """Stands for the feature network where the features are there already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return features


def frechet_distance(real: torch.Tensor, generated: torch.Tensor) -> float:
    """Fréchet distance between two sets of features (1706.08500, eq. 6), in float64; FID if they are Inception's.

    Args:
        real: (N, D).
        generated: (M, D).

    Returns:
        `||μ_r - μ_g||² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)`, at least 0. Biased upwards by about 1/M.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    metric = FrechetInceptionDistance(feature=_Precomputed(real.shape[1]))
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return max(0.0, float(metric.compute()))


def kernel_distance(real: torch.Tensor, generated: torch.Tensor, seed: int = 0) -> tuple[float, float]:
    """KID, the squared MMD with the kernel `(x·y/D + 1)³`, unbiased (1801.01401, section 3): mean, standard deviation.

    Args:
        real: (N, D).
        generated: (M, D).
        seed: Chooses the 100 subsets of at most 1,000 that it is averaged over.
    """
    from torchmetrics.image.kid import KernelInceptionDistance

    size = min(KID_SUBSET_SIZE, len(real), len(generated))
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", UserWarning)  # that it keeps the features in memory, where they are already
        metric = KernelInceptionDistance(
            feature=_Precomputed(real.shape[1]), subsets=KID_SUBSETS, subset_size=size
        )  # the subsets are drawn by torch's global generator
        torch.manual_seed(seed)
        metric.update(real, real=True)
        metric.update(generated, real=False)
        mean, std = metric.compute()
    return float(mean), float(std)


def nearest(
    points: torch.Tensor, others: torch.Tensor, k: int = 1, without_self: bool = False
) -> tuple[torch.Tensor, torch.Tensor]:
    """Distance to, and index of, the k-th nearest of `others`, both (N,), for `points` (N, D) and `others` (M, D).

    `without_self` passes the nearest over: for `points` that are `others`, each is its own.
    """
    rank = k + without_self
    distances, indices = [], []
    for part in torch.split(points, 1000):
        found = torch.cdist(part, others).topk(rank, dim=1, largest=False)
        distances.append(found.values[:, -1])
        indices.append(found.indices[:, -1])
    return torch.cat(distances), torch.cat(indices)


def precision_recall_density_coverage(
    real: torch.Tensor, generated: torch.Tensor, k: int = NEIGHBOURS
) -> dict[str, float]:
    """Fidelity and diversity by nearest neighbours, after 1904.06991 (eq. 1, 2) and 2002.09797 (eq. 3, 5).

    The ball of a point reaches to its k-th nearest neighbour in its own set. Precision: the share of generated points
    in some real ball. Recall: of real points in some generated ball. Density: how many real balls a generated point
    lies in, over k; it may exceed 1. Coverage: the share of real balls that hold a generated point.

    Args:
        real: (N, D), N > k.
        generated: (M, D), M > k.
        k: The number of neighbours.
    """
    real_radii, _ = nearest(real, real, k, without_self=True)
    generated_radii, _ = nearest(generated, generated, k, without_self=True)
    in_real_balls, in_some, covered = 0, 0, torch.zeros(len(real), dtype=torch.bool, device=real.device)
    recalled = torch.zeros_like(covered)
    for part, radii in zip(torch.split(generated, 1000), torch.split(generated_radii, 1000), strict=True):
        distances = torch.cdist(part, real)  # (m, N)
        inside = distances < real_radii
        in_real_balls += int(inside.sum())
        in_some += int(inside.any(dim=1).sum())
        covered |= inside.any(dim=0)
        recalled |= (distances < radii[:, None]).any(dim=0)
    return {
        "precision": in_some / len(generated),
        "recall": float(recalled.float().mean()),
        "density": in_real_balls / (k * len(generated)),
        "coverage": float(covered.float().mean()),
    }


def memorization(images: torch.Tensor, train_images: torch.Tensor, train_radii: torch.Tensor) -> float:
    """Share of images that are nearer to a training image than that one is to any other (2102.08921, section 3.3).

    Distances are between pixels. Copies have 1; unseen images the chance that two points are each other's nearest
    neighbours, about a half where the points fill many dimensions evenly. Compare with real images that were not seen.

    Args:
        images: (N, C, H, W) uint8.
        train_images: (M, C, H, W) uint8.
        train_radii: (M,), the distance of each training image to the nearest other one: `pixel_radii(train_images)`.
    """
    distances, neighbours = nearest(images.flatten(1).float(), train_images.flatten(1).float())
    return float((distances < train_radii[neighbours]).float().mean())


def pixel_radii(images: torch.Tensor) -> torch.Tensor:
    """Distance of each image of (N, C, H, W) to the nearest other one, (N,)."""
    pixels = images.flatten(1).float()
    return nearest(pixels, pixels, without_self=True)[0]
