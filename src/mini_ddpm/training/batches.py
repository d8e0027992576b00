"""The batches of a training run: images, noise, timesteps and labels, each a function of seed and step."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..data import ImageDataset, to_model_range
from .train import TrainConfig

if TYPE_CHECKING:
    from accelerate import Accelerator


def _image_ids(config: TrainConfig, accelerator: Accelerator, num_images: int, micro_steps: range) -> Iterator[Any]:
    """The images of each forward pass of this process: a (train_batch_size,) int64 tensor at a time.

    The stream of all batches is the dataset over and over, shuffled anew each epoch by (seed, epoch). Forward pass m
    of all processes together takes places m·B to (m+1)·B, and each process its share of them.
    """
    batch_size = config.train_batch_size * accelerator.num_processes
    epochs: dict[int, torch.Tensor] = {}
    for micro_step in micro_steps:
        start = micro_step * batch_size + accelerator.process_index * config.train_batch_size
        places = torch.arange(start, start + config.train_batch_size)
        wanted = range(start // num_images, int(places[-1]) // num_images + 1)
        epochs = {
            epoch: epochs[epoch] if epoch in epochs else _shuffled(config, num_images, epoch) for epoch in wanted
        }
        order = torch.cat([epochs[epoch] for epoch in wanted])
        yield order[places - wanted[0] * num_images]


def _shuffled(config: TrainConfig, num_images: int, epoch: int) -> torch.Tensor:
    """A permutation of the images, (num_images,) int64."""
    return torch.randperm(num_images, generator=_generator("cpu", config.seed, 0, epoch))


def _batches(
    config: TrainConfig, dataset: ImageDataset, accelerator: Accelerator, micro_steps: range
) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
    """This process's batches on its device: images (B, C, H, W) in [-1, 1] and labels (B,) or `None`."""
    device = accelerator.device
    ids = _image_ids(config, accelerator, len(dataset), micro_steps)
    cache = config.cache_dataset
    if cache is None:
        cache = len(dataset) * int(np.prod(dataset.shape)) < 2e9
    if cache:
        images, labels = dataset.stack(progress=accelerator.is_main_process)
        images, labels = images.to(device), labels.to(device) if labels is not None else None
        for batch in ids:
            batch = batch.to(device)
            yield to_model_range(images[batch]), labels[batch] if labels is not None else None
    else:
        loader: torch.utils.data.DataLoader[dict[str, Any]] = torch.utils.data.DataLoader(
            dataset,
            batch_sampler=(batch.tolist() for batch in ids),
            num_workers=config.dataloader_num_workers,
            pin_memory=device.type == "cuda",
        )
        for item in loader:
            labels = item.get("class_labels")
            yield item["images"].to(device), labels.to(device) if labels is not None else None


def _noise_batch(
    config: TrainConfig,
    accelerator: Accelerator,
    levels: torch.Tensor,
    micro_step: int,
    images: torch.Tensor,
    class_labels: torch.Tensor | None,
    null_label: int | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Draw noise, timesteps and labels with dropout for one forward pass, from (seed, micro_step) alone.

    The timesteps, out of `levels` (N,), are stratified over the batch, place `floor(N · frac(u + i/B))`: every batch
    covers all noise levels, so that the loss varies less (VDM, arXiv 2107.00630, appendix I.1). All is drawn for the
    batch of all processes.
    """
    local, device = images.shape[0], images.device
    batch_size = local * accelerator.num_processes
    mine = slice(accelerator.process_index * local, (accelerator.process_index + 1) * local)
    generator = _generator(device, config.seed, 1, micro_step)
    noise = torch.randn((batch_size, *images.shape[1:]), generator=generator, device=device)[mine]
    offset = torch.rand((), generator=generator, device=device, dtype=torch.float64)
    strata = torch.arange(batch_size, device=device, dtype=torch.float64) / batch_size
    timesteps = levels[((strata + offset) % 1 * len(levels)).long().clamp(max=len(levels) - 1)][mine]
    if null_label is None or class_labels is None:
        return noise, timesteps, None
    dropped = torch.rand(batch_size, generator=generator, device=device)[mine] < config.class_dropout_prob
    return noise, timesteps, class_labels.masked_fill(dropped, null_label)


def _generator(device: torch.device | str, *key: int) -> torch.Generator:
    """A generator whose seed is a hash of `key`. (Torch's CPU generator uses 32 bits of a seed, so no packing.)"""
    return torch.Generator(device).manual_seed(int(np.random.SeedSequence(key).generate_state(1)[0]))
