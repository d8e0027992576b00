"""Training: the loss is the paper's, an interrupted run resumes exactly, failures keep the last checkpoint."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import tyro
from conftest import SHORT_RUN, WEIGHTS, assert_equal_weights, weights
from PIL import Image

from mini_ddpm import (
    MiniDDIMScheduler,
    MiniDDPMClassConditionalPipeline,
    MiniDDPMPipeline,
    load_pipeline,
)
from mini_ddpm.data import ImageDataset, image_dataset, to_model_range
from mini_ddpm.pipelines.pipeline_base import DEFAULT_NUM_INFERENCE_STEPS
from mini_ddpm.training.batches import image_batches, image_ids, noise_batch
from mini_ddpm.training.checkpoints import truncate_log
from mini_ddpm.training.distill import DistillConfig
from mini_ddpm.training.loss import beyond_saturation, compute_loss, saturated_levels
from mini_ddpm.training.models import new_model
from mini_ddpm.training.train import TrainConfig, train


@pytest.fixture
def config(pictures, tmp_path):
    """Twenty steps of a tiny network."""
    return TrainConfig(
        dataset_name=str(pictures),
        output_dir=tmp_path / "run",
        block_out_channels=(64, 64),
        layers_per_block=1,
        max_train_steps=20,
        lr_warmup_steps=5,
        checkpointing_steps=10,
        logging_steps=5,
        **SHORT_RUN,
    )


def hidden_files(folder):
    """Unfinished files, beside the lock."""
    return [path.name for path in folder.rglob(".*") if path.name != ".lock"]


def run_in_process(config, launcher=()):
    """Start `train(config)` in a process of its own."""
    values = {key: str(value) if isinstance(value, Path) else value for key, value in vars(config).items()}
    script = config.output_dir.parent / "train.py"
    script.write_text(
        "import json, sys\nfrom mini_ddpm.training.train import TrainConfig, train\n"
        f"train(TrainConfig(**json.loads({json.dumps(json.dumps(values))})))\n"
    )
    command = [sys.executable, *launcher, str(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


# ---- the loss ----------------------------------------------------------------------------------------------


class OfEpsilon(torch.nn.Module):
    """One and the same prediction of the noise, ε + δ, told as ε, x_0 or v."""

    def __init__(self, scheduler, images, noise, error):
        super().__init__()
        self.scheduler, self.images, self.noise, self.error = scheduler, images, noise, error

    def forward(self, sample, timesteps, class_labels=None):
        alphas_cumprod = self.scheduler.alphas_cumprod[timesteps].view(-1, 1, 1, 1).double()
        alpha, sigma = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        epsilon = self.noise + self.error
        x0 = self.images - sigma / alpha * self.error
        told = {"epsilon": epsilon, "sample": x0, "v_prediction": alpha * epsilon - sigma * x0}
        return SimpleNamespace(sample=told[self.scheduler.config.prediction_type])


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("limits", [{"max": 1e9}, {"max": 5.0}, {"max": 0.1}, {"min": 1.0}, {"min": 0.5, "max": 4.0}])
def test_snr_weights_make_the_three_losses_one(prediction_type, limits):
    # Min-SNR weighs the error of x_0 by min(SNR, γ), truncated SNR by max(SNR, 1), however it is told; that is
    # min(SNR, γ)/SNR · ||δ||² for an error δ of the noise.
    torch.manual_seed(0)
    scheduler = MiniDDIMScheduler(prediction_type=prediction_type)
    images, noise, error = (torch.randn(6, 1, 4, 4, dtype=torch.float64) for _ in range(3))
    timesteps = torch.tensor([3, 100, 300, 500, 700, 900])
    loss = compute_loss(
        OfEpsilon(scheduler, images, noise, error),
        scheduler,
        images,
        noise,
        timesteps,
        snr_gamma=limits.get("max"),
        snr_floor=limits.get("min"),
    )
    alphas_cumprod = scheduler.alphas_cumprod[timesteps].double()
    snr = alphas_cumprod / (1 - alphas_cumprod)
    expected = (snr.clamp(**limits) / snr * error.square().mean(dim=(1, 2, 3))).mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_without_weights_the_loss_is_the_mean_squared_error(prediction_type):
    torch.manual_seed(0)
    scheduler = MiniDDIMScheduler(prediction_type=prediction_type)
    images, noise, labels = torch.randn(3, 1, 4, 4), torch.randn(3, 1, 4, 4), torch.tensor([7, 8, 9])
    timesteps = torch.tensor([3, 500, 900])
    target = {
        "epsilon": noise,
        "sample": images,
        "v_prediction": scheduler.get_velocity(images, noise, timesteps),
    }[prediction_type]
    given = []

    def network(*args, **labels):
        given[:] = [*args, labels]
        return SimpleNamespace(sample=target + torch.tensor([1.0, 2.0, 3.0]).view(3, 1, 1, 1))

    loss = compute_loss(network, scheduler, images, noise, timesteps, labels)
    assert loss.dtype == torch.float32 and loss.item() == pytest.approx((1 + 4 + 9) / 3, rel=1e-5)
    assert torch.equal(given[0], scheduler.add_noise(images, noise, timesteps))
    assert given[1] is timesteps and given[2] == {"class_labels": labels}
    compute_loss(network, scheduler, images, noise, timesteps)
    assert given[-1] == {}


def test_loss_refuses_a_learned_variance():
    scheduler, images = MiniDDIMScheduler(), torch.zeros(2, 1, 4, 4)
    doubled = OfEpsilon(scheduler, images, torch.zeros(2, 2, 4, 4), 0.0)
    with pytest.raises(ValueError, match=r"\(2, 2, 4, 4\).*\(2, 1, 4, 4\)"):
        compute_loss(doubled, scheduler, images, images, torch.tensor([1, 2]))


# ---- what each step sees -----------------------------------------------------------------------------------


def process(index, of):
    return SimpleNamespace(
        process_index=index, num_processes=of, is_main_process=index == 0, device=torch.device("cpu")
    )


def test_every_epoch_shows_every_image_once_in_a_new_order():
    for count in (10, 7):  # epochs that end between two batches, and within one
        stream = torch.cat(list(image_ids(process(0, 1), 0, count, 4, range(count))))
        epochs = stream.split(count)
        assert [epoch.sort().values.tolist() for epoch in epochs] == 4 * [list(range(count))]
        assert len({tuple(epoch.tolist()) for epoch in epochs}) == 4


def test_draws_do_not_change_from_version_to_version():
    assert next(image_ids(process(0, 1), 7, 10, 10, range(3, 4))).tolist() == [3, 7, 8, 1, 0, 2, 9, 5, 4, 6]
    noise, timesteps, labels = noise_batch(
        process(0, 1), 7, 3, torch.arange(1000), torch.zeros(4, 1, 1, 1), torch.arange(4), 4, 0.5
    )
    assert (timesteps.tolist(), labels.tolist()) == ([543, 793, 43, 293], [0, 4, 4, 3])
    assert noise.flatten().tolist() == pytest.approx([0.129073, -0.782812, 0.858112, -0.742872], abs=1e-6)


def test_processes_share_the_batch_of_one():
    images, labels = torch.zeros(8, 1, 4, 4), torch.arange(8)
    levels = torch.arange(1000)
    whole = noise_batch(process(0, 1), 0, 3, levels, images, labels, 8, 0.5)
    parts = [noise_batch(process(i, 2), 0, 3, levels, images[:4], labels[4 * i : 4 * i + 4], 8, 0.5) for i in (0, 1)]
    assert 0 < (whole[2] == 8).sum() < 8
    for of_whole, of_parts in zip(whole, zip(*parts, strict=True), strict=True):
        assert torch.equal(of_whole, torch.cat(of_parts))
    ids = [list(image_ids(process(i, 2), 0, 10, 4, range(5))) for i in (0, 1)]
    ids_whole = list(image_ids(process(0, 1), 0, 10, 8, range(5)))
    assert [torch.cat(pair).tolist() for pair in zip(*ids, strict=True)] == [batch.tolist() for batch in ids_whole]


def test_seed_and_step_decide_what_is_drawn():
    def drawn(seed, step):
        noise, timesteps, labels = noise_batch(
            process(0, 1), seed, step, torch.arange(1000), torch.zeros(8, 1, 4, 4), torch.zeros(8).long(), 8, 0.5
        )
        ids = next(image_ids(process(0, 1), seed, 1000, 8, range(step, step + 1)))
        return noise, timesteps, labels, ids

    first = drawn(0, 3)
    assert all(torch.equal(one, other) for one, other in zip(first, drawn(0, 3), strict=True))
    for seed, step in ((1, 3), (0, 4)):
        noise, timesteps, _, ids = drawn(seed, step)
        assert not torch.equal(noise, first[0])
        assert not torch.equal(timesteps, first[1]) and not torch.equal(ids, first[3])


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize(
    ("width", "cache", "is_cached"),
    [
        (8, True, True),
        (8, False, False),
        (8, None, True),
        (124_999_999, None, True),  # times 16 pictures: just less than 2 GB
        (125_000_000, None, False),
        (125_000_000, True, True),
    ],
)
def test_batches_are_the_images_of_their_indices(pictures, tmp_path, monkeypatch, labelled, width, cache, is_cached):
    if not labelled:
        for path in pictures.rglob("*.png"):
            shutil.copyfile(path, tmp_path / path.name)
    dataset = image_dataset(pictures if labelled else tmp_path)
    images, labels = dataset.stack(progress=False)
    stacked = []
    monkeypatch.setattr(dataset, "stack", lambda progress: stacked.append(progress) or (images, labels))
    if width != 8:
        monkeypatch.setattr(dataset, "shape", (1, 1, width))
        monkeypatch.setattr(type(dataset), "pixels", lambda self, index: images[index].numpy())
    ids = [torch.tensor([3, 1, 8]), torch.tensor([15, 1, 0])]
    is_main = labelled  # only the main process shows a progress bar
    batches = list(image_batches(process(0 if is_main else 1, 2), dataset, iter(ids), cache, 0))
    assert stacked == [is_main] * is_cached
    for batch, (of_batch, its_labels) in zip(ids, batches, strict=True):
        assert torch.equal(of_batch, images[batch] / 127.5 - 1)
        assert torch.equal(its_labels, labels[batch]) if labelled else its_labels is None


def test_timesteps_are_stratified_and_labels_dropped():
    images, seen, dropped = torch.zeros(100, 1, 1, 1), [], 0
    for step in range(40):
        noise, timesteps, labels = noise_batch(
            process(0, 1), 0, step, torch.arange(1000), images, torch.zeros(100).long(), 10, 0.25
        )
        # Exactly one in each of 100 strata of ten noise levels. Strata begin at a multiple of ten plus an offset in
        # [0, 10), which rounds down to one offset for all timesteps of a batch.
        assert ((timesteps - timesteps.min()).sort().values == 10 * torch.arange(100)).all()
        assert timesteps.min() < 10
        assert torch.histc(timesteps.float(), 10, 0, 1000).tolist() == pytest.approx([10] * 10, abs=1)
        assert set(labels.tolist()) <= {0, 10}
        dropped += (labels == 10).sum().item()
        seen.append(timesteps)
    seen = torch.cat(seen)
    assert seen.min() == 0 and seen.max() == 999 and len(seen.unique()) > 900
    assert dropped / 4000 == pytest.approx(0.25, abs=0.03)


def test_every_stratum_has_one_timestep_also_where_they_do_not_divide():
    for batch_size, count in ((3, 8), (7, 100), (64, 1000), (100, 32)):
        levels = torch.arange(count).flip(0) * 10  # as a teacher's, they come in any order
        images = torch.zeros(batch_size, 1, 1, 1)
        edges = count * torch.arange(batch_size + 1, dtype=torch.float64) / batch_size
        for step in range(20):
            labels = torch.zeros(batch_size).long()  # which an unconditional network does not take
            _, timesteps, labels = noise_batch(process(0, 1), 0, step, levels, images, labels, None, 0.1)
            assert labels is None
            positions = (count - 1 - timesteps // 10).sort().values.double()
            # A position is a point of its stratum, rounded down.
            assert (positions > edges[:-1] - 1).all() and (positions < edges[1:]).all()


# ---- whole runs --------------------------------------------------------------------------------------------


def test_overfits_sixteen_images(config, pictures):
    config = dataclasses.replace(
        config,
        class_conditional=True,
        train_batch_size=16,
        max_train_steps=250,
        learning_rate=3e-3,
        checkpointing_steps=250,
        ema_max_decay=0.9,
        save_images_epochs=100,
        log_with="tensorboard",
    )
    folder = train(config)
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.25 * log[0]["loss"]
    assert log[-1]["images"] == 250 * 16 and log[-1]["epoch"] == 250
    assert list((folder / "logs").glob("events.*")) and (folder / "samples" / "epoch-0250.png").exists()

    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    drawn = pipe(["left"] * 8 + ["right"] * 8, num_inference_steps=20, generator=generator, output_type="pt").images
    real = torch.stack(
        [torch.from_numpy(np.asarray(Image.open(path)) / 255.0).float() for path in sorted(pictures.rglob("*.png"))]
    )
    distance = (drawn.flatten(1)[:, None] - real.flatten(1)[None]).square().mean(-1).min(dim=1).values.sqrt()
    assert distance.median() < 0.15  # the pictures themselves are 0.5 apart
    left, right = drawn[:8], drawn[8:]
    assert left[..., :4].mean() > 3 * left[..., 5:].mean() and right[..., 5:].mean() > 3 * right[..., :4].mean()


def test_ten_steps_and_ten_more_are_twenty(config, capsys):
    whole = train(dataclasses.replace(config, dropout=0.1))
    cut = whole.with_name("cut")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-20")
    (cut / WEIGHTS).unlink()
    train(dataclasses.replace(config, dropout=0.1, output_dir=cut))
    assert f"Resuming from {cut / 'checkpoint-10'} (step 10 of 20)." in capsys.readouterr().out
    assert_equal_weights(cut, whole)
    lines = [json.loads(line) for line in (cut / "train_log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [5, 10, 15, 20]
    before = weights(whole)
    train(dataclasses.replace(config, dropout=0.1))
    assert f"{whole} is already trained (20 steps)." in capsys.readouterr().out
    assert all(torch.equal(before[key], tensor) for key, tensor in weights(whole).items())


def test_reading_images_as_they_are_needed_changes_nothing(config):
    config = dataclasses.replace(config, class_conditional=True)
    cached = train(dataclasses.replace(config, max_train_steps=10))
    read = train(
        dataclasses.replace(
            config,
            max_train_steps=10,
            output_dir=cached.with_name("read"),
            cache_dataset=False,
            dataloader_num_workers=0,
        )
    )
    assert_equal_weights(read, cached)


def test_killed_at_any_moment_it_goes_on_from_the_last_whole_checkpoint(config):
    config = dataclasses.replace(config, max_train_steps=40, checkpointing_steps=2)
    killed = dataclasses.replace(config, output_dir=config.output_dir.with_name("killed"))
    running = run_in_process(killed)
    deadline = time.monotonic() + 120
    while not (killed.output_dir / "checkpoint-4").exists():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()[0]
        time.sleep(0.01)
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert not (killed.output_dir / "checkpoint-40").exists()
    assert load_pipeline(killed.output_dir)
    train(killed)
    assert_equal_weights(killed.output_dir, train(config))
    assert hidden_files(killed.output_dir) == []


def test_stopped_before_any_rename_the_same_command_completes_the_run(config, monkeypatch):
    """A checkpoint of the last step means that weights, card and grid of that step are written."""
    config = dataclasses.replace(config, max_train_steps=4, checkpointing_steps=2, log_with="none")
    rename, calls = os.replace, []

    class Stop(BaseException):
        pass

    def stop_before(last):
        def replace(source, target):
            calls.append(Path(target).name)
            if len(calls) == last:
                raise Stop
            rename(source, target)

        calls.clear()
        monkeypatch.setattr(os, "replace", replace)

    stop_before(None)
    whole = train(config)
    files = {path.relative_to(whole) for path in whole.rglob("*")}
    names = [*calls]
    assert names.count("diffusion_pytorch_model.safetensors") == 2 and names.index("checkpoint-4") == len(names) - 1
    for last in range(names.index("checkpoint-2"), len(names) + 1):
        stopped = dataclasses.replace(config, output_dir=whole.with_name(f"stopped-{last}"))
        stop_before(last)
        with pytest.raises(Stop):
            train(stopped)
        stop_before(None)
        train(stopped)
        assert_equal_weights(stopped.output_dir, whole)
        assert {path.relative_to(stopped.output_dir) for path in stopped.output_dir.rglob("*")} == files


def test_two_processes_are_one_with_twice_the_batch(config, two_processes):
    two = dataclasses.replace(config, train_batch_size=2, output_dir=config.output_dir.with_name("two"))
    running = run_in_process(two, two_processes)
    try:
        output = running.communicate(timeout=120)[0]
    finally:
        running.kill()
    assert running.returncode == 0, output
    # What they predict, not their weights: a bias that the softmax or a norm cancels has only rounding for a gradient,
    # and Adam walks along it as far as along any other.
    sample, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 600, 999])
    predictions = [load_pipeline(folder).unet(sample, timesteps).sample for folder in (two.output_dir, train(config))]
    torch.testing.assert_close(*predictions, atol=1e-4, rtol=0)
    assert hidden_files(two.output_dir) == []
    steps = [json.loads(line)["images"] for line in (two.output_dir / "train_log.jsonl").read_text().splitlines()]
    assert steps[-1] == 80


def test_accumulation_counts_optimizer_steps(config):
    folder = train(dataclasses.replace(config, train_batch_size=2, gradient_accumulation_steps=2))
    last = json.loads((folder / "train_log.jsonl").read_text().splitlines()[-1])
    assert (last["step"], last["images"], last["epoch"]) == (20, 80, 5.0)


def test_colour_and_oblong_pictures(config, tmp_path):
    (tmp_path / "colour").mkdir()
    for index in range(4):
        Image.new("RGB", (12, 9), (60 * index, 255, 0)).save(tmp_path / "colour" / f"{index}.png")
    folder = train(dataclasses.replace(config, dataset_name=str(tmp_path / "colour"), max_train_steps=2))
    pipe = load_pipeline(folder)
    assert pipe(num_inference_steps=1, output_type="pt").images.shape == (1, 3, 9, 12)


@pytest.mark.parametrize(("levels", "steps"), [(1000, DEFAULT_NUM_INFERENCE_STEPS), (8, 8)])
def test_grids_take_the_default_number_of_steps(config, monkeypatch, levels, steps):
    calls, call = [], MiniDDPMPipeline.__call__

    def record(self, *args, **options):
        calls.append(options)
        return call(self, *args, **options)

    monkeypatch.setattr(MiniDDPMPipeline, "__call__", record)
    config = dataclasses.replace(config, max_train_steps=8, save_images_epochs=1, num_train_timesteps=levels)
    folder = train(config)
    # Four steps of four images are an epoch.
    assert [path.name for path in sorted((folder / "samples").iterdir())] == ["epoch-0001.png", "epoch-0002.png"]
    assert [(options["num_inference_steps"], options["batch_size"]) for options in calls] == [(steps, 64)] * 2
    # What is saved is checked and logged first.
    log = [json.loads(line)["step"] for line in (folder / "train_log.jsonl").read_text().splitlines()]
    assert log == [4, 5, 8]
    with Image.open(folder / "samples" / "epoch-0002.png") as grid:
        assert grid.width > 8 * 8


# ---- runs that start from a pipeline -------------------------------------------------------------------------


@pytest.fixture
def save(tiny_unet, tmp_path):
    """Saves an untrained pipeline whose every weight shows, and returns its folder and its network."""

    def make(timesteps=1000, prediction_type="v_prediction", **shape):
        unet = tiny_unet(**shape)
        scheduler = MiniDDIMScheduler(num_train_timesteps=timesteps, prediction_type=prediction_type)
        kind = MiniDDPMPipeline if unet.config.num_class_embeds is None else MiniDDPMClassConditionalPipeline
        kind(unet, scheduler).save_pretrained(tmp_path / "start")
        return str(tmp_path / "start"), unet

    return make


def starting_from(folder, config, **changes):
    shape = {"block_out_channels": None, "layers_per_block": None}
    return dataclasses.replace(config, **shape, pretrained_model_name_or_path=folder, **changes)


@pytest.mark.parametrize(
    ("known", "classes", "told"),
    [
        # classes that the source knows, those of the dataset, and what the source is told where the new one is told y
        pytest.param(10, None, lambda y: torch.full_like(y, 10), id="classes to none"),
        pytest.param(None, 2, lambda y: None, id="none to classes"),
        pytest.param(10, 2, lambda y: torch.full_like(y, 10), id="classes to others"),
        pytest.param(10, 10, lambda y: y, id="classes to as many"),
        pytest.param(None, None, lambda y: None, id="none to none"),
    ],
)
def test_a_run_starts_as_the_pipeline_it_starts_from(save, config, tmp_path, known, classes, told):
    folder, source = save(num_class_embeds=known and known + 1)
    for index in range(classes or 1):
        (tmp_path / "other" / str(index)).mkdir(parents=True)
        Image.new("L", (10, 12)).save(tmp_path / "other" / str(index) / "0.png")
    config = starting_from(folder, config, class_conditional=classes is not None, dropout=0.5)
    unet, scheduler = new_model(config, image_dataset(tmp_path / "other"))
    assert unet.config.num_class_embeds == (classes and classes + 1)
    assert unet.config.sample_size == (12, 10) and unet.config.dropout == 0.5
    sample, timesteps = torch.randn(11, 1, 12, 10), torch.arange(0, 1000, 99)[:11]
    labels = torch.arange(11) % ((classes or 0) + 1)  # the null label too
    with torch.no_grad():
        began = unet.eval()(sample, timesteps, None if classes is None else labels).sample
        expected = source(sample, timesteps, told(labels)).sample
        torch.testing.assert_close(began, expected, atol=1e-5, rtol=0)
        if known:  # else any class would do
            assert (source(sample, timesteps, torch.zeros(11).long()).sample - expected).abs().max() > 1e-3


def test_shape_and_noise_schedule_are_those_of_the_pipeline(save, config):
    # Fewer timesteps than the configuration has, and than the steps in which grids of samples are drawn.
    folder, source = save(timesteps=12, prediction_type="epsilon", sample_size=28, num_class_embeds=None)
    config = starting_from(folder, config, max_train_steps=1, save_images_epochs=1, train_batch_size=32)
    pipe = load_pipeline(train(dataclasses.replace(config, learning_rate=1e-25)))
    assert (pipe.scheduler.config.num_train_timesteps, pipe.scheduler.config.prediction_type) == (12, "epsilon")
    assert list(pipe.unet.config.block_out_channels) == list(source.config.block_out_channels)
    assert pipe.unet.config.sample_size == 8
    assert pipe(num_inference_steps=2, output_type="pt").images.shape == (1, 1, 8, 8)
    # The step was too small to change the weights.
    assert_equal_weights(config.output_dir, folder)
    trained = train(dataclasses.replace(config, max_train_steps=10, output_dir=config.output_dir.with_name("longer")))
    before = source.state_dict()
    assert all(not torch.equal(tensor, before[key]) for key, tensor in weights(trained).items() if "conv" in key)


def test_a_cut_run_from_a_pipeline_goes_on(save, config, tmp_path):
    folder, source = save()
    config = starting_from(folder, config, class_conditional=True)
    whole = train(config)
    cut = whole.with_name("cut")
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoint-20")
    (cut / WEIGHTS).unlink()
    train(dataclasses.replace(config, output_dir=cut))
    assert_equal_weights(cut, whole)
    shutil.copytree(folder, tmp_path / "another")
    for other in (None, str(tmp_path / "another")):
        with pytest.raises(ValueError, match=f"pretrained_model_name_or_path='{folder}', not {other!r}"):
            train(dataclasses.replace(config, pretrained_model_name_or_path=other))


def test_a_pipeline_of_other_images_is_refused(save, config):
    folder, source = save(in_channels=3, out_channels=3)
    with pytest.raises(ValueError, match="3 channels, but those of .* have 1") as error:
        train(starting_from(folder, config))
    assert "\n" not in str(error.value)
    assert not config.output_dir.exists()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("preset", "tutorial-32"),
        ("block_out_channels", (8, 8)),
        ("prediction_type", "epsilon"),
        ("layers_per_block", 3),
    ],
)
def test_another_shape_or_schedule_than_the_pipelines_is_refused(save, config, field, value):
    folder, source = save()
    config = dataclasses.replace(starting_from(folder, config), **{field: value})
    with pytest.raises(
        ValueError,
        match=rf"{field}=.* conflicts with .*, whose network shape and noise schedule are kept\. Omit {field}",
    ):
        train(config)
    assert not config.output_dir.exists()


# ---- what goes wrong ---------------------------------------------------------------------------------------


def test_pixels_at_the_ends_are_moved_beyond_them():
    pixels = torch.tensor([0, 1, 127, 250, 251, 253, 255], dtype=torch.uint8).reshape(1, 1, 1, 7)
    images = to_model_range(pixels)
    moved = beyond_saturation(images, 0.25, (0, 253)).flatten()
    assert moved[[0, 4, 5, 6]].tolist() == [-1.25, 1.25, 1.25, 1.25]
    assert torch.equal(moved[1:4], images.flatten()[1:4])
    assert beyond_saturation(images, 0.25, (2, None)).flatten().tolist()[:2] == [-1.25, -1.25]
    assert beyond_saturation(images, 0.25, (None, 255)).flatten().tolist()[4:] == [
        *images.flatten().tolist()[4:6],
        1.25,
    ]
    assert beyond_saturation(images, 0.25, (None, None)) is images


def test_the_levels_are_those_that_a_share_of_the_pixels_is_near():
    def levels(*rows, share=0.05):
        pixels = torch.full((1, 1, 20, 10), 100, dtype=torch.uint8)  # a row is a twentieth
        for index, level in enumerate(rows):
            pixels[0, 0, index] = level
        return saturated_levels(ImageDataset.from_tensors(pixels), share)

    assert levels() == (None, None)
    assert levels(253) == (None, 253)
    assert levels(253, share=0.06) == (None, None)
    assert levels(253, 254, 253, 0) == (0, 253)
    assert levels(6, 249) == (None, None)
    assert levels(5, 250) == (5, 250)


@pytest.mark.parametrize(
    ("count", "read"), [(1000, range(1000)), (1001, range(0, 1001, 2)), (2500, range(0, 2500, 3))]
)
def test_the_levels_are_looked_for_in_up_to_a_thousand_pictures(count, read):
    class Pictures:
        indices = []

        def __len__(self):
            return count

        def pixels(self, index):
            self.indices.append(index)
            return np.zeros((1, 2, 2), dtype=np.uint8)

    assert saturated_levels(Pictures()) == (0, None)
    assert Pictures.indices == list(read)


def test_black_comes_out_black(config, tmp_path):
    """What the margin is for: flat areas are not strewn with faint grey, though the network is hardly trained."""
    (tmp_path / "half").mkdir()
    pixels = np.full((8, 8), 128, dtype=np.uint8)
    pixels[:, :4] = 0
    for index in range(4):
        Image.fromarray(pixels).save(tmp_path / "half" / f"{index}.png")
    config = dataclasses.replace(config, dataset_name=str(tmp_path / "half"), max_train_steps=300, learning_rate=2e-3)
    black = {}
    for margin in (0.0, 0.1):
        folder = tmp_path / f"margin-{margin}"
        train(dataclasses.replace(config, output_dir=folder, saturation_margin=margin))
        pipe = load_pipeline(folder)
        assert pipe.scheduler.config.clip_sample_range == 1 + margin
        pipe.set_progress_bar_config(disable=True)
        generator = torch.Generator().manual_seed(0)
        images = pipe(batch_size=32, num_inference_steps=10, generator=generator, output_type="pt").images
        assert (images[..., 4:] - 128 / 255).abs().mean() < 0.05  # as for the rest, nothing changes
        black[margin] = float(((images[..., :4] * 255).round() == 0).float().mean())
    assert black[0.1] > 0.6 and black[0.1] > black[0.0] + 0.2, black


def test_only_ends_that_many_pixels_are_at_are_moved(config, tmp_path):
    for name, levels in (("photographs", (6, 249)), ("dark", (0, 249))):
        (tmp_path / name).mkdir()
        for index in range(4):
            pixels = np.full((8, 8), levels[1], dtype=np.uint8)
            pixels[:, :4] = levels[0]
            Image.fromarray(pixels).save(tmp_path / name / f"{index}.png")
        folder = tmp_path / "runs" / name
        train(dataclasses.replace(config, dataset_name=str(tmp_path / name), output_dir=folder, max_train_steps=1))
        scheduler = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
        assert scheduler["clip_sample_range"] == (1.1 if name == "dark" else 1.0)


def test_nan_loss_stops_and_keeps_the_last_good_weights(config, monkeypatch):
    losses = []

    def overflowing(*args, **options):
        losses.append(compute_loss(*args, **options))
        return losses[-1] * (float("nan") if len(losses) > 13 else 1.0)

    monkeypatch.setattr("mini_ddpm.training.train.compute_loss", overflowing)
    with pytest.raises(FloatingPointError, match=r"loss nan.*Lower learning_rate \(now 0.001\).*checkpoint-10"):
        train(config)
    assert [path.name for path in sorted(config.output_dir.glob("checkpoint-*"))] == ["checkpoint-10"]
    assert all(tensor.isfinite().all() for tensor in weights(config.output_dir).values())
    monkeypatch.undo()
    assert_equal_weights(
        train(config), train(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))
    )


def test_a_learning_rate_out_of_reason_stops(config):
    with pytest.raises(FloatingPointError, match=r"Lower learning_rate \(now 1e\+30\).*none was written yet"):
        train(dataclasses.replace(config, learning_rate=1e30))


def test_full_disk_keeps_the_previous_checkpoint(config):
    train(dataclasses.replace(config, max_train_steps=10))
    before = {path: path.read_bytes() for path in config.output_dir.rglob("*.safetensors")}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))  # files cannot grow past this, as on a full disk
    try:
        with pytest.raises(OSError, match=r"Free some space.*checkpoint-10"):
            train(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert {path: path.read_bytes() for path in before} == before
    assert hidden_files(config.output_dir) == []
    train(config)
    assert (config.output_dir / "checkpoint-20").exists()


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"train_batch_size": 0}, "train_batch_size=0 must be at least 1"),
        ({"max_train_steps": 0}, "max_train_steps=0"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be above 0"),
        ({"class_dropout_prob": 1.0}, "class_dropout_prob=1.0 must be below 1"),
        ({"snr_gamma": -1.0}, "snr_gamma=-1.0"),
        ({"preset": "huge"}, "preset='huge' must be one of mini, tutorial-32, tutorial-64"),
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 10**20}, "seed=100000000000000000000 must be at most 4294967295"),
        ({"seed": 1.0}, "seed=1.0 must be a whole number"),
        ({"train_batch_size": True}, "train_batch_size=True must be a whole number"),
        ({"layers_per_block": 0}, "layers_per_block=0 must be at least 1"),
        ({"block_out_channels": (64, 0)}, r"block_out_channels=\(64, 0\) must be at least 1"),
        ({"block_out_channels": 64}, "block_out_channels=64 must be several values, each a whole number"),
        ({"resolution": 0}, "resolution=0 must be at least 1"),
        ({"lr_warmup_steps": -5}, "lr_warmup_steps=-5 must be at least 0"),
        ({"lr_scheduler": "piecewise_constant"}, "lr_scheduler='piecewise_constant' must be one of cosine, linear"),
        ({"beta_schedule": "cos"}, "beta_schedule='cos' must be one of squaredcos_cap_v2, linear"),
        ({"prediction_type": "noise"}, "prediction_type='noise' must be one of epsilon, sample, v_prediction"),
        ({"mixed_precision": "fp8"}, "mixed_precision='fp8' must be one of auto, no, fp16, bf16"),
        ({"device": 0}, "device=0 must be one of auto, cpu, cuda, mps"),
        ({"learning_rate": float("nan")}, "learning_rate=nan must be a finite number"),
        ({"learning_rate": "fast"}, "learning_rate='fast' must be a finite number"),
        ({"ema_max_decay": -1.0}, "ema_max_decay=-1.0 must be at least 0"),
        ({"adam_weight_decay": -0.1}, "adam_weight_decay=-0.1 must be at least 0"),
        ({"saturation_margin": 1.5}, "saturation_margin=1.5 must be at most 1"),
        ({"num_train_timesteps": 10**7}, "num_train_timesteps=10000000 must be at most 100000"),
        ({"dataloader_num_workers": -1}, "dataloader_num_workers=-1 must be at least 0"),
        ({"save_images_epochs": -1}, "save_images_epochs=-1 must be at least 0"),
        ({"output_dir": 3}, "output_dir=3 must be a path"),
        ({"torch_compile": "yes"}, "torch_compile='yes' must be True or False"),
    ],
)
def test_impossible_settings_are_refused(values, message):
    with pytest.raises(ValueError, match=message) as error:
        TrainConfig(**values)
    assert "\n" not in str(error.value)


def test_numbers_of_numpy_and_paths_as_text_are_taken(tmp_path):
    config = TrainConfig(seed=np.int64(3), learning_rate=np.float32(0.5), output_dir="d", block_out_channels=[8])
    assert config.output_dir == Path("d") and (config.seed, config.learning_rate) == (3, 0.5)
    assert DistillConfig("mnist", output_dir="d").output_dir == Path("d")
    assert DistillConfig("mnist", guidance_interval=[0.1, 1]).guidance_interval == [0.1, 1]
    with pytest.raises(ValueError, match="guidance_interval=0.5 must be 2 values, each a finite number"):
        DistillConfig("mnist", guidance_interval=0.5)


@pytest.mark.parametrize("kind", ["cpu", "cuda", "mps"])
def test_accelerate_takes_the_device_that_was_found(config, monkeypatch, kind):
    class Taken(Exception):
        pass

    def accelerator(**options):
        raise Taken(options["cpu"], options["mixed_precision"])

    monkeypatch.setattr("mini_ddpm.training.runtime.find_device", lambda name: torch.device(kind))
    monkeypatch.setattr("accelerate.Accelerator", accelerator)
    for precision in ("no", "fp16", "bf16"):
        with pytest.raises(Taken) as error:
            train(dataclasses.replace(config, device="auto", mixed_precision=precision))
        assert error.value.args == (kind == "cpu", precision)


def test_runs_of_one_process_have_their_own_precision(config, monkeypatch):
    seen = []

    def loss(*args, **options):
        seen.append(torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else None)
        return compute_loss(*args, **options)

    monkeypatch.setattr("mini_ddpm.training.train.compute_loss", loss)
    for precision in ("no", "bf16", "no"):
        folder = config.output_dir.with_name(f"{len(seen)}")
        train(dataclasses.replace(config, output_dir=folder, max_train_steps=1, mixed_precision=precision))
    assert seen == [None, torch.bfloat16, None]


def test_help_is_plain_and_hides_what_nobody_needs(capsys):
    with pytest.raises(SystemExit):
        tyro.cli(TrainConfig, args=["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "--adam-weight-decay" in text and "adam-beta2" not in text
    assert "channels-last" not in text and "ema-power" not in text and "None:" not in text
    assert tyro.cli(TrainConfig, args=[]) == TrainConfig()


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_gpu_is_refused(config):
    with pytest.raises(ValueError, match="device='cuda'"):
        train(dataclasses.replace(config, device="cuda"))
    assert not config.output_dir.exists()


def test_other_runs_and_foreign_folders_are_left_alone(config, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds no run of mini-ddpm"):
        train(config)
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["thesis.tex"]
    other = dataclasses.replace(config, output_dir=tmp_path / "other", max_train_steps=1)
    train(other)
    with pytest.raises(ValueError, match="prediction_type='v_prediction', not 'epsilon'"):
        train(dataclasses.replace(other, prediction_type="epsilon"))


def test_log_lines_after_the_checkpoint_are_dropped(tmp_path):
    lines = [json.dumps({"step": step}) for step in (5, 10, 15)]
    for text in ("\n".join(lines) + "\n", "\n".join(lines) + '\n{"step": 2', "\n".join(lines[:2])):
        (tmp_path / "train_log.jsonl").write_text(text)
        truncate_log(tmp_path, 10)
        assert (tmp_path / "train_log.jsonl").read_text() == '{"step": 5}\n{"step": 10}\n'
    truncate_log(tmp_path / "nowhere", 10)
    assert not (tmp_path / "nowhere").exists()


def test_class_conditional_needs_labels(config, tmp_path):
    (tmp_path / "flat").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "flat" / "0.png")
    with pytest.raises(ValueError, match="class_conditional=True needs labels, but"):
        train(dataclasses.replace(config, dataset_name=str(tmp_path / "flat"), class_conditional=True))
    assert not config.output_dir.exists()


def test_a_run_that_failed_before_its_first_checkpoint_can_be_started_otherwise(config, tmp_path):
    (tmp_path / "damaged").mkdir()
    Image.new("L", (8, 8)).save(tmp_path / "damaged" / "0.png")
    (tmp_path / "damaged" / "1.png").write_bytes(b"no picture")
    with pytest.raises(ValueError, match=r"1\.png.*cannot be decoded"):
        train(dataclasses.replace(config, dataset_name=str(tmp_path / "damaged"), max_train_steps=1))
    assert load_pipeline(train(dataclasses.replace(config, max_train_steps=1)))


# ---- not MNIST alone ---------------------------------------------------------------------------------------


def blobs(folder, height, width, background, colours, count=240):
    """Smooth pictures made by a formula: a soft spot of its class's colour, anywhere on a background with a gradient.

    Colours are RGB or grey in [0, 1], by class; a lone class `None` has no folder of its own.
    """
    rng = np.random.default_rng(0)
    rows, columns = np.linspace(0, 1, height)[:, None, None], np.linspace(0, 1, width)[None, :, None]
    for index in range(count):
        name = list(colours)[index % len(colours)]
        row, column, size = rng.uniform(0.2, 0.8), rng.uniform(0.2, 0.8), rng.uniform(0.1, 0.2)
        spot = np.exp(-((rows - row) ** 2 + (columns - column) ** 2) / (2 * size**2))  # (H, W, 1)
        shade = 1 + rng.uniform(-0.2, 0.2) * (2 * columns - 1)
        pixels = (1 - spot) * shade * np.array(background) + spot * np.array(colours[name])
        pixels = np.round(255 * pixels.clip(0, 1)).astype(np.uint8)  # (H, W, C)
        path = folder / (name or "") / f"{index:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(path)


def neighbours_apart(images):
    """How far neighbouring pixels of (N, C, H, W) are apart on average, by channel: noise tells itself by it."""
    return (images.diff(dim=-1).abs().mean(dim=(0, 2, 3)) + images.diff(dim=-2).abs().mean(dim=(0, 2, 3))) / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("size", "background", "colours"),
    [
        pytest.param(
            (32, 32),
            (0.1, 0.1, 0.2),
            {"blue": (0.1, 0.3, 1.0), "green": (0.2, 0.9, 0.1), "red": (1.0, 0.2, 0.1)},
            id="colour 32x32 in three classes",
        ),
        pytest.param((28, 28), (0.8,), {None: (0.1,)}, id="grey 28x28 without classes"),
        pytest.param(
            (12, 20),
            (0.9, 0.7, 0.4),
            {"dark": (0.1, 0.0, 0.3), "light": (0.9, 1.0, 1.0)},
            id="colour 20x12 in two classes",
        ),
        pytest.param(
            (48, 64),
            (0.2, 0.4, 0.3),
            {"black": (0.0, 0.0, 0.0), "pink": (1.0, 0.5, 0.7)},
            id="colour 64x48 in two classes",
        ),
    ],
)
def test_not_mnist_alone(config, tmp_path, size, background, colours):
    blobs(tmp_path / "blobs", *size, background, colours)
    classes = [name for name in colours if name]
    config = dataclasses.replace(
        config,
        dataset_name=str(tmp_path / "blobs"),
        class_conditional=bool(classes),
        block_out_channels=(32, 64),
        train_batch_size=8,
        max_train_steps=700,
        learning_rate=4e-3,
        checkpointing_steps=1000,
        logging_steps=20,
        ema_max_decay=0.98,
    )
    pipe = load_pipeline(train(config))
    log = [json.loads(line) for line in (config.output_dir / "train_log.jsonl").read_text().splitlines()]
    assert log[-1]["loss"] < 0.25 * log[0]["loss"]

    pipe.set_progress_bar_config(disable=True)
    per_class = 48 // max(len(classes), 1)
    what = {"batch_size": per_class}
    if classes:
        what = {"class_labels": [name for name in classes for _ in range(per_class)], "guidance_scale": 1.0}
    drawn = pipe(**what, num_inference_steps=20, generator=torch.Generator().manual_seed(0), output_type="pt").images
    real, labels = image_dataset(tmp_path / "blobs").stack(progress=False)
    real = real / 255.0
    assert drawn.shape[1:] == real.shape[1:] == (len(background), *size)
    # Of an untrained network they are 0.5, 0.35 and 0.4, whatever the images.
    torch.testing.assert_close(drawn.mean(dim=(0, 2, 3)), real.mean(dim=(0, 2, 3)), atol=0.05, rtol=0)
    torch.testing.assert_close(drawn.std(dim=(0, 2, 3)), real.std(dim=(0, 2, 3)), atol=0.05, rtol=0)
    torch.testing.assert_close(neighbours_apart(drawn), neighbours_apart(real), atol=0.1, rtol=0)
    if classes:
        of_drawn = drawn.unflatten(0, (len(classes), per_class)).mean(dim=1)  # (classes, C, H, W)
        of_real = torch.stack([real[labels == label].mean(dim=0) for label in range(len(classes))])
        distances = (of_drawn[:, None] - of_real[None]).square().mean(dim=(2, 3, 4)).sqrt()
        assert distances.argmin(dim=1).tolist() == list(range(len(classes))), distances
