"""The Hub: push and pull in every way that is offered, model cards, and the messages of failures.

The real client runs in a process of its own, with its own cache, against the loopback Hub of `conftest.py`.
"""

import hashlib
import importlib
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import venv
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import READ_TOKEN, TOKEN
from diffusers import DiffusionPipeline
from huggingface_hub import ModelCard, errors
from PIL import Image
from safetensors.torch import load_file, save_file
from test_remote_code import DIGITS, PRELUDE, commit, draw, unet_of_diffusers

import mini_ddpm
import mini_ddpm_cli
from mini_ddpm import (
    PRETRAINED,
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    MiniDDPMScheduler,
)
from mini_ddpm.files import atomic_write
from mini_ddpm.hub.card import is_rendered, render_card
from mini_ddpm.hub.errors import HTTPError, explain_hub_errors
from mini_ddpm.hub.facts import read_facts, refuse_links_to_elsewhere
from mini_ddpm.hub.publish import replacement_key, staged_pipeline
from mini_ddpm.pipelines.portable import CARD, write_checksums

ROOT = Path(__file__).parents[1]
PLACEHOLDER = "[More Information Needed]"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory, tiny_unet):
    """The files of a training run (pipeline, checkpoint, grids, logs) and of an evaluation."""
    folder = tmp_path_factory.mktemp("runs") / "digits"
    MiniDDPMClassConditionalPipeline(
        tiny_unet(), MiniDDPMScheduler(prediction_type="v_prediction"), DIGITS
    ).save_pretrained(folder)
    (folder / "README.md").unlink()
    (folder / "checkpoint-20").mkdir()
    (folder / "checkpoint-20" / "optimizer.bin").write_bytes(b"0" * 1000)
    for name in ("notes.txt", ".config.json", "optimizer.bin"):  # not the pipeline's
        (folder / "unet" / name).write_text("/home/me")
    (folder / "samples").mkdir()
    for epoch in (1, 2):
        Image.new("L", (8, 8), epoch).save(folder / "samples" / f"epoch-{epoch:04d}.png")
    config = {"dataset_name": "ylecun/mnist", "split": "train", "output_dir": "/home/me/runs", "seed": 7}
    config |= {"learning_rate": 1e-3, "class_conditional": True, "class_dropout_prob": 0.1, "snr_gamma": None}
    (folder / "train_config.json").write_text(json.dumps(config))
    entries = [
        {"step": n, "epoch": n / 10, "images": 64 * n, "loss": 0.0625, "seconds": 90.0, "lr": 0.0} for n in (10, 20)
    ]
    (folder / "train_log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    # A record written by hand, and two that `mini-ddpm evaluate` writes: real images and one sampler.
    protocol = {"feature_extractor": "Inception (2015)", "feature_dtype": "bf16", "dataset": "ylecun/mnist"}
    protocol |= {"split": "test", "reference_images": 10_000, "num_images": 1000, "seed": 0}
    sampler = {"scheduler": "MiniDDIMScheduler", "num_inference_steps": 20, "eta": 0.0, "dtype": "fp32"}
    records = [
        {"metric": "kid", "name": "KID", "value": 0.5, "dataset": "ylecun/mnist", "num_inference_steps": 50},
        {"images": "real", "num_images": 1000, "fid": 1.5, "class_accuracy": 0.995, "protocol": protocol},
        {
            "images": "generated",
            "num_images": 1000,
            "fid": 3.25,
            "class_accuracy": 0.985,
            "protocol": protocol,
            **sampler,
        },
    ]
    (folder / "evaluation.json").write_text(json.dumps(records))
    return folder


def relative(folder):
    return {path.relative_to(folder).as_posix() for path in Path(folder).rglob("*") if path.is_file()}


def without_hash(names):
    return {re.sub(r"_[0-9a-f]{8}\.py$", "_#.py", name) for name in names}


# ---- The card -----------------------------------------------------------------------------------------------------


def sections(card):
    return re.findall(r"^## (.+)$", card, flags=re.M)


def test_card_shows_the_facts_of_its_folder(run_folder):
    card = render_card(read_facts(run_folder) | {"repo_id": "user/digits", "revision": "0" * 40})
    data = ModelCard(card).data
    tags = data.to_dict()
    assert tags["library_name"] == "diffusers" and tags["pipeline_tag"] == "unconditional-image-generation"
    assert data.datasets == ["ylecun/mnist"] and "mini-ddpm" in data.tags and data.license is None
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "kid": 0.5,
        "fid": 3.25,
        "accuracy": 0.985,
    }
    assert sections(card) == [
        "How to use", "Evaluation", "Limitations", "The model", "Training", "Licence", "Citation",
    ]  # fmt: skip
    for text in (
        "# digits\n",
        "8×8 pixels",
        "![Images that this model generated](samples/epoch-0002.png)",
        'load_pipeline("user/digits")',
        'MiniDDPMClassConditionalPipeline.from_pretrained("user/digits")',
        'DiffusionPipeline.from_pretrained("user/digits")',
        'MiniUNet2DModel.from_pretrained("user/digits", subfolder="unet")',
        "trust_remote_code=True",
        f'revision="{"0" * 40}"',
        "mini-ddpm sample user/digits",
        "20 steps of AdamW with a batch size of 64, 2 epochs, 1,280 images seen, in 2 minutes.",
        "Final training loss: 0.0625",
        "Training data: [ylecun/mnist](https://huggingface.co/datasets/ylecun/mnist), split `train`.",
        "| Sampling | KID | FID | Class accuracy |\n|---|--:|--:|--:|\n| ylecun/mnist: 50 steps | 0.5 |  |  |\n"
        "| ylecun/mnist, split test: 1,000 images, 20 steps, MiniDDIMScheduler, fp32 |  | 3.25 | 98.50% |\n\n",
        "- FID: distance to 10,000 real images, Inception (2015) in bf16; other real images score 1.50\n",
        "- Class accuracy: share of images in which a classifier sees the right class; real images score 99.50%\n",
        "zero, one, two",
        "2207.12598",
    ):
        assert text in card, text
    assert "/home/me" not in card and PLACEHOLDER not in card and "None" not in card
    assert "\n\n\n" not in card


def test_card_without_facts_is_short(tiny_unet, tmp_path):
    MiniDDPMPipeline(tiny_unet(num_class_embeds=None), MiniDDPMScheduler()).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert sections(card) == ["How to use", "Limitations", "The model", "Licence", "Citation"]
    assert PLACEHOLDER not in card and "None" not in card and "\n\n\n" not in card
    assert ModelCard(card).data.datasets is None and "model-index" not in card and "![" not in card
    assert not (tmp_path / "facts.json").exists()


def test_python_in_the_card_runs(run_folder, tmp_path, monkeypatch):
    """The code for readers who have the package, as the card of a folder spells it."""
    with staged_pipeline(run_folder) as folder:
        card = render_card(read_facts(folder)).replace("path/to/this/folder", str(folder))
        first, second = re.findall(r"```python\n(.*?)```", card, flags=re.S)
        names = {}
        monkeypatch.chdir(tmp_path)
        exec(first, names)
        with Image.open("image.png") as image:
            assert len(names["images"]) == 2 and image.size == (8, 8)
        compile(second, "card", "exec")
        others = re.findall(r"^- `(.*\.from_pretrained\(.*\))`", card, flags=re.M)
        opened = [eval(code, {"mini_ddpm": mini_ddpm, "diffusers": diffusers}) for code in others]
        assert [type(part) for part in opened] == [type(names["pipe"])] * 2 + [mini_ddpm.MiniUNet2DModel]


def test_facts_are_copied_with_the_same_weights_only(run_folder, tmp_path):
    pipe = mini_ddpm.load_pipeline(run_folder)
    pipe.save_pretrained(tmp_path / "same")
    assert read_facts(tmp_path / "same")["evaluation"] == read_facts(run_folder)["evaluation"]
    assert (tmp_path / "same/samples.png").read_bytes() == (run_folder / "samples/epoch-0002.png").read_bytes()
    again = mini_ddpm.load_pipeline(tmp_path / "same", dtype=torch.float16)
    again.save_pretrained(tmp_path / "half", variant="fp16")
    facts = read_facts(tmp_path / "half")
    assert facts["training"]["steps"] == 20 and facts["model"]["dtype"] == "float16"

    torch.nn.init.zeros_(next(pipe.unet.parameters()))
    pipe.save_pretrained(tmp_path / "other")
    assert read_facts(tmp_path / "other").keys() == {"model"}
    assert "Evaluation" not in sections((tmp_path / "other/README.md").read_text())


