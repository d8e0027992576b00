"""Training with parts of one's own: network, scheduler, data, loss, callbacks; what a run shows of itself."""

import dataclasses
import functools
import json
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import SHORT_RUN, assert_equal_weights, weights
from diffusers import DDPMScheduler, EulerDiscreteScheduler, UNet2DModel
from PIL import Image
from torch.utils.data import TensorDataset

from mini_ddpm import (
    ImageDataset,
    MiniDDIMScheduler,
    MiniDDPMScheduler,
    MiniUNet2DModel,
    TrainCallback,
    TrainConfig,
    as_image_dataset,
    compute_loss,
    image_dataset,
    load_pipeline,
    train,
)


@pytest.fixture
def config(tmp_path):
    """Eight steps on data that is given."""
    return TrainConfig(
        output_dir=tmp_path / "run",
        max_train_steps=8,
        checkpointing_steps=4,
        logging_steps=2,
        **SHORT_RUN,
    )


@pytest.fixture
def images():
    """Sixteen 8x8 pictures, white on black."""
    torch.manual_seed(0)
    return (torch.rand(16, 1, 8, 8) > 0.7).to(torch.uint8) * 255


@pytest.fixture
def labels():
    return torch.arange(16) % 3


def unet(**overrides):
    torch.manual_seed(0)
    config = {"sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4}
    return MiniUNet2DModel(**(config | {"attention_head_dim": 8} | overrides))


def elsewhere(config, name="other", **changes):
    return dataclasses.replace(config, output_dir=config.output_dir.with_name(name), **changes)


def log_of(folder):
    return [json.loads(line) for line in (Path(folder) / "train_log.jsonl").read_text().splitlines()]


# ---- the network -------------------------------------------------------------------------------------------------


def test_a_network_that_is_given_is_trained_in_place_and_saved(config, images):
    network = unet()
    before = {key: tensor.clone() for key, tensor in network.state_dict().items()}
    folder = train(config, unet=network, dataset=images)
    assert any(not torch.equal(before[key], tensor) for key, tensor in network.state_dict().items())
    pipe = load_pipeline(folder)
    assert pipe.unet.config.block_out_channels == [8, 16]
    assert pipe(batch_size=2, num_inference_steps=2, output_type="np").images.shape == (2, 8, 8, 1)


def test_a_run_with_given_parts_resumes_exactly(config, images, labels):
    given = {"dataset": (images, labels), "loss_fn": functools.partial(compute_loss, snr_gamma=5.0, reduction="none")}
    config = dataclasses.replace(config, class_conditional=True)
    whole = train(
        elsewhere(config), unet=unet(num_class_embeds=4, dropout=0.1), scheduler=MiniDDPMScheduler(), **given
    )
    cut = dataclasses.replace(config, max_train_steps=4, lr_scheduler="constant", lr_warmup_steps=0)
    whole = train(elsewhere(cut, "whole", max_train_steps=8), unet=unet(num_class_embeds=4, dropout=0.1), **given)
    train(cut, unet=unet(num_class_embeds=4, dropout=0.1), **given)
    folder = train(dataclasses.replace(cut, max_train_steps=8), unet=unet(num_class_embeds=4, dropout=0.1), **given)
    assert_equal_weights(folder, whole)


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"unet": unet(layers_per_block=2)}, "unet="),
        ({"unet": None}, "unet="),
        ({"scheduler": MiniDDPMScheduler(prediction_type="sample")}, "scheduler="),
        ({"scheduler": DDPMScheduler(prediction_type="v_prediction")}, "scheduler="),
        ({"loss_fn": None}, "loss_fn="),
        ({"dataset": torch.zeros(16, 1, 8, 8, dtype=torch.uint8)[:12]}, "num_images"),
    ],
)
def test_another_part_is_another_run(config, images, changed, text):
    def loss(*args):
        return compute_loss(*args, reduction="none")

    given = {"unet": unet(), "scheduler": MiniDDPMScheduler(), "loss_fn": loss, "dataset": images}
    train(config, **given)
    with pytest.raises(ValueError, match=text):
        train(config, **(given | changed))
    train(config, **(given | {"unet": unet()}))  # another object, the same network


