"""Render a model card from the facts of a pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shlex
import shutil
import unicodedata
from pathlib import Path
from typing import Any
from urllib.parse import quote

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file

from ..files import atomic_write, write_text
from ..options import distilled_steps
from ..pipelines.portable import CARD
from .errors import HTTPError
from .facts import PROTOCOL_TEXTS, model_facts, protocol_text, read_facts
from .load import weights_by_variant

_TEMPLATE = Path(__file__).parent / "model_card.md.jinja"

# The last line of a rendered card. `{}` is a hash of the card above it, so an edited card no longer matches.
_SIGNATURES = (
    "<!-- mini-ddpm rendered this card: {}. Edit it freely: mini-ddpm never overwrites an edited card. -->\n",
    "<!-- mini-ddpm rendered this card: {}. Once edited it is yours, and never overwritten. -->\n",  # older cards
)


def render_card(facts: dict[str, Any]) -> str:
    """Render the model card, metadata and text, from what `read_facts` returns.

    A published pipeline has two more facts: `repo_id`, and `revision`, the commit that holds it.
    """
    facts = _cleaned(facts) | {"description": _without_surrogates(facts.get("description") or "")}
    model, training = facts["model"], facts.get("training", {})
    name = _clip(str(facts.get("repo_id") or model["pipeline"]).split("/")[-1], 96)
    papers = _papers(model, training)
    evaluation = [_evaluation_row(record, training.get("dataset")) for record in facts.get("evaluation", [])]
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Image generation",
            dataset_type=row["dataset"],
            dataset_name=row["dataset"],
            dataset_split=row.get("split"),
            metric_type=row["metric"],
            metric_name=f"{row['name']} ({row['protocol']})" if row["protocol"] else row["name"],
            metric_value=row["value"],
        )
        for row in evaluation
        if row["dataset"]  # the Hub requires a dataset
    ]
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=facts.get("license"),
        datasets=sorted({row["dataset"] for row in (*evaluation, training) if row.get("dataset")}) or None,
        tags=["mini-ddpm", "diffusion", "ddpm", "image-generation", *(f"arxiv:{paper}" for paper in papers)],
        eval_results=results or None,
        model_name=name if results else None,
    )
    size = model.get("sample_size")
    height, width = size if isinstance(size, list) else (size, size)
    context = facts | {
        "name": name,
        "training": training,
        "papers": papers,
        "evaluation": _evaluation_table(evaluation),
        "distilled": distilled_steps(model) is not None,
        "sampling": protocol_text(
            {key: model[f"default_{key}"] for key in PROTOCOL_TEXTS if f"default_{key}" in model}
        ),
    }
    context |= {"size": f"{width}×{height}" if size else None}

    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"prose": _prose, "span": _span, "literal": _literal, "shell": shlex.quote, "url": quote}
    environment.filters |= {"clip": _clip}
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(context)
    card = str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text.strip()}\n\n"))
    return _signed(card)[0]


def _cleaned(value: Any) -> Any:
    """Return facts whose texts are valid Unicode, of one line and not endless, at any depth."""
    if isinstance(value, dict):
        return {_cleaned(key): _cleaned(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_cleaned(item) for item in value]
    if not isinstance(value, str):
        return value
    text = "".join(" " if unicodedata.category(c) in ("Cc", "Zl", "Zp") else c for c in _without_surrogates(value))
    return _clip(" ".join(text.split()), 2_000)


def _without_surrogates(text: str) -> str:
    """Return a text without lone surrogates, which JSON can hold and UTF-8 cannot."""
    return text.encode("utf-8", "replace").decode("utf-8")


def _clip(text: str, length: int) -> str:
    """Return a text of at most this length."""
    return text if len(text) <= length else text[: length - 1] + "…"


def _prose(value: Any) -> str:
    """Return a value as text of a Markdown paragraph or table: it shows as it is, whatever marks it holds."""
    text = re.sub(r"([\\`*\[\]|])", r"\\\1", str(value))
    text = re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # within a word it is no mark
    return re.sub(r"&(?=#?\w+;)", "&amp;", text).replace("<", "&lt;").replace(">", "&gt;")


def _span(value: Any) -> str:
    """Return a value as a Markdown code span, also if it holds backticks."""
    text = str(value)
    if "`" not in text:
        return f"`{text}`"
    fence = "`" * (1 + max(map(len, re.findall("`+", text))))
    return f"{fence} {text} {fence}"


def _literal(value: Any) -> str:
    """Return a text as a string in Python."""
    return json.dumps(str(value), ensure_ascii=False)


def is_rendered(file: Path) -> bool:
    """Return whether a card is exactly as it was rendered, so that replacing it loses nothing."""
    text = file.read_text(encoding="utf-8", errors="replace")
    return text == CARD or text in _signed(text.rpartition(_SIGNATURES[0].partition("{")[0])[0])


def _signed(card: str) -> list[str]:
    """Return a card with its signature, then with that of older versions."""
    digest = hashlib.sha256(card.encode()).hexdigest()[:16]
    return [card + signature.format(digest) for signature in _SIGNATURES]


def write_card(pipe: Any, folder: Path) -> None:
    """Write `README.md` into the folder of a saved pipeline. Keep a card that a person wrote or edited.

    If the weights are still those that the pipeline was loaded with, the facts beside them (training, evaluation,
    picture) and a hand-written card are copied into the folder first.
    """
    source = pipe._source_folder()
    if source is not None and source.resolve() != folder.resolve() and holds_weights(source, pipe.unet):
        write_card_like(source, folder)
    else:
        _write_rendered_card(folder)


def write_card_like(source: Path, folder: Path) -> None:
    """Write the card of a pipeline's folder whose weights are those in another folder, with what is known there."""
    _copy_facts_and_card(source, folder)
    _write_rendered_card(folder)


