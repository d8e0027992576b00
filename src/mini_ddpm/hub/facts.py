"""What is known of a pipeline, read from its folder."""

from __future__ import annotations

import contextlib
import json
import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from .load import _weights, is_bundled

_PROTOCOL = {  # how the fields of an evaluation's record read in a table
    "num_images": "{:,} images",
    "num_inference_steps": "{} steps",
    "scheduler": "{}",
    "guidance_scale": "guidance {}",
    "guidance_interval": "from {0[0]:g} to {0[1]:g} of the way",
    "eta": "eta {}",
    "seed": "seed {}",
    "dtype": "{}",
    "note": "{}",
}


def read_facts(folder: Path) -> dict[str, Any]:
    """Gathers what is known of a pipeline from its folder; what is not known has no key.

    `model` comes from the configurations and the weights' headers. The rest comes from `facts.json`, which travels
    with the pipeline and may be edited (`license`, `description`, `limitations`: a text, a text, a list), and where a
    training run left its files from those: most of `training` from `train_config.json` and the last line of
    `train_log.jsonl`, `picture` from `samples.png` or the newest grid in `samples/`. `evaluation` comes from
    `evaluation.json`: what `mini-ddpm evaluate` wrote, or a list of records with `metric`, `value` and, each optional,
    `name`, `dataset`, `split`, `num_images`, `num_inference_steps`, `scheduler`, `guidance_scale`,
    `guidance_interval`, `eta`, `seed`, `dtype`, `note`.

    Raises:
        ValueError: A file is not what it should be.
    """
    facts = _model_facts(folder)
    if (folder / "facts.json").is_file():
        facts |= {key: value for key, value in _read_json(folder / "facts.json", dict).items() if key != "model"}
    if (folder / "train_config.json").is_file():
        facts["training"] = facts.get("training", {}) | _training_facts(folder)
    if (folder / "evaluation.json").is_file():
        file = folder / "evaluation.json"
        facts["evaluation"] = _evaluation_facts(_read_json(file, list), file)
    facts.pop("picture", None)
    if pictures := [*sorted(folder.glob("samples/epoch-*.png")), *folder.glob("samples.png")]:
        facts["picture"] = pictures[-1].relative_to(folder).as_posix()
    return facts


def _read_json(file: Path, kind: type) -> Any:
    if not file.is_file():
        raise OSError(f"{file.parent} is no pipeline: it has no {file.name}.")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid JSON: {error}.") from error
    if not isinstance(content, kind):
        raise ValueError(f"{file} must hold a JSON {'list' if kind is list else 'object'}.")
    return content


def _model_facts(folder: Path) -> dict[str, Any]:
    index = _read_json(folder / "model_index.json", dict)

    def class_name(value: Any) -> Any:
        return value[-1] if isinstance(value, list) else value

    unet = _read_json(folder / "unet" / "config.json", dict)
    scheduler = _read_json(folder / "scheduler" / "scheduler_config.json", dict)
    model = {"pipeline": class_name(index["_class_name"]), "unet": class_name(index["unet"])}
    model |= {"scheduler": class_name(index["scheduler"])}
    for config, keys in (
        (unet, ("sample_size", "in_channels", "block_out_channels", "layers_per_block", "num_class_embeds")),
        (scheduler, ("num_train_timesteps", "beta_schedule", "prediction_type")),
    ):
        model |= {key: config[key] for key in keys if config.get(key) is not None}
    model |= {key: value for key, value in index.items() if key.startswith("default_")}
    if labels := index.get("id2label"):
        model["labels"] = list(labels.values())
    for files in list(_weights(folder / "unet").values())[:1]:
        count, dtypes = 0, set()
        for file in files:
            with safe_open(file, framework="pt") as weights:
                for key in weights.keys():  # noqa: SIM118
                    tensor = weights.get_slice(key)
                    count += int(torch.Size(tensor.get_shape()).numel())
                    dtypes.add({"F32": "float32", "F16": "float16", "BF16": "bfloat16"}.get(tensor.get_dtype()))
        model |= {"parameters": count} | ({"dtype": dtype} if (dtype := dtypes.pop()) and not dtypes else {})
    return {"model": model}


