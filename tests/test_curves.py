"""The picture of a training run: a panel for each quantity of its log, and the noising strip of its schedule."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

import mini_ddpm_cli
from mini_ddpm import MiniDDIMScheduler, MiniDDPMClassConditionalPipeline, MiniDDPMPipeline, TrainConfig, curves, train
from mini_ddpm.curves import run_curves
from mini_ddpm.plots import noising_strip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_unet):
    """A run of ten timesteps, without a log."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    MiniDDPMPipeline(tiny_unet(num_class_embeds=None), MiniDDIMScheduler(num_train_timesteps=10)).save_pretrained(
        folder
    )
    return folder


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn."""
    found = []
    draw = curves.figure_to_image
    monkeypatch.setattr(curves, "figure_to_image", lambda figure: found.append(figure) or draw(figure))
    return found


def write_log(folder, entries):
    text = "".join(json.dumps(entry) + "\n" for entry in entries)
    (folder / "train_log.jsonl").write_text(text + '{"step": 99, "lo', encoding="utf-8")  # a killed run wrote this


def entry(step, **others):
    return {"step": step, "epoch": step / 10, "images": step * 8, "loss": 1 / step, "lr": 1e-3 / step, **others}


def shown(figure):
    """The curves of each panel: by label, the steps and the values."""
    return {
        axes.get_title(): {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axes.lines}
        for axes in figure.axes
    }


def test_every_quantity_has_a_panel(folder, figures):
    bands = [[0.5 + band for band in range(10)], None, [2.0] * 9 + [None]]
    more = [{"validation_loss": 0.7}, {}, {"validation_loss": 0.6}]
    write_log(
        folder,
        [
            entry(step, grad_norm=3.0 + step, loss_by_noise_level=band, **other)
            for step, band, other in zip((1, 2, 4), bands, more, strict=True)
        ],
    )
    picture = run_curves(folder)
    assert picture.mode == "RGB" and picture.width == 1200
    assert figures[0].get_suptitle() == "mine: step 4, epoch 0.4, 32 images"
    panels = shown(figures[0])
    assert panels["loss"] == {"training": ([1, 2, 4], [1, 0.5, 0.25]), "validation": ([1, 4], [0.7, 0.6])}
    assert panels["learning rate"].popitem()[1] == ([1, 2, 4], [1e-3, 5e-4, 2.5e-4])
    assert panels["gradient norm"].popitem()[1] == ([1, 2, 4], [4, 5, 7])
    levels = panels["loss by noise level t/T"]
    assert list(levels) == [f"0.{band} to {(band + 1) / 10:.1f}" for band in range(10)]
    assert levels["0.3 to 0.4"] == ([1, 4], [3.5, 2]) and levels["0.9 to 1.0"] == ([1], [9.5])
    scales = {axes.get_title(): axes.get_yscale() for axes in figures[0].axes}
    assert scales.pop("learning rate") == "linear" and set(scales.values()) == {"log"}


def test_a_log_of_an_earlier_version(folder, figures):
    write_log(folder, [entry(5)])
    run_curves(folder)
    assert list(shown(figures[0])) == ["loss", "learning rate"]
    assert figures[0].axes[0].lines[0].get_marker() == "o"  # a single point is seen


def test_a_long_log_is_smoothed(folder, figures):
    write_log(folder, [entry(step, loss=1.0 + step % 2) for step in range(1, 1001)])
    run_curves(folder)
    raw, mean = figures[0].axes[0].lines
    assert raw.get_alpha() < 1 and set(raw.get_ydata()) == {1, 2}
    assert list(mean.get_xdata()) == list(range(1, 1001))
    np.testing.assert_allclose(mean.get_ydata()[10:-10], 1.5, atol=0.03)
    assert len(figures[0].axes[1].lines) == 1  # the learning rate as it is


def test_below_is_the_noising_strip_of_the_schedule(folder, figures):
    """Of two images of the run's pipeline, seeds 0 and 1, at the timesteps 0, 200, 500, 999, scaled to its ten."""
    write_log(folder, [entry(1)])
    scheduler = MiniDDIMScheduler(num_train_timesteps=10)
    drawn = opened(folder)(2, generator=[0, 1]).images
    pictures = [Image.new("RGB", (8, 8), "red")]
    for options, images, timesteps, scale in (
        ({}, drawn, [0, 2, 5, 9], 20),
        ({"images": pictures}, pictures, [0, 2, 5, 9], 20),
        ({"timesteps": [3]}, drawn, [3], 20),
        ({"timesteps": [1] * 20}, drawn, [1] * 20, 6),
    ):
        page = run_curves(folder, **options)
        strip = noising_strip(images, scheduler, timesteps=timesteps, generator=0, scale=scale)
        left, top = (page.width - strip.width) // 2, page.height - strip.height - 12
        assert page.crop((left, top, left + strip.width, top + strip.height)) == strip
    with pytest.raises(ValueError, match="10 must be 0 to 9"):
        run_curves(folder, timesteps=[10])