def test_a_unet_of_diffusers_is_trained_by_our_loop(config, images, labels):
    torch.manual_seed(0)
    shape = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "block_out_channels": (32, 32)}
    shape |= {"layers_per_block": 1, "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "AttnDownBlock2D")}
    shape |= {"up_block_types": ("AttnUpBlock2D", "UpBlock2D")}
    plain = train(dataclasses.replace(config, save_images_epochs=1), unet=UNet2DModel(**shape), dataset=images)
    assert isinstance(load_pipeline(plain).unet, UNet2DModel)
    assert list((plain / "samples").iterdir())
    conditional = UNet2DModel(**shape, num_class_embeds=4)
    folder = train(
        elsewhere(config, class_conditional=True),
        unet=conditional,
        scheduler=DDPMScheduler(),
        dataset=(images, labels),
    )
    pipe = load_pipeline(folder)
    assert isinstance(pipe.unet, UNet2DModel) and isinstance(pipe.scheduler, DDPMScheduler)
    assert len(pipe([0, 1, 2], num_inference_steps=2).images) == 3
    # It is a pipeline like any other to start from.
    again = train(
        elsewhere(config, "again", pretrained_model_name_or_path=str(folder), class_conditional=True),
        dataset=(images, labels),
    )
    assert isinstance(load_pipeline(again).unet, UNet2DModel)


@pytest.mark.parametrize(
    ("given", "changes", "text"),
    [
        (lambda: torch.nn.Conv2d(1, 1, 3), {}, "unet is of type Conv2d"),
        (lambda: unet(in_channels=3), {}, "in_channels=3"),
        (lambda: unet(out_channels=2), {}, "out_channels=2"),
        (lambda: unet(sample_size=16), {}, r"sample_size=\(16, 16\)"),
        (lambda: unet(num_class_embeds=4), {}, "num_class_embeds=4"),
        (lambda: unet(num_class_embeds=3), {"class_conditional": True}, "num_class_embeds=3.*need num_class_embeds=4"),
        (lambda: unet().requires_grad_(False), {}, "requires_grad"),
        (unet, {"block_out_channels": (32,)}, "block_out_channels.*conflicts"),
        (unet, {"dropout": 0.5}, "dropout.*conflicts"),
        (unet, {"pretrained_model_name_or_path": "mnist"}, "pretrained_model_name_or_path='mnist'"),
    ],
)
def test_networks_that_do_not_fit(config, images, labels, given, changes, text):
    with pytest.raises((ValueError, TypeError), match=text):
        train(dataclasses.replace(config, **changes), unet=given(), dataset=(images, labels))
    assert not config.output_dir.exists()


def test_a_network_with_adapters_is_refused(config, images):
    peft = pytest.importorskip("peft")
    network = unet()
    network.add_adapter(peft.LoraConfig(r=2, target_modules=["to_q"]))
    with pytest.raises(ValueError, match="fuse_lora"):
        train(config, unet=network, dataset=images)


# ---- the scheduler -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scheduler",
    [
        MiniDDIMScheduler(num_train_timesteps=4, trained_betas=[0.1, 0.2, 0.3, 0.9]),
        MiniDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="v_prediction"),
        MiniDDPMScheduler(rescale_betas_zero_snr=True, prediction_type="epsilon"),
        DDPMScheduler(beta_schedule="linear"),
    ],
)
def test_a_noise_schedule_of_ones_own(config, images, scheduler):
    folder = train(dataclasses.replace(config, snr_gamma=5.0), unet=unet(), scheduler=scheduler, dataset=images)
    saved = load_pipeline(folder).scheduler
    assert type(saved) is type(scheduler) and torch.equal(saved.betas, scheduler.betas)
    assert saved.config.prediction_type == scheduler.config.prediction_type
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


@pytest.mark.parametrize(
    ("scheduler", "changes", "text"),
    [
        (EulerDiscreteScheduler(), {}, "EulerDiscreteScheduler.*x_t"),
        (object(), {}, "object"),
        (MiniDDIMScheduler(), {"beta_schedule": "linear"}, "beta_schedule='linear' conflicts"),
        (MiniDDIMScheduler(), {"prediction_type": "epsilon"}, "prediction_type='epsilon' conflicts"),
    ],
)
def test_schedulers_that_do_not_fit(config, images, scheduler, changes, text):
    with pytest.raises(ValueError, match=text):
        train(dataclasses.replace(config, **changes), unet=unet(), scheduler=scheduler, dataset=images)


