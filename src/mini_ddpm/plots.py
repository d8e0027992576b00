"""Grids of samples, films of the denoising, strips of the forward process q(x_t | x_0), curves of an evaluation.

Pillow draws the pictures; only the curves need matplotlib.
"""

from __future__ import annotations

import contextlib
import functools
import math
import os
import re
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageDraw, ImageFont

from .options import require

_PAPER, _INK = (255, 255, 255), (64, 64, 64)
_GAP = 2  # white pixels between two tiles
# Pillow's own font is Latin. Of these, the ones that the system has draw what it lacks.
_FALLBACK_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "Arial Unicode.ttf", "msyh.ttc")

UInt8Array = npt.NDArray[np.uint8]


def _tiles(images: Sequence[Image.Image] | npt.NDArray[Any], scale: int) -> UInt8Array:
    """Stack images into one array (B, H·scale, W·scale, 3) of RGB bytes, enlarged without smoothing."""
    if len(images) == 0:
        raise ValueError("images is empty. Give at least one image.")
    array = np.stack([np.asarray(image) for image in images])
    if array.dtype != np.uint8:
        raise ValueError(f"images must be PIL images or a uint8 array, not {array.dtype}.")
    if array.ndim == 3:
        array = array[..., None]  # (B, H, W, 1)
    if array.ndim != 4 or array.shape[-1] not in (1, 3):
        raise ValueError(f"images must be grey or RGB, (B, H, W, 1) or (B, H, W, 3), not {tuple(array.shape)}.")
    array = np.broadcast_to(array, (*array.shape[:3], 3))
    return array.repeat(scale, axis=1).repeat(scale, axis=2)


def _to_uint8(images: torch.Tensor) -> UInt8Array:
    """Map images (B, C, H, W) in [-1, 1] to bytes (B, H, W, C); clip values outside the range."""
    images = (images.detach().float().cpu().permute(0, 2, 3, 1) + 1) * 127.5
    return images.clamp(0, 255).round().to(torch.uint8).numpy()


class _Caption(NamedTuple):
    """A text to draw, line by line."""

    lines: list[str]
    font: Any

    @property
    def width(self) -> int:
        length: float = max(self.font.getlength(line) for line in self.lines)
        return math.ceil(length)

    @property
    def line_height(self) -> int:
        bottom: float = self.font.getbbox("Ag")[3]
        return math.ceil(bottom) + _GAP


@functools.lru_cache(maxsize=8)
def _fonts(size: int) -> list[Any]:
    """Return Pillow's own font, and the fallbacks that the system has."""
    fonts: list[Any] = [ImageFont.load_default(size=size)]
    for name in _FALLBACK_FONTS:
        with contextlib.suppress(OSError):
            fonts.append(ImageFont.truetype(name, size))
    return fonts


def _has_glyph(font: Any, character: str) -> bool:
    """Return whether a font draws a character, not the box that stands for one it lacks."""
    try:
        return character == " " or bytes(font.getmask(character)) != bytes(font.getmask("\U0010ffff"))
    except UnicodeEncodeError:
        return False


def _wrap(text: str, font: Any, width: int) -> list[str]:
    """Break a text between words into lines of at most `width` pixels; a longer word has a line of its own."""
    lines = [""]
    for word in re.split(r"(?<=[ _/-])", text):
        if lines[-1] and font.getlength((lines[-1] + word).rstrip()) > width:
            lines.append("")
        lines[-1] += word
    return [line.rstrip() for line in lines]


def _clip(text: str, font: Any, width: int) -> str:
    """Return the text, or as much of it as fits in `width` pixels, with three dots at its end."""
    if font.getlength(text) <= width:
        return text
    return next(
        (text[:end] + "..." for end in range(len(text), 0, -1) if font.getlength(text[:end] + "...") <= width), ""
    )