def test_a_card_that_a_person_edited_is_kept(run_folder, tmp_path):
    pipe = mini_ddpm.load_pipeline(run_folder)
    pipe.save_pretrained(tmp_path / "a")
    card = tmp_path / "a/README.md"
    ours = card.read_text()
    card.write_text(ours.replace("## Limitations", "## What it cannot do"))
    edited = card.read_text()
    pipe.save_pretrained(tmp_path / "a")
    assert card.read_text() == edited
    mini_ddpm.load_pipeline(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b/README.md").read_text() == edited
    card.write_bytes("Meine Häuser".encode("latin-1"))  # of a person too
    pipe.save_pretrained(tmp_path / "a")
    assert card.read_bytes() == "Meine Häuser".encode("latin-1")
    card.write_bytes(ours.replace("\n", "\r\n").encode())  # a checkout on Windows is no edit
    pipe.save_pretrained(tmp_path / "a")
    assert card.read_bytes() == ours.encode()


def test_cards_of_the_version_before_count_as_rendered(run_folder, tmp_path):
    card, file = render_card(read_facts(run_folder)), tmp_path / "README.md"
    older = re.sub(r"(?<=[0-9a-f]{16}\. ).* -->\n$", "Once edited it is yours, and never overwritten. -->\n", card)
    assert older != card
    for text, expected in ((card, True), (older, True), (CARD, True), (card + "\n", False), (CARD + "\n", False)):
        file.write_text(text)
        assert is_rendered(file) is expected, text[-200:]
    for text in (card, older, CARD):
        file.write_text(text.replace("diffusion", "Diffusion"))
        assert not is_rendered(file)
    file.write_text(older.replace("and never", "never"))
    assert not is_rendered(file)


def test_card_of_a_distilled_pipeline(run_folder):
    """Every line of the card that depends on a fact which the other tests do not have."""
    facts = read_facts(run_folder)
    plain = render_card(facts)
    facts["model"] |= {"scheduler": "MiniDDIMScheduler", "sample_size": [8, 12], "in_channels": 3}
    facts["model"] |= {"default_num_inference_steps": 4, "default_guidance_scale": 1.0}
    facts["training"] |= {"snr_gamma": 5.0, "distilled_from": "user/teacher", "adversarial_weight": 0.1}
    facts["training"] |= {"sharpened_from": "user/plain", "sharpening_weight": 0.5}
    facts |= {"description": "Digits in colour.", "license": "mit", "limitations": ["No letters."]}
    card = render_card(facts)
    for text in (
        "Digits in colour.\n\nA class-conditional diffusion model of colour images of 12×8 pixels, for",
        "Made with mini-ddpm. It is distilled: an image takes 4 steps.\n",
        "| Distilled | steps per image: 4, with one network evaluation each; guidance is distilled into the weights,",
        'load_pipeline("path/to/this/folder")',
        "pipe([0, 1]).images",
        "- `distilled_from`: user/teacher\n",
        "- `snr_gamma`: 5.0\n",
        "- No letters.\n",
        "The weights: `mit`. The source files",
        "Song, Meng, Ermon: Denoising Diffusion Implicit Models, 2020, [arXiv:2010.02502](https://arxiv.org/abs/2010.02502)",
    ):
        assert text in card and text not in plain.replace("path/to/this/folder", ""), text
    assert "pipe([0, 1], num_inference_steps=20).images" in plain and "greyscale images of 8×8 pixels" in plain
    always = {"2006.11239", "2102.09672", "2202.00512", "2207.12598"}
    others = {"2010.02502", "2303.09556", "2210.03142", "2405.14867", "2510.03597"}
    for text, papers in ((plain, always), (card, always | others)):
        assert set(re.findall(r"\[arXiv:([\d.]+)\]\(https://arxiv.org/abs/\1\)", text)) == papers
        assert {tag.removeprefix("arxiv:") for tag in ModelCard(text).data.tags if "arxiv" in tag} == papers


def test_card_cites_progressive_distillation_for_either_reason(run_folder):
    facts = read_facts(run_folder)
    for steps, is_cited in (({}, False), ({"default_num_inference_steps": 4}, True)):
        card = render_card(facts | {"model": facts["model"] | {"prediction_type": "epsilon"} | steps})
        assert ("2202.00512" in card) is is_cited and "2006.11239" in card


def test_dataset_of_an_evaluation(run_folder):
    """A record without a dataset is of the training dataset. Without that, the metadata leave it out."""
    facts = read_facts(run_folder) | {"evaluation": [{"metric": "kid", "value": 1.5}]}
    for training, expected in (({"dataset": "user/data"}, ["user/data"]), ({}, [])):
        card = render_card(facts | {"training": training})
        assert [result.dataset_type for result in ModelCard(card).data.eval_results or []] == expected
        assert "| Sampling | kid |\n|---|--:|\n|  | 1.5 |\n" in card
        assert ("Compared with user/data.\n" in card) is bool(expected) and "Compared with None" not in card
    facts["evaluation"][0]["dataset"] = "user/other"
    card = render_card(facts | {"training": {"dataset": "user/data"}})
    assert "Compared with user/other.\n" in card and ModelCard(card).data.datasets == ["user/data", "user/other"]


def test_the_table_of_figures_has_a_row_for_each_way_of_sampling(run_folder):
    """What all rows share stands above, what a figure means below. No record is lost, whatever the records are."""
    few = {"metric": "fid", "name": "FID", "value": 9.5, "num_images": 100, "num_inference_steps": 1, "note": "one"}
    records = [few, few | {"num_inference_steps": 8, "value": 8.5}, few | {"metric": "kid", "name": "KID", "value": 2}]

    def table(records):
        card = render_card(read_facts(run_folder) | {"evaluation": records})
        return (
            card.partition("## Evaluation\n\n")[2].partition("\n\n## ")[0].replace("Compared with ylecun/mnist. ", "")
        )

    head, rule = "| Sampling | FID | KID |\n", "|---|--:|--:|\n"
    notes = "\n\n- FID: one\n- KID: one"
    rows = "| 1 step | 9.5 | 2 |\n| 8 steps | 8.5 |  |"
    assert table(records) == f"In all rows: 100 images.\n\n{head}{rule}{rows}{notes}"
    # The same metric twice for one way of sampling, and two notes for one metric.
    records.append(few | {"value": 7.5, "note": "two"})
    notes = "\n\n- FID (100 images, 1 step): one\n- FID (100 images, 1 step): two\n- KID: one"
    assert table(records) == f"In all rows: 100 images.\n\n{head}{rule}{rows}\n| 1 step | 7.5 |  |{notes}"


def test_facts_of_the_weights(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    count = sum(tensor.numel() for tensor in tensors.values())
    half = {key: tensor.half() for key, tensor in tensors.items()}
    save_file(half, weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    facts = read_facts(folder)["model"]  # of the weights without a variant, where there are both
    assert facts["parameters"] == count > 0 and facts["dtype"] == "float32"
    first = next(iter(tensors))
    for content in (tensors | {first: half[first]}, {key: tensor.double() for key, tensor in tensors.items()}):
        save_file(content, weights)
        facts = read_facts(folder)["model"]  # mixed, or unusual
        assert facts["parameters"] == count and "dtype" not in facts


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        ({"dataset_name": "runs/here"}, {}),  # a folder that exists is not a repository
        ({"dataset_name": "user/data", "split": "train"}, {"dataset": "user/data", "split": "train"}),
        ({"dataset_name": "mnist"}, {}),  # a bundled pipeline is no data set
        ({"pretrained_model_name_or_path": "mnist"}, {"started_from": "mnist"}),
        ({"pretrained_model_name_or_path": "/home/me/runs"}, {}),
        ({"distilled_from": "user/teacher"}, {"distilled_from": "user/teacher"}),
        ({"distilled_from": "../teacher"}, {}),
        ({"sharpened_from": "mnist", "sharpening_weight": 0.5}, {"sharpened_from": "mnist", "sharpening_weight": 0.5}),
        ({"guidance_scale": 1.5, "guidance_interval": [0, 1]}, {"guidance_scale": 1.5}),
        ({"guidance_interval": [0.35, 0.6]}, {"guidance_interval": [0.35, 0.6]}),
        ({"teacher_steps": 20, "adversarial_weight": 0.05}, {"teacher_steps": 20, "adversarial_weight": 0.05}),
        ({"class_dropout_prob": 0.1, "mixed_precision": "auto", "snr_gamma": None}, {}),
    ],
)
def test_facts_of_a_training_run(run_folder, tmp_path, monkeypatch, config, expected):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    (tmp_path / "runs/here").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    (folder / "train_config.json").write_text(json.dumps(config))
    for log in (
        None,
        "",
        '{"step": 10, "epo',
        '{"step": 0}',
        "null",
    ):  # a run that was killed left no log, an empty one or half a line
        (folder / "train_log.jsonl").unlink(missing_ok=True)
        if log is not None:
            (folder / "train_log.jsonl").write_text(log)
        assert read_facts(folder).get("training", {}) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", "{}", "must hold a JSON list"),
        ("evaluation.json", '[{"metric": "fid"}]', "record 0 needs a `metric`"),
        ("evaluation.json", '[{"metric": "fid", "value": 1}, 5]', "record 1 needs a `metric`"),
        ("evaluation.json", "[null]", "record 0 needs a `metric`"),
        ("evaluation.json", '[5, {"protocol": 1}]', "record 0 needs a `metric`"),
        ("evaluation.json", '[{"protocol": {}, "images": "generated"}]', "record 0 needs a `metric`"),
        ("evaluation.json", '[{"metric": "fid", "value": 1, "num_images": "many"}]', "record 0 needs a `metric`"),
        ("evaluation.json", '[{"metric": "fid", "value": 1, "guidance_interval": 1}]', "record 0 needs a `metric`"),
        ("facts.json", '{"training": []}', "`training` must be an object"),
        ("facts.json", '{"training": {"steps": "many"}}', "`steps` in `training` must be a number"),
        ("facts.json", '{"limitations": "None."}', "`limitations` must be a list of texts"),
        ("facts.json", '{"license": 1}', "`license` must be a text"),
        ("facts.json", '{"evaluation": [1]}', "record 0 needs a `metric`"),
        ("facts.json", "[" * 100_000, "is not valid JSON"),
        ("model_index.json", "{}", "`_class_name` must name a class"),
        ("unet/config.json", '{"in_channels": []}', "`in_channels` has a value of the wrong type"),
        ("unet/config.json", '{"sample_size": [1, 2, 3]}', "`sample_size` has a value of the wrong type"),
        ("facts.json", "{", "is not valid JSON"),
        ("facts.json", "[]", "must hold a JSON object"),
    ],
)
def test_facts_that_cannot_be_read(run_folder, tmp_path, name, content, message):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    (folder / name).write_text(content)
    with pytest.raises(ValueError, match=rf"{name}:? .*{re.escape(message)}"):
        read_facts(folder)


