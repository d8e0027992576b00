"""The measuring scripts measure: on a task whose answer is known."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from PIL import Image

import mini_ddpm
from mini_ddpm import MiniDDIMScheduler, MiniDDPMClassConditionalPipeline

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "class_accuracy.py"


def half(label):
    """An image of class 0 is bright on the left, of class 1 on the right; (8, 8) bytes."""
    pixels = np.zeros((8, 8), dtype=np.uint8)
    pixels[:, 4 * label : 4 * label + 4] = 255
    return pixels


class Confused(ModelMixin, ConfigMixin):
    """Predicts the very image that was asked for, but class 1 when asked for class 0 at every fourth place."""

    @register_to_config
    def __init__(self, sample_size=8, in_channels=1, num_class_embeds=3):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))

    def forward(self, sample, timestep, class_labels):
        shown = class_labels % 2
        shown[::4] = 1
        images = [torch.from_numpy(half(int(label)) / 127.5 - 1) for label in shown]
        return UNet2DOutput(sample=torch.stack(images)[:, None].to(sample))


@pytest.fixture(scope="module")
def script():
    # Registered, as dataclasses look up the module of their annotations.
    spec = importlib.util.spec_from_file_location("class_accuracy", SCRIPT)
    module = sys.modules["class_accuracy"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_class_accuracy_counts_what_is_wrong(script, tmp_path, monkeypatch, capsys):
    rng = np.random.default_rng(0)
    for split, count in (("train", 256), ("test", 32)):
        for index in range(count):
            folder = tmp_path / "real" / split / ("left", "right")[index % 2]
            folder.mkdir(parents=True, exist_ok=True)
            noisy = np.clip(half(index % 2) + rng.normal(0, 40, (8, 8)), 0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(folder / f"{index:03d}.png")
    pipe = MiniDDPMClassConditionalPipeline(
        Confused(), MiniDDIMScheduler(prediction_type="sample"), id2label={0: "left", 1: "right"}
    )
    monkeypatch.setattr(mini_ddpm, "load_pipeline", lambda name, dtype: pipe)
    monkeypatch.setattr(script, "MAX_SHIFT", 0)
    arguments = script.Args(
        dataset=str(tmp_path / "real"),
        classifier=tmp_path / "classifier",
        epochs=20,
        num_images=16,
        batch_size=8,
        num_inference_steps=(1, 2),
        guidance_scale=1.0,
        out=tmp_path / "accuracy.json",
    )
    results = script.main(arguments)
    assert results == json.loads((tmp_path / "accuracy.json").read_text())
    assert [result["num_inference_steps"] for result in results] == [1, 2]
    for result in results:
        assert result["classifier_test_accuracy"] >= 0.992
        assert result["accuracy"] == 0.75 and result["accuracy_per_class"] == {"left": 0.5, "right": 1.0}
        assert result["confusions"] == [{"asked": "left", "read": "right", "count": 4}]
    trained = (tmp_path / "classifier" / "model.safetensors").stat().st_mtime_ns
    script.main(arguments)
    assert (tmp_path / "classifier" / "model.safetensors").stat().st_mtime_ns == trained
    arguments.num_images = 15
    with pytest.raises(ValueError, match="multiple of the 2 classes"):
        script.main(arguments)
    capsys.readouterr()
