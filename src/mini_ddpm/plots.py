"""Grids of samples, films of the denoising, strips of the forward process q(x_t | x_0), curves of an evaluation.

Pillow draws the pictures; only the curves need matplotlib.
"""

from __future__ import annotations

import base64
import contextlib
import functools
import io
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
from .pipelines.pipeline_base import seeded_generator

_PAPER, _INK = (255, 255, 255), (64, 64, 64)
_GAP = 2  # white pixels between two tiles
# Pillow's own font is Latin. Of these, the ones that the system has draw what it lacks.
_FALLBACK_FONTS = ("DejaVuSans.ttf", "NotoSansCJK-Regular.ttc", "wqy-zenhei.ttc", "Arial Unicode.ttf", "msyh.ttc")

UInt8Array = npt.NDArray[np.uint8]
# What `_pixels` converts; a sequence holds PIL images, arrays or tensors.
Images = Image.Image | torch.Tensor | npt.NDArray[Any] | Sequence[Any]


def _pixels(images: Any, value_range: tuple[float, float] | None, bound: float = 1.5) -> torch.Tensor:
    """Return images in any form that `sample_grid` takes as (B, C, H, W) float32 on the CPU, in [-1, 1], not clipped.

    The range of floats is guessed only if all are within `bound` of 0. What a network draws reaches a bit beyond
    [-1, 1], standardized images reach farther.
    """
    images, is_tensor = _stack(images)
    if images.numel() == 0:
        raise ValueError("images is empty. Give at least one image.")
    values = _channels_first(images, is_tensor).float()
    low, high = values.amin().item(), values.amax().item()
    if not math.isfinite(low + high):
        raise ValueError("images holds NaN or infinite values.")
    if value_range is None and images.dtype == torch.uint8:
        value_range = (0, 255)
    elif value_range is None and images.is_floating_point() and max(-low, high) <= bound:
        if low < -0.1:  # resizing images in [0, 1] can give values that are a little below 0
            value_range = (-1, 1)
        elif low >= 0 and high <= 1 and (not is_tensor or low < 0.1):  # else, in [-1, 1], nothing would be dark
            value_range = (0, 1)
    if value_range is None:
        kind = str(images.dtype).removeprefix("torch.")
        raise ValueError(
            f"images holds values of {kind} from {low:.4g} to {high:.4g}, whose range is unclear. Pass"
            " value_range=(black, white), such as (-1, 1), (0, 1) or (0, 255)."
        )
    black, white = value_range
    if not black < white:
        raise ValueError(f"value_range={value_range} must be two numbers, the value of black and that of white.")
    return (values - black) / (white - black) * 2 - 1


def _stack(images: Any) -> tuple[torch.Tensor, bool]:
    """Return images as one tensor on the CPU, and whether they were tensors, which have their channels first."""
    if isinstance(images, Image.Image):
        images = [images]
    if not isinstance(images, (torch.Tensor, np.ndarray)):
        images = list(images)
        if images and isinstance(images[0], Image.Image):
            modes = {image.mode for image in images}
            if any(mode[0] in "IF" for mode in modes):
                raise ValueError("images holds a picture of more than 8 bits per channel. Convert it to 8 bits first.")
            images = [np.asarray(image.convert("L" if modes <= {"1", "L"} else "RGB")) for image in images]
        shapes = dict.fromkeys(tuple(np.shape(image)) for image in images)
        if len(shapes) > 1:
            raise ValueError(f"images must have one size, but have the shapes {', '.join(map(str, shapes))}.")
        images = torch.stack(images) if images and isinstance(images[0], torch.Tensor) else np.array(images)
    if isinstance(images, torch.Tensor):
        return images.detach().cpu(), True
    if images.dtype.kind not in "buif":
        raise ValueError("images must be PIL images, arrays or tensors, such as pipe(...).images.")
    return torch.from_numpy(images.astype(np.uint8) * 255 if images.dtype == bool else np.array(images)), False


