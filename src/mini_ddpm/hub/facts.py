"""Gather what is known of a pipeline from its folder."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..options import counted
from .load import is_bundled, read_header, read_json, weights_by_variant

PROTOCOL_TEXTS: dict[str, Callable[[Any], str]] = {
    "num_images": "{:,} images".format,
    "num_inference_steps": lambda steps: counted(steps, "step"),
    "scheduler": str,
    "guidance_scale": "guidance {}".format,
    "guidance_interval": "only from {0[0]:g} to {0[1]:g} of the steps".format,
    "eta": "eta {}".format,
    "seed": "seed {}".format,
    "dtype": str,
    "note": str,
}
"""How a table shows the fields of an evaluation record."""

EXPORTS = ("onnx/sampler.onnx", "onnx/unet.onnx")
"""The graphs of a pipeline, in its folder and on the Hub: the whole sampler, and the network alone."""

# The facts that the configurations tell, with their types.
_CONFIG_FACTS: dict[str, dict[str, Any]] = {
    "unet/config.json": {
        "sample_size": (int, list),
        "in_channels": int,
        "block_out_channels": list,
        "layers_per_block": (int, list),
        "head_channels": int,
        "num_class_embeds": int,
    },
    "scheduler/scheduler_config.json": {"num_train_timesteps": int, "beta_schedule": str, "prediction_type": str},
}


def read_facts(folder: Path) -> dict[str, Any]:
    """Gather what is known of a pipeline from its folder. An unknown fact has no key.

    The facts come from these files:

    - `model`: the configurations and the headers of the weights files.
    - all others: `facts.json`. It is saved with the pipeline and can be edited: `license` and `description` are texts,
      `limitations` is a list of texts.
    - `training`: the `train_config.json` and the last line of the `train_log.jsonl` that a training run wrote, over
      `facts.json`.
    - `evaluation`: `evaluation.json`, over `facts.json`. Either `mini-ddpm evaluate` wrote it, or it is a list of
      records with `metric`, `value` and any of `name`, `dataset`, `split`, `num_images`, `num_inference_steps`,
      `scheduler`, `guidance_scale`, `guidance_interval`, `eta`, `seed`, `dtype`, `note`.
    - `picture`: the name of `samples.png`, or of the newest grid in `samples/`.
    - `exports`: the names of the graphs in `onnx/` that `mini-ddpm export` wrote.

    Raises:
        OSError: The folder holds no pipeline.
        ValueError: A file is not valid JSON, does not hold what it must, or is a link that leads out of the folder.
    """
    refuse_links_to_elsewhere(folder)
    facts: dict[str, Any] = {"model": model_facts(folder)}
    if (folder / "facts.json").is_file():
        facts |= _saved_facts(folder / "facts.json")
    if (folder / "train_config.json").is_file():
        facts["training"] = facts.get("training", {}) | _training_facts(folder)
    if (folder / "evaluation.json").is_file():
        file = folder / "evaluation.json"
        facts["evaluation"] = _evaluation_records(file, read_json(file, list))
    facts.pop("picture", None)
    pictures = [*sorted(folder.glob("samples/epoch-*.png")), folder / "samples.png"]
    if pictures := [file for file in pictures if file.is_file()]:
        facts["picture"] = pictures[-1].relative_to(folder).as_posix()
    facts.pop("exports", None)
    if exports := exported_files(folder):
        facts["exports"] = [file.name for file in exports]
    return facts


def exported_files(folder: Path) -> list[Path]:
    """Return the graphs in a pipeline's folder that `mini-ddpm export` writes there."""
    return [file for name in EXPORTS if (file := folder / name).is_file()]


