"""The batches of a training run: images, noise, timesteps and labels, each a function of seed and step alone."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import MAX_BYTES_IN_MEMORY, ImageDataset, to_model_range

if TYPE_CHECKING:
    from accelerate import Accelerator


def image_batches(
    accelerator: Accelerator, dataset: ImageDataset, ids: Iterator[torch.Tensor], cache: bool | None, num_workers: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """Yield the batches of one process on its device: images (B, C, H, W) in [-1, 1] and labels (B,) or `None`.

    `ids` gives the indices of each batch, see `image_ids`. With `cache`, all images are kept on the device as bytes
    (`None`: if they take less than 2 GB and are the same each time); without it, `num_workers` processes read them
    again for each batch.
    """
    device = accelerator.device
    if cache is None:
        cache = dataset.is_fixed and len(dataset) * int(np.prod(dataset.shape)) < MAX_BYTES_IN_MEMORY
    if cache:
        images, labels = dataset.stack(progress=accelerator.is_main_process)
        images, labels = images.to(device), labels.to(device) if labels is not None else None
        for batch in ids:
            batch = batch.to(device)
            yield to_model_range(images[batch]), labels[batch] if labels is not None else None
    else:
        sampler = (batch.tolist() for batch in ids)
        loader: torch.utils.data.DataLoader[dict[str, Any]] = torch.utils.data.DataLoader(
            dataset, batch_sampler=sampler, num_workers=num_workers, pin_memory=device.type == "cuda"
        )
        for item in loader:
            labels = item.get("class_labels")
            yield item["images"].to(device), labels.to(device) if labels is not None else None


def split_ids(seed: int, num_images: int, validation_share: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the indices of the images to train on, and of those that are held out, chosen at random; both int64."""
    count = math.ceil(validation_share * num_images)
    order = torch.randperm(num_images, generator=_generator("cpu", seed, 2))
    return order[count:].sort().values, order[:count].sort().values


def image_ids(
    accelerator: Accelerator, seed: int, num_images: int, batch_size: int, micro_steps: range
) -> Iterator[torch.Tensor]:
    """Yield the indices of the images of each forward pass of this process, (batch_size,) int64.

    The dataset is repeated without end, in an order that depends on (seed, epoch). Forward pass m of all processes
    together takes positions m·B to (m+1)·B of this sequence, and each process its part of them, `batch_size` images.
    """

    @functools.lru_cache(maxsize=2)  # a batch seldom spans more epochs
    def order(epoch: int) -> torch.Tensor:
        return torch.randperm(num_images, generator=_generator("cpu", seed, 0, epoch))

    for micro_step in micro_steps:
        start = (micro_step * accelerator.num_processes + accelerator.process_index) * batch_size
        positions = torch.arange(start, start + batch_size)
        epochs = range(start // num_images, int(positions[-1]) // num_images + 1)
        yield torch.cat([order(epoch) for epoch in epochs])[positions - epochs[0] * num_images]


def noise_batch(
    accelerator: Accelerator,
    seed: int,
    micro_step: int,
    noise_levels: torch.Tensor,
    images: torch.Tensor,
    class_labels: torch.Tensor | None,
    null_label: int | None,
    class_dropout_prob: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draw the noise, timesteps and labels of one forward pass of this process from (seed, micro_step) alone.

    All is drawn for the batch of all processes, of which each process takes its part. The timesteps are stratified:
    row i of B takes `noise_levels[floor(N · frac(u + i/B))]`, so that every batch covers all noise levels evenly and
    the loss varies less (arXiv 2107.00630, appendix I.1). With probability `class_dropout_prob` a label becomes
    `null_label`, which is `None` for an unconditional network.

    Return noise like this process's `images`, (B, C, H, W); timesteps out of `noise_levels`, (B,) int64; labels,
    (B,) int64, or `None` for an unconditional network.
    """
    local, device = images.shape[0], images.device
    batch_size = local * accelerator.num_processes
    own = slice(accelerator.process_index * local, (accelerator.process_index + 1) * local)
    generator = _generator(device, seed, 1, micro_step)
    # In float32 whatever the default is: MPS has no float64, and a seed means the same numbers everywhere.
    kind: dict[str, Any] = {"device": device, "dtype": torch.float32}
    noise = torch.randn((batch_size, *images.shape[1:]), generator=generator, **kind)[own]
    offset = torch.rand((), generator=generator, **kind)
    strata = torch.arange(batch_size, **kind) / batch_size
    levels = ((strata + offset) % 1 * len(noise_levels)).long().clamp(max=len(noise_levels) - 1)
    timesteps = noise_levels[levels][own]
    if null_label is None or class_labels is None:
        return noise, timesteps, None
    dropped = torch.rand(batch_size, generator=generator, **kind)[own] < class_dropout_prob
    return noise, timesteps, class_labels.masked_fill(dropped, null_label)


def validation_batches(
    dataset: ImageDataset, ids: torch.Tensor, seed: int, batch_size: int, noise_levels: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]:
    """Yield images, noise, timesteps and labels of the validation loss on the CPU; the same for every call.

    The timesteps of all M images are evenly spread over `noise_levels`, in an order that is random.
    """
    noise_levels = noise_levels.cpu()
    generator = _generator("cpu", seed, 3)
    order = torch.randperm(len(ids), generator=generator)
    timesteps = noise_levels[((order + 0.5) / len(ids) * len(noise_levels)).long()]
    for batch, own_timesteps in zip(torch.split(ids, batch_size), torch.split(timesteps, batch_size), strict=True):
        items = [dataset[index] for index in batch.tolist()]
        images = torch.stack([item["images"] for item in items])
        labels = torch.tensor([item["class_labels"] for item in items]) if "class_labels" in items[0] else None
        yield images, torch.randn(images.shape, generator=generator, dtype=torch.float32), own_timesteps, labels


def _generator(device: torch.device | str, *key: int) -> torch.Generator:
    """Return a generator seeded with a hash of `key`.

    A hash, because torch's CPU generator uses only 32 bits of a seed: the numbers of `key` cannot be packed into it.
    """
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
