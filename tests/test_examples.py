"""The examples, run at a small size, give the results that they state."""

import importlib.util
from pathlib import Path

import pytest

import mini_ddpm

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(name):
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(not (mini_ddpm.PRETRAINED / "mnist").exists(), reason="the weights are not in this checkout")
@pytest.mark.parametrize("num_inference_steps", [5, 7])
def test_every_equation(tmp_path, num_inference_steps):
    out = tmp_path / "digits.png"
    assert load("every_equation").main(num_inference_steps=num_inference_steps, out=str(out)) < 1e-4
    assert out.stat().st_size > 1000