def test_half_a_line_of_the_log_leaves_the_facts_of_the_whole_ones(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    expected = read_facts(folder)["training"]
    assert expected["steps"] == 20
    for rest in (b'{"step": 30, "epo', b'{"step": 30}\n', b"\xff\xfe", b"[" * 5000, b"null\n7\n"):
        (folder / "train_log.jsonl").write_bytes((run_folder / "train_log.jsonl").read_bytes() + rest)
        assert read_facts(folder)["training"] == expected


MONTHS = ["Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"]


def test_classes_are_listed_by_label(tiny_unet, tmp_path):
    """JSON sorts the label 10 before 2."""
    pipe = MiniDDPMClassConditionalPipeline(
        tiny_unet(num_class_embeds=13), MiniDDPMScheduler(), dict(enumerate(MONTHS))
    )
    pipe.save_pretrained(tmp_path)
    assert f"| Classes | {', '.join(MONTHS)} |" in (tmp_path / "README.md").read_text()


HOSTILE = [
    "a|b",
    "first\n| second |\n\n## Third",
    "`code` and ```fence",
    "<script>alert(1)</script><!-- x",
    "--- \n---\n",
    "\ud800",
    "*bold* [link](javascript:x) _em_ \\ &lt;",
    "key: value # {x}",
    "a\u2028b\x00\r",
    "x" * 10_000,
    '")\nimport os  #',
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_do_not_break_the_card(run_folder, tmp_path, name):
    """As the name of a class, a repository, a data set, a metric and a setting, one by one and all at once."""
    facts = json.loads(json.dumps(read_facts(run_folder)))
    plain = render_card(facts | {"repo_id": "user/x", "revision": "0" * 40})
    facts["model"]["labels"] = ["zero", name, "two"]
    facts["training"] |= {"dataset": name, "split": name, "note": name, name: 1}
    for record in facts["evaluation"]:
        record |= {"dataset": name, "name": name, "note": name}
    card = render_card(facts | {"repo_id": name, "revision": name, "license": name})
    (tmp_path / "README.md").write_text(card, encoding="utf-8")
    assert sections(card) == sections(plain)
    assert is_rendered(tmp_path / "README.md")
    # The metadata are whole, and so are the tables: as many rows and columns as before.
    data = ModelCard(card).data
    assert len(data.eval_results) == 3 and data["library_name"] == "diffusers" and len(data.datasets) <= 1

    def shape(text):
        body = text.split("\n---\n", 1)[1]
        return [len(re.findall(r"(?<!\\)\|", line)) for line in body.splitlines() if line.startswith("|")]

    assert shape(card) == shape(plain) and max(map(len, card.splitlines())) < 8000
    blocks = re.findall(r"^```python\n(.*?)^```$", card, flags=re.S | re.M)
    assert len(blocks) == 2 == card.count("\n```python\n") and card.count("\n```\n") == 2
    for block in blocks:
        compile(block, "card", "exec")
        assert not re.search(r"^import os", block, flags=re.M)
    outside = re.sub(
        r"(`+).*?\1", "", card.split("\n---\n", 1)[1].rpartition("<!-- mini-ddpm rendered")[0], flags=re.S
    )
    assert "<script" not in outside and "<!--" not in outside


@pytest.mark.parametrize("name", [path.parent.name for path in sorted(PRETRAINED.glob("*/model_index.json"))])
def test_model_card_of_the_shipped_weights_is_current(name):
    """`make card` writes both from the weights that ship."""
    facts = json.loads((ROOT / "model_card" / name / "facts.json").read_text(encoding="utf-8"))
    assert (ROOT / "model_card" / name / "README.md").read_text(encoding="utf-8") == render_card(facts)
    shipped = read_facts(PRETRAINED / name)
    assert facts == json.loads(json.dumps(shipped)) | {"repo_id": facts["repo_id"]}
    if "picture" in facts:
        shown = (ROOT / "model_card" / name / facts["picture"]).read_bytes()
        assert shown == (PRETRAINED / name / facts["picture"]).read_bytes()


# ---- Written files ----------------------------------------------------------------------------------------------


def test_files_that_are_pushed_from_a_run(run_folder, capsys):
    """All that describes the pipeline and nothing else: no checkpoint, no log, no local path."""
    with staged_pipeline(run_folder) as folder:
        names = relative(folder)
        assert without_hash(names) == {
            "README.md",
            "facts.json",
            "model_index.json",
            "pipeline_mini_ddpm_class_conditional_#.py",
            "samples.png",
            "scheduler/scheduler_config.json",
            "scheduler/scheduling_mini_ddpm_#.py",
            "unet/config.json",
            "unet/diffusion_pytorch_model.safetensors",
            "unet/unet_mini_#.py",
        }
        rest = [name for name in names if not name.endswith((".safetensors", ".png"))]
        assert sum((folder / name).stat().st_size for name in rest) < 200_000
        for name in rest:
            assert "/home/me" not in (folder / name).read_text()
        sizes = {name: (folder / name).stat().st_size for name in names}
    assert mini_ddpm_cli.main(["push", str(run_folder), "user/digits", "--dry-run"]) == 0
    listed = capsys.readouterr().out
    for name, size in sizes.items():
        assert re.search(rf"^ *{size:,}  {re.escape(name)}$", listed, flags=re.M), name
    assert "10 files" in listed and "nothing was pushed" in listed


def test_paths_and_pickles(tiny_unet, tmp_path, caplog):
    pipe = MiniDDPMPipeline(tiny_unet(), MiniDDIMScheduler())
    pipe.save_pretrained(tmp_path / "a", safe_serialization=False)
    assert {path.suffix for path in (tmp_path / "a").rglob("*") if path.is_file()} <= {
        ".md",
        ".json",
        ".py",
        ".safetensors",
    }
    for door in (
        mini_ddpm.load_pipeline,
        MiniDDPMPipeline.from_pretrained,
        DiffusionPipeline.from_pretrained,
    ):
        assert draw(door(tmp_path / "a")) == draw(door(str(tmp_path / "a")))
    # No door opens a pickle in place of the weights, unless `use_safetensors=False`.
    weights = tmp_path / "a/unet/diffusion_pytorch_model.safetensors"
    weights.unlink()
    torch.save(pipe.unet.state_dict(), weights.with_suffix(".bin"))
    for door in (
        mini_ddpm.load_pipeline,
        MiniDDPMPipeline.from_pretrained,
        DiffusionPipeline.from_pretrained,
    ):
        with pytest.raises(OSError, match="safetensors"):
            door(tmp_path / "a")
    with pytest.raises(OSError, match="safetensors"):
        mini_ddpm.MiniUNet2DModel.from_pretrained(tmp_path / "a", subfolder="unet")
    assert draw(MiniDDPMPipeline.from_pretrained(tmp_path / "a", use_safetensors=False)) == draw(pipe)


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("unet/unet_mini_0123abcd.py", ("unet", "code", None)),
        ("pipeline_mini_ddpm_class_conditional_0123abcd.py", ("", "code", None)),
        ("a/unet/unet_mini_0123abcd.py", ("a/unet", "code", None)),
        ("unet/diffusion_pytorch_model.safetensors", ("unet", "weights", None)),
        ("unet/diffusion_pytorch_model.fp16.safetensors", ("unet", "weights", "fp16")),
        ("unet/diffusion_pytorch_model-00001-of-00002.safetensors", ("unet", "weights", None)),
        ("unet/diffusion_pytorch_model.fp16-00001-of-00002.safetensors", ("unet", "weights", "fp16")),
        ("unet/diffusion_pytorch_model.safetensors.index.json", ("unet", "weights", None)),
        ("unet/diffusion_pytorch_model.safetensors.index.fp16.json", ("unet", "weights", "fp16")),
        *((name, None) for name in ("unet_mini.py", "app.py", "unet/unet_mini_0123abcd.txt", "unet/config.json")),
        *((name, None) for name in ("README.md", "unet/diffusion_pytorch_model.bin", "unet/other.safetensors")),
    ],
)
def test_replacement_key(name, key):
    assert replacement_key(name) == key


@pytest.mark.parametrize(
    "unet",
    [["diffusers", "UNetOfTheFuture"], ["their_unet", "UNet2DModel"], ["their_unet_0123abcd", "MiniUNet2DModel"]],
)
def test_components_of_unknown_classes(run_folder, tmp_path, unet):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | {"unet": unet}))
    message = (
        f"the component 'unet' has an unknown class, {unet[1]!r} of {unet[0]!r}. It must be a class of diffusers or"
    )
    with pytest.raises(ValueError, match=re.escape(message)):
        mini_ddpm.load_pipeline(folder)


def test_weights_of_the_requested_variant_are_checked(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    weights = folder / "unet/diffusion_pytorch_model.safetensors"
    half = weights.with_name("diffusion_pytorch_model.fp16.safetensors")
    half.write_bytes(weights.read_bytes()[:-100])
    mini_ddpm.load_pipeline(folder)
    with pytest.raises(ValueError, match="fp16.safetensors is truncated or corrupt"):
        mini_ddpm.load_pipeline(folder, variant="fp16")
    half.unlink()  # without the variant, diffusers reads the other weights
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match="model.safetensors is truncated or corrupt"):
        mini_ddpm.load_pipeline(folder, variant="fp16")


# ---- Damaged and hostile folders ------------------------------------------------------------------------------------