# ---- the data ----------------------------------------------------------------------------------------------------


class Items(torch.utils.data.Dataset):
    """A torch dataset."""

    classes = ["a", "b", "c"]

    def __init__(self, images, labels, make):
        self.images, self.labels, self.make = images, labels, make

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.make(self.images[index], int(self.labels[index]))


KINDS = {
    "tensors": lambda images, labels: (images, labels),
    "arrays": lambda images, labels: (images.numpy(), labels.numpy()),
    "floats in [-1, 1]": lambda images, labels: (images.float() / 127.5 - 1, labels),
    "floats in [0, 1]": lambda images, labels: (images.float() / 255, labels),
    "TensorDataset": lambda images, labels: TensorDataset(images, labels),
    "ImageDataset": lambda images, labels: ImageDataset.from_tensors(images, labels),
    "pairs of tensors": lambda images, labels: Items(images, labels, lambda image, y: (image.float() / 127.5 - 1, y)),
    "pairs of pictures": lambda images, labels: Items(
        images, labels, lambda image, y: (Image.fromarray(image[0].numpy()), y)
    ),
    "arrays by key": lambda images, labels: Items(
        images, labels, lambda image, y: {"pixel_values": image.permute(1, 2, 0).numpy(), "label": y}
    ),
    "a list": lambda images, labels: [(image / 255, y) for image, y in zip(images, labels.tolist(), strict=True)],
    "datasets.Dataset": lambda images, labels: hf_dataset(images, labels),
    "datasets.Dataset with a transform": lambda images, labels: hf_dataset(images, labels).with_transform(
        lambda rows: {"images": [torch.from_numpy(np.array(x)) for x in rows["image"]], "label": rows["label"]}
    ),
}


def hf_dataset(images, labels):
    datasets = pytest.importorskip("datasets")
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b", "c"])})
    pictures = [Image.fromarray(image[0].numpy()) for image in images]
    return datasets.Dataset.from_dict({"image": pictures, "label": labels.tolist()}, features=features)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_data_gives_the_same_images(images, labels, kind):
    dataset = as_image_dataset(KINDS[kind](images, labels))
    found, found_labels = dataset.stack()
    assert torch.equal(found, images) and torch.equal(found_labels, labels)
    assert dataset.shape == (1, 8, 8) and len(dataset) == 16 and dataset.is_fixed
    assert list(dataset.id2label) == [0, 1, 2]
    assert dataset[3]["images"].dtype == torch.float32 and dataset[3]["class_labels"] == 0
    json.dumps(dataset.fingerprint)


@pytest.mark.parametrize("kind", ["tensors", "pairs of pictures", "datasets.Dataset"])
def test_every_kind_of_data_trains(config, images, labels, kind):
    shape = {"unet": unet(num_class_embeds=4)}
    config = dataclasses.replace(config, class_conditional=True, max_train_steps=4)
    folder = train(config, dataset=KINDS[kind](images, labels), **shape)
    assert json.loads((folder / "train_config.json").read_text())["dataset_name"] is None
    assert "ylecun" not in (folder / "README.md").read_text()


def test_colour_is_kept():
    pictures = [Image.new("L", (4, 6), 9), Image.new("RGB", (4, 6), (1, 2, 3))]
    with pytest.raises(ValueError, match=r"Item 1 has the shape \(3, 6, 4\), the first \(1, 6, 4\)"):
        as_image_dataset(pictures)
    colour = as_image_dataset(pictures[::-1])
    assert colour.shape == (3, 6, 4) and colour.pixels(1).max() == 9 and colour.id2label is None
    assert as_image_dataset(pictures[::-1], resolution=2).shape == (3, 2, 2)


class Flipping(Items):
    """A random transform."""

    def __getitem__(self, index):
        image, label = self.images[index], int(self.labels[index])
        return (image.flip(2) if torch.rand(()) < 0.5 else image), label