def _captions(texts: Sequence[str], size: int, width: int) -> tuple[dict[str, _Caption], dict[str, _Caption]]:
    r"""Return the caption of each text, at most `width` pixels wide and two lines high, and a legend by text.

    A text that is too long, or that no font can draw, gets a number, which the legend explains. What no font can draw
    is written there as in Python, `\u732b`.
    """
    captions: dict[str, _Caption] = {}
    legend: dict[str, _Caption] = {}
    for number, text in enumerate(dict.fromkeys(texts), 1):
        shown = unicodedata.normalize("NFC", " ".join(text.split()))[:500]
        font = _fonts(size)[0]
        if not all(_has_glyph(font, character) for character in set(shown)):
            font = max(_fonts(size), key=lambda font: sum(_has_glyph(font, character) for character in shown))
        drawn = "".join(c if _has_glyph(font, c) else c.encode("ascii", "backslashreplace").decode() for c in shown)
        caption = _Caption(_wrap(drawn, font, width), font)
        if drawn != shown or len(text) > 500 or len(caption.lines) > 2 or caption.width > width:
            legend[f"#{number} {text}"] = _Caption([f"#{number} {drawn}"], font)
            caption = _Caption([f"#{number}"], _fonts(size)[0])
        captions[text] = caption
    return captions, legend