def opened(folder):
    pipe = MiniDDPMPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize("classes", [1, 2])
def test_a_class_conditional_run(tmp_path, tiny_unet, classes):
    unet = tiny_unet(num_class_embeds=classes + 1)
    MiniDDPMClassConditionalPipeline(unet, MiniDDIMScheduler()).save_pretrained(tmp_path)
    write_log(tmp_path, [entry(1)])
    with_strip = run_curves(tmp_path)
    (tmp_path / "model_index.json").unlink()
    assert run_curves(tmp_path).height < with_strip.height - 300


def test_a_run_without_a_pipeline_is_plotted_without_the_strip(tmp_path, capsys):
    write_log(tmp_path, [entry(1)])
    assert run_curves(tmp_path, images=torch.zeros(1, 1, 8, 8)).size[0] == 1200
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("The noising strip is left out: ") and "model_index.json" in line


def test_a_folder_without_a_log(tmp_path):
    with pytest.raises(ValueError, match="no train_log.jsonl. Give the folder of a training run."):
        run_curves(tmp_path)
    for name in ("steps-8", "steps-4"):
        (tmp_path / name).mkdir()
        write_log(tmp_path / name, [])
    with pytest.raises(ValueError, match="Give one of its runs: steps-4, steps-8."):
        run_curves(tmp_path)
    with pytest.raises(ValueError, match="train_log.jsonl has no entry yet"):
        run_curves(tmp_path / "steps-4")


def read(file):
    with Image.open(file) as picture:
        return picture.copy()


def test_the_command(folder, tmp_path, pictures, capsys):
    write_log(folder, [entry(1)])
    assert mini_ddpm_cli.main(["plot", str(folder)]) == 0
    size = "{}x{}".format(*read(folder / "plot.png").size)
    assert capsys.readouterr().out == f"{folder / 'plot.png'}: {size}\n"
    out = tmp_path / "new" / "run.PNG"
    flags = ["--timesteps", "1", "2", "--dataset-name", str(pictures), "--out", str(out)]
    assert mini_ddpm_cli.main(["plot", str(folder), *flags]) == 0
    images = [read(pictures / "left" / name) for name in ("00.png", "02.png")]
    expected = run_curves(folder, images=images, timesteps=[1, 2])
    assert read(out) == expected
    for bad, message in (
        ([str(folder), "--out", "run.jpg"], "--out=run.jpg must be a file that ends in .png"),
        ([str(tmp_path / "none")], "none has no train_log.jsonl"),
        ([str(folder), "--timesteps", "10"], "timesteps=[10]: 10 must be 0 to 9"),
    ):
        assert mini_ddpm_cli.main(["plot", *bad]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_what_a_training_run_writes_can_be_plotted(tmp_path, pictures, figures):
    config = TrainConfig(
        dataset_name=str(pictures), output_dir=tmp_path / "run", block_out_channels=(8, 16), layers_per_block=1,
        train_batch_size=8, max_train_steps=3, logging_steps=1, save_images_epochs=0, device="cpu", log_with="none",
        dataloader_num_workers=0,
    )  # fmt: skip
    picture = run_curves(train(config))
    assert {"loss", "learning rate"} <= set(shown(figures[0]))
    assert picture.height > 700  # with the strip
