"""The scripts around the measurements do what they say: on a task that is known to be easy, or to be none."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetModel

from mini_ddpm import MiniDDIMScheduler, MiniDDPMClassConditionalPipeline
from mini_ddpm.data import image_dataset, to_model_range
from mini_ddpm.evaluation.evaluate import read_samples
from mini_ddpm.training.distill import DistillConfig, distill

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_classifier.py"


@pytest.fixture(scope="module")
def script(benchmark):
    return benchmark("train_classifier")


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    """Noisy 8x8 pictures of two classes, bright on the left or on the right, with the splits train and test."""
    root, rng = tmp_path_factory.mktemp("halves"), np.random.default_rng(0)
    for split, count in (("train", 256), ("test", 32)):
        for index in range(count):
            pixels, label = rng.normal(0, 40, (8, 8)), index % 2
            pixels[:, 4 * label : 4 * label + 4] += 255
            folder = root / split / ("left", "right")[label]
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(folder / f"{index:03d}.png")
    return root


@pytest.fixture
def config(script, halves, tmp_path):
    return script.Config(
        dataset_name=str(halves), output_dir=tmp_path / "classifier", epochs=20, max_shift=0, device="cpu"
    )


def test_the_classifier_is_as_good_as_it_says(script, config):
    accuracy = script.train_classifier(config)
    assert accuracy >= 0.992
    network = AutoModelForImageClassification.from_pretrained(config.output_dir).eval()
    assert network.config.id2label == {0: "left", 1: "right"}
    images, labels = image_dataset(config.dataset_name, "test").stack(progress=False)
    with torch.inference_mode():
        read = network(to_model_range(images)).logits.argmax(1)
    assert (read == labels).double().mean().item() == accuracy == network.config.test_accuracy

    before = {path: path.read_bytes() for path in config.output_dir.iterdir()}
    with pytest.raises(ValueError, match="is there already"):
        script.train_classifier(config)
    assert {path: path.read_bytes() for path in config.output_dir.iterdir()} == before


def test_a_classifier_that_cannot_tell_is_not_saved(script, config, tmp_path):
    for split, count in (("train", 32), ("test", 16)):
        for index in range(count):  # the same picture in both classes
            folder = tmp_path / "same" / split / ("left", "right")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("L", (8, 8), 128).save(folder / f"{index:03d}.png")
    with pytest.raises(ValueError, match=r"only 50.00% .* less than min_test_accuracy=99.20%, and is not saved"):
        script.train_classifier(dataclasses.replace(config, dataset_name=str(tmp_path / "same"), epochs=1))
    assert not config.output_dir.exists()


def test_the_command_line_refuses_unlabelled_images_in_one_line(config, tmp_path):
    for split in ("train", "test"):
        (tmp_path / "flat" / split).mkdir(parents=True)
        Image.new("L", (8, 8)).save(tmp_path / "flat" / split / "0.png")
    arguments = ["--dataset-name", tmp_path / "flat", "--output-dir", config.output_dir]
    done = subprocess.run([sys.executable, SCRIPT, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == f"error: {str(tmp_path / 'flat')!r} has no labels to train a classifier on."
    assert "Traceback" not in done.stderr and not config.output_dir.exists()


def test_shifts_are_whole_and_in_every_direction(script):
    torch.manual_seed(0)
    image = torch.arange(1, 13, dtype=torch.uint8).view(1, 1, 3, 4)
    framed = torch.nn.functional.pad(image, (1, 1, 1, 1))
    possible = {tuple(framed[..., i : i + 3, j : j + 4].flatten().tolist()) for i in range(3) for j in range(3)}
    seen = {tuple(shift.flatten().tolist()) for shift in script.shifted(image.expand(200, -1, -1, -1), 1)}
    assert seen == possible


def test_speed_is_measured_beside_peers(tmp_path, benchmark):
    speed = benchmark("speed")
    parts = ("sampling", "student", "training", "scheduler")
    args = speed.Args(rounds=1, num_inference_steps=2, batch_sizes=(1, 2), train_batch_size=2, compiled=False)
    result = speed.main(dataclasses.replace(args, only=parts, results=tmp_path))
    assert json.loads((tmp_path / "speed.json").read_text()) == result
    rows = {row["row"]: row["values"] for row in result["rows"]}
    for row in ("draw, 2 steps, 2 images", "a training step, batch 2", "a DDIM step of the scheduler"):
        assert {"mini-ddpm", "diffusers"} <= set(rows[row])
        assert all(value > 0 for values in rows[row].values() for value in values)
    assert rows["parameters"]["mini-ddpm"][0] == pytest.approx(2.976477)
    table = (tmp_path / "speed.md").read_text()
    assert (
        "| | Parameters, M | GFLOP an image | 1 image, s | 2 images, s | % of the peak | Training, images/s |" in table
    )
    with Image.open(tmp_path / "speed.png") as plot:
        assert plot.size[0] > 500
    with pytest.raises(ValueError, match="--only nothing: choose of sampling, student, training"):
        speed.main(dataclasses.replace(args, only=("nothing",)))


@pytest.fixture
def quality(benchmark, monkeypatch, tmp_path):
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "cache"))
    return benchmark("quality")


@pytest.fixture
def tiny(quality, halves, tmp_path):
    """Arguments of a table that takes seconds."""
    torch.manual_seed(0)
    shape = ResNetConfig(num_channels=1, embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetModel(shape).save_pretrained(tmp_path / "features")
    return quality.Args(
        table="ablation",
        dataset_name=str(halves),
        num_images=32,
        num_inference_steps=2,
        feature_extractor=str(tmp_path / "features"),
        feature_dtype="fp32",
        dtype="fp32",
        mixed_precision="no",
        torch_compile=False,
        runs=tmp_path / "runs",
        results=tmp_path / "results",
    )


def test_the_ablation_is_made_of_real_trainings_once(quality, tiny, monkeypatch):
    args = dataclasses.replace(tiny, only=("epsilon", "widths 32, 64"), seeds=(0, 1), epochs=(0.25,))
    rows = quality.main(args)
    settings = [(row["variant"], row["training_seed"], row["images_seen"]) for row in rows]
    assert settings == [(variant, seed, 64) for variant in args.only for seed in args.seeds]
    assert json.loads((args.results / "ablation.json").read_text()) == rows
    configs = [json.loads(file.read_text()) for file in sorted(args.runs.glob("ablation/*/train_config.json"))]
    changed = [(config["prediction_type"], config["block_out_channels"], config["seed"]) for config in configs]
    assert changed == [("epsilon", None, 0), ("epsilon", None, 1)] + [("v_prediction", [32, 64], k) for k in (0, 1)]
    table = (args.results / "ablation.md").read_text().splitlines()
    mean = sum(row["frechet_distance"] for row in rows[:2]) / 2
    assert table[2].startswith(f"| epsilon | 0.25 | 64 | {mean:.2f} ± ") and table[2].endswith(" | 2 |")
    assert len(table) == 6 and table[-1].startswith("2 steps of MiniDDIMScheduler. 32 images ")

    monkeypatch.setattr("mini_ddpm.training.train.TrainingLoop", None)  # what was trained is not trained again
    assert quality.main(args) == rows
    with pytest.raises(ValueError, match="--only nothing: choose of the recipe; epsilon; "):
        quality.main(dataclasses.replace(args, only=("nothing",)))


def test_the_ablation_keeps_the_rows_of_another_machine(quality, tiny, tmp_path, monkeypatch):
    args = dataclasses.replace(tiny, only=("epsilon",), epochs=(0.25,), runs=tmp_path / "there")
    epsilon = quality.main(args)
    args = dataclasses.replace(args, only=("the recipe",), runs=tmp_path / "here")
    rows = quality.main(args)
    assert [row["variant"] for row in rows] == ["the recipe", "epsilon"] and rows[1:] == epsilon

    monkeypatch.setattr("mini_ddpm.training.train.TrainingLoop", None)
    elsewhere = dataclasses.replace(args, only=("epsilon", "the recipe"), runs=tmp_path / "elsewhere")
    assert quality.main(elsewhere) == rows and not elsewhere.runs.exists()
    with pytest.raises(TypeError):  # it would train: this row has other settings
        quality.main(dataclasses.replace(elsewhere, train_batch_size=32))


def test_the_tutorials_table_has_a_column_for_each_number_of_epochs(quality, tiny, monkeypatch):
    only = ("tutorial, cosine, T = 1000", "ours")
    args = dataclasses.replace(tiny, table="tutorial", only=only, epochs=(1, 0.5))
    rows = quality.main(args)
    settings = [(row["variant"], row["epochs"], row["images_seen"]) for row in rows]
    assert settings == [(variant, epochs, 256 * epochs) for variant in only for epochs in (0.5, 1)]
    assert len({row["frechet_distance"] for row in rows}) == 4
    folders = {path.name: path for path in (args.runs / "tutorial").iterdir()}
    assert set(folders) == {f"tutorial-cosine-T=1000-0-{k}" for k in ("0.5", "1")} | {"ours-0-0.5", "ours-0-1"}
    steps = {name: [file.name for file in sorted(folder.glob("checkpoint-*"))] for name, folder in folders.items()}
    assert steps["tutorial-cosine-T=1000-0-1"] == ["checkpoint-1", "checkpoint-2"]  # went on from the column before
    assert steps["ours-0-0.5"] == ["checkpoint-2"] and steps["ours-0-1"] == ["checkpoint-4"]  # a schedule of its own

    monkeypatch.setattr("mini_ddpm.training.train.TrainingLoop", None)  # what was trained is not trained again
    assert quality.main(args) == rows


@pytest.fixture
def digits(tiny_unet, tmp_path):
    """The folder of a pipeline that has learned nothing."""
    scheduler = MiniDDIMScheduler(prediction_type="v_prediction")
    pipe = MiniDDPMClassConditionalPipeline(tiny_unet(num_class_embeds=3), scheduler, id2label={0: "left", 1: "right"})
    pipe.save_pretrained(tmp_path / "digits")
    return str(tmp_path / "digits")


def test_the_samplers_table_tries_every_spacing(quality, tiny, digits):
    rows = quality.main(dataclasses.replace(tiny, table="samplers", pipelines=(digits,), max_steps=10))
    drawn = [row for row in rows if row["images"] == "generated"]
    ddim = {(r["variant"], r["num_inference_steps"]): r["frechet_distance"] for r in drawn if "DDIM" in r["scheduler"]}
    assert set(ddim) == {("digits", 10), ("digits", 5), ("digits, leading", 10), ("digits, linspace", 10)}
    assert len({distance for (_, steps), distance in ddim.items() if steps == 10}) == 3
    assert "`digits, leading`\n\n| Images |" in (tiny.results / "samplers.md").read_text()


def test_the_table_of_distillation_has_students_and_teacher(quality, tiny, halves, tmp_path, digits):
    distilling = DistillConfig(
        digits, tmp_path / "students", 2, rounds=2, images_per_round=64, dataset_name=str(halves)
    )
    students = tuple(map(str, distill(dataclasses.replace(distilling, guidance_scale=1.5, log_with="none"))))
    args = dataclasses.replace(tiny, table="distillation", pipelines=(digits,), students=students)
    quality.main(args)
    table = (args.results / "distillation.md").read_text().splitlines()
    starts = ["| 2 | **student** | 2 | ", "| 4 | **student** | 4 | ", "| 4 | teacher | 8 | "]
    starts += ["| 20 | teacher | 40 | "]
    assert [row[: len(start)] for row, start in zip(table[2:], starts, strict=False)] == starts
    assert table[6] == "" and "The teacher: guidance 1.5. 32 images " in table[-1]
    with Image.open(args.results / "distillation.png") as picture:
        assert picture.size[0] > 80
    with pytest.raises(ValueError, match="is no student. Make some"):
        quality.main(dataclasses.replace(args, students=(digits,)))
    with pytest.raises(ValueError, match="is a student itself"):
        quality.main(dataclasses.replace(args, pipelines=students))


def test_the_weights_are_trained_and_measured_by_one_command(quality, tiny, monkeypatch):
    args = dataclasses.replace(tiny, table="weights", epochs=(1,))
    rows = quality.main(args)
    drawn = [(row["variant"], row["eta"], row.get("guidance_scale")) for row in rows if row["images"] == "generated"]
    assert drawn == [("mnist-class-conditional", 1, 1), ("mnist-class-conditional", 1, 1.5), ("mnist", 1, None)]
    trained = {
        name: json.loads((args.runs / name / "train_config.json").read_text()) for name in ("mnist", drawn[0][0])
    }
    assert trained["mnist"]["pretrained_model_name_or_path"] == str(args.runs / "mnist-class-conditional")
    assert (args.results / "weights.md").read_text().count("guidance 1.5 from 0.35 to 0.6, eta 1") == 1

    monkeypatch.setattr("mini_ddpm.training.train.TrainingLoop", None)  # what was trained is not trained again
    assert quality.main(args) == rows


def test_the_run_on_a_gpu_is_rehearsed_on_a_cpu(benchmark, tmp_path):
    """Every part that draws or trains, at a tiny size; what it draws is what `evaluate --samples` reads."""
    gpu = benchmark("gpu")
    generator = torch.Generator().manual_seed(0)
    arrays = {}
    for split, count in (("train", 24), ("test", 12)):
        images = torch.randint(0, 256, (count, 1, 8, 8), generator=generator, dtype=torch.uint8)
        arrays |= {f"{split}_images": images.numpy(), f"{split}_labels": (torch.arange(count) % 3).numpy()}
    np.savez(tmp_path / "packed.npz", **arrays)
    args = gpu.Args(
        data=str(tmp_path / "packed.npz"), output=tmp_path / "out", device="cpu", batch_size=4, minutes=1.0,
        images_per_second=4.0, images_per_round=8, draw_batch_size=5, num_images=12, num_final_images=16,
        num_inference_steps=2, block_out_channels=(32,),
        only=("class-conditional", "samples", "unconditional", "sharpen", "final-samples", "students"),
    )  # fmt: skip
    gpu.main(args)
    result = json.loads(next((tmp_path / "out").glob("gpu-*.json")).read_text())
    assert not [name for name in args.only if "error" in result[name]], result
    names = {path.stem for path in (tmp_path / "out").glob("*.safetensors")}
    assert {"class-conditional", "class-conditional-early", "unconditional", "steps-4", "steps-2", "steps-1"} <= names
    images, labels, row = read_samples(tmp_path / "out" / "samples-eta-0.7.npz", 100)
    assert images.shape == (12, 1, 8, 8) and labels.tolist() == arrays["test_labels"].tolist()
    assert (row["num_inference_steps"], row["eta"], row["unet_evaluations"]) == (2, 0.7, 2)