def _write_rendered_card(folder: Path) -> None:
    card = folder / "README.md"
    if not card.is_file() or is_rendered(card):
        write_text(card, render_card(read_facts(folder)))


def export_card(folder: Path, facts: dict[str, Any], out: Path) -> None:
    """Write the card, the facts and the picture of the pipeline in `folder` to the folder `out`."""
    write_text(out / "README.md", render_card(_write_facts(facts, folder, out)))


def _write_facts(facts: dict[str, Any], source: Path, target: Path) -> dict[str, Any]:
    """Write `facts.json` and its picture, `samples.png`, to the folder `target`. Return what was written."""
    if "picture" in facts:
        _copy(source / facts["picture"], target / "samples.png")
        facts = facts | {"picture": "samples.png"}
    write_text(target / "facts.json", json.dumps(facts, indent=2) + "\n")
    return facts


def _papers(model: dict[str, Any], training: dict[str, Any]) -> dict[str, str]:
    """Return the papers whose methods a model uses: arXiv number and title."""
    papers = {"2006.11239": "Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020"}
    if "DDIM" in model["scheduler"]:
        papers["2010.02502"] = "Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2020"
    if model.get("beta_schedule") == "squaredcos_cap_v2":
        papers["2102.09672"] = "Nichol, Dhariwal: Improved Denoising Diffusion Probabilistic Models, 2021"
    if model.get("prediction_type") == "v_prediction" or distilled_steps(model) is not None:
        papers["2202.00512"] = "Salimans, Ho: Progressive Distillation for Fast Sampling of Diffusion Models, 2022"
    if "num_class_embeds" in model:
        papers["2207.12598"] = "Ho, Salimans: Classifier-Free Diffusion Guidance, 2022"
    if "snr_gamma" in training:
        papers["2303.09556"] = "Hang et al.: Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023"
    if model.get("default_guidance_scale") == 1:
        papers["2210.03142"] = "Meng et al.: On Distillation of Guided Diffusion Models, 2022"
    if training.get("adversarial_weight"):
        papers["2405.14867"] = "Yin et al.: Improved Distribution Matching Distillation for Fast Image Synthesis, 2024"
    if training.get("sharpening_weight"):
        papers["2510.03597"] = "Alemohammad, Wang, Baraniuk: Neon: Negative Extrapolation From Self-Training, 2025"
    return papers