def _training_facts(folder: Path) -> dict[str, Any]:
    config = _read_json(folder / "train_config.json", dict)
    keys = ["split", "learning_rate", "lr_scheduler", "ema_max_decay", "snr_gamma", "saturation_margin"]
    keys += ["mixed_precision", "seed", "guidance_scale"]  # the last where it was distilled in
    facts = {key: config[key] for key in keys if config.get(key) not in (None, "auto")}
    if config.get("guidance_interval", [0, 1]) != [0, 1]:
        facts["guidance_interval"] = config["guidance_interval"]
    if config.get("class_conditional"):
        facts["class_dropout_prob"] = config["class_dropout_prob"]
    for key, names in (
        ("dataset", "dataset_name"),
        ("started_from", "pretrained_model_name_or_path"),
        ("distilled_from", "distilled_from"),
    ):
        name = str(config.get(names))
        is_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", name) and not Path(name).exists()
        if is_hub or (key != "dataset" and is_bundled(name)):  # a folder is nobody's business
            facts[key] = name
    log = folder / "train_log.jsonl"
    lines = log.read_text(encoding="utf-8").splitlines() if log.is_file() else []
    for line in lines[-1:]:
        with contextlib.suppress(json.JSONDecodeError):  # a killed run was writing it
            entry = json.loads(line)
            facts |= {"steps": entry["step"]} | {key: entry[key] for key in ("epoch", "images", "loss", "seconds")}
            facts["batch_size"] = entry["images"] // entry["step"]
    return facts


def _evaluation_facts(rows: list[Any], file: Path) -> list[dict[str, Any]]:
    """The records to show, of those in an `evaluation.json`: what `evaluate` wrote, or records of one figure each."""
    records = []
    for i, row in enumerate(rows):
        if isinstance(row, dict) and "protocol" in row:
            records += _figures(row, next((other for other in rows if other.get("images") == "real"), {}))
        elif (
            isinstance(row, dict) and isinstance(row.get("metric"), str) and isinstance(row.get("value"), (int, float))
        ):
            records.append(row)
        else:
            raise ValueError(f"{file}: record {i} needs a `metric` (a text) and a `value` (a number).")
    keys = ("metric", "name", "value", "dataset", "split", *_PROTOCOL)
    return [{key: record[key] for key in keys if key in record} for record in records]


def _figures(row: dict[str, Any], floor: dict[str, Any]) -> list[dict[str, Any]]:
    """One record for each figure of a row of `evaluate`'s that belongs on a card, beside that of real images."""
    if row["images"] == "real":
        return []
    protocol = row["protocol"]
    network = f"{protocol['feature_extractor']} in {protocol['feature_dtype']}"
    distance = f"against {protocol['reference_images']:,} real ones, {network}; real images: "
    records = []
    for key, metric, name, real, reading in (
        ("fid", "fid", "FID", distance, "{:.2f}"),
        ("frechet_distance", "frechet_distance", "Fréchet distance", distance, "{:.4g}"),
        ("class_accuracy", "accuracy", "Class accuracy", "read by a classifier, right on real images: ", "{:.2%}"),
        (
            "memorization",
            "memorization",
            "Memorization",
            "nearer to one trained on than it to others; unseen real images: ",
            "{:.1%}",
        ),
    ):
        if key in row:
            record = {**row, "metric": metric, "name": name, "value": row[key], "split": protocol["split"]}
            if "/" in protocol["dataset"]:  # a name on the Hub
                record["dataset"] = protocol["dataset"]
            if key in floor:
                record["note"] = real + reading.format(floor[key])
            records.append({key: value for key, value in record.items() if key != "eta" or value})
    return records