def sample_grid(
    images: Sequence[Image.Image] | npt.NDArray[Any],
    labels: Sequence[object] | None = None,
    *,
    columns: int | None = None,
    scale: int = 2,
) -> Image.Image:
    """Draw images as a grid, row by row, each below its label.

    If every column holds images of one label, each label is written once, at the head of its column. A label that is
    too long for its column, or that no font at hand can draw, becomes a number, and a legend below the grid names it.

    Args:
        images: PIL images of one size, as a pipeline returns them, or uint8 array (B, H, W, C), C = 1 or 3.
        labels: One label per image, converted with `str`.
        columns: Number of images in a row. `None`: make the grid about square.
        scale: Enlarge each pixel to a square of this side.

    Returns:
        An RGB image. If it has a legend, that is also in `.info["legend"]`, one line per label.

    Raises:
        ValueError: There are no images, C is neither 1 nor 3, or the number of labels differs from that of the images.
    """
    tiles = _tiles(images, scale)
    count, height, width, _ = tiles.shape
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    texts = None if labels is None else [str(label) for label in labels]
    if texts is not None and len(texts) != count:
        raise ValueError(f"labels holds {len(texts)} labels for {count} images. Give one per image.")
    is_label_per_column = texts is not None and all(text == texts[i % columns] for i, text in enumerate(texts))

    size = max(10, min(20, height // 3))
    captions, legend = _captions(texts or (), size, max(width - 3 * _GAP, 6 * size))
    caption = max((len(one.lines) * one.line_height for one in captions.values()), default=0)
    # A long label widens all columns, so labels do not overlap.
    cell = max([width] + [one.width + 3 * _GAP for one in captions.values()])
    page_width = _GAP + columns * (cell + _GAP)
    entries = []
    if legend:
        page_width = max(page_width, min(24 * size, max(one.width for one in legend.values()) + 2 * _GAP))
        for (text,), font in legend.values():
            lines = _wrap(text, font, page_width - 2 * _GAP)
            lines = lines[:2] + ([" ".join(lines[2:])] if len(lines) > 2 else [])
            entries.append(_Caption([_clip(line, font, page_width - 2 * _GAP) for line in lines], font))
    grid_height = _GAP + rows * (height + _GAP) + (caption if is_label_per_column else caption * rows)
    page_height = grid_height + sum(len(entry.lines) * entry.line_height for entry in entries)
    page = Image.new("RGB", (page_width, page_height), _PAPER)
    draw = ImageDraw.Draw(page)
    for i, tile in enumerate(tiles):
        row, column = divmod(i, columns)
        left = _GAP + column * (cell + _GAP)
        top = _GAP + row * (height + _GAP) + (caption if is_label_per_column else caption * (row + 1))
        page.paste(Image.fromarray(tile), (left + (cell - width) // 2, top))
        if texts is not None and (row == 0 or not is_label_per_column):
            lines, font = captions[texts[i]]
            for above, line in enumerate(reversed(lines)):
                bottom = top - _GAP - above * captions[texts[i]].line_height
                draw.text((left + cell / 2, bottom), line, fill=_INK, font=font, anchor="md")
    bottom = grid_height - _GAP
    for entry in entries:
        for line in entry.lines:
            bottom += entry.line_height
            draw.text((_GAP, bottom), line, fill=_INK, font=entry.font, anchor="ld")
    if legend:
        page.info["legend"] = "\n".join(legend)
    return page


def denoising_film(
    latents_trajectory: torch.Tensor,
    pred_original_samples: torch.Tensor | None = None,
    *,
    columns: int | None = None,
    scale: int = 2,
) -> list[Image.Image]:
    """Draw the denoising as a film: each frame shows x_t and, to its right, the x̂_0 predicted from it.

    Args:
        latents_trajectory: x_t from noise to image, (steps + 1, B, C, H, W) in [-1, 1], as a pipeline returns it for
            `return_trajectory=True`.
        pred_original_samples: x̂_0 of each step, (steps, B, C, H, W). The last frame repeats the last x̂_0. `None`: show
            x_t only.
        columns: Number of images in a row of each half. `None`: make each half about square.
        scale: Enlarge each pixel to a square of this side.

    Returns:
        `steps + 1` RGB images of one size.

    Raises:
        ValueError: The shapes of the two trajectories do not match.
    """
    steps = len(latents_trajectory) - 1
    halves = [latents_trajectory]
    if pred_original_samples is not None:
        if len(pred_original_samples) != steps or pred_original_samples.shape[1:] != latents_trajectory.shape[1:]:
            raise ValueError(
                f"pred_original_samples has the shape {tuple(pred_original_samples.shape)}, but latents_trajectory of "
                f"shape {tuple(latents_trajectory.shape)} needs {steps} predictions of its images."
            )
        halves.append(pred_original_samples)

    font = ImageFont.load_default(size=14)
    head = math.ceil(font.getbbox("Ag")[3]) + 2 * _GAP
    frames = []
    for step in range(steps + 1):
        grids = []
        for half in halves:
            images = half[min(step, len(half) - 1)]  # (B, C, H, W)
            # Euler and Heun use x_t = x_0 + σ·ε, with σ up to 1e4. Rescale it to the range of an image.
            images = images / images.std().clamp(min=1)
            grids.append(sample_grid(_to_uint8(images), columns=columns, scale=scale))
        titles = [f"x_t, step {step} of {steps}", "predicted x_0"][: len(halves)]
        width = max(grids[0].width, math.ceil(font.getlength(f"x_t, step {steps} of {steps}")) + 2 * _GAP)
        frame = Image.new("RGB", (len(grids) * (width + 4 * _GAP) - 4 * _GAP, head + grids[0].height), _PAPER)
        draw = ImageDraw.Draw(frame)
        for k, (title, grid) in enumerate(zip(titles, grids, strict=True)):
            left = k * (width + 4 * _GAP)
            frame.paste(grid, (left, head))
            draw.text((left + _GAP, _GAP), title, fill=_INK, font=font)
        frames.append(frame)
    return frames


def save_film(frames: Sequence[Image.Image], path: str | os.PathLike[str], *, seconds: float = 4.0) -> None:
    """Save frames of one size as an endless animation that pauses on its last frame for two seconds.

    The suffix of `path` is `.gif` or `.webp`. The frames before the last take `seconds` together.
    """
    milliseconds = max(20, round(1000 * seconds / len(frames)))  # browsers slow down frames shorter than 20 ms
    durations = [milliseconds] * (len(frames) - 1) + [2000]
    frames[0].save(path, save_all=True, append_images=list(frames[1:]), duration=durations, loop=0)


def noising_strip(
    images: torch.Tensor,
    scheduler: Any,
    *,
    timesteps: Sequence[int] | None = None,
    generator: torch.Generator | None = None,
    scale: int = 2,
) -> Image.Image:
    """Draw the forward process q(x_t | x_0) = N(√ᾱ_t·x_0, (1 - ᾱ_t)·I): a row per image, a column per timestep.

    Args:
        images: x_0, (B, C, H, W) in [-1, 1].
        scheduler: A scheduler with `add_noise` and `config.num_train_timesteps`.
        timesteps: The columns after the clean image. `None`: eight evenly spaced timesteps up to the last.
        generator: Generator of the noise. Each row uses one noise for all timesteps.
        scale: Enlarge each pixel to a square of this side.

    Returns:
        An RGB image.
    """
    if timesteps is None:
        timesteps = np.linspace(0, scheduler.config.num_train_timesteps - 1, 9).round().astype(int)[1:].tolist()
    noise = torch.randn(images.shape, generator=generator, dtype=torch.float32).to(images)
    times = (torch.full((len(images),), t, device=images.device) for t in timesteps)
    columns = [images, *(scheduler.add_noise(images, noise, t) for t in times)]
    strip = torch.stack(columns, dim=1).flatten(0, 1)  # (B·columns, C, H, W)
    labels = ["x_0", *(f"t = {t}" for t in timesteps)] * len(images)
    return sample_grid(_to_uint8(strip), labels, columns=len(columns), scale=scale)


def sampling_options(row: dict[str, Any]) -> str:
    """Return the guidance and eta of a row as text that follows the sampler's name, like ", guidance 1.5, eta 1"."""
    text = f", guidance {row['guidance_scale']:g}" if "guidance_scale" in row else ""
    text += " from {:g} to {:g}".format(*row["guidance_interval"]) if "guidance_interval" in row else ""
    return text + (f", eta {row['eta']:g}" if row["eta"] else "")


def evaluation_curves(rows: Sequence[dict[str, Any]]) -> Image.Image:
    """Plot the distance to real images against network evaluations and seconds per image, one curve per sampler.

    The rows are results of `evaluate`, of one protocol. The floor is a dashed line. The RGB image is 1200 by 480.
    """
    require("eval", "matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator

    titles = {"fid": "FID", "frechet_distance": "Fréchet distance"}
    name = next(key for key in titles if any(key in row for row in rows))
    labels = {"unet_evaluations": "network evaluations per image"}
    if any("seconds_per_image" in row for row in rows):
        labels["seconds_per_image"] = "seconds per image"
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        if row["images"] == "generated":
            legend = row["scheduler"].removesuffix("Scheduler") + sampling_options(row)
            curves.setdefault(legend, []).append(row)
    panels = figure.subplots(1, len(labels), sharey=True, squeeze=False)[0]
    for axes, (key, label) in zip(panels, labels.items(), strict=True):
        for legend, curve in curves.items():
            curve = sorted((row for row in curve if key in row), key=lambda row: row[key])
            axes.plot([row[key] for row in curve], [row[name] for row in curve], "o-", label=legend)
        for row in rows:
            if row["images"] == "real" and row[name] > 0:  # the axis is logarithmic
                axes.axhline(row[name], color="grey", linestyle="--", label=f"real images: {row[name]:.2f}")
        axes.set(xlabel=label, xscale="log", yscale="log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
            axis.set_minor_formatter("{x:g}")
        axes.xaxis.set_minor_locator(LogLocator(subs=(2, 5)))  # nine labels per decade would overlap
        axes.tick_params(axis="both", which="both", labelsize=8)
        axes.grid(True, which="both", alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    figure.axes[0].set_ylabel(titles[name])
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")  # type: ignore[no-untyped-call]
