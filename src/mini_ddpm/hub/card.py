"""Render a model card from the facts of a pipeline."""

from __future__ import annotations

import contextlib
import hashlib
import shutil
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData, snapshot_download
from huggingface_hub.errors import HFValidationError
from safetensors.torch import load_file

from ..files import atomic_write
from ..pipelines.portable import CARD
from .errors import HTTPError
from .facts import PROTOCOL_TEXTS, model_facts, read_facts, write_facts
from .load import weights_by_variant

_TEMPLATE = Path(__file__).parent / "model_card.md.jinja"

# The last line of a rendered card. `{}` is a hash of the card above it, so an edited card no longer matches.
_SIGNATURES = (
    "<!-- mini-ddpm rendered this card: {}. Edit it freely: mini-ddpm never overwrites an edited card. -->\n",
    "<!-- mini-ddpm rendered this card: {}. Once edited it is yours, and never overwritten. -->\n",  # older cards
)


def render_card(facts: dict[str, Any]) -> str:
    """Render the model card, metadata and text.

    Args:
        facts: What `read_facts` returns. A published pipeline has two more: `repo_id`, and `revision`, the commit that
            holds it.
    """
    model, training = facts["model"], facts.get("training", {})
    name = str(facts.get("repo_id") or model["pipeline"]).split("/")[-1]
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
    model_index: dict[str, Any] = {"eval_results": results, "model_name": name} if results else {}
    metadata = ModelCardData(
        library_name="diffusers",
        pipeline_tag="unconditional-image-generation",
        license=facts.get("license"),
        datasets=sorted({row["dataset"] for row in (*evaluation, training) if row.get("dataset")}) or None,
        tags=["mini-ddpm", "diffusion", "ddpm", "image-generation", *(f"arxiv:{paper}" for paper in papers)],
        **model_index,
    )
    context = {key: facts.get(key) for key in ("picture", "repo_id", "revision", "license", "description")}
    context |= {"limitations": facts.get("limitations", [])}
    context |= {"name": name, "model": model, "training": training, "evaluation": evaluation, "papers": papers}
    if size := model.get("sample_size"):
        height, width = size if isinstance(size, list) else (size, size)
        context["size"] = f"{width}×{height}"

    import jinja2

    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(_TEMPLATE.read_text(encoding="utf-8")).render(context)
    card = str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{text.strip()}\n\n"))
    return card + _SIGNATURES[0].format(_hash(card))


def is_rendered(file: Path) -> bool:
    """Return whether a card is exactly as it was rendered, so that replacing it loses nothing."""
    text = file.read_text(encoding="utf-8").replace("\r\n", "\n")
    card, mark, _ = text.partition(_SIGNATURES[0].partition("{")[0])
    return text == CARD or (mark != "" and text in [card + signature.format(_hash(card)) for signature in _SIGNATURES])


def write_card(pipe: Any, folder: Path) -> None:
    """Write `README.md` into the folder of a saved pipeline. Keep a card that a person wrote or edited.

    If the weights are still those that the pipeline was loaded with, the facts beside them (training, evaluation,
    picture) and a hand-written card are copied into the folder first.
    """
    source = pipe._source_folder()
    if source is not None and source.resolve() != folder.resolve() and _holds_weights(source, pipe.unet):
        _copy_facts_and_card(source, folder)
    card = folder / "README.md"
    if not card.is_file() or is_rendered(card):
        write_text(card, render_card(read_facts(folder)))


def export_card(folder: Path, facts: dict[str, Any], out: Path) -> None:
    """Write the card, the facts and the picture of the pipeline in `folder` to the folder `out`."""
    facts = dict(facts)
    if "picture" in facts:
        facts["picture"] = _copy(folder / facts["picture"], out / "samples.png")
    write_facts(facts, out)
    write_text(out / "README.md", render_card(facts))


def write_text(target: Path, text: str) -> None:
    """Write a text file, whole or not at all."""
    with atomic_write(target) as file:
        file.write_text(text, encoding="utf-8")