def test_random_transforms_stay_random_and_the_run_says_so(config, labels, capsys):
    images = torch.zeros(16, 1, 8, 8, dtype=torch.uint8)
    images[..., :4] = 255
    dataset = as_image_dataset(Flipping(images, labels, None))
    assert not dataset.is_fixed
    drawn = {dataset[0]["images"][0, 0, 0].item() for _ in range(30)}
    assert drawn == {-1.0, 1.0}
    train(dataclasses.replace(config, dataloader_num_workers=0), unet=unet(), dataset=dataset)
    assert "a resumed run sees other ones" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("data", "error", "text"),
    [
        ("mnist", TypeError, "dataset_name"),
        ({"train": [1], "test": [2]}, TypeError, "train, test"),
        (iter([1]), TypeError, "list_iterator"),
        ([], TypeError, "list"),
        ([("no picture", 1)], ValueError, "Item 0 holds no picture, but str"),
        ([{"x": 1}], ValueError, "Item 0 has no picture: its keys are x"),
        ([(torch.zeros(1, 4, 4), "cat")], ValueError, "'cat'"),
        ([torch.zeros(1, 4, 4), torch.zeros(1, 5, 4)], ValueError, r"Item 1 has the shape \(1, 5, 4\)"),
        ([torch.full((1, 4, 4), 200.0)], ValueError, "from 200 to 200"),
        ([torch.zeros(2, 4, 4)], ValueError, r"C = 1 or 3"),
    ],
)
def test_data_that_cannot_be_used(data, error, text):
    with pytest.raises(error, match=text):
        as_image_dataset(data)


def test_the_decoded_pictures_are_cached_once(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("mini_ddpm.data._LEAST_TO_CACHE", 4)
    (tmp_path / "pictures").mkdir()
    for index in range(6):
        Image.new("L", (4, 4), 10 * index).save(tmp_path / "pictures" / f"{index}.png")
    decoded = []
    pixels = ImageDataset.pixels
    monkeypatch.setattr(ImageDataset, "pixels", lambda self, index: decoded.append(index) or pixels(self, index))

    def stack():
        dataset = image_dataset(tmp_path / "pictures")
        decoded.clear()
        return dataset.stack()[0]

    first = stack()
    assert decoded == [*range(6)] and first[:, 0, 0, 0].tolist() == [0, 10, 20, 30, 40, 50]
    assert torch.equal(stack(), first) and decoded == []
    assert image_dataset(tmp_path / "pictures", resolution=2).stack()[0].shape == (6, 1, 2, 2)
    # A picture that changed, also within its size, is read again.
    Image.new("L", (4, 4), 77).save(tmp_path / "pictures" / "5.png")
    assert stack()[5].max() == 77 and decoded == [*range(6)]
    # A damaged file of the cache is replaced; a cache that cannot be written is no error.
    for file in (tmp_path / "cache").rglob("*.npz"):
        file.write_bytes(b"damaged")
    assert stack()[5].max() == 77 and decoded == [*range(6)]
    shutil.rmtree(tmp_path / "cache")
    (tmp_path / "cache").touch()
    assert stack()[5].max() == 77 and len(decoded) == 6


# ---- the loss ----------------------------------------------------------------------------------------------------


def test_a_loss_of_ones_own_is_what_is_minimized(config, images):
    seen = []

    def loss(network, scheduler, images, noise, timesteps, class_labels):
        seen.append((images.shape, noise.shape, timesteps.shape, class_labels))
        return torch.full((4,), 7.0) + 0 * network(images, timesteps).sample.mean(dim=(1, 2, 3))

    folder = train(config, unet=unet(), dataset=images, loss_fn=loss)
    assert len(seen) == 8 and seen[0] == ((4, 1, 8, 8), (4, 1, 8, 8), (4,), None)
    assert all(entry["loss"] == 7.0 for entry in log_of(folder))
    assert log_of(folder)[-1]["grad_norm"] == 0.0


@pytest.mark.parametrize("returned", [torch.zeros(()), 0.5, torch.zeros(4, 1)])
def test_a_loss_of_another_shape_is_refused(config, images, returned):
    with pytest.raises(ValueError, match=r"loss_fn must return.*\(4,\)"):
        train(config, unet=unet(), dataset=images, loss_fn=lambda *_: returned)


def test_losses_of_images_and_their_mean():
    scheduler, network, x = MiniDDIMScheduler(), unet(), torch.randn(4, 1, 8, 8)
    timesteps = torch.tensor([1, 400, 700, 999])
    losses = compute_loss(network, scheduler, x, x, timesteps, snr_gamma=5.0, reduction="none")
    assert losses.shape == (4,)
    assert torch.equal(losses.mean(), compute_loss(network, scheduler, x, x, timesteps, snr_gamma=5.0))


# ---- callbacks ---------------------------------------------------------------------------------------------------


class Recorder(TrainCallback):
    def __init__(self):
        self.calls = []

    def on_step_end(self, state):
        self.calls.append(("step", state.step))

    def on_log(self, state):
        self.calls.append(("log", state.log["step"]))

    def on_epoch_end(self, state):
        self.calls.append(("epoch", state.epoch))

    def on_checkpoint(self, state):
        assert (state.checkpoint / "progress.json").is_file()
        self.calls.append(("checkpoint", state.checkpoint.name))


def test_callbacks_are_called_in_order(config, images):
    recorder = Recorder()
    train(dataclasses.replace(config, max_train_steps=4, logging_steps=3), unet=unet(), dataset=images,
          callbacks=[recorder])  # fmt: skip
    steps = [("step", step) for step in range(1, 5)]
    assert recorder.calls == [
        *steps[:3], ("log", 3), steps[3], ("log", 4), ("epoch", 1.0), ("checkpoint", "checkpoint-4"),
    ]  # fmt: skip


class StopAt(TrainCallback):
    def __init__(self, step, event="on_step_end"):
        self.step, self.event, self.count = step, event, 0

    def on_step_end(self, state):
        self.count += 1
        self.look(state, "on_step_end")

    def on_log(self, state):
        self.look(state, "on_log")

    def look(self, state, event):
        if state.step == self.step and event == self.event:
            state.stop()

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state_dict):
        self.count = state_dict["count"]


