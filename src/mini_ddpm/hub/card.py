"""The model card, rendered from facts and nothing else."""

from __future__ import annotations

import contextlib
import hashlib
import json
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import (
    EvalResult,
    ModelCard,
    ModelCardData,
    snapshot_download,
)
from huggingface_hub.errors import (
    HFValidationError,
)
from safetensors.torch import load_file

from ..pipelines.pipeline_mini_ddpm import CARD
from .errors import HTTPError
from .facts import _PROTOCOL, _model_facts, read_facts
from .load import _weights

_TEMPLATE = Path(__file__).parent / "model_card.md.jinja"


_SIGNATURE = "<!-- mini-ddpm rendered this card: {}. Once edited it is yours, and never overwritten. -->\n"


def render_card(facts: dict[str, Any]) -> str:
    """Renders the model card: metadata and text, of what `read_facts` found and of nothing else.

    Two more facts are known once a pipeline is published: `repo_id`, and `revision`, the commit that holds it.
    """
    model, training = facts["model"], facts.get("training", {})
    data = {"name": str(facts.get("repo_id") or model["pipeline"]).split("/")[-1], "dataset": training.get("dataset")}
    papers = ["2006.11239"]
    for paper, is_used in (
        ("2010.02502", "DDIM" in model["scheduler"]),
        ("2102.09672", model.get("beta_schedule") == "squaredcos_cap_v2"),
        (
            "2202.00512",
            model.get("prediction_type") == "v_prediction" or "default_num_inference_steps" in model,
        ),
        ("2207.12598", "num_class_embeds" in model),
        ("2303.09556", "snr_gamma" in training),
        ("2210.03142", model.get("default_guidance_scale") == 1),
    ):
        papers += [paper] * is_used
    evaluation = []
    for record in facts.get("evaluation", []):
        protocol = [text.format(record[key]) for key, text in _PROTOCOL.items() if record.get(key) is not None]
        is_share = record["metric"] in ("accuracy", "memorization")
        value = f"{record['value']:.2%}" if is_share else f"{record['value']:.4g}"
        dataset = record.get("dataset") or data["dataset"]
        name = record.get("name") or record["metric"]
        evaluation.append({**record, "name": name, "text": value, "dataset": dataset, "protocol": ", ".join(protocol)})
    results = [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Image generation",
            dataset_type=record["dataset"],
            dataset_name=record["dataset"],
            dataset_split=record.get("split"),
            metric_type=record["metric"],
            metric_name=f"{record['name']} ({record['protocol']})" if record["protocol"] else record["name"],
            metric_value=record["value"],
        )
        for record in evaluation
        if record["dataset"]  # the Hub wants one
    ]
    datasets = sorted({record["dataset"] for record in (*evaluation, data) if record["dataset"]})
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=facts.get("license"),
        datasets=datasets or None,
        tags=["mini-ddpm", "diffusion", "ddpm", "image-generation", *(f"arxiv:{paper}" for paper in papers)],
        **({"eval_results": results, "model_name": data["name"]} if results else {}),
    )
    context = {**data, "model": model, "training": training, "evaluation": evaluation, "papers": papers}
    context |= {key: facts.get(key) for key in ("picture", "repo_id", "revision", "license", "description")}
    context |= {"limitations": facts.get("limitations", [])}
    if size := model.get("sample_size"):
        height, width = size if isinstance(size, list) else (size, size)
        context["size"] = f"{width}×{height}"
    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(context)
    card = str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text.strip()}\n\n"))
    return card + _SIGNATURE.format(_hash(card))


def _is_rendered(file: Path) -> bool:
    """Whether a card is as it was rendered, so that nothing is lost when another takes its place."""
    text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    card, mark, _ = text.partition(_SIGNATURE.partition("{")[0])
    return text == CARD or (mark != "" and text == card + _SIGNATURE.format(_hash(card)))


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_card(pipe: Any, folder: Path) -> None:
    """Writes `README.md` into a saved pipeline's folder, unless a person wrote the one that is there.

    What was recorded of the weights in the folder they were read from (training, evaluation, picture) goes along, as
    long as they are the same weights.
    """
    source = pipe._source_folder()
    if source is not None and source.resolve() != folder.resolve() and _holds_weights(source, pipe.unet):
        if source.parent.name == "snapshots" and not (source / "facts.json").exists():  # in the cache of the Hub
            _, *names = source.parents[1].name.split("--")
            with contextlib.suppress(OSError, HTTPError, HFValidationError):  # without a network there are less facts
                patterns = ["facts.json", "samples.png"]
                snapshot_download(
                    "/".join(names), revision=source.name, cache_dir=source.parents[2], allow_patterns=patterns
                )
        facts = read_facts(source)
        if "picture" in facts:
            shutil.copyfile(source / facts["picture"], folder / "samples.png")
            facts["picture"] = "samples.png"
        if facts.keys() - {"model", "repo_id", "revision"}:
            facts = {key: facts[key] for key in facts if key not in ("repo_id", "revision")} | _model_facts(folder)
            (folder / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
        theirs = source / "README.md"
        if theirs.is_file() and not _is_rendered(theirs) and not (folder / "README.md").exists():
            shutil.copyfile(theirs, folder / "README.md")
    card = folder / "README.md"
    if not card.is_file() or _is_rendered(card):
        card.write_text(render_card(read_facts(folder)), encoding="utf-8")


def export_card(folder: Path, facts: dict[str, Any], out: Path) -> None:
    """Writes the card of the pipeline in `folder` to `out`, with its facts and its picture."""
    out.mkdir(parents=True, exist_ok=True)
    facts = dict(facts)
    if "picture" in facts:
        shutil.copyfile(folder / facts["picture"], out / "samples.png")
        facts["picture"] = "samples.png"
    (out / "facts.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")
    (out / "README.md").write_text(render_card(facts), encoding="utf-8")


def _holds_weights(folder: Path, unet: torch.nn.Module) -> bool:
    """Whether a pipeline's folder holds the weights that a network has, in whatever precision."""
    state = unet.state_dict()
    for files in _weights(folder / "unet").values():
        stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
        if stored.keys() == state.keys() and all(
            torch.equal(tensor.to(state[key].dtype), state[key].cpu()) for key, tensor in stored.items()
        ):
            return True
    return False
