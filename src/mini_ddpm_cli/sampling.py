"""The command `sample`."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from .commands import hide_loading_bar

if TYPE_CHECKING:
    import numpy as np

_FILM_SUFFIXES = (".gif", ".webp")
_FILES_OF_A_SAMPLE_FOLDER = re.compile(r"\d{5,}(_[\w-]+)?\.png")


@dataclass
class SampleConfig:
    """Draw images with a trained pipeline. Without arguments: a labelled grid of digits, samples.png."""

    pipeline: tyro.conf.Positional[str | None] = None
    """Bundled name, folder, or Hub repository. Default: mnist-distilled (four steps); mnist-class-conditional if you
    set steps, scheduler, eta, guidance, or write a film."""
    revision: str | None = None
    """Branch, tag, commit or refs/pr/N of a Hub repository. Default: main."""
    class_labels: tuple[str, ...] = ()
    """Classes to draw, by name or number, e.g. 3 1 4. With --num-images they repeat. Default: all classes."""
    num_images: int | None = None
    """Number of images. Default: one per label in --class-labels, else 10 per class (2 in a film); without classes 64
    (16)."""

    num_inference_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """Denoising steps. Default: the pipeline's own, else 20."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. Default: the pipeline's own."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two shares of the steps, e.g. 0.35 0.6; 0 is noise, 1 is the image. Default: the
    pipeline's own if --guidance-scale is not given, else every step."""
    eta: float | None = None
    """Noise that DDIM adds at each step: 0 is deterministic, 1 is as much as DDPM. Default: the pipeline's own if
    --steps is not given, else 0."""
    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ddpm|ddim|dpmsolver++|unipc|euler|euler-ancestral")] = None
    """Sampler. Default: the pipeline's own."""
    seed: int = 0
    """Image i is drawn from seed + i, so it does not depend on --num-images or --batch-size."""

    batch_size: int = 128
    """Number of images drawn at once (a film draws all at once). Lower it if memory runs out. Finished batches are
    saved, so an interrupted command resumes when run again. `accelerate launch -m mini_ddpm sample` splits them among
    processes."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the network. bf16 is faster on processors with native bf16."""
    torch_compile: bool = False
    """Compile the network. Takes a minute on a CPU and pays off above a few thousand images."""
    out: Path = Path("samples.png")
    """*.png: labelled grid; *.gif, *.webp: film of the denoising; *.npz: arrays; no suffix: folder of PNGs."""

    def __post_init__(self) -> None:
        """Expand `~`, which a shell leaves alone in `--out=~/x.png`."""
        self.out = Path(os.path.expanduser(self.out))


def pipeline_to_sample(config: SampleConfig) -> str:
    """Return the pipeline to draw with. The distilled model only works with its own sampler settings."""
    guidance = config.guidance_scale, config.guidance_interval
    settings = (config.num_inference_steps, config.scheduler, *guidance, config.eta)
    if config.pipeline is not None:
        return config.pipeline
    if any(value is not None for value in settings) or config.out.suffix.lower() in _FILM_SUFFIXES:
        return "mnist-class-conditional"
    return "mnist-distilled"