@contextmanager
def seconds(limit):
    """Fail if the block hangs or takes longer."""

    def stop(*_):
        pytest.fail(f"it took more than {limit} seconds")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(limit)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def set_keys(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


NAN = float("nan")
UNET, SCHEDULER, INDEX = "unet/config.json", "scheduler/scheduler_config.json", "model_index.json"


@pytest.mark.parametrize(
    ("file", "key", "values"),
    [
        (UNET, "norm_eps", [NAN, float("inf"), -1e-5, 0, 2, "1e-5", True, None, [1e-5]]),
        (UNET, "attention_head_dim", [0, -8, 8.0, "8", 5, True, 10**12, None]),
        (UNET, "layers_per_block", [0, -1, 1.0, 10**6, 10**30, "1", [1, 1], None]),
        (UNET, "block_out_channels", [[], 8, [8, 16] * 5000, [8, 10**9], [8.0, 16], [True, 16], [0, 16], {}, "ab"]),
        (UNET, "down_block_types", ["DownBlock2D", [], ["DownBlock2D"] * 10_000, [1, 2], [["x"], "x"], None]),
        (UNET, "sample_size", [0, -1, 10**12, "8", [8], [8, 8, 8], [8, NAN], 8.5, {}]),
        (UNET, "in_channels", [0, 10**9, "1", True]),
        (UNET, "patch_size", [0, 10**9, 2.0, NAN]),
        (UNET, "head_channels", [-1, 10**9, "0", None, False]),
        (UNET, "norm_num_groups", [0, -4, 10**9, 3]),
        (UNET, "num_class_embeds", [0, 1, 10**12, "11", 11.0, True]),
        (UNET, "dropout", [-0.1, 1, NAN, "0"]),
        (UNET, "add_attention", [0, 1, "true", None]),
        (UNET, "_class_name", ["UNet2DModel", 1, None, ["MiniUNet2DModel"]]),
        (UNET, "_diffusers_version", [1, None]),
        (UNET, "auto_map", [1, "x"]),
        (SCHEDULER, "num_train_timesteps", [0, -1, 10**7, 10**12, 10**30, 1000.0, "1000", True, None]),
        (SCHEDULER, "beta_start", [NAN, -1, 0, 2, "0.1", None]),
        (SCHEDULER, "beta_end", [float("inf"), -1, 0, 2, True]),
        (SCHEDULER, "trained_betas", [[0.1], [NAN] * 1000, "x", [2.0] * 1000, [[0.1]] * 1000, ["0.1"] * 1000, 1]),
        (SCHEDULER, "beta_schedule", ["cosine", 1, None, ["linear"]]),
        (SCHEDULER, "prediction_type", ["v", None, 0]),
        (SCHEDULER, "timestep_spacing", ["", 1, {}]),
        (SCHEDULER, "variance_type", ["large", 1, ["learned"]]),
        (SCHEDULER, "clip_sample", ["NaN", 1, 0, None, NAN]),
        (SCHEDULER, "thresholding", ["false", 1, None]),
        (SCHEDULER, "rescale_betas_zero_snr", ["NaN", 1, "", []]),
        (SCHEDULER, "clip_sample_range", [NAN, -1.0, 0, 1e9, "1", True, None]),
        (SCHEDULER, "sample_max_value", [NAN, -1.0, 1e300, None]),
        (SCHEDULER, "dynamic_thresholding_ratio", [NAN, -0.1, 1.1, "1"]),
        (SCHEDULER, "steps_offset", [-1, 0.5, 10**12, None]),
        (SCHEDULER, "_use_default_values", [1, [1], None, "x"]),
        (INDEX, "default_num_inference_steps", [0, -4, 4.0, "4", True, 10**12, 1001, NAN]),
        (INDEX, "default_guidance_scale", [0, -1, NAN, float("inf"), "1", True, 1e9]),
        (INDEX, "default_eta", [-0.1, 2, NAN, "1", True]),
        (INDEX, "default_guidance_interval", [0.5, [0.5], [0.6, 0.4], [0, 2], [0, "1"], ["a", "b"], "01"]),
        (INDEX, "black_level", [-1, 256, 1.0, "0", True, 255]),
        (INDEX, "white_level", [0, 256, 253.0, NAN]),
        (INDEX, "id2label", [[], 1, {"a": "x"}, {"1.0": "x"}, {"-1": "x"}, {"0": 1}, {"0": None}, {"99": "x"}, "x"]),
        (INDEX, "unet", [None, 1, [], ["diffusers"], [None, None], ["diffusers", "DDPMScheduler"], {}, "diffusers",
                         ["diffusers", "ModelMixin", "x"], ["diffusers", ["UNet2DModel"]]]),
        (INDEX, "scheduler", [["diffusers", "UNet2DModel"], ["diffusers", "utils"], ["diffusers", "FlaxDDIM"]]),
        (INDEX, "_class_name", [None, 1, "MiniUNet2DModel", "utils", ["pipeline_mini_ddpm", "x"], {}, "x" * 10_000]),
        (INDEX, "_weights_sha256", [1, [], {"unet/diffusion_pytorch_model.safetensors": 1}, None, "x"]),
    ],
)  # fmt: skip
def test_values_of_a_wrong_type_or_out_of_range(run_folder, tmp_path, file, key, values):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    before = (folder / file).read_text()
    for value in values:
        set_keys(folder / file, **{key: value})
        with pytest.raises(ValueError) as raised, seconds(5):
            mini_ddpm.load_pipeline(folder)
        message = str(raised.value)
        what = {"unet": "'unet'", "_class_name": "class", "scheduler": "'scheduler'"}.get(key, key)
        assert str(folder / file) in message and what in message and "\n" not in message, (value, message)
        assert len(message) < 1500
        (folder / file).write_text(before)
    mini_ddpm.load_pipeline(folder)


def test_the_class_of_the_index_must_be_that_of_the_configuration(run_folder, tmp_path):
    """diffusers would convert the configuration, and take its own defaults for the rest."""
    folder = shutil.copytree(run_folder, tmp_path / "x")
    set_keys(folder / INDEX, scheduler=["diffusers", "DDPMScheduler"])
    with pytest.raises(
        ValueError, match="scheduler_config.json: `_class_name` must be DDPMScheduler, as in the index"
    ):
        mini_ddpm.load_pipeline(folder)


def test_bounds_hold_for_networks_of_diffusers(tmp_path):
    MiniDDPMPipeline(unet_of_diffusers(), MiniDDIMScheduler()).save_pretrained(tmp_path)
    before = (tmp_path / UNET).read_text()
    for key, value in (
        ("layers_per_block", 10**6), ("block_out_channels", [4] * 1000), ("down_block_types", ["DownBlock2D"] * 1000),
        ("norm_eps", NAN), ("dropout", "NaN"), ("add_attention", "NaN"), ("time_embedding_dim", 10**12),
        ("down_block_types", ["NoBlock", "DownBlock2D"]), ("act_fn", "no"), ("norm_num_groups", 0),
    ):  # fmt: skip
        set_keys(tmp_path / UNET, **{key: value})
        with pytest.raises(ValueError) as raised, seconds(5):
            mini_ddpm.load_pipeline(tmp_path)
        assert str(tmp_path / UNET) in str(raised.value) and "\n" not in str(raised.value)
    (tmp_path / UNET).write_text(before)
    assert type(mini_ddpm.load_pipeline(tmp_path).unet).__name__ == "UNet2DModel"


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of their own
@pytest.mark.parametrize(
    "name", sorted(c.__name__ for c in MiniDDIMScheduler()._get_compatibles() if "EDM" not in c.__name__)
)
def test_schedulers_of_diffusers_open_as_before(run_folder, tmp_path, name):
    """Their own values fit their annotations, also -inf and those that are annotated wrongly."""
    pipe = mini_ddpm.load_pipeline(run_folder)
    if not isinstance(getattr(diffusers, name), type) or "Dummy" in str(type(getattr(diffusers, name))):
        pytest.skip("needs a library that is not installed")
    try:
        theirs = getattr(diffusers, name).from_config(pipe.scheduler.config)
    except (ImportError, TypeError, NotImplementedError) as error:
        pytest.skip(str(error))
    for scheduler in (theirs, MiniDDIMScheduler.from_config(theirs.config)):
        pipe.scheduler = scheduler
        pipe.save_pretrained(tmp_path)
        assert type(mini_ddpm.load_pipeline(tmp_path).scheduler) is type(scheduler)
    set_keys(tmp_path / SCHEDULER, num_train_timesteps=10**12)
    with pytest.raises(ValueError, match="num_train_timesteps"), seconds(5):
        mini_ddpm.load_pipeline(tmp_path)


@pytest.mark.parametrize("how", ["fifo", "folder", "nowhere", "itself", "device"])
@pytest.mark.parametrize("name", [INDEX, UNET, SCHEDULER, "unet/diffusion_pytorch_model.safetensors"])
def test_nothing_but_regular_files_is_opened(run_folder, tmp_path, name, how):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    file = folder / name
    file.unlink()
    {
        "fifo": lambda: os.mkfifo(file),
        "folder": file.mkdir,
        "nowhere": lambda: file.symlink_to("nowhere"),
        "itself": lambda: file.symlink_to(file.name),
        "device": lambda: file.symlink_to("/dev/zero"),
    }[how]()
    for call in (mini_ddpm.load_pipeline, lambda folder: staged_pipeline(folder).__enter__(), read_facts):
        if call is read_facts and (name.endswith(".safetensors") or how == "device"):
            continue  # facts without weights; a link out of the folder
        with pytest.raises((OSError, ValueError)) as raised, seconds(5):
            call(folder)
        assert str(folder) in str(raised.value) and "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "name",
    ["facts.json", "evaluation.json", "train_log.jsonl", "train_config.json", "README.md", "samples.png",
     "samples/epoch-0003.png", "unet/extra.json", "unet/diffusion_pytorch_model.fp16.safetensors",
     "unet/diffusion_pytorch_model.safetensors.index.json"],
)  # fmt: skip
def test_other_files_that_would_block_are_left_alone(run_folder, tmp_path, name):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    (folder / name).unlink(missing_ok=True)
    os.mkfifo(folder / name)
    with seconds(10):
        if name.endswith("index.json"):
            with pytest.raises(OSError, match=re.escape(name.rpartition("/")[2])):
                mini_ddpm.load_pipeline(folder)
            return
        pipe = mini_ddpm.load_pipeline(folder)
        read_facts(folder)
        with staged_pipeline(folder) as staged:
            assert not any(path.is_fifo() for path in staged.rglob("*"))
        pipe.save_pretrained(tmp_path / "again")