@pytest.mark.parametrize("event", ["on_step_end", "on_log"])
def test_a_callback_stops_the_run_and_remembers(config, images, capsys, event):
    config = dataclasses.replace(config, lr_scheduler="constant", lr_warmup_steps=0, logging_steps=3)
    whole = train(elsewhere(config), unet=unet(), dataset=images)
    folder = train(config, unet=unet(), dataset=images, callbacks=[StopAt(3, event)])
    assert [path.name for path in folder.glob("checkpoint-*")] == ["checkpoint-3"]
    assert "Stopped after step 3 of 8" in capsys.readouterr().out
    resumed = StopAt(0)
    assert_equal_weights(train(config, unet=unet(), dataset=images, callbacks=[resumed]), whole)
    assert resumed.count == 8  # three of them before the stop


def test_network_data_and_callbacks_of_ones_own_together(config, images, labels):
    class MyUNet(MiniUNet2DModel):
        pass

    network = MyUNet(sample_size=8, block_out_channels=(8, 16), layers_per_block=1, num_class_embeds=4)
    config = dataclasses.replace(config, class_conditional=True)
    recorder = Recorder()
    folder = train(config, unet=network, dataset=hf_dataset(images, labels), callbacks=[recorder])
    assert recorder.calls[-1] == ("checkpoint", "checkpoint-8")
    pipe = load_pipeline(folder, unet=MyUNet.from_pretrained(folder, subfolder="unet"))
    assert type(pipe.unet) is MyUNet and pipe.config.id2label == {0: "a", 1: "b", 2: "c"}
    assert len(pipe(["a", "c"], num_inference_steps=2, generator=0).images) == 2


def test_averaged_weights_are_those_that_are_saved(config, images):
    class Look(TrainCallback):
        def on_checkpoint(self, state):
            with state.averaged_weights():
                self.averaged = state.unet.conv_in.weight.detach().clone()
                assert not state.unet.training
            assert state.unet.training and not torch.equal(state.unet.conv_in.weight, self.averaged)

    look = Look()
    folder = train(config, unet=unet(), dataset=images, callbacks=[look])
    assert torch.equal(weights(folder)["conv_in.weight"], look.averaged)


