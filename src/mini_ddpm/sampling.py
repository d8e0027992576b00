"""Draw many images, in one process or in several, and save them in shards.

Image i depends only on seed + i, so any process can draw it at any time. The processes that `accelerate launch` or
`torchrun` started take the shards in turn. Each shard is one file, named by a hash of the weights and of all settings.
An interrupted run therefore resumes with the missing shards, and never uses images of other weights or settings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from .files import atomic_write
from .options import DTYPES, process_rank, wait_for_processes

Arrays = dict[str, npt.NDArray[Any]]


def content_hash(tensors: Iterable[tuple[str, torch.Tensor]], *texts: str) -> str:
    """Return the SHA-256 of texts and of named tensors (names, types, shapes, bytes)."""
    digest = hashlib.sha256("\n".join(texts).encode())
    for key, tensor in tensors:
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def config_json(component: Any) -> str:
    """Return the configuration of a network or scheduler as JSON, without its path and its library version."""
    config = {key: value for key, value in component.config.items() if key[0] != "_"}
    return json.dumps(config, default=str, sort_keys=True)


def weights_hash(pipe: Any) -> str:
    """Return a hash of the weights and the configuration of a pipeline's network, 16 hexadecimal digits."""
    return content_hash(pipe.unet.state_dict().items(), config_json(pipe.unet))[:16]


def cache_folder() -> Path:
    """Return the folder of what is costly to make again: `MINI_DDPM_CACHE` or ~/.cache/mini-ddpm."""
    return Path(os.environ.get("MINI_DDPM_CACHE") or "~/.cache/mini-ddpm").expanduser()


def cached(folder: Path, key: list[Any], compute: Callable[[], Arrays]) -> Arrays:
    """Return the arrays stored in `folder` under a hash of `key`; if there are none, compute and store them."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    file = folder / digest[:2] / f"{digest}.npz"
    damaged = (ValueError, OSError, EOFError, NotImplementedError, zipfile.BadZipFile, zlib.error)
    if file.is_file():
        with contextlib.suppress(*damaged), file.open("rb") as stream, np.load(stream) as arrays:
            return dict(arrays)
    computed = compute()
    with atomic_write(file) as temporary:
        np.savez(temporary, **computed)  # type: ignore[arg-type]
    return computed


def draw(
    pipe: Any,
    count: int,
    options: dict[str, Any],
    *,
    labels: Sequence[int] | None = None,
    seed: int = 0,
    batch_size: int = 250,
    shard_size: int = 1000,
    folder: Path | None = None,
    shared: bool = False,
    title: str = "Drawing",
) -> tuple[torch.Tensor, float, int]:
    """Draw N = `count` images, `batch_size` at once, except those that an earlier call stored in `folder`.

    Image i is drawn with a generator of `seed` + i, and has the class `labels[i]`; `options` are the other arguments
    of the pipeline's call. Each file in `folder` holds `shard_size` images; `None` stores nothing. With `shared`, all
    processes share the work: each of them makes this call, and all see `folder`.

    Return the images, (N, C, H, W) uint8; the seconds spent on drawing them, summed over processes and interrupted
    runs; the number of network evaluations per image. With `shared`, ranks above 0 get an empty tensor and zeros.
    """
    rank, processes = process_rank() if shared else (0, 1)
    dtype = next((name for name, dtype in DTYPES.items() if dtype == pipe.unet.dtype), str(pipe.unet.dtype))
    key: list[Any] = []
    if folder is not None:
        key = [weights_hash(pipe), type(pipe.scheduler).__name__, config_json(pipe.scheduler), options, dtype]
        key.append(pipe.device.type)
    starts = range(0, count, shard_size)
    own_count = sum(min(shard_size, count - first) for first in starts[rank::processes])

    def draw_shard(first: int) -> Arrays:
        end = min(first + shard_size, count)

        def compute() -> Arrays:
            batches, began = [], time.perf_counter()
            for start in range(first, end, batch_size):
                indices = range(start, min(start + batch_size, end))
                size_or_labels: dict[str, Any] = {"batch_size": len(indices)}
                if labels is not None:
                    size_or_labels = {"class_labels": list(labels[indices.start : indices.stop])}
                generator = [torch.Generator("cpu").manual_seed(seed + i) for i in indices]
                drawn = pipe(**options, **size_or_labels, generator=generator, output_type="pt").images
                batches.append((drawn * 255).round().to("cpu", torch.uint8))
                bar.update(len(indices))
            evaluations = pipe.num_timesteps + getattr(pipe, "num_guided_timesteps", 0)
            cost = np.array([time.perf_counter() - began, evaluations])
            return {"images": torch.cat(batches).numpy(), "cost": cost}

        if folder is None:
            return compute()
        classes = None if labels is None else labels[first:end]
        return cached(folder, [*key, seed + first, end - first, classes], compute)

    shards: dict[int, Arrays] = {}
    hidden = None if rank == 0 and count > batch_size else True  # None: show a bar on a terminal, not in a log file
    with tqdm(total=own_count, desc=title, unit="img", disable=hidden) as bar:
        for first in starts[rank::processes]:
            shards[first] = draw_shard(first)
            bar.update(min(shard_size * len(shards), own_count) - bar.n)
    if shared:
        wait_for_processes(pipe.device)
    if rank > 0:
        return torch.empty(0, dtype=torch.uint8), 0.0, 0
    arrays = [shards[first] if first in shards else draw_shard(first) for first in starts]
    images = torch.from_numpy(np.concatenate([array["images"] for array in arrays]))
    return images, float(sum(array["cost"][0] for array in arrays)), int(arrays[0]["cost"][1])