def test_json_that_is_too_large_or_too_deep(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    for name in (INDEX, UNET, SCHEDULER):
        before = (folder / name).read_bytes()
        for content in (b"{" + b" " * 20_000_000 + b"}", b"[" * 100_000, b'{"a":' * 100_000, b"9" * 10_000, b"\xff"):
            (folder / name).write_bytes(content)
            with pytest.raises(ValueError, match=re.escape(str(folder / name))), seconds(5):
                mini_ddpm.load_pipeline(folder)
        (folder / name).write_bytes(before)


def test_shards_must_be_those_of_the_folder(run_folder, tmp_path):
    folder = tmp_path / "x"
    mini_ddpm.load_pipeline(run_folder).save_pretrained(folder, max_shard_size="20KB")
    expected = draw(mini_ddpm.load_pipeline(run_folder))
    assert draw(mini_ddpm.load_pipeline(folder)) == expected
    file = folder / "unet/diffusion_pytorch_model.safetensors.index.json"
    index = json.loads(file.read_text())
    key, other = next(iter(index["weight_map"])), sorted(set(index["weight_map"].values()))[-1]
    for content in (
        {}, {"metadata": {}}, {"metadata": 1, "weight_map": index["weight_map"]}, {**index, "weight_map": {}},
        {**index, "weight_map": {**index["weight_map"], key: "../../x"}},
        {**index, "weight_map": {**index["weight_map"], key: "/etc/passwd"}},
        {**index, "weight_map": {**index["weight_map"], key: 1}},
        {**index, "weight_map": {**index["weight_map"], key: other}},
    ):  # fmt: skip
        file.write_text(json.dumps(content))
        with pytest.raises((OSError, ValueError), match=re.escape(str(folder / "unet"))):
            mini_ddpm.load_pipeline(folder)
    file.unlink()
    with pytest.raises(OSError, match="has no weights"):
        mini_ddpm.load_pipeline(folder)


def flip(file, at=-1):
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


def test_a_changed_byte_of_the_weights_is_found(run_folder, tmp_path):
    """In each variant and each shard; the same weights have the same checksums."""
    pipe = mini_ddpm.load_pipeline(run_folder)
    for folder in (tmp_path / "x", tmp_path / "y"):
        pipe.save_pretrained(folder)
        pipe.save_pretrained(folder, variant="cut", max_shard_size="20KB")
    assert (tmp_path / "x" / INDEX).read_bytes() == (tmp_path / "y" / INDEX).read_bytes()
    folder = tmp_path / "x"
    files = sorted((folder / "unet").glob("*.safetensors"))
    assert len(files) > 3 and len(json.loads((folder / INDEX).read_text())["_weights_sha256"]) == len(files)
    for file in files:
        variant = "cut" if ".cut" in file.name else None
        before = file.read_bytes()
        for at in (-1, -1000, 8 + before[8:].index(b"F32") + 1, 40):
            flip(file, at)
            with pytest.raises(ValueError, match=re.escape(str(file))) as raised:
                mini_ddpm.load_pipeline(folder, variant=variant)
            assert "\n" not in str(raised.value)
            file.write_bytes(before)
        flip(file)
        with pytest.raises(ValueError, match=re.escape(file.name)), staged_pipeline(folder):
            pass  # a push checks all variants
        file.write_bytes(before)
        mini_ddpm.load_pipeline(folder, variant=variant)


def test_weights_that_another_tool_saved(run_folder, tmp_path):
    """A checksum that is not theirs is an error that says what to do. A folder without any opens as before."""
    folder = shutil.copytree(run_folder, tmp_path / "x")
    pipe = mini_ddpm.load_pipeline(folder)
    torch.nn.init.ones_(pipe.unet.conv_out.bias)
    pipe.unet.save_pretrained(folder / "unet")
    message = "Download or save it again. If the change is wanted, remove `_weights_sha256` from model_index.json."
    with pytest.raises(ValueError, match=re.escape(message)):
        mini_ddpm.load_pipeline(folder)
    index = json.loads((folder / INDEX).read_text())
    index.pop("_weights_sha256")
    (folder / INDEX).write_text(json.dumps(index))
    assert draw(mini_ddpm.load_pipeline(folder)) == draw(pipe)
    write_checksums(folder)
    assert draw(mini_ddpm.load_pipeline(folder)) == draw(pipe)
    flip(folder / "unet/diffusion_pytorch_model.safetensors")
    with pytest.raises(ValueError, match="was changed or damaged after it was saved"):
        mini_ddpm.load_pipeline(folder)


def test_integer_weights_are_refused(run_folder, tmp_path):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    file = folder / "unet/diffusion_pytorch_model.safetensors"
    save_file({key: tensor.to(torch.int32) for key, tensor in load_file(file).items()}, file)
    with pytest.raises(ValueError, match="is stored as I32"):
        mini_ddpm.load_pipeline(folder)


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_permissions_follow_the_umask(run_folder, tmp_path, umask):
    """safetensors writes its files for their owner alone, so another account could not open the pipeline."""
    before = os.umask(umask)
    try:
        pipe = mini_ddpm.load_pipeline(run_folder)
        pipe.save_pretrained(tmp_path / "x")
        pipe.save_pretrained(tmp_path / "x", variant="cut", max_shard_size="20KB")
        with staged_pipeline(tmp_path / "x") as staged:
            shutil.copytree(staged, tmp_path / "y")
        with atomic_write(tmp_path / "z", folder=True) as folder, atomic_write(tmp_path / "w.safetensors") as file:
            for path in (folder / "a.safetensors", file):
                save_file({"a": torch.zeros(1)}, path)
    finally:
        os.umask(before)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) > 10
    assert {stat.S_IMODE(path.stat().st_mode) for path in files} == {0o666 & ~umask}


def test_other_exceptions_become_one_line(run_folder, tmp_path, monkeypatch):
    folder = shutil.copytree(run_folder, tmp_path / "x")
    for error, kind in (
        (KeyError("a"), ValueError), (AttributeError("a\nb"), ValueError), (RecursionError(), ValueError),
        (ImportError("a"), ValueError), (EOFError(), ValueError), (ZeroDivisionError("a"), ValueError),
        (ValueError("a\nb"), ValueError), (OSError("a\nb"), OSError), (PermissionError(13, "no"), OSError),
    ):  # fmt: skip

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(DiffusionPipeline, "from_pretrained", fail)
        with pytest.raises(kind, match=re.escape(f"{folder} cannot be opened: ")) as raised:
            mini_ddpm.load_pipeline(folder)
        assert "\n" not in str(raised.value) and raised.value.__cause__ is error