def test_an_exception_in_a_callback_keeps_the_checkpoint(config, images):
    class Pruned(Exception):
        pass

    class Prune(TrainCallback):
        def on_log(self, state):
            if state.step == 6:
                raise Pruned

    with pytest.raises(Pruned):
        train(config, unet=unet(), dataset=images, callbacks=[Prune()])
    assert (config.output_dir / "checkpoint-4").is_dir()
    whole = train(elsewhere(config), unet=unet(), dataset=images)
    assert_equal_weights(train(config, unet=unet(), dataset=images), whole)


def test_what_is_no_callback_is_refused(config, images):
    with pytest.raises(TypeError, match="TrainCallback"):
        train(config, unet=unet(), dataset=images, callbacks=[print])


# ---- what a run shows --------------------------------------------------------------------------------------------


def test_the_log_tells_loss_by_noise_level_gradient_and_decay(config, images):
    def loss(network, scheduler, images, noise, timesteps, class_labels):
        return timesteps.float() // 100 + 0 * network(images, timesteps).sample.mean(dim=(1, 2, 3))

    config = dataclasses.replace(config, train_batch_size=16, gradient_accumulation_steps=2, max_train_steps=4)
    for entry in log_of(train(config, unet=unet(), dataset=images, loss_fn=loss)):
        assert entry["loss_by_noise_level"] == [float(band) for band in range(10)]
        assert entry["grad_norm"] == 0.0 and 0 < entry["ema_decay"] < 1
    folder = train(elsewhere(config), unet=unet(), dataset=images)
    entries = log_of(folder)
    assert all(entry["grad_norm"] > 0 for entry in entries)
    # Each band has as many images as every other in a stratified batch.
    assert np.mean(entries[-1]["loss_by_noise_level"]) == pytest.approx(entries[-1]["loss"], rel=0.2)


def test_the_validation_loss_is_that_of_the_saved_weights_with_fixed_noise(config, images):
    config = dataclasses.replace(config, saturation_margin=0.0)
    folder = train(config, unet=unet(), dataset=images, eval_dataset=images[:6])
    entries = [entry for entry in log_of(folder) if "validation_loss" in entry]
    assert [entry["step"] for entry in entries] == [4, 8]
    # A run that measures on the same images has the same; it does not change the run.
    again = train(elsewhere(config), unet=unet(), dataset=images, eval_dataset=images[:6])
    assert [e["validation_loss"] for e in log_of(again) if "validation_loss" in e] == [
        entry["validation_loss"] for entry in entries
    ]
    assert_equal_weights(folder, train(elsewhere(config, "without"), unet=unet(), dataset=images))
    # A network that predicts zeros has the loss of the target: E v² = ᾱ E ε² + (1 - ᾱ) E x².
    pipe, total = load_pipeline(folder), []
    from mini_ddpm.training.batches import validation_batches

    dataset = ImageDataset.from_tensors(images[:6])
    for x, noise, t, _ in validation_batches(dataset, torch.arange(6), 0, 4, torch.arange(1000)):
        total.append(compute_loss(pipe.unet, pipe.scheduler, x, noise, t, reduction="none").detach())
    assert torch.cat(total).mean().item() == pytest.approx(entries[-1]["validation_loss"], rel=1e-5)


def test_a_share_is_held_out(config, images):
    seen = set()

    def loss(network, scheduler, images, noise, timesteps, class_labels):
        if torch.is_grad_enabled():
            seen.update(images.amax(dim=(1, 2, 3)).mul(100).round().int().tolist())
        return compute_loss(network, scheduler, images, noise, timesteps, reduction="none")

    levels = (torch.arange(16, dtype=torch.uint8) * 10).view(16, 1, 1, 1).expand(16, 1, 8, 8)
    config = dataclasses.replace(config, validation_share=0.25, saturation_margin=0.0, max_train_steps=6)
    folder = train(config, unet=unet(), dataset=levels, loss_fn=loss)
    assert len(seen) == 12
    assert [entry["step"] for entry in log_of(folder) if "validation_loss" in entry] == [4, 6]
    assert log_of(folder)[-1]["epoch"] == 2.0  # of twelve images
    with pytest.raises(ValueError, match="exclude each other"):
        train(elsewhere(config), unet=unet(), dataset=levels, eval_dataset=levels)
    with pytest.raises(ValueError, match="leaves none"):
        train(elsewhere(config, validation_share=0.99), unet=unet(), dataset=levels[:1])


