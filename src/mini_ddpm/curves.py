"""The curves of a training run, drawn from its log: loss, loss by noise level, learning rate, gradient norm."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from .hub.load import load_pipeline
from .options import require
from .plots import Images, figure_to_image, noising_strip

# The timesteps of the strip, of a schedule with 1000.
_TIMESTEPS = (0, 200, 500, 999)


def run_curves(
    folder: str | os.PathLike[str], *, images: Images | None = None, timesteps: Sequence[int] | None = None
) -> Image.Image:
    """Plot the log of a training run: loss, loss by noise level, learning rate, gradient norm, as far as it has them.

    Below the curves is the noising strip of the run's schedule. It is left out, with one line on stderr, if the folder
    holds no pipeline that can be opened, as before the first checkpoint.

    Args:
        folder: The folder of a run, with a `train_log.jsonl`.
        images: x_0 of the strip, in any form that `sample_grid` takes. Default: two images that the run's pipeline
            draws, from seeds 0 and 1.
        timesteps: The columns of the strip. Default: 0, 200, 500, 999, scaled to the run's `num_train_timesteps`.

    Returns:
        An RGB image, about 1200 pixels wide.

    Raises:
        ValueError: The folder has no log, the log has no entry, or a timestep is none of the scheduler's.
        ImportError: matplotlib is not installed.
    """
    folder = Path(folder)
    entries = _read_log(folder)
    curves = _plot(entries, folder.resolve().name)
    strip = _strip(folder, images, timesteps, curves.width)
    if strip is None:
        return curves
    page = Image.new("RGB", (max(curves.width, strip.width), curves.height + strip.height + 12), "white")
    page.paste(curves, ((page.width - curves.width) // 2, 0))
    page.paste(strip, ((page.width - strip.width) // 2, curves.height))
    return page


def _read_log(folder: Path) -> list[dict[str, Any]]:
    """Return the entries of the run's log, oldest first. A line that a killed run did not finish is left out."""
    file = folder / "train_log.jsonl"
    if not file.is_file():
        runs = sorted(path.parent.name for path in folder.glob("*/train_log.jsonl"))
        hint = f"Give one of its runs: {', '.join(runs)}." if runs else "Give the folder of a training run."
        raise ValueError(f"{folder} has no train_log.jsonl. {hint}")
    entries = []
    for line in file.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
            entries.append({**entry, "step": int(entry["step"])})
        except (ValueError, KeyError, TypeError):
            continue
    if not entries:
        raise ValueError(f"{file} has no entry yet.")
    return entries


def _plot(entries: list[dict[str, Any]], title: str) -> Image.Image:
    """Draw a panel for each quantity that the log has."""
    require("eval", "matplotlib")
    from matplotlib import colormaps
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    def column(name: str) -> list[float | None]:
        return [entry.get(name) for entry in entries]

    # Each panel has curves by label, and each curve the values of all entries, `None` where an entry has none.
    bands = [entry.get("loss_by_noise_level") or [] for entry in entries]
    count = max(map(len, bands))
    panels: dict[str, dict[str, list[float | None]]] = {
        "loss": {"training": column("loss"), "validation": column("validation_loss")},
        "loss by noise level t/T": {
            f"{band / count:.1f} to {(band + 1) / count:.1f}": [
                one[band] if band < len(one) else None for one in bands
            ]
            for band in range(count)
        },
        "learning rate": {"": column("lr")},
        "gradient norm": {"": column("grad_norm")},
    }
    steps = np.array([entry["step"] for entry in entries])
    found = {}
    for name, curves in panels.items():
        arrays = {label: np.array(values, dtype=float) for label, values in curves.items()}
        arrays = {label: values for label, values in arrays.items() if np.isfinite(values).any()}
        if arrays:
            found[name] = arrays

    rows = math.ceil(len(found) / 2)
    figure = Figure(figsize=(10, 3 * rows + 0.4), dpi=120, layout="constrained")
    figure.suptitle(_title(title, entries[-1]))
    for index, (name, arrays) in enumerate(found.items()):
        axes = figure.add_subplot(rows, min(2, len(found)), index + 1)
        colors = colormaps["viridis"](np.linspace(0, 0.95, len(arrays))) if "noise" in name else ["C0", "C1"]
        for color, (label, values) in zip(colors, arrays.items(), strict=False):
            known = np.isfinite(values)
            half_window = 0 if name == "learning rate" else known.sum() // 100
            _curve(axes, steps[known], values[known], half_window, label=label, color=color)
        if name != "learning rate" and any((values[np.isfinite(values)] > 0).any() for values in arrays.values()):
            axes.set_yscale("log")
            low, high = axes.get_ylim()
            axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10) if high < 10 * low else (2, 5)))
            axes.yaxis.set_major_formatter("{x:g}")
            axes.yaxis.set_minor_formatter("{x:g}")
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=True))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.tick_params(axis="both", which="both", labelsize=8)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel("step", fontsize=9)
        axes.grid(True, which="both", alpha=0.3)
        if len(arrays) > 2:
            axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
        elif len(arrays) > 1:
            axes.legend(fontsize=8)
    return figure_to_image(figure)


def _title(name: str, last: dict[str, Any]) -> str:
    """Return the title of the page: the run's name and how far it got."""
    parts = [f"step {last['step']:,}"]
    parts += [f"epoch {last['epoch']:.4g}"] if "epoch" in last else []
    parts += [f"{last['images']:,} images"] if "images" in last else []
    return f"{name}: {', '.join(parts)}"


def _curve(axes: Any, steps: Any, values: Any, half_window: int, **style: Any) -> None:
    """Draw a curve: its points, or if they are many their moving average, over the points, paler."""
    if half_window > 0:
        axes.plot(steps, values, color=style["color"], alpha=0.25, linewidth=0.7)
        i = np.arange(len(values))
        half = np.minimum(half_window, np.minimum(i, i[::-1]))  # smaller at both ends, to be centred everywhere
        sums = np.concatenate([[0.0], np.cumsum(values)])
        values = (sums[i + half + 1] - sums[i - half]) / (2 * half + 1)
    axes.plot(steps, values, linewidth=1.2, marker="o" if len(values) < 20 else None, markersize=3, **style)


def _strip(folder: Path, images: Images | None, timesteps: Sequence[int] | None, width: int) -> Image.Image | None:
    """Draw the noising strip of the run's schedule, about `width` pixels wide, if there is a pipeline."""
    try:
        pipe: Any = load_pipeline(folder.resolve())
    except (OSError, ValueError) as error:
        print(f"The noising strip is left out: {error}", file=sys.stderr)
        return None
    if timesteps is None:
        last = pipe.scheduler.config.num_train_timesteps - 1
        timesteps = sorted({round(t * last / 999) for t in _TIMESTEPS})
    if images is None:
        pipe.set_progress_bar_config(disable=True)
        is_conditional = hasattr(pipe, "get_label_ids")
        first = [0, 1 % (pipe.unet.config.num_class_embeds - 1)] if is_conditional else 2  # the last label is null
        images = pipe(first, generator=[0, 1]).images
    tile = pipe.unet.config.sample_size
    tile = max(tile) if isinstance(tile, (list, tuple)) else tile or 32
    scale = max(1, min(160, width // (len(timesteps) + 1) - 8) // tile)
    return noising_strip(images, pipe.scheduler, timesteps=timesteps, generator=0, scale=scale)