def _channels_first(images: torch.Tensor, is_tensor: bool) -> torch.Tensor:
    """Return images of any shape that is unambiguous as (B, C, H, W), C = 1 or 3."""
    shape = tuple(images.shape)
    if len(shape) == 2 or (len(shape) == 3 and shape[-1] in (1, 3)):
        images = images[None]  # one image
    elif is_tensor and len(shape) == 3 and shape[0] == 3:
        raise ValueError(f"images has the shape {shape}. Pass images[None] for one in RGB, images[:, None] if grey.")
    if images.ndim == 3:
        return images[:, None]
    first, last = (images.ndim == 4 and images.shape[axis] in (1, 3) for axis in (1, -1))
    if not (first or last):
        raise ValueError(f"images must be grey or RGB, such as (B, 1, H, W) or (B, H, W, 3), not {shape}.")
    return images if first and (is_tensor or not last) else images.permute(0, 3, 1, 2)


def _to_uint8(images: torch.Tensor) -> UInt8Array:
    """Map images (B, C, H, W) in [-1, 1] to RGB bytes (B, H, W, 3). Clip values outside the range."""
    images = ((images + 1) * 127.5).clamp(0, 255).round().byte().permute(0, 2, 3, 1)
    return images.expand(-1, -1, -1, 3).numpy()


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
    images: Images,
    labels: Sequence[object] | torch.Tensor | None = None,
    *,
    value_range: tuple[float, float] | None = None,
    columns: int | None = None,
    scale: int = 2,
) -> Image.Image:
    """Draw images as a grid, row by row, each below its label.

    If every column holds images of one label, each label is written once, at the head of its column. A label that is
    too long for its column, or that no font at hand can draw, becomes a number, and a legend below the grid names it.

    Args:
        images: PIL images of one size, arrays (B, H, W, C) or tensors (B, C, H, W), C = 1 or 3, on any device. The
            shapes (B, H, W), (H, W), and (H, W, C) of one image are understood too, and lists of images of one shape.
        labels: One label per image, converted with `str`.
        value_range: The values of black and white, such as (-1, 1). Values outside are clipped. Default: (0, 255) for
            PIL images and bytes; for floats (-1, 1) if some are below 0, else (0, 1), where that is certain.
        columns: Number of images in a row. `None`: make the grid about square.
        scale: Enlarge each pixel to a square of this side.

    Returns:
        An RGB image. If it has a legend, that is also in `.info["legend"]`, one line per label.

    Raises:
        ValueError: There are no images, C is neither 1 nor 3, the number of labels differs from that of the images, a
            tensor (3, H, W) is one RGB image or three grey ones, or the range is unclear without `value_range`:
            integers other than bytes, floats beyond [-1.5, 1.5] or with none of the values that tell [-1, 1] and
            [0, 1] apart (below -0.1; for [0, 1] none below 0, and in tensors some below 0.1).
    """
    tiles = _to_uint8(_pixels(images, value_range)).repeat(scale, axis=1).repeat(scale, axis=2)
    count, height, width, _ = tiles.shape
    if columns is not None and columns < 1:
        raise ValueError(f"columns={columns} must be at least 1.")
    columns = min(count, columns or math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    if isinstance(labels, torch.Tensor):
        labels = labels.tolist()
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


class Film(list[Image.Image]):
    """The frames of a film. A notebook plays it where it is the last line of a cell."""

    def _repr_html_(self) -> str:
        file: Any = io.BytesIO()
        file.name = "film.webp"  # Pillow reads the format from it
        save_film(self, file)
        return f'<img src="data:image/webp;base64,{base64.b64encode(file.getvalue()).decode()}">'


def denoising_film(
    latents_trajectory: Images,
    pred_original_samples: Images | None = None,
    *,
    value_range: tuple[float, float] | None = None,
    columns: int | None = None,
    scale: int = 2,
) -> Film:
    """Draw the denoising as a film: each frame shows x_t and, to its right, the x̂_0 predicted from it.

    Args:
        latents_trajectory: x_t from noise to image, (steps + 1, B, C, H, W), as a pipeline returns it for
            `return_trajectory=True`, or a list with the images of each step, as `sample_grid` takes them.
        pred_original_samples: x̂_0 of each step, (steps, B, C, H, W). The last frame repeats the last x̂_0. `None`: show
            x_t only.
        value_range: The values of black and white. Default: as in `sample_grid`, but floats of which some are below 0
            may have any size, as noise has.
        columns: Number of images in a row of each half. `None`: make each half about square.
        scale: Enlarge each pixel to a square of this side.

    Returns:
        A list of `steps + 1` RGB images of one size. `save_film` writes it to a file.

    Raises:
        ValueError: The shapes of the two trajectories do not match, or the images are unclear as in `sample_grid`.
    """
    halves: list[Any] = (
        [latents_trajectory] if pred_original_samples is None else [latents_trajectory, pred_original_samples]
    )
    shape, *others = [(len(half), *np.shape(half[0])) for half in halves]
    steps, batch_size = shape[0] - 1, shape[1]
    if isinstance(latents_trajectory, torch.Tensor) and len(shape) != 5:
        raise ValueError(f"latents_trajectory must have the shape (steps + 1, B, C, H, W), but has {shape}.")
    if any(other != (steps, *shape[1:]) for other in others):
        raise ValueError(
            f"pred_original_samples has the shape {others[0]}, but latents_trajectory of shape {shape} needs {steps} "
            "predictions of its images."
        )
    # one conversion for both, with one range
    pixels = _pixels([image for half in halves for batch in half for image in batch], value_range, math.inf)
    pixels = pixels.reshape(-1, batch_size, *pixels.shape[1:])  # x_t and x̂_0, (steps + 1 + steps, B, C, H, W)

    font = ImageFont.load_default(size=14)
    head = math.ceil(font.getbbox("Ag")[3]) + 2 * _GAP
    frames = Film()
    for step in range(steps + 1):
        grids = []
        for index in (step, min(steps + 1 + step, 2 * steps))[: len(halves)]:
            images = pixels[index]  # (B, C, H, W)
            # Euler and Heun use x_t = x_0 + σ·ε, with σ up to 1e4. Rescale it to the range of an image.
            images = images / images.std().clamp(min=1)
            grids.append(sample_grid(images, value_range=(-1, 1), columns=columns, scale=scale))
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
    images: Images,
    scheduler: Any,
    *,
    value_range: tuple[float, float] | None = None,
    timesteps: Sequence[int] | None = None,
    generator: int | torch.Generator | None = None,
    scale: int = 2,
) -> Image.Image:
    """Draw the forward process q(x_t | x_0) = N(√ᾱ_t·x_0, (1 - ᾱ_t)·I): a row per image, a column per timestep.

    Args:
        images: x_0, in any form that `sample_grid` takes.
        scheduler: A scheduler with `add_noise` and `config.num_train_timesteps`.
        value_range: The values of black and white in x_0. Default: as in `sample_grid`.
        timesteps: The columns after the clean image. `None`: eight evenly spaced timesteps up to the last.
        generator: Seed or generator of the noise, on the CPU. Each row uses one noise for all timesteps.
        scale: Enlarge each pixel to a square of this side.

    Returns:
        An RGB image.

    Raises:
        ValueError: A timestep is none of the scheduler's, or the images are unclear as in `sample_grid`.
    """
    count = scheduler.config.num_train_timesteps
    if timesteps is None:
        timesteps = np.linspace(0, count - 1, 9).round().astype(int)[1:].tolist()
    for t in timesteps:
        if not 0 <= t < count:
            raise ValueError(f"timesteps={list(timesteps)}: {t} must be 0 to {count - 1}.")
    x0 = _pixels(images, value_range)  # (B, C, H, W) in [-1, 1]
    noise = torch.randn(x0.shape, generator=seeded_generator(generator), dtype=torch.float32)
    columns = [x0, *(scheduler.add_noise(x0, noise, torch.full((len(x0),), t)) for t in timesteps)]
    strip = torch.stack(columns, dim=1).flatten(0, 1)  # (B·columns, C, H, W)
    labels = ["x_0", *(f"t = {t}" for t in timesteps)] * len(x0)
    return sample_grid(strip, labels, value_range=(-1, 1), columns=len(columns), scale=scale)


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
    return figure_to_image(figure)


def figure_to_image(figure: Any) -> Image.Image:
    """Return a figure of matplotlib as an RGB image."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return Image.frombuffer("RGBA", canvas.get_width_height(), canvas.buffer_rgba()).convert("RGB")  # type: ignore[no-untyped-call]