@pytest.mark.parametrize(
    ("given", "changes", "text"),
    [
        (torch.zeros(4, 1, 6, 8, dtype=torch.uint8), {}, r"\(1, 6, 8\)"),
        ((torch.zeros(4, 1, 8, 8, dtype=torch.uint8), torch.arange(4)), {"class_conditional": True}, "classes"),
    ],
)
def test_validation_images_that_do_not_fit(config, images, labels, given, changes, text):
    with pytest.raises(ValueError, match=text):
        train(dataclasses.replace(config, **changes), dataset=(images, labels), eval_dataset=given)


def test_tensorboard_has_settings_curves_and_pictures(config, images):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    config = dataclasses.replace(config, log_with="tensorboard", save_images_epochs=1)
    folder = train(config, unet=unet(), dataset=images, eval_dataset=images)
    assert {path.suffix for path in (folder / "logs").iterdir()} <= {f".{i}" for i in range(10)}  # event files alone
    events = accumulator.EventAccumulator(str(folder / "logs"), size_guidance={"images": 0})
    events.Reload()
    tags = events.Tags()
    assert {"loss", "validation_loss", "lr", "grad_norm", "ema_decay", "images_per_second"} <= set(tags["scalars"])
    assert {f"loss_by_noise_level/{t:04d}" for t in range(0, 1000, 100)} & set(tags["scalars"])
    picture = events.Images("samples")[-1]
    with Image.open(folder / "samples" / "epoch-0002.png") as grid:
        assert (picture.step, picture.width) == (8, grid.width)
    assert any("hparams" in tag for tag in events.summary_metadata)


# ---- several runs and processes ------------------------------------------------------------------------------------


def test_two_runs_and_a_foreign_accelerator_in_one_process(config, images):
    foreign = Accelerator(cpu=True)
    try:
        layer = foreign.prepare(torch.nn.Linear(2, 2))
        first = train(config, unet=unet(), dataset=images)
        assert foreign.device.type == "cpu" and layer(torch.zeros(1, 2)).shape == (1, 2)
        assert_equal_weights(first, train(elsewhere(config), unet=unet(), dataset=images))
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


LAUNCH = """
    import torch
    from accelerate import notebook_launcher
    from mini_ddpm import MiniUNet2DModel, TrainConfig, train

    def run():
        torch.manual_seed(0)
        images = (torch.rand(16, 1, 8, 8) > 0.7).to(torch.uint8) * 255
        network = MiniUNet2DModel(
            sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8
        )
        config = TrainConfig(
            output_dir={folder!r}, train_batch_size={batch}, max_train_steps=6, logging_steps=2, save_images_epochs=0,
            log_with="none", device="cpu", mixed_precision="no",
        )
        train(config, unet=network, dataset=images, eval_dataset=images)

    if __name__ == "__main__":
        notebook_launcher(run, num_processes={processes}, use_port={port!r})
"""


def test_the_notebook_launcher_makes_two_processes_one_with_twice_the_batch(tmp_path, two_processes):
    port = next(argument.split("=")[1] for argument in two_processes if "master-port" in argument)
    for processes, batch in ((2, 4), (1, 8)):
        code = LAUNCH.format(folder=str(tmp_path / str(processes)), processes=processes, batch=batch, port=port)
        done = subprocess.run(
            [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, timeout=200
        )
        assert done.returncode == 0, done.stderr
    two, one = weights(tmp_path / "2"), weights(tmp_path / "1")
    for key, tensor in one.items():
        torch.testing.assert_close(two[key], tensor, atol=1e-5, rtol=1e-4)
    logs = [log_of(tmp_path / name) for name in ("1", "2")]
    for entry, other in zip(*logs, strict=True):
        assert entry["loss"] == pytest.approx(other["loss"], rel=1e-4)
        bands, other_bands = ([x or -1 for x in e["loss_by_noise_level"]] for e in (entry, other))
        assert bands == pytest.approx(other_bands, rel=1e-3)
    assert logs[0][-1]["validation_loss"] == pytest.approx(logs[1][-1]["validation_loss"], rel=1e-3)
