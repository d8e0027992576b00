"""Gather what is known of a pipeline from its folder."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .load import is_bundled, read_json, weights_by_variant

PROTOCOL_TEXTS = {
    "num_images": "{:,} images",
    "num_inference_steps": "{} steps",
    "scheduler": "{}",
    "guidance_scale": "guidance {}",
    "guidance_interval": "only from {0[0]:g} to {0[1]:g} of the steps",
    "eta": "eta {}",
    "seed": "seed {}",
    "dtype": "{}",
    "note": "{}",
}
"""How a table shows the fields of an evaluation record."""


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

    Raises:
        OSError: The folder holds no pipeline.
        ValueError: A file is not valid JSON, does not hold what it must, or is a link that leads out of the folder.
    """
    refuse_links_to_elsewhere(folder)
    facts: dict[str, Any] = {"model": model_facts(folder)}
    if (folder / "facts.json").is_file():
        facts |= {key: value for key, value in read_json(folder / "facts.json").items() if key != "model"}
    if (folder / "train_config.json").is_file():
        facts["training"] = facts.get("training", {}) | _training_facts(folder)
    if (folder / "evaluation.json").is_file():
        facts["evaluation"] = _evaluation_records(folder / "evaluation.json")
    facts.pop("picture", None)
    if pictures := [*sorted(folder.glob("samples/epoch-*.png")), *folder.glob("samples.png")]:
        facts["picture"] = pictures[-1].relative_to(folder).as_posix()
    return facts


def refuse_links_to_elsewhere(folder: Path) -> None:
    """Raise a `ValueError` if a file that a card or a push publishes is a link that leads out of the folder.

    Files in the Hub's cache are links to the blobs of their repository, which is allowed.
    """
    folder = folder.resolve()
    roots = [folder, folder.parents[1] / "blobs"] if folder.parent.name == "snapshots" else [folder]
    for pattern in ("*.json", "*.jsonl", "*.md", "samples.png", "samples/*.png", "unet/*", "scheduler/*"):
        for file in folder.glob(pattern):
            if not any(file.resolve().is_relative_to(root) for root in roots):
                raise ValueError(
                    f"{file} is a link that leads out of the folder, and would be published. Replace it by a copy."
                )


def model_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that the configurations and the headers of the weights files tell.

    A missing configuration is an `OSError`, one that is not a JSON object a `ValueError`.
    """
    index = read_json(folder / "model_index.json")
    unet = read_json(folder / "unet" / "config.json")
    scheduler = read_json(folder / "scheduler" / "scheduler_config.json")

    model: dict[str, Any] = {}
    for fact, key in (("pipeline", "_class_name"), ("unet", "unet"), ("scheduler", "scheduler")):
        model[fact] = index[key][-1] if isinstance(index[key], list) else index[key]
    for config, keys in (
        (
            unet,
            (
                "sample_size",
                "in_channels",
                "block_out_channels",
                "layers_per_block",
                "head_channels",
                "num_class_embeds",
            ),
        ),
        (scheduler, ("num_train_timesteps", "beta_schedule", "prediction_type")),
    ):
        model |= {key: config[key] for key in keys if config.get(key) is not None}
    model |= {
        key: value
        for key, value in index.items()
        if key.startswith("default_") or key in ("black_level", "white_level")
    }
    if labels := index.get("id2label"):
        model["labels"] = list(labels.values())
    for files in list(weights_by_variant(folder / "unet").values())[:1]:
        count, dtypes = 0, set()
        for file in files:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    tensor = weights.get_slice(key)
                    count += int(torch.Size(tensor.get_shape()).numel())
                    dtypes.add({"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(tensor.get_dtype()))
        model |= {"parameters": count} | ({"dtype": dtype} if (dtype := dtypes.pop()) and not dtypes else {})
    return model


def _training_facts(folder: Path) -> dict[str, Any]:
    """Return the facts that a training run's own files tell."""
    config = read_json(folder / "train_config.json")
    keys = ["split", "learning_rate", "lr_scheduler", "ema_max_decay", "snr_gamma", "saturation_margin"]
    keys += ["mixed_precision", "seed", "guidance_scale", "guidance_interval"]  # guidance: of a distilled pipeline
    facts = {key: config[key] for key in keys if config.get(key) not in (None, "auto", [0, 1])}
    if config.get("class_conditional"):
        facts["class_dropout_prob"] = config["class_dropout_prob"]
    renamed = {"dataset_name": "dataset", "pretrained_model_name_or_path": "started_from"}
    for key in (*renamed, "distilled_from"):
        name = str(config.get(key))
        is_on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
        if is_on_hub or (key != "dataset_name" and is_bundled(name)):  # do not publish local paths
            facts[renamed.get(key, key)] = name
    log = folder / "train_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for line in lines[-1:]:
        with contextlib.suppress(json.JSONDecodeError):  # a run that was killed leaves an incomplete line
            entry = json.loads(line)
            facts |= {"steps": entry["step"]} | {key: entry[key] for key in ("epoch", "images", "loss", "seconds")}
            facts["batch_size"] = entry["images"] // entry["step"]
    return facts


def _evaluation_records(file: Path) -> list[dict[str, Any]]:
    """Return one record per metric from an `evaluation.json`.

    It holds rows that `mini-ddpm evaluate` wrote, or records of one metric. Any other row is a `ValueError`.
    """
    rows = read_json(file, list)
    records = []
    for i, row in enumerate(rows):
        row = row if isinstance(row, dict) else {}
        if "protocol" in row:
            records += _metric_records(row, next((other for other in rows if other.get("images") == "real"), {}))
        elif isinstance(row.get("metric"), str) and isinstance(row.get("value"), (int, float)):
            records.append(row)
        else:
            raise ValueError(f"{file}: record {i} needs a `metric` (a text) and a `value` (a number).")
    keys = ("metric", "name", "value", "dataset", "split", *PROTOCOL_TEXTS)
    return [{key: record[key] for key in keys if key in record} for record in records]


def _metric_records(row: dict[str, Any], real_row: dict[str, Any]) -> list[dict[str, Any]]:
    """Return one record per metric that a card shows, from the row of a sampler; none from that of real images.

    The notes quote the figures of real images, `real_row`.
    """
    if row["images"] == "real":
        return []
    protocol = row["protocol"]
    network = f"{protocol['feature_extractor']} in {protocol['feature_dtype']}"
    distance = f"against {protocol['reference_images']:,} real images, {network}; real images score "
    nearest = "closer to a training image than any other training image is; unseen real images score "
    records = []
    for key, metric, name, note, number in (
        ("fid", "fid", "FID", distance, "{:.2f}"),
        ("frechet_distance", "frechet_distance", "Fréchet distance", distance, "{:.4g}"),
        ("class_accuracy", "accuracy", "Class accuracy", "judged by a classifier; real images score ", "{:.2%}"),
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