def _evaluation_row(record: dict[str, Any], training_dataset: str | None) -> dict[str, Any]:
    """Return an evaluation record with the texts that the card's table shows for it."""
    is_share = record["metric"] in ("accuracy", "memorization")
    return {
        **record,
        "name": record.get("name") or record["metric"],
        "text": f"{record['value']:.2%}" if is_share else f"{record['value']:.4g}",
        "dataset": record.get("dataset") or training_dataset,
        "protocol": protocol_text(record),
    }


def _evaluation_table(records: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the card's table of figures: a row for each way of sampling and a column for each metric.

    `data` and `shared` are what all rows have in common; they stand above the table. `notes` stand below it.
    """
    columns = list(dict.fromkeys((record["metric"], record["name"]) for record in records))
    rows: list[dict[str, Any]] = []
    notes: dict[str, dict[str, str]] = {}  # by metric: the row that a note belongs to, by note
    for record in records:
        column = columns.index((record["metric"], record["name"]))
        data = ", split ".join(filter(None, (record["dataset"], record.get("split"))))
        settings = {key: record[key] for key in PROTOCOL_TEXTS if key != "note" and key in record}
        row = next((row for row in rows if (row["data"], row["settings"]) == (data, settings)), None)
        if row is None or row["cells"][column]:
            row = {"data": data, "settings": settings, "cells": [""] * len(columns)}
            rows.append(row)
        row["cells"][column] = record["text"]
        if note := record.get("note"):
            notes.setdefault(record["name"], {}).setdefault(note, protocol_text(settings))
    data = rows[0]["data"] if len({row["data"] for row in rows}) == 1 else ""
    shared = {
        key: value
        for key, value in (rows[0]["settings"].items() if len(rows) > 1 else ())
        if all(row["settings"].get(key) == value for row in rows)
    }
    for row in rows:
        own = protocol_text({key: value for key, value in row["settings"].items() if key not in shared})
        row["label"] = ": ".join(filter(None, (row["data"] if not data else "", own)))
    return {
        "data": data,
        "shared": protocol_text(shared),
        "columns": [name for _, name in columns],
        "rows": rows,
        "notes": [
            (name if len(texts) == 1 else f"{name} ({row})", text)
            for name, texts in notes.items()
            for text, row in texts.items()
        ],
    }


def _copy_facts_and_card(source: Path, folder: Path) -> None:
    """Copy the picture, the facts and a hand-written card from one pipeline's folder to another."""
    if source.parent.name == "snapshots" and not (source / "facts.json").exists():
        # The pipeline is in the Hub's cache, and diffusers did not download these files. Offline: fewer facts.
        repo_id, files = "/".join(source.parents[1].name.split("--")[1:]), ["facts.json", "samples.png"]
        with contextlib.suppress(OSError, HTTPError, HFValidationError):
            snapshot_download(repo_id, revision=source.name, cache_dir=source.parents[2], allow_patterns=files)
    facts = {key: value for key, value in read_facts(source).items() if key not in ("model", "repo_id", "revision")}
    if facts:
        _write_facts({"model": model_facts(folder)} | facts, source, folder)
    card = source / "README.md"
    if card.is_file() and not is_rendered(card) and not (folder / "README.md").exists():
        _copy(card, folder / "README.md")


def holds_weights(folder: Path, unet: torch.nn.Module) -> bool:
    """Return whether a pipeline's folder holds the weights of a network, in any precision."""
    state = unet.state_dict()
    for files in weights_by_variant(folder / "unet").values():
        stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
        if stored.keys() == state.keys() and all(
            torch.equal(tensor.to(state[key].dtype), state[key].cpu()) for key, tensor in stored.items()
        ):
            return True
    return False


def _copy(source: Path, target: Path) -> None:
    with atomic_write(target) as file:
        shutil.copyfile(source, file)