def sample(config: SampleConfig) -> None:
    """Draw images with a trained pipeline: a grid, a folder, arrays, or a film."""
    for flag, value in (("--num-images", config.num_images), ("--batch-size", config.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}={value} must be at least 1.")
    _check_output(config.out)

    import numpy as np
    import torch

    from mini_ddpm import options as choices
    from mini_ddpm import plots
    from mini_ddpm.files import atomic_write
    from mini_ddpm.hub.load import load_pipeline
    from mini_ddpm.sampling import draw

    choices.check_fields(config, {"seed": (0, choices.MAX_SEED), "eta": (0, None)})
    # With `accelerate launch` every process draws a share, and rank 0 writes the images of all.
    rank, processes = choices.process_rank()
    suffix = config.out.suffix.lower()
    is_film = suffix in _FILM_SUFFIXES
    shard_folder = config.out.parent / f".{config.out.name}.parts"
    with contextlib.ExitStack() as stack:
        target = config.out
        if rank == 0:  # Open the output first: images that cannot be written should not be drawn.
            try:
                target = stack.enter_context(atomic_write(config.out, folder=not suffix))
            except OSError as error:
                raise OSError(f"--out={config.out} cannot be written: {error.strerror}.") from error

        device = choices.find_device(config.device)
        hide_loading_bar()
        name = pipeline_to_sample(config)
        pipe: Any = load_pipeline(name, dtype=choices.DTYPES[config.dtype], revision=config.revision)
        if config.scheduler is not None:
            pipe.scheduler = choices.replace_scheduler(pipe.scheduler, config.scheduler)
        pipe.to(device)

        rows = 2 if is_film else 10  # noise does not compress: a film of 100 images would have 15 MB
        labels, names, columns = choices.resolve_labels(pipe, config.class_labels, config.num_images, rows)
        count = len(labels) if labels else config.num_images or (16 if is_film else 64)
        steps = choices.default_steps(pipe) if config.num_inference_steps is None else config.num_inference_steps
        eta = choices.default_eta(pipe, config.num_inference_steps) if config.eta is None else config.eta
        options: dict[str, Any] = {"num_inference_steps": steps, "eta": eta}
        options |= choices.resolve_guidance(pipe, name, config.guidance_scale, config.guidance_interval)

        if config.torch_compile:
            pipe.unet.compile()
        has_shards = not is_film and (count > config.batch_size or processes > 1)
        is_resumed = has_shards and shard_folder.is_dir()
        title = choices.counted(count, "image")
        # disable=None: show a bar on a terminal, not in a log file
        pipe.set_progress_bar_config(desc=title, disable=True if has_shards else None)
        started = time.perf_counter()
        if is_film:
            if rank > 0:
                return
            size_or_labels = {"batch_size": count} if labels is None else {"class_labels": labels}
            generator = [torch.Generator("cpu").manual_seed(config.seed + i) for i in range(count)]
            film = pipe(**options, **size_or_labels, generator=generator, output_type="np", return_trajectory=True)
            images = film.images  # (B, H, W, C)
        else:
            work: dict[str, Any] = {"batch_size": config.batch_size, "shard_size": config.batch_size, "shared": True}
            work |= {"seed": config.seed, "title": title, "folder": shard_folder if has_shards else None}
            try:
                tensor, _, evaluations = draw(pipe, count, options, labels=labels, **work)
            except KeyboardInterrupt as stop:
                if shard_folder.is_dir():
                    saved = f"Finished batches are saved in {shard_folder}. Run the same command again to resume."
                    stop.args = (saved,)
                raise
            if rank > 0:
                return
            images = tensor.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        seconds, legend = time.perf_counter() - started, ""
        if is_film:
            frames = plots.denoising_film(film.latents_trajectory, film.pred_original_samples, columns=columns)
            plots.save_film(frames, target)
        elif suffix == ".png":
            grid = plots.sample_grid(images, names, columns=columns)
            grid.save(target)
            legend = grid.info.get("legend", "")
        elif suffix == ".npz":
            arrays: dict[str, Any] = {"images": images, "seeds": config.seed + np.arange(count)}
            arrays |= {} if labels is None else {"class_labels": np.array(labels)}
            settings = {"scheduler": type(pipe.scheduler).__name__, **options, "dtype": config.dtype}
            settings |= {"device": choices.device_name(device), "unet_evaluations": evaluations}
            np.savez_compressed(target, **arrays, settings=np.array(json.dumps(settings)))
        else:
            _save_folder(target, images, names)
    shutil.rmtree(shard_folder, ignore_errors=True)
    height, width = images.shape[1:3]
    pace = "" if is_resumed else f", {count / seconds:.1f} images/s"  # a resumed run did not draw all images
    sampler = f"{choices.counted(steps, 'step')} of {type(pipe.scheduler).__name__}"
    print(f"{config.out}: {title} of {width}x{height}, {sampler}, {seconds:.1f} s{pace} ({device}, {config.dtype})")
    if legend:
        print(f"Numbers in place of names: {', '.join(legend.splitlines())}")


def _check_output(out: Path) -> None:
    """Raise `ValueError` if `out` has an unknown suffix, or is a file or folder that must not be replaced."""
    suffix = out.suffix.lower()
    if suffix not in ("", ".png", ".npz", *_FILM_SUFFIXES):
        raise ValueError(f"--out={out} must end in .png, .gif, .webp or .npz, or have no suffix, for a folder.")
    if suffix and out.is_dir():
        raise ValueError(f"--out={out} is a folder. Choose another name.")
    if not suffix and out.exists():
        if not out.is_dir():
            raise ValueError(f"--out={out} is a file. Choose another name; for a grid, one that ends in .png.")
        foreign = [path.name for path in out.iterdir() if not _FILES_OF_A_SAMPLE_FOLDER.fullmatch(path.name)]
        if foreign:
            raise ValueError(f"--out={out} holds other files ({foreign[0]}, ...). Choose a new or an empty folder.")


def _save_folder(folder: Path, images: np.ndarray[Any, Any], names: Sequence[str] | None) -> None:
    """Save images (B, H, W, C) as `NUMBER_LABEL.png`."""
    from PIL import Image

    digits = max(5, math.ceil(math.log10(len(images) + 1)))
    for i, image in enumerate(images):
        label = "" if names is None else "_" + _file_label(names[i])
        pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
        Image.fromarray(pixels).save(folder / f"{i:0{digits}}{label}.png")


def _file_label(name: str) -> str:
    """Return a class name as a part of a file name: short, and of characters that the file system takes."""
    label = re.sub(r"[^\w-]+", "-", name)
    try:
        os.fsencode(label)
    except UnicodeEncodeError:
        label = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII)
    return label[:50]