def test_the_home_folder_is_expanded(run_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(run_folder, tmp_path / "mine")
    assert draw(mini_ddpm.load_pipeline("~/mine")) == draw(mini_ddpm.load_pipeline(run_folder))
    with staged_pipeline("~/mine"):
        pass


# ---- Push and pull through every door -----------------------------------------------------------------------------

OPEN_ALL = """
def open_all(name, repo, doors, **kwargs):
    for door, opener in doors.items():
        pipe = opener(repo, **kwargs)
        assert pipe.unet.dtype == kwargs.get("dtype", torch.float32)
        out[f"{name} {door}"] = draw(pipe)
"""


@pytest.fixture(scope="module")
def published(run_folder, loopback_hub, fresh_process, tmp_path_factory):
    """Push in all ways and open the results with the package. Return the result and the home of the process."""
    home = tmp_path_factory.mktemp("home")
    run = fresh_process(
        PRELUDE
        + OPEN_ALL
        + f"""
from pathlib import Path
import mini_ddpm
from mini_ddpm import *
from huggingface_hub import HfApi
folder = Path({str(run_folder)!r})
pipe = load_pipeline(folder)
doors = dict(own=MiniDDPMClassConditionalPipeline.from_pretrained, generic=DiffusionPipeline.from_pretrained,
             load_pipeline=load_pipeline)

first = pipe.push_to_hub("user/all", commit_message="First", private=True)
HfApi().create_tag("user/all", tag="v1")
torch.nn.init.ones_(pipe.unet.conv_out.bias)  # the branch and the pull request get other weights
out["changed"] = draw(pipe)
pipe.push_to_hub("user/all", revision="branch")
request = pipe.push_to_hub("user/all", create_pr=True)
out["pull request"] = [request.pr_url, request.pr_revision]
out["oid"] = first.oid
for revision in ("main", "v1", first.oid, "branch", "refs/pr/1"):
    open_all(revision, "user/all", doors, revision=revision)

load_pipeline(folder).push_to_hub("user/variants")
half = load_pipeline(folder, dtype=torch.float16)
half.push_to_hub("user/variants", variant="fp16")
out["half"] = draw(half.to(torch.float32))  # half precision may differ from process to process
open_all("plain", "user/variants", doors)
open_all("fp16", "user/variants", doors, variant="fp16", dtype=torch.float32)
unet = MiniUNet2DModel.from_pretrained("user/variants", subfolder="unet", variant="fp16", dtype=torch.float16)
assert unet.dtype == torch.float16

load_pipeline(folder).push_to_hub("user/shards")
load_pipeline(folder).push_to_hub("user/shards", max_shard_size="20KB")
open_all("shards", "user/shards", doors)
open_all("shards cached", "user/shards", doors, local_files_only=True)
MiniUNet2DModel.from_pretrained("user/shards", subfolder="unet")
MiniDDPMScheduler.from_pretrained("user/shards", subfolder="scheduler")

# Facts and picture are fetched from the Hub when a pipeline in its cache is saved.
load_pipeline("user/variants").save_pretrained("copy")
out["copy"] = sorted(path.name for path in Path("copy").glob("*.*") if path.suffix != ".py")

load_pipeline(folder).save_pretrained(Path("by-path"), push_to_hub=True)
open_all("path", "user/by-path", doors)
print(json.dumps(out))
""",
        home=home,
    )
    return run.result, home


def test_pushes_and_pulls_with_the_package(published, run_folder, loopback_hub):
    result, _ = published
    expected = draw(mini_ddpm.load_pipeline(run_folder))
    changed, half = result.pop("changed"), result.pop("half")
    assert result.pop("copy") == ["README.md", "facts.json", "model_index.json", "samples.png"]
    assert changed != expected != half
    assert result.pop("pull request") == [f"{loopback_hub.url}/user/all/discussions/1", "refs/pr/1"]
    oid = result.pop("oid")
    assert len(result) == 3 * (5 + 2 + 2 + 1)
    for name, image in result.items():
        other = {"branch": changed, "refs/pr/1": changed, "fp16": half}
        assert image == other.get(name.split()[0], expected), name

    assert loopback_hub.repos["user/all"]["private"] and not loopback_hub.repos["user/shards"]["private"]
    files = loopback_hub.files("user/all")
    assert without_hash(files) == {
        ".gitattributes",
        "README.md",
        "facts.json",
        "model_index.json",
        "pipeline_mini_ddpm_class_conditional_#.py",
        "samples.png",
        "scheduler/scheduler_config.json",
        "scheduler/scheduling_mini_ddpm_#.py",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "unet/unet_mini_#.py",
    }
    card = files["README.md"].decode()
    assert f'revision="{oid}"' in card and PLACEHOLDER not in card and "## Evaluation" in card
    # The changed weights have no evaluation, and the card of the pull request says so.
    for ref in ("branch", "refs/pr/1"):
        files = dict(loopback_hub.files("user/all", ref))
        card = files.pop("README.md").decode()
        assert "## Evaluation" not in card
        # The card names the commit of these weights, not the one that the branch began with.
        named = dict(loopback_hub.files("user/all", re.search(r'revision="([0-9a-f]{40})"', card)[1]))
        del named["README.md"]
        assert named == files
    weights = {name for name in loopback_hub.files("user/shards") if "safetensors" in name}
    assert "unet/diffusion_pytorch_model.safetensors" not in weights  # the shards replaced it
    assert "unet/diffusion_pytorch_model.safetensors.index.json" in weights and len(weights) > 2
    both = {"unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors"}
    assert both == {name for name in loopback_hub.files("user/variants") if "safetensors" in name}


def test_pulls_offline(published, fresh_process, run_folder):
    """From the cache of the process that pushed."""
    _, home = published
    run = fresh_process(
        PRELUDE
        + OPEN_ALL
        + """
from mini_ddpm import *
doors = dict(own=MiniDDPMClassConditionalPipeline.from_pretrained, generic=DiffusionPipeline.from_pretrained,
             load_pipeline=load_pipeline)
open_all("shards", "user/shards", doors)
open_all("tag", "user/all", doors, revision="v1")
MiniUNet2DModel.from_pretrained("user/shards", subfolder="unet")
try:
    load_pipeline("user/nowhere")
except OSError as error:
    out["missing"] = str(error)
load_pipeline("user/shards").save_pretrained("offline")
out["offline"] = sorted(name for name in os.listdir("offline") if name.endswith((".json", ".md", ".png")))
print(json.dumps(out))
""",
        home=home,
        HF_HUB_OFFLINE="1",
    )
    assert "not in the local cache" in run.result.pop("missing")
    assert run.result.pop("offline") == ["README.md", "model_index.json"]  # offline: fewer facts
    assert len(run.result) == 6 and set(run.result.values()) == {draw(mini_ddpm.load_pipeline(run_folder))}


def test_pushes_and_pulls_without_the_package(published, fresh_process, run_folder, loopback_hub, tmp_path):
    """The door for remote code with every feature, also to push again, and offline as the card says."""
    run = fresh_process(
        PRELUDE
        + OPEN_ALL
        + """
from pathlib import Path
doors = dict(remote=lambda repo, **kwargs: DiffusionPipeline.from_pretrained(repo, trust_remote_code=True, **kwargs))
for revision in ("main", "v1", "branch", "refs/pr/1"):
    open_all(revision, "user/all", doors, revision=revision)
open_all("fp16", "user/variants", doors, variant="fp16", dtype=torch.float32)
open_all("shards", "user/shards", doors)
open_all("shards cached", "user/shards", doors, local_files_only=True)

pipe = doors["remote"]("user/shards")
pipe.push_to_hub("user/again", private=True)
open_all("again", "user/again", doors)
pipe.push_to_hub("user/again", revision="branch", variant="fp16")
open_all("again branch", "user/again", doors, revision="branch", variant="fp16")
out["pull request"] = pipe.push_to_hub("user/again", create_pr=True).pr_revision
options = dict(repo_id="user/again-by-path", max_shard_size="20KB", safe_serialization=False)
pipe.save_pretrained(Path("another-name"), push_to_hub=True, **options)
open_all("path", "user/again-by-path", doors)

from huggingface_hub import snapshot_download
snapshot_download("user/all")
print(json.dumps(out))
""",
        package=False,
        home=tmp_path,
    )
    result, _ = published
    expected = draw(mini_ddpm.load_pipeline(run_folder))
    assert run.result.pop("pull request") in ("refs/pr/1", None)
    assert run.result.pop("branch remote") == run.result.pop("refs/pr/1 remote") == result["branch own"]
    assert run.result.pop("fp16 remote") == result["fp16 own"]
    assert len(run.result) == 7 and set(run.result.values()) == {expected}
    assert loopback_hub.repos["user/again"]["private"]
    for repo in ("user/again", "user/again-by-path"):
        files = loopback_hub.files(repo)
        assert PLACEHOLDER not in files["README.md"].decode() and not any(name.endswith(".bin") for name in files)
    run = fresh_process(
        PRELUDE
        + """
from huggingface_hub import snapshot_download
out["offline"] = draw(DiffusionPipeline.from_pretrained(snapshot_download("user/all"), trust_remote_code=True))
print(json.dumps(out))
""",
        package=False,
        home=tmp_path,
        HF_HUB_OFFLINE="1",
    )
    assert run.result["offline"] == expected


@pytest.mark.slow
@pytest.mark.network
def test_door_with_torch_and_diffusers_alone(published, fresh_process, run_folder, tmp_path):
    """A new environment, installed from the package index, with torch and diffusers and nothing else."""
    venv.create(tmp_path / "venv", with_pip=True)
    python = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin") / "python"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    for packages in (["torch"], ["diffusers"]):  # torch alone first, so that nothing can pull another build of it
        command = [python, "-m", "pip", "install", "--quiet", "--constraint", ROOT / "constraints.txt", *packages]
        subprocess.run(command, check=True, env=environment)
    run = fresh_process(
        PRELUDE
        + """
import importlib.util
assert all(importlib.util.find_spec(name) is None for name in ("mini_ddpm", "mini_ddpm_cli", "accelerate", "tyro"))
pipe = DiffusionPipeline.from_pretrained("user/all", trust_remote_code=True)
out["hub"] = draw(pipe)
pipe.save_pretrained("folder")
out["folder"] = draw(DiffusionPipeline.from_pretrained("folder", trust_remote_code=True))
pipe.push_to_hub("user/from-venv")
out["again"] = draw(DiffusionPipeline.from_pretrained("user/from-venv", trust_remote_code=True))
print(json.dumps(out))
""",
        package=False,
        python=str(python),
    )
    assert len(run.result) == 3 and set(run.result.values()) == {draw(mini_ddpm.load_pipeline(run_folder))}


# ---- Failures -----------------------------------------------------------------------------------------------------

CATCH = """
import contextlib, io, sys, urllib.request
import mini_ddpm_cli

def fail(**failure):
    body = json.dumps(failure).encode()
    urllib.request.urlopen(urllib.request.Request(os.environ["HF_ENDPOINT"] + "/_fail", body, method="POST")).read()

def cli(*arguments):
    stdout, stderr = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        code = mini_ddpm_cli.main(list(map(str, arguments)))
    lines = [line for line in stderr.getvalue().splitlines() if line.startswith("mini-ddpm:")]
    return [code, (lines or stdout.getvalue().splitlines() or [""])[-1]]

def catch(name, function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (OSError, ValueError) as error:
        assert "\\n" not in str(error), error
        out[name] = [str(error), type(error.__cause__).__name__]
    else:
        out[name] = ["it worked", ""]
"""


@pytest.mark.parametrize(
    ("kind", "status", "message"),
    [
        (errors.HfHubHTTPError, 401, "The Hub rejected your token (from HF_TOKEN, `token=` or `hf auth login`)."),
        (errors.HfHubHTTPError, 403, "Your token has no write access to user/x."),
        (errors.HfHubHTTPError, 500, "It failed for user/x: First line."),
        (errors.GatedRepoError, 403, "The repository user/x is gated. Request access at"),
        (errors.RepositoryNotFoundError, 401, "The repository user/x does not exist, or it is private"),
        (errors.RevisionNotFoundError, 404, "The repository user/x has no revision 'v9'."),
        (errors.RemoteEntryNotFoundError, 404, "The repository user/x holds no pipeline: it has no model_index.json."),
        (errors.LocalEntryNotFoundError, None, "The repository user/x (revision 'v9') is not in the local cache"),
        (errors.OfflineModeIsEnabled, None, "The repository user/x (revision 'v9') is not in the local cache"),
        (errors.HFValidationError, None, "'user/x' is not a valid repository name. Write user/name."),
        (HTTPError, None, "The connection to the Hub (https://huggingface.co) failed: First line. Check the network"),
        (RuntimeError, None, "It failed for user/x: First line."),
    ],
)
def test_errors_of_the_hub_in_one_line(monkeypatch, kind, status, message):
    """The line is the same when diffusers and the client wrap the error in others."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "https://huggingface.co")
    client = importlib.import_module(HTTPError.__module__.partition(".")[0])
    answer = (
        {} if status is None else {"response": client.Response(status, request=client.Request("GET", "http://hub"))}
    )
    error = kind("First line.\nSecond line.", **answer)
    explain = partial(explain_hub_errors, "user/x", "v9", "It failed for {}: {}.")
    with pytest.raises(OSError, match=rf"^{re.escape(message)}") as bare, explain():
        raise error
    assert "\n" not in str(bare.value) and bare.value.__cause__ is error
    with pytest.raises(OSError) as wrapped, explain():
        raise OSError("The pipeline is not fully cached locally") from error
    assert str(wrapped.value) == str(bare.value)
    with pytest.raises(OSError) as wrapped, explain():
        try:
            raise error
        except kind:
            raise OSError("The pipeline is not fully cached locally")  # noqa: B904
    assert str(wrapped.value) == str(bare.value)


def test_other_errors_pass_unchanged():
    with pytest.raises(KeyError), explain_hub_errors("user/x", None, "{} {}"):
        raise KeyError("a mistake in the program")


def test_failures_in_plain_words(run_folder, loopback_hub, fresh_process, tmp_path):
    no_pipeline = tmp_path / "no-pipeline"
    no_pipeline.mkdir()
    commit(loopback_hub, "user/public", run_folder)
    commit(loopback_hub, "user/secret", run_folder)
    loopback_hub.repos["user/secret"]["private"] = True
    commit(loopback_hub, "user/empty", no_pipeline)
    commit(loopback_hub, "other/theirs", run_folder)
    before = {repo: dict(loopback_hub.repos[repo]["refs"]) for repo in ("user/public", "user/secret", "other/theirs")}
    run = fresh_process(
        PRELUDE
        + CATCH
        + f"""
from mini_ddpm import *
from mini_ddpm.hub.publish import push
folder, no_pipeline = {str(run_folder)!r}, {str(no_pipeline)!r}
os.environ.pop("HF_TOKEN", None)
pipe = load_pipeline(folder)
catch("push, no token", pipe.push_to_hub, "user/new")
catch("push, wrong token", pipe.push_to_hub, "user/new", token="hf_wrong")
catch("push, read-only token, new", pipe.push_to_hub, "user/new", token={READ_TOKEN!r})
catch("push, read-only token", pipe.push_to_hub, "user/public", token={READ_TOKEN!r})
catch("push, not mine", pipe.push_to_hub, "other/theirs", token={TOKEN!r})
catch("push, not mine, request", pipe.push_to_hub, "other/theirs", token={TOKEN!r}, create_pr=True)
catch("push, bad name", pipe.push_to_hub, "user/a/b", token={TOKEN!r})
catch("push, no folder", push, "nowhere", "user/new", token={TOKEN!r})
catch("push, no pipeline", push, no_pipeline, "user/new", token={TOKEN!r})
own = MiniDDPMClassConditionalPipeline.from_pretrained
for door, opener in dict(load_pipeline=load_pipeline, own=own).items():
    catch(f"{{door}}, missing", opener, "user/missing", token={TOKEN!r})
    catch(f"{{door}}, private", opener, "user/secret")
    catch(f"{{door}}, stale token", opener, "user/public", token="hf_stale")
    catch(f"{{door}}, no revision", opener, "user/public", revision="nope")
    catch(f"{{door}}, empty", opener, "user/empty")
catch("load_pipeline, bad name", load_pipeline, "user/a/b")
catch("parts without subfolder", MiniUNet2DModel.from_pretrained, "user/public")
for name, arguments in {{
    "cli, push": ["push", folder, "user/new"],
    "cli, push no pipeline": ["push", no_pipeline, "user/new"],
    "cli, sample private": ["sample", "user/secret"],
    "cli, verify nothing": ["verify", "user/public"],
}}.items():
    out[name] = cli(*arguments)
os.environ["HF_TOKEN"] = "hf_stale"
out["cli, sample stale token"] = cli("sample", "user/public", "--steps", 1, "--num-images", 1, "--device", "cpu")
catch("own, stale token, token=False", own, "user/public", token=False)
catch("push, token=False", pipe.push_to_hub, "user/new", token=False)
print(json.dumps(out))
""",
        token=None,
    )
    expected = {
        "push, no token": ("To push to user/new, log in with `hf auth login`", "NoneType"),
        "push, token=False": ("To push to user/new, log in with `hf auth login`", "NoneType"),
        "push, wrong token": ("The Hub rejected your token (from HF_TOKEN, `token=`", "HfHubHTTPError"),
        "push, read-only token, new": ("Your token has no write access to user/new", "HfHubHTTPError"),
        "push, read-only token": ("Your token has no write access to user/public", "HfHubHTTPError"),
        "push, not mine": (
            "has no write access to other/theirs. Create a token with write access"
            f" ({loopback_hub.url}/settings/tokens), and check that you are a member of other.",
            "HfHubHTTPError",
        ),
        "push, not mine, request": ("it worked", ""),
        "push, bad name": ("'user/a/b' is not a valid repository name. Write user/name.", "HFValidationError"),
        "push, no folder": ("There is no folder nowhere", "NoneType"),
        "push, no pipeline": ("is not a pipeline: it has no model_index.json", "NoneType"),
        "load_pipeline, bad name": ("No pipeline 'user/a/b': it is not a folder, a repository on the Hub", "NoneType"),
        "parts without subfolder": ("config.json", None),
        "cli, push": (2, "`hf auth login`"),
        "cli, push no pipeline": (2, "is not a pipeline: it has no model_index.json"),
        "cli, sample private": (2, "or it is private and you have no access to it"),
        "cli, verify nothing": (2, "mini-ddpm sample user/public"),
        "cli, sample stale token": (2, "unset HF_TOKEN"),
        "own, stale token, token=False": ("it worked", ""),
    }
    for door in ("load_pipeline", "own"):
        expected |= {
            f"{door}, missing": ("The repository user/missing does not exist, or it is private", "OSError"),
            f"{door}, private": ("The repository user/secret does not exist, or it is private", "OSError"),
            f"{door}, stale token": ("if user/public is public, read it without a token: unset HF_TOKEN", None),
            f"{door}, no revision": ("The repository user/public has no revision 'nope'", None),
            f"{door}, empty": ("The repository user/empty holds no pipeline", None),
        }
    assert run.result.keys() == expected.keys()
    for name, (message, cause) in expected.items():
        if isinstance(message, int):
            assert run.result[name][0] == message and cause in run.result[name][1], (name, run.result[name])
        else:
            assert message in run.result[name][0] and cause in (None, run.result[name][1]), (name, run.result[name])
    assert "user/new" not in loopback_hub.repos
    assert before["user/public"] == loopback_hub.repos["user/public"]["refs"]
    assert before["other/theirs"]["main"] == loopback_hub.repos["other/theirs"]["refs"]["main"]


def test_push_command_and_edited_cards(run_folder, loopback_hub, fresh_process):
    run = fresh_process(
        PRELUDE
        + CATCH
        + f"""
import mini_ddpm
from huggingface_hub import HfApi
folder, api = {str(run_folder)!r}, HfApi()
out["private"] = cli("push", folder, "user/cli", "--private", "--message", "By hand")
out["branch"] = cli("push", folder, "user/cli", "--revision", "dev/2")
out["request"] = cli("push", folder, "user/cli", "--create-pr")
out["sample"] = cli("sample", "user/cli", "--revision", "dev/2", "--class-labels", "one", "--steps", 1)

# A rendered card is replaced when the facts change, an edited one is kept.
pipe = mini_ddpm.load_pipeline(folder)
before = api.model_info("user/cli").sha
torch.nn.init.ones_(pipe.unet.conv_out.bias)
pipe.push_to_hub("user/cli")
out["ours"] = open(api.hf_hub_download("user/cli", "README.md")).read()
edited = out["ours"].replace("# cli", "# My digits")
api.upload_file(path_or_fileobj=edited.encode(), path_in_repo="README.md", repo_id="user/cli")
mini_ddpm.load_pipeline(folder).push_to_hub("user/cli")
out["kept"] = open(api.hf_hub_download("user/cli", "README.md")).read() == edited
out["back"] = draw(mini_ddpm.load_pipeline("user/cli"))

# In a folder of the repository, without a card. The second push replaces the first there, and nothing at the root.
mini_ddpm.load_pipeline(folder).push_to_hub("user/cli", subfolder="some/folder")
mini_ddpm.load_pipeline(folder).push_to_hub("user/cli", subfolder="some/folder/", max_shard_size="20KB")
print(json.dumps(out))
"""
    )
    url, result = loopback_hub.url, run.result
    assert result["private"] == [0, f"{url}/user/cli"] and loopback_hub.repos["user/cli"]["private"]
    assert result["branch"] == [0, f"{url}/user/cli/tree/dev/2"]
    assert result["request"] == [0, f"{url}/user/cli"]  # nothing differs from main, so no pull request is opened
    assert result["sample"][0] == 0
    assert "By hand" in loopback_hub.messages
    assert "## Evaluation" not in result["ours"] and result["kept"]
    assert result["back"] == draw(mini_ddpm.load_pipeline(run_folder))
    files = loopback_hub.files("user/cli")
    inside = {name.removeprefix("some/folder/") for name in files if name.startswith("some/folder/")}
    root = {name for name in files if not name.startswith("some/")}
    assert "README.md" not in inside and "README.md" in root and "model_index.json" in inside & root
    weights = {"unet/diffusion_pytorch_model.safetensors"}
    assert root - inside == {".gitattributes", "README.md"} | weights
    assert all("-of-" in name or name.endswith(".index.json") for name in inside - root) and len(inside - root) > 2


def test_interrupted_and_damaged_transfers(run_folder, loopback_hub, fresh_process):
    loopback_hub.lfs.clear()  # it does not request files that it has
    loopback_hub.messages.clear()
    weights = "unet/diffusion_pytorch_model.safetensors"
    damages = [("truncate", weights), ("flip", weights), ("flip", "unet/config.json")]
    run = fresh_process(
        PRELUDE
        + CATCH
        + f"""
import shutil
from pathlib import Path
from mini_ddpm import *
from mini_ddpm.files import atomic_write
from mini_ddpm.hub.card import render_card
from mini_ddpm.hub.facts import read_facts, refuse_links_to_elsewhere
from mini_ddpm.hub.publish import staged_pipeline
from huggingface_hub import HfApi
folder, api = {str(run_folder)!r}, HfApi()
pipe = load_pipeline(folder)

# 1. An upload that fails leaves no commit, and the next one completes it.
for name, start in dict(weights="PUT /lfs/", commit="POST /api/models/user/broken/commit").items():
    fail(start=start, status=507 if name == "weights" else 500)
    catch(f"push, {{name}} lost", pipe.push_to_hub, "user/broken")
    out[f"after {{name}}"] = api.list_repo_files("user/broken")
fail()
catch("push again", pipe.push_to_hub, "user/broken")
sha = api.model_info("user/broken").sha
catch("push the same", pipe.push_to_hub, "user/broken")
out["nothing new"] = sha == api.model_info("user/broken").sha
# A card that names no commit, as after a failed second commit: a pull request leaves it, a push completes it.
with staged_pipeline(folder) as staged:
    unnamed = render_card(read_facts(staged) | {{"repo_id": "user/broken"}})
api.upload_file(path_or_fileobj=unnamed.encode(), path_in_repo="README.md", repo_id="user/broken")
for key in ("request", "push"):
    pipe.push_to_hub("user/broken", create_pr=key == "request")
    card = open(api.hf_hub_download("user/broken", "README.md")).read()
    out[f"card after {{key}}"] = "unnamed" if card == unnamed else "named" if "revision=" in card else card
sha = api.model_info("user/broken").sha
torch.nn.init.ones_(pipe.unet.conv_out.bias)
fail(start="POST /api/models/user/broken/commit/refs", status=500)  # the second commit, with the card
catch("push, card lost", pipe.push_to_hub, "user/broken", create_pr=True)
fail()

# 2. A truncated or corrupt download leaves nothing broken in the cache.
cache = Path(os.environ["HF_HOME"]) / "hub"
for damage, file in {damages}:
    fail(start=f"GET /user/broken/resolve/{{sha}}/{{file}}", damage=damage)
    catch(f"{{damage}} {{file}}", load_pipeline, "user/broken")
    fail()
    catch(f"after {{damage}} {{file}}", load_pipeline, "user/broken")
    out[f"image after {{damage}} {{file}}"] = draw(load_pipeline("user/broken"))
    shutil.rmtree(cache)

# 3. diffusers' loaders do not check contents, `verify` does.
fail(start=f"GET /user/broken/resolve/{{sha}}/unet/diffusion_pytorch_model", damage="flip")
catch("flip unnoticed", DiffusionPipeline.from_pretrained, "user/broken")
fail()
out["verify"] = cli("verify", "user/broken")
out["sample"] = cli("sample", "user/broken", "--class-labels", "one", "--steps", 1, "--device", "cpu")
out["verify again"] = cli("verify", "user/broken")
print(json.dumps(out))
"""
    )
    result = run.result
    expected = draw(mini_ddpm.load_pipeline(run_folder))
    for name in ("weights", "commit"):
        assert result[f"push, {name} lost"][0].endswith(". Nothing was published; push again.")
        assert result[f"after {name}"] == [".gitattributes"]
    assert result["push again"] == ["it worked", ""] and result["nothing new"]
    assert (result["card after request"], result["card after push"]) == ("unnamed", "named")
    # After the first push and the last, not after the same one again.
    assert loopback_hub.messages.count("Name the commit to load in the model card") == 2
    assert result["push, card lost"][0].startswith(
        "The pipeline was published on user/broken, but its model card does not name the new commit: "
    )
    assert "refs/pr/1" in loopback_hub.repos["user/broken"]["refs"]
    assert "unet/diffusion_pytorch_model.safetensors" in loopback_hub.files("user/broken")
    for damage, file in damages:
        corrupt = f"user/broken: {file}: the download from the Hub was corrupt and has been deleted from the cache."
        message = "The connection to the Hub" if damage == "truncate" else corrupt
        assert message in result[f"{damage} {file}"][0]
        assert result[f"after {damage} {file}"] == ["it worked", ""]
        assert result[f"image after {damage} {file}"] == expected
    assert result["flip unnoticed"] == ["it worked", ""]
    assert result["verify"][0] == 2
    assert f"user/broken: {weights}: the cached copy is corrupt and has been deleted." in result["verify"][1]
    assert result["sample"][0] == 0 and result["verify again"][0] == 0


def test_a_second_push_names_the_commit_that_the_first_could_not(run_folder, loopback_hub, fresh_process):
    """The card follows in a second commit. If that fails, the card names the weights of an earlier push."""
    loopback_hub.messages.clear()
    run = fresh_process(
        PRELUDE
        + CATCH
        + f"""
from mini_ddpm import *
from huggingface_hub import HfApi
api = HfApi()
def card():
    return open(api.hf_hub_download("user/repair", "README.md")).read()
pipe = load_pipeline({str(run_folder)!r})
out["first"] = pipe.push_to_hub("user/repair").oid
torch.nn.init.ones_(pipe.unet.conv_out.bias)
# The first commit gets through; the second, which holds the card alone, does not.
create_commit = HfApi.create_commit
def create(self, *arguments, **options):
    if "model card" in options["commit_message"]:
        raise OSError("the connection was lost")
    return create_commit(self, *arguments, **options)
HfApi.create_commit = create
catch("lost", pipe.push_to_hub, "user/repair")
HfApi.create_commit = create_commit
out["sha"], out["stale"] = api.model_info("user/repair").sha, card()
out["again"] = pipe.push_to_hub("user/repair").oid
out["repaired"] = card()
before = api.model_info("user/repair").sha
pipe.push_to_hub("user/repair")
out["unchanged"] = before == api.model_info("user/repair").sha
print(json.dumps(out))
"""
    )
    result = run.result
    assert result["lost"][0].endswith("does not name the new commit: the connection was lost. Push again.")
    assert f'revision="{result["first"]}"' in result["stale"] and result["again"] == result["sha"] != result["first"]
    assert f'revision="{result["sha"]}"' in result["repaired"] and result["unchanged"]
    assert loopback_hub.messages.count("Name the commit to load in the model card") == 2


def test_checksums_of_other_variants_stay_in_a_repository(run_folder, loopback_hub, fresh_process):
    fresh_process(
        PRELUDE
        + f"""
from mini_ddpm import *
load_pipeline({str(run_folder)!r}).push_to_hub("user/sums")
load_pipeline({str(run_folder)!r}, dtype=torch.float16).push_to_hub("user/sums", variant="fp16")
load_pipeline("user/sums")
load_pipeline("user/sums", variant="fp16")
"""
    )
    files = loopback_hub.files("user/sums")
    weights = {name: hashlib.sha256(files[name]).hexdigest() for name in files if name.endswith(".safetensors")}
    assert len(weights) == 2 and json.loads(files["model_index.json"])["_weights_sha256"] == weights


def test_no_network(run_folder, fresh_process):
    run = fresh_process(
        PRELUDE
        + CATCH
        + f"""
from mini_ddpm import *
pipe = load_pipeline({str(run_folder)!r})
catch("push", pipe.push_to_hub, "user/new")
catch("pull", load_pipeline, "user/new")
catch("own", MiniDDPMClassConditionalPipeline.from_pretrained, "user/new")
out["verify"] = cli("verify", "user/new")
print(json.dumps(out))
""",
        HF_ENDPOINT="http://127.0.0.1:9",
    )
    for name in ("push", "pull", "own"):
        assert re.match(
            r"The connection to the Hub \(http://127.0.0.1:9\) failed: .*\. Check the network and try again\.$",
            run.result[name][0],
        )


@pytest.mark.parametrize(
    "name",
    ["samples.png", "samples/epoch-0003.png", "README.md", "facts.json", "evaluation.json", "train_log.jsonl",
     "unet/extra.json", "unet/extra.safetensors", "scheduler/scheduler_config.json", "unet", "model_index.json"],
)  # fmt: skip
def test_links_out_of_the_folder_are_not_published(run_folder, tmp_path, name):
    """By a link a folder could have any file of its owner published, such as a token."""
    folder, secret = tmp_path / "digits", tmp_path / "secret"
    shutil.copytree(run_folder, folder)
    link = folder / name
    if link.exists():
        shutil.move(link, secret)
    else:
        secret.write_text("{}")
    link.symlink_to(secret)
    message = "is a link that leads out of the folder, and would be published. Replace it by a copy."
    with pytest.raises(ValueError, match=message), staged_pipeline(folder):
        pass
    with pytest.raises(ValueError, match=message):
        read_facts(folder)
    link.unlink()
    secret.rename(folder / "inside")
    link.symlink_to(folder / "inside")  # a link within the folder is no harm
    refuse_links_to_elsewhere(folder)


def test_the_folder_may_be_a_link_and_the_hubs_cache_has_links(run_folder, tmp_path):
    (tmp_path / "link").symlink_to(run_folder)
    with staged_pipeline(tmp_path / "link") as folder:
        assert "unet/config.json" in relative(folder)
    snapshot = tmp_path / "models--user--digits" / "snapshots" / ("0" * 40)
    shutil.copytree(run_folder, snapshot)
    blobs = tmp_path / "models--user--digits" / "blobs"
    blobs.mkdir()
    (blobs / "abc").write_text('{"license": "mit"}')
    (snapshot / "facts.json").symlink_to("../../blobs/abc")
    assert read_facts(snapshot)["license"] == "mit"
