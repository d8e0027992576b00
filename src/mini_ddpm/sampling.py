"""Drawing many images: in shards, which are kept, by one process or by many.

Image i is drawn from seed + i alone, so it does not matter which process draws it, nor when. The shards go round the
processes that `accelerate launch` or `torchrun` started; each is a file under a hash of all that it was made from. Cut
off, the same command draws what is missing, and what was made by other weights or settings is never taken for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
import zipfile
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from tqdm.auto import tqdm

from .options import DTYPES

Arrays = dict[str, npt.NDArray[Any]]


def content_hash(tensors: Iterable[tuple[str, torch.Tensor]], *texts: str) -> str:
    """SHA-256 over named tensors (names, types, shapes, bytes) and texts."""
    digest = hashlib.sha256("\n".join(texts).encode())
    for key, tensor in tensors:
        digest.update(f"{key} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def settings_of(part: Any) -> str:
    """The configuration of a network or scheduler, without where it was loaded from and by which version."""
    return json.dumps({key: value for key, value in part.config.items() if key[0] != "_"}, default=str, sort_keys=True)


def weights_hash(pipe: Any) -> str:
    """Names a pipeline's network: its weights and its configuration, in 16 hexadecimal digits."""
    return content_hash(pipe.unet.state_dict().items(), settings_of(pipe.unet))[:16]


def cached(folder: Path, key: list[Any], compute: Callable[[], Arrays]) -> Arrays:
    """Arrays out of a file of `folder`, or computed and put there; under another name first, so a file is whole."""
    digest = hashlib.sha256(json.dumps(key).encode()).hexdigest()
    file = folder / digest[:2] / f"{digest}.npz"
    if file.is_file():
        with contextlib.suppress(ValueError, OSError, zipfile.BadZipFile), np.load(file) as arrays:  # or it is damaged
            return dict(arrays)
    computed = compute()
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            np.savez(stream, **computed)  # type: ignore[arg-type]
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)
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
    """Draws images, or takes those that were drawn before.

    Args:
        pipe: A pipeline on its device.
        count: Number of images N.
        options: Arguments of the pipeline's call that are the same for all images.
        labels: The class of each image, for a class-conditional pipeline.
        seed: Image i is drawn with a generator of seed + i.
        batch_size: Images drawn at once.
        shard_size: Images in one file.
        folder: Where the shards are kept. None: nowhere.
        shared: Whether processes share the work, all of which call this; `folder` is then on a disk that all see.
        title: What the progress bar says.

    Returns:
        The images as bytes, (N, C, H, W) uint8, which of processes that share the work only the first collects, the
        others have (0,); the seconds that drawing them took, added up over processes and runs; and the network's
        evaluations for an image.
    """
    rank, processes = 0, 1
    if shared:
        rank, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    dtype = next((name for name, dtype in DTYPES.items() if dtype == pipe.unet.dtype), str(pipe.unet.dtype))
    key: list[Any] = []
    if folder is not None:
        key = [weights_hash(pipe), type(pipe.scheduler).__name__, settings_of(pipe.scheduler), options, dtype]
        key.append(pipe.device.type)
    starts = range(0, count, shard_size)
    mine = sum(min(shard_size, count - first) for first in starts[rank::processes])

    def shard(first: int) -> Arrays:
        end = min(first + shard_size, count)

        def compute() -> Arrays:
            parts, began = [], time.perf_counter()
            for start in range(first, end, batch_size):
                part = range(start, min(start + batch_size, end))
                which: dict[str, Any] = {"batch_size": len(part)}
                if labels is not None:
                    which = {"class_labels": list(labels[part.start : part.stop])}
                generator = [torch.Generator("cpu").manual_seed(seed + i) for i in part]
                drawn = pipe(**options, **which, generator=generator, output_type="pt").images
                parts.append((drawn * 255).round().to("cpu", torch.uint8))
                bar.update(len(part))
            evaluations = pipe.num_timesteps + getattr(pipe, "num_guided_timesteps", 0)
            cost = np.array([time.perf_counter() - began, evaluations])
            return {"images": torch.cat(parts).numpy(), "cost": cost}

        if folder is None:
            return compute()
        classes = None if labels is None else labels[first:end]
        return cached(folder, [*key, seed + first, end - first, classes], compute)

    shards: dict[int, Arrays] = {}
    hidden = None if rank == 0 and count > batch_size else True  # None: a bar on a terminal, none in a log file
    with tqdm(total=mine, desc=title, unit="img", disable=hidden) as bar:
        for first in starts[rank::processes]:
            shards[first] = shard(first)
            bar.update(min(shard_size * len(shards), mine) - bar.n)
    if processes > 1:
        from accelerate import PartialState

        PartialState(cpu=pipe.device.type == "cpu").wait_for_everyone()
    if rank > 0:
        return torch.empty(0, dtype=torch.uint8), 0.0, 0
    arrays = [shards[first] if first in shards else shard(first) for first in starts]
    images = torch.from_numpy(np.concatenate([array["images"] for array in arrays]))
    return images, float(sum(array["cost"][0] for array in arrays)), int(arrays[0]["cost"][1])