def _papers(model: dict[str, Any], training: dict[str, Any]) -> dict[str, str]:
    """Return the papers whose methods a model uses: arXiv number and title."""
    is_ddim = "DDIM" in model["scheduler"]
    is_cosine = model.get("beta_schedule") == "squaredcos_cap_v2"
    is_distilled_or_v = model.get("prediction_type") == "v_prediction" or "default_num_inference_steps" in model
    has_distilled_guidance = model.get("default_guidance_scale") == 1
    papers = (
        (True, "2006.11239", "Ho, Jain, Abbeel: Denoising Diffusion Probabilistic Models, 2020"),
        (is_ddim, "2010.02502", "Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2020"),
        (is_cosine, "2102.09672", "Nichol, Dhariwal: Improved Denoising Diffusion Probabilistic Models, 2021"),
        (
            is_distilled_or_v,
            "2202.00512",
            "Salimans, Ho: Progressive Distillation for Fast Sampling of Diffusion Models, 2022",
        ),
        ("num_class_embeds" in model, "2207.12598", "Ho, Salimans: Classifier-Free Diffusion Guidance, 2022"),
        (
            "snr_gamma" in training,
            "2303.09556",
            "Hang et al.: Efficient Diffusion Training via Min-SNR Weighting Strategy, 2023",
        ),
        (has_distilled_guidance, "2210.03142", "Meng et al.: On Distillation of Guided Diffusion Models, 2022"),
    )
    return {number: title for is_used, number, title in papers if is_used}


def _evaluation_row(record: dict[str, Any], training_dataset: str | None) -> dict[str, Any]:
    """Return an evaluation record with the texts that the card's table shows for it."""
    is_share = record["metric"] in ("accuracy", "memorization")
    protocol = [text.format(record[key]) for key, text in PROTOCOL_TEXTS.items() if record.get(key) is not None]
    return {
        **record,
        "name": record.get("name") or record["metric"],
        "text": f"{record['value']:.2%}" if is_share else f"{record['value']:.4g}",
        "dataset": record.get("dataset") or training_dataset,
        "protocol": ", ".join(protocol),
    }


def _copy_facts_and_card(source: Path, folder: Path) -> None:
    """Copy the picture, the facts and a hand-written card from one pipeline's folder to another."""
    if source.parent.name == "snapshots" and not (source / "facts.json").exists():
        # The pipeline is in the Hub's cache, and diffusers did not download these files. Offline: fewer facts.
        _, *names = source.parents[1].name.split("--")
        with contextlib.suppress(OSError, HTTPError, HFValidationError):
            snapshot_download(
                "/".join(names),
                revision=source.name,
                cache_dir=source.parents[2],
                allow_patterns=["facts.json", "samples.png"],
            )
    facts = read_facts(source)
    if "picture" in facts:
        facts["picture"] = _copy(source / facts["picture"], folder / "samples.png")
    if facts.keys() - {"model", "repo_id", "revision"}:
        kept = {key: value for key, value in facts.items() if key not in ("repo_id", "revision")}
        write_facts(kept | {"model": model_facts(folder)}, folder)
    card = source / "README.md"
    if card.is_file() and not is_rendered(card) and not (folder / "README.md").exists():
        _copy(card, folder / "README.md")


def _holds_weights(folder: Path, unet: torch.nn.Module) -> bool:
    """Return whether a pipeline's folder holds the weights of a network, in any precision."""
    state = unet.state_dict()
    for files in weights_by_variant(folder / "unet").values():
        stored = {key: tensor for file in files for key, tensor in load_file(file).items()}
        if stored.keys() == state.keys() and all(
            torch.equal(tensor.to(state[key].dtype), state[key].cpu()) for key, tensor in stored.items()
        ):
            return True
    return False


def _copy(source: Path, target: Path) -> str:
    """Copy a file and return the name of the copy."""
    with atomic_write(target) as file:
        shutil.copyfile(source, file)
    return target.name


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