def _saved_facts(file: Path) -> dict[str, Any]:
    """Return the facts in `facts.json`, but for those that other files tell."""
    facts = {key: value for key, value in read_json(file).items() if key != "model"}
    for key, kind, text in (
        ("training", dict, "an object"),
        ("license", str, "a text"),
        ("description", str, "a text"),
        ("limitations", list, "a list of texts"),
        ("evaluation", list, "a list of records"),
        ("repo_id", str, "a text"),
        ("revision", str, "a text"),
    ):
        value = facts.get(key, kind())
        if not isinstance(value, kind) or (key == "limitations" and not all(isinstance(item, str) for item in value)):
            raise ValueError(f"{file}: `{key}` must be {text}.")
    for key in ("steps", "batch_size", "epoch", "images", "seconds", "loss"):
        if not isinstance(facts.get("training", {}).get(key, 0), (int, float)):
            raise ValueError(f"{file}: `{key}` in `training` must be a number.")
    if "evaluation" in facts:
        facts["evaluation"] = _evaluation_records(file, facts["evaluation"])
    return facts


def refuse_links_to_elsewhere(folder: Path) -> None:
    """Raise a `ValueError` if a file that a card or a push publishes is a link that leads out of the folder.

    Files in the Hub's cache are links to the blobs of their repository, which is allowed.
    """
    folder = folder.resolve()
    roots = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    for pattern in ("*.json", "*.jsonl", "*.md", "samples.png", "samples/*.png", "unet/*", "scheduler/*", *EXPORTS):
        for file in folder.glob(pattern):
            if not any(Path(os.path.realpath(file)).is_relative_to(root) for root in roots):  # also of a loop
                raise ValueError(
                    f"{file} is a link that leads out of the folder, and would be published. Replace it by a copy."
                )


def model_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that the configurations and the headers of the weights files tell.

    A missing configuration is an `OSError`. One that is not a JSON object or has a value of the wrong type is a
    `ValueError`.
    """
    index = read_json(folder / "model_index.json")
    model: dict[str, Any] = {}
    for fact, key in (("pipeline", "_class_name"), ("unet", "unet"), ("scheduler", "scheduler")):
        value = index.get(key)
        model[fact] = value[-1] if isinstance(value, list) and value else value
        if not isinstance(model[fact], str) or not model[fact].isidentifier():
            raise ValueError(f"{folder / 'model_index.json'}: `{key}` must name a class, but is {str(value)[:80]!r}.")
    for file, kinds in _CONFIG_FACTS.items():
        config = read_json(folder / file)
        for key, kind in kinds.items():
            value = config.get(key)
            is_pair = key != "sample_size" or not isinstance(value, list) or len(value) == 2
            if value is not None and not (isinstance(value, kind) and is_pair):
                raise ValueError(f"{folder / file}: `{key}` has a value of the wrong type, {str(value)[:80]!r}.")
            model |= {} if value is None else {key: value}
    model |= {
        key: value
        for key, value in index.items()
        if key.startswith("default_") or key in ("black_level", "white_level")
    }
    if labels := index.get("id2label"):
        if not isinstance(labels, dict) or not all(re.fullmatch(r"\d{1,9}", label) for label in labels):
            raise ValueError(f"{folder / 'model_index.json'}: `id2label` must give a text for each label.")
        model["labels"] = [str(labels[label]) for label in sorted(labels, key=int)]  # JSON sorts 10 before 2
    for files in list(weights_by_variant(folder / "unet").values())[:1]:
        tensors = [tensor for file in files for tensor in read_header(file).values()]
        count = sum(math.prod(shape) for shape, _ in tensors)
        dtypes = {{"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(dtype) for _, dtype in tensors}
        model |= {"parameters": count} | ({"dtype": dtype} if len(dtypes) == 1 and (dtype := dtypes.pop()) else {})
    return model


def _training_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that a training run's own files tell."""
    config = read_json(folder / "train_config.json")
    keys = ["split", "learning_rate", "lr_scheduler", "ema_max_decay", "snr_gamma", "saturation_margin"]
    keys += ["mixed_precision", "seed"]
    keys += ["teacher_steps", "guidance_scale", "guidance_interval", "adversarial_weight"]  # of a distilled pipeline
    keys += ["sharpening_weight"]
    facts = {key: config[key] for key in keys if config.get(key) not in (None, "auto", [0, 1])}
    if config.get("class_conditional"):
        facts["class_dropout_prob"] = config.get("class_dropout_prob")
    renamed = {"dataset_name": "dataset", "pretrained_model_name_or_path": "started_from"}
    for key in (*renamed, "distilled_from", "sharpened_from"):
        name = str(config.get(key))
        is_on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not os.path.exists(name)
        if is_on_hub or (key != "dataset_name" and is_bundled(name)):  # do not publish local paths
            facts[renamed.get(key, key)] = name
    log = folder / "train_log.jsonl"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.is_file() else []
    for line in reversed(lines):  # a run that was killed leaves an incomplete last line
        try:
            entry = json.loads(line)
            progress = {"steps": entry["step"]} | {key: entry[key] for key in ("epoch", "images", "loss", "seconds")}
            progress["batch_size"] = entry["images"] // entry["step"]
        except (ValueError, TypeError, KeyError, ZeroDivisionError, RecursionError):
            continue
        return facts | progress
    return facts


