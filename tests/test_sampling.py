"""Drawing many images: which seed draws which image, what is stored, and when a stored shard is used."""

from __future__ import annotations

import hashlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from mini_ddpm import MiniDDIMScheduler, MiniDDPMClassConditionalPipeline, MiniDDPMPipeline, MiniDDPMScheduler
from mini_ddpm.sampling import cached, config_json, content_hash, draw, weights_hash


@pytest.fixture
def pipe(tiny_unet):
    pipe = MiniDDPMPipeline(tiny_unet(num_class_embeds=None), MiniDDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture
def calls(monkeypatch):
    """The number of images of each call of an unconditional pipeline, in order."""
    call, sizes = MiniDDPMPipeline.__call__, []

    def counted(self, **options):
        sizes.append(options["batch_size"])
        return call(self, **options)

    monkeypatch.setattr(MiniDDPMPipeline, "__call__", counted)
    return sizes


def by_pipeline(pipe, seeds, **options) -> torch.Tensor:
    generator = [torch.Generator().manual_seed(seed) for seed in seeds]
    images = pipe(**options, generator=generator, output_type="pt").images
    return (images * 255).round().to(torch.uint8)


ONE_STEP = {"num_inference_steps": 1}


# ---- draw -----------------------------------------------------------------------------------------------------------


def test_image_is_that_of_its_seed(pipe):
    options = {"num_inference_steps": 3, "eta": 0.5}
    images, seconds, evaluations = draw(pipe, 5, options, seed=7, batch_size=2, shard_size=3)
    assert images.dtype == torch.uint8 and images.shape == (5, 1, 8, 8)
    expected = by_pipeline(pipe, range(7, 12), batch_size=5, **options)
    assert (
        images.int() - expected.int()
    ).abs().max() <= 1  # a convolution over another batch size may round otherwise
    assert (images[0].int() - images[1].int()).abs().max() > 10
    assert seconds > 0 and evaluations == 3
    assert torch.equal(draw(pipe, 5, options, batch_size=5)[0], by_pipeline(pipe, range(5), batch_size=5, **options))


def test_each_image_has_its_label_and_guidance_counts(tiny_unet):
    unet = tiny_unet(num_class_embeds=4)
    with torch.no_grad():
        unet.class_embedding.weight.mul_(30)
    pipe = MiniDDPMClassConditionalPipeline(unet, MiniDDIMScheduler(prediction_type="v_prediction"))
    pipe.set_progress_bar_config(disable=True)
    labels, options = [2, 0, 1, 2, 0], {"num_inference_steps": 2, "guidance_scale": 3.0}
    images, _, evaluations = draw(pipe, 5, options, labels=labels, batch_size=2, shard_size=4)
    expected = by_pipeline(pipe, range(5), class_labels=labels, **options)
    assert (images.int() - expected.int()).abs().max() <= 1
    other = by_pipeline(pipe, range(5), class_labels=[0, 1, 2, 0, 1], **options)
    assert ((images.int() - other.int()).abs().amax(dim=(1, 2, 3)) > 1).all()
    assert evaluations == 4  # two for each step


def test_default_batches_shards_and_storage(pipe, calls, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images, _, _ = draw(pipe, 1001, ONE_STEP)
    assert calls == [250] * 4 + [1] and len(images) == 1001
    assert list(tmp_path.iterdir()) == []  # nothing is stored without a folder
    again, _, _ = draw(pipe, 1001, ONE_STEP, folder=tmp_path / "shards")
    assert torch.equal(again, images)
    sizes = []
    for file in (tmp_path / "shards").glob("*/*.npz"):
        with np.load(file) as arrays:
            sizes.append(len(arrays["images"]))
    assert sorted(sizes) == [1, 1000]


def test_default_ignores_other_processes(pipe, calls, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    images, _, _ = draw(pipe, 4, ONE_STEP, shard_size=2)
    assert len(images) == 4 and calls == [2, 2]


class RecordedBar:
    """A progress bar that shows nothing and keeps what it was given."""

    def __init__(self, **options):
        self.n, self.options = 0, options

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def update(self, count):
        self.n += count


@pytest.fixture
def bars(monkeypatch):
    made = []
    monkeypatch.setattr("mini_ddpm.sampling.tqdm", lambda **options: made.append(RecordedBar(**options)) or made[-1])
    return made


def test_progress_bar_counts_all_images(pipe, bars, tmp_path):
    draw(pipe, 3, ONE_STEP, batch_size=2)
    draw(pipe, 3, ONE_STEP, batch_size=2, title="Digits")
    draw(pipe, 3, ONE_STEP, batch_size=3)
    draw(pipe, 5, ONE_STEP, batch_size=1, shard_size=2, folder=tmp_path)
    draw(pipe, 7, ONE_STEP, batch_size=1, shard_size=2, folder=tmp_path)  # the first two shards are there
    assert [bar.options["desc"] for bar in bars] == ["Drawing", "Digits", "Drawing", "Drawing", "Drawing"]
    # None shows it on a terminal only; one batch needs no bar.
    assert [bar.options["disable"] for bar in bars] == [None, None, True, None, None]
    assert [bar.options["total"] for bar in bars] == [bar.n for bar in bars] == [3, 3, 3, 5, 7]


def test_processes_draw_a_share_each_and_rank_0_collects(pipe, bars, calls, tmp_path, monkeypatch):
    """The second process runs first, so that the first finds its shards."""
    waited = []
    state = SimpleNamespace(wait_for_everyone=lambda: waited.append(1))
    monkeypatch.setattr("accelerate.PartialState", lambda cpu, timeout: waited.append(cpu) or state)
    options = {"batch_size": 2, "shard_size": 2, "folder": tmp_path, "shared": True}
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    images, seconds, evaluations = draw(pipe, 7, ONE_STEP, **options)
    assert images.shape == (0,) and images.dtype == torch.uint8 and (seconds, evaluations) == (0, 0)
    assert calls == [2, 1] and waited == [True, 1]  # images 2, 3 and 6
    monkeypatch.setenv("RANK", "0")
    images, seconds, evaluations = draw(pipe, 7, ONE_STEP, **options)
    assert calls == [2, 1, 2, 2] and waited == [True, 1] * 2
    assert [(bar.options["total"], bar.n, bar.options["disable"]) for bar in bars] == [(3, 3, True), (4, 4, None)]
    assert evaluations == 1
    costs = []
    for file in tmp_path.glob("*/*.npz"):
        with np.load(file) as arrays:
            costs.append(arrays["cost"].tolist())
    assert len(costs) == 4 and seconds == pytest.approx(sum(cost[0] for cost in costs))
    monkeypatch.undo()
    assert torch.equal(images, draw(pipe, 7, ONE_STEP, batch_size=2, shard_size=2)[0])


def test_shards_of_earlier_versions_are_found(pipe, tmp_path):
    """The name of a shard is a hash of this list; another list would make every finished image be drawn again."""
    draw(pipe, 3, ONE_STEP, seed=5, shard_size=2, folder=tmp_path)
    settings = [weights_hash(pipe), "MiniDDIMScheduler", config_json(pipe.scheduler), ONE_STEP, "fp32", "cpu"]
    keys = [[*settings, 5, 2, None], [*settings, 7, 1, None]]
    names = {hashlib.sha256(json.dumps(key).encode()).hexdigest() for key in keys}
    assert {file.stem for file in tmp_path.glob("*/*.npz")} == names


def test_stored_shards_are_drawn_once_and_only_for_the_same_call(pipe, tiny_unet, calls, tmp_path):
    def drawn(pipe=pipe, options=ONE_STEP, count=4, **changes):
        calls.clear()
        images, _, _ = draw(pipe, count, options, **{"shard_size": 2, "folder": tmp_path, **changes})
        return images, list(calls)

    images, first_calls = drawn()
    assert first_calls == [2, 2]
    again, no_calls = drawn()
    assert torch.equal(again, images) and no_calls == []
    assert drawn(batch_size=1)[1] == []  # not part of an image
    assert drawn(count=5)[1] == [1]  # the first two shards are there
    assert drawn(seed=2)[1] == [2]  # images 2 and 3 are there
    assert drawn(options={"num_inference_steps": 2})[1] == [2, 2]
    for scheduler in (
        MiniDDPMScheduler(prediction_type="v_prediction"),
        MiniDDIMScheduler(prediction_type="v_prediction", clip_sample_range=0.5),
    ):
        other = MiniDDPMPipeline(pipe.unet, scheduler)
        other.set_progress_bar_config(disable=True)
        assert drawn(other)[1] == [2, 2]
    pipe.unet.to(torch.bfloat16)
    assert drawn()[1] == [2, 2]
    pipe.unet.to(torch.float32)
    with torch.no_grad():
        pipe.unet.conv_out.bias.add_(1)
    assert drawn()[1] == [2, 2]


# ---- hashes and files -----------------------------------------------------------------------------------------------


def test_configuration_without_paths_and_versions(pipe):
    config = json.loads(config_json(pipe.scheduler))
    assert config["prediction_type"] == "v_prediction" and not any(key.startswith("_") for key in config)
    assert list(config) == sorted(config)


def test_hash_of_weights_sees_weights_and_configuration(tiny_unet, pipe):
    before = weights_hash(pipe)
    assert len(before) == 16 and int(before, 16)
    pipe.unet.register_to_config(_name_or_path="elsewhere")
    assert weights_hash(pipe) == before
    pipe.unet.register_to_config(dropout=0.5)
    assert weights_hash(pipe) != before
    pipe.unet.register_to_config(dropout=0.0)
    assert weights_hash(pipe) == before
    with torch.no_grad():
        pipe.unet.conv_out.bias[0].add_(1e-3)
    assert weights_hash(pipe) != before


def test_hash_of_tensors_sees_names_types_shapes_bytes_and_texts():
    tensor = torch.arange(6, dtype=torch.int32)
    variants = [
        content_hash([("a", tensor)]),
        content_hash([("b", tensor)]),
        content_hash([("a", tensor.view(2, 3))]),
        content_hash([("a", tensor.view(torch.float32))]),
        content_hash([("a", tensor + 1)]),
        content_hash([("a", tensor)], "text"),
        content_hash([("a", tensor)], "te", "xt"),
    ]
    assert len(set(variants)) == len(variants)
    assert content_hash([("a", tensor.view(2, 3).t().contiguous().t())]) == variants[2]  # not the memory format


def test_cached_arrays_are_computed_once_and_replaced_when_damaged(tmp_path):
    computed = []

    def compute():
        computed.append(len(computed))
        return {"values": np.arange(3) + len(computed)}

    assert cached(tmp_path, ["key", 1], compute)["values"].tolist() == [1, 2, 3]
    digest = hashlib.sha256(b'["key", 1]').hexdigest()
    file = tmp_path / digest[:2] / f"{digest}.npz"  # where earlier versions look too
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [file]
    assert cached(tmp_path, ["key", 1], compute)["values"].tolist() == [1, 2, 3] and computed == [0]
    assert cached(tmp_path, ["key", 2], compute)["values"].tolist() == [2, 3, 4]
    for content in (b"", file.read_bytes()[:-30], b"not an archive"):
        file.write_bytes(content)
        count = len(computed)
        cached(tmp_path, ["key", 1], compute)
        assert len(computed) == count + 1


def test_a_failed_computation_leaves_no_file(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        cached(tmp_path, ["key"], lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert not any(path.is_file() for path in tmp_path.rglob("*"))
