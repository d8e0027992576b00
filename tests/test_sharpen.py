"""Sharpening: weights away from what training on own samples teaches (arXiv 2510.03597)."""

import dataclasses
import json
import subprocess
import sys

import pytest
import torch
from conftest import assert_equal_weights, weights

from mini_ddpm import SharpenConfig, TrainConfig, extrapolate, load_pipeline, sharpen, train
from mini_ddpm.training.loop import TrainingLoop


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    """Return tiny pipelines, trained for a moment: without classes, and with them."""
    folder, shared = tmp_path_factory.mktemp("trained"), {"block_out_channels": (32,), "layers_per_block": 1}
    shared |= {"max_train_steps": 20, "train_batch_size": 16, "save_images_epochs": 0, "log_with": "none"}
    shared |= {"dataset_name": str(pictures), "device": "cpu", "num_train_timesteps": 100}
    return [
        train(TrainConfig(output_dir=folder / name, class_conditional=name == "labelled", **shared))
        for name in ("plain", "labelled")
    ]


@pytest.fixture
def config(trained, tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "cache"))
    return SharpenConfig(
        str(trained[1]),
        tmp_path / "sharpened",
        weight=0.5,
        num_images=12,
        num_inference_steps=2,
        max_train_steps=4,
        train_batch_size=8,
        learning_rate=1e-3,
        device="cpu",
        mixed_precision="no",
    )


def test_extrapolate():
    base, tuned = {"a": torch.tensor([1.0, 2.0])}, {"a": torch.tensor([1.5, 1.0])}
    torch.testing.assert_close(extrapolate(base, tuned, 0.5)["a"], torch.tensor([0.75, 2.5]))
    assert torch.equal(extrapolate(base, tuned, 0.0)["a"], base["a"])
    half = extrapolate({"a": base["a"].half()}, {"a": tuned["a"].half()}, 1.0)["a"]
    assert half.dtype == torch.float16 and half.tolist() == [0.5, 3.0]
    with pytest.raises(ValueError, match="differ in their names: b"):
        extrapolate(base, tuned | {"b": base["a"]}, 1.0)


@pytest.mark.parametrize("which", [0, 1])
def test_the_weights_move_away_from_those_trained_on_own_samples(config, trained, which):
    config = dataclasses.replace(config, pipeline=str(trained[which]))
    folder = sharpen(config)
    before, tuned, after = (weights(place) for place in (trained[which], folder / "own", folder))
    assert any((tuned[name] != before[name]).any() for name in before)
    for name, value in before.items():
        torch.testing.assert_close(after[name], 1.5 * value - 0.5 * tuned[name], atol=1e-6, rtol=1e-5)
    pipe, source = load_pipeline(str(folder)), load_pipeline(str(trained[which]))
    assert type(pipe) is type(source) and pipe.scheduler.config == source.scheduler.config
    ours, theirs = ({k: v for k, v in p.config.items() if k[0] != "_"} for p in (pipe, source))
    assert {**ours, "unet": None, "scheduler": None} == {**theirs, "unet": None, "scheduler": None}

    # The same command again changes nothing; another weight needs no other training.
    written = (folder / "own" / "train_log.jsonl").read_text()
    once = weights(sharpen(config))
    assert all(torch.equal(once[name], after[name]) for name in after)
    twice = weights(sharpen(dataclasses.replace(config, weight=2.0)))
    assert (folder / "own" / "train_log.jsonl").read_text() == written
    for name, value in before.items():
        torch.testing.assert_close(twice[name], 3 * value - 2 * tuned[name], atol=1e-6, rtol=1e-5)


def test_own_samples_have_every_class_and_the_levels_of_the_pipeline(config, monkeypatch):
    seen = {}

    def record(train_config, dataset):
        seen["dataset"], seen["config"] = dataset, train_config
        return train(train_config, dataset=dataset)

    monkeypatch.setattr("mini_ddpm.training.sharpen.train", record)
    sharpen(config)
    dataset = seen["dataset"]
    source = load_pipeline(config.pipeline)
    classes = source.unet.config.num_class_embeds - 1
    assert len(dataset) == 12 and dataset.id2label == source.config.id2label
    assert [int(dataset[index]["class_labels"]) for index in range(12)] == [index % classes for index in range(12)]
    assert 1 + seen["config"].saturation_margin == pytest.approx(source.scheduler.config.clip_sample_range)


def test_cut_off_it_goes_on_exactly(config, interrupt):
    whole = sharpen(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))
    interrupt(TrainingLoop, "save_pipeline", 1)
    with pytest.raises(KeyboardInterrupt):
        sharpen(config)
    assert not (config.output_dir / "model_index.json").exists()
    assert_equal_weights(whole, sharpen(config))


def test_two_processes_are_one_with_twice_the_batch(config, two_processes):
    one, two = sharpen(config), config.output_dir.with_name("two")
    command = [sys.executable, *two_processes, "-m", "mini_ddpm", "sharpen", config.pipeline, "--output-dir", str(two)]
    command += ["--num-images", "12", "--steps", "2", "--max-train-steps", "4", "--train-batch-size", "4"]
    command += ["--learning-rate", "1e-3", "--device", "cpu", "--mixed-precision", "no"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(f"{two}: sharpened. Draw images with: mini-ddpm sample {two}") == 1
    first, second = weights(one), weights(two)
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=1e-3, rtol=0)


def test_what_cannot_be_sharpened_is_refused_and_nothing_is_written(config, trained):
    for change, message in (
        ({"pipeline": "mnist-distilled"}, "mnist-distilled is distilled: .* Sharpen the teacher before you distil it"),
        ({"output_dir": trained[1]}, "holds another run. Use another output_dir"),
        ({"weight": -1.0}, "weight=-1.0 must be at least 0"),
        ({"num_images": 0}, "num_images=0 must be at least 1"),
    ):
        before = weights(trained[1])
        with pytest.raises(ValueError, match=message):
            sharpen(dataclasses.replace(config, **change))
        assert not config.output_dir.exists()
        assert all(torch.equal(value, before[name]) for name, value in weights(trained[1]).items())
    sharpen(config)
    settings = json.loads((config.output_dir / "train_config.json").read_text())
    assert settings["sharpened_from"] == config.pipeline and settings["sharpening_weight"] == 0.5
    itself = str(config.output_dir)
    with pytest.raises(ValueError, match="holds another run. Use another output_dir"):
        sharpen(dataclasses.replace(config, pipeline=itself))
    with pytest.raises(ValueError, match=r"own holds a run on other images: their .* or another output_dir"):
        sharpen(dataclasses.replace(config, num_images=16))