def _evaluation_records(file: Path, rows: list[Any]) -> list[dict[str, Any]]:
    """Return one record per metric from the rows of an `evaluation.json`, or from `facts.json`.

    They are rows that `mini-ddpm evaluate` wrote, or records of one metric. Any other row is a `ValueError`.
    """
    records = []
    for i, row in enumerate(rows):
        try:
            if "protocol" in row:
                real = (other for other in rows if isinstance(other, dict) and other.get("images") == "real")
                records += _metric_records(row, next(real, {}))
            elif isinstance(row["metric"], str) and isinstance(row["value"], (int, float)):
                records.append(row)
            else:
                raise TypeError
            for record in records[-1:]:
                protocol_text(record)
        except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
            needed = "a `metric` (a text) and a `value` (a number), or what `mini-ddpm evaluate` writes"
            raise ValueError(f"{file}: record {i} needs {needed}.") from error
    keys = ("metric", "name", "value", "dataset", "split", *PROTOCOL_TEXTS)
    return [{key: record[key] for key in keys if key in record} for record in records]


def protocol_text(record: dict[str, Any]) -> str:
    """Return how a metric was measured, in words."""
    texts = (text(record[key]) for key, text in PROTOCOL_TEXTS.items() if record.get(key) is not None)
    return ", ".join(texts)


def _metric_records(row: dict[str, Any], real_row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one record per metric that a card shows, from the row of a sampler; none from that of real images.

    The notes quote the figures of real images, `real_row`.
    """
    if row["images"] == "real":
        return []
    protocol = row["protocol"]
    network = f"{protocol['feature_extractor']} in {protocol['feature_dtype']}"
    distance = f"distance to {protocol['reference_images']:,} real images, {network}; other real images score "
    nearest = "share of images closer to a training image than that one is to any other; unseen real images score "
    accuracy = "share of images in which a classifier sees the right class; real images score "
    records = []
    for key, metric, name, note, number in (
        ("fid", "fid", "FID", distance, "{:.2f}"),
        ("frechet_distance", "frechet_distance", "Fréchet distance", distance, "{:.4g}"),
        ("class_accuracy", "accuracy", "Class accuracy", accuracy, "{:.2%}"),
        ("memorization", "memorization", "Memorization", nearest, "{:.1%}"),
    ):
        if key in row:
            record = {**row, "metric": metric, "name": name, "value": row[key], "split": protocol["split"]}
            if "/" in protocol["dataset"]:  # a name on the Hub, not a local folder
                record["dataset"] = protocol["dataset"]
            if key in real_row:
                record["note"] = note + number.format(real_row[key])
            records.append({key: value for key, value in record.items() if key != "eta" or value})
    return records
