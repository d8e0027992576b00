"""Evaluation: figures with known values, interrupted runs that resume, tables of one protocol."""

from __future__ import annotations

import importlib
import json
import math
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    BertConfig,
    BertModel,
    ResNetConfig,
    ResNetForImageClassification,
    ResNetModel,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)

import mini_ddpm_cli
from mini_ddpm import MiniDDIMScheduler, MiniDDPMClassConditionalPipeline, MiniDDPMPipeline, load_pipeline
from mini_ddpm.data import image_dataset
from mini_ddpm.evaluation import evaluate as evaluate_module
from mini_ddpm.evaluation import features as features_module
from mini_ddpm.evaluation import metrics
from mini_ddpm.evaluation.evaluate import EvaluateConfig, code_hash, evaluate, markdown_table
from mini_ddpm.evaluation.features import (
    FeatureExtractor,
    extract_features,
    fetch_inception,
    inception_extractor,
    load_classifier,
    transformers_extractor,
)
from mini_ddpm.evaluation.metrics import (
    compare_features,
    frechet_distance,
    kernel_distance,
    memorization,
    nearest,
    pixel_radii,
    precision_recall_density_coverage,
)

CLASSES = {"bag": 12, "boot": 8, "coat": 4}  # how many of the 24 reference images are of each class
FILES = ["evaluation.json", "evaluation.md", "evaluation.png"]


def gaussian(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def random_images(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 256, (count, *shape), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


# ---- Distances ------------------------------------------------------------------------------------------------------


def whitened(count: int, size: int, seed: int = 0) -> np.ndarray:
    """Points whose mean is zero and whose covariance is the identity, to the last digits."""
    points = gaussian(count, size, seed).numpy()
    points = points - points.mean(axis=0)
    return points @ np.linalg.inv(np.linalg.cholesky(np.cov(points.T))).T


def square_root(matrix: np.ndarray) -> np.ndarray:
    values, vectors = np.linalg.eigh(matrix)
    return vectors * np.sqrt(values.clip(0)) @ vectors.T


def test_frechet_distance_of_gaussians_is_the_closed_form():
    rng = np.random.default_rng(0)
    first, second = (rng.normal(size=(6, 6)) for _ in range(2))
    shift = rng.normal(size=6)
    real = whitened(300, 6, seed=1) @ first.T + 3
    generated = whitened(200, 6, seed=2) @ second.T + 3 + shift
    root = square_root(first @ first.T)  # tr (Σ_r Σ_g)^½ = tr (Σ_r^½ Σ_g Σ_r^½)^½
    cross = square_root(root @ second @ second.T @ root)
    expected = shift @ shift + np.trace(first @ first.T + second @ second.T - 2 * cross)
    assert frechet_distance(torch.tensor(real), torch.tensor(generated)) == pytest.approx(expected, rel=1e-9)

    # Where covariances commute each direction counts by itself: (μ - μ')² + (σ - σ')².
    scales, others = np.array([1.0, 2.0, 5.0]), np.array([1.0, 3.0, 0.5])
    real, generated = whitened(100, 3) * scales, whitened(80, 3, seed=1) * others + 2
    expected = 3 * 2**2 + ((scales - others) ** 2).sum()
    assert frechet_distance(torch.tensor(real), torch.tensor(generated)) == pytest.approx(expected, rel=1e-9)


def test_frechet_distance_is_symmetric_and_of_sets():
    real, generated = gaussian(60, 5), gaussian(90, 5, seed=1) * 1.5 + 0.2
    distance = frechet_distance(real, generated)
    assert 0 <= frechet_distance(real, real.flip(0)) < 1e-9
    assert frechet_distance(real.flip(0), generated.roll(7, 0)) == pytest.approx(distance, rel=1e-9)
    assert frechet_distance(generated, real) == pytest.approx(distance, rel=1e-9)
    # Single precision goes in, double precision is computed with: 1e4 ± 1 squared has no digits left in float32.
    far = frechet_distance((real + 1e4).float(), (generated + 1e4).float())
    assert far == pytest.approx(distance, rel=2e-3)


def test_frechet_distance_is_biased_by_the_number_of_images():
    real = gaussian(4000, 8)
    means = [
        np.mean([frechet_distance(real, gaussian(count, 8, seed)) for seed in range(1, 9)]) for count in (50, 100, 200)
    ]
    assert means[0] / means[1] == pytest.approx(2, rel=0.25)
    assert means[1] / means[2] == pytest.approx(2, rel=0.25)


def test_kernel_distance_is_the_unbiased_mmd():
    real, generated = gaussian(30, 4).tolist(), (gaussian(30, 4, seed=1) + 0.5).tolist()

    def kernel(x, y):
        return (sum(a * b for a, b in zip(x, y, strict=True)) / 4 + 1) ** 3

    within = sum(
        kernel(points[i], points[j]) for points in (real, generated) for i in range(30) for j in range(30) if i != j
    )
    across = sum(kernel(x, y) for x in real for y in generated)
    expected = within / (30 * 29) - 2 * across / 30**2
    mean, std = kernel_distance(torch.tensor(real), torch.tensor(generated))
    assert mean == pytest.approx(expected, rel=1e-4)  # each of the 100 subsets is all of the images
    assert std == pytest.approx(0, abs=1e-4)


def test_kernel_distance_is_about_zero_for_one_distribution():
    distances = [kernel_distance(gaussian(25, 4, seed), gaussian(25, 4, 100 + seed))[0] for seed in range(40)]
    error = np.std(distances) / math.sqrt(len(distances))
    assert abs(np.mean(distances)) < 3 * error
    assert min(distances) < 0 < max(distances)
    # With the diagonal in it would be off by far more: 2/n · (E k(x, x) - E k(x, y)).
    x, y = gaussian(10_000, 4), gaussian(10_000, 4, seed=1)
    bias = 2 / 25 * float((((x * x).sum(1) / 4 + 1) ** 3 - ((x * y).sum(1) / 4 + 1) ** 3).mean())
    assert bias > 6 * error


def test_defaults_of_metrics(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 10)
    real, generated = gaussian(40, 3).float(), gaussian(50, 3, seed=1).float() * 0.9
    assert (metrics.NEIGHBOURS, metrics.KID_SUBSETS) == (5, 100)
    assert kernel_distance(real, generated) == kernel_distance(real, generated, 0)
    figures = precision_recall_density_coverage(real, generated)
    assert figures == precision_recall_density_coverage(real, generated, 5)
    assert figures != precision_recall_density_coverage(real, generated, 4)
    assert compare_features(real, generated) == compare_features(real, generated, 0)
    assert [found.tolist() for found in nearest(real, real)] == [
        found.tolist() for found in nearest(real, real, 1, without_self=False)
    ]
    assert nearest(real, real)[1].tolist() == list(range(40))  # each is its own


def test_comparison_of_features_holds_every_figure(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 10)
    real, generated = gaussian(40, 3).float(), gaussian(50, 3, seed=1).float() + 1
    kid, kid_std = kernel_distance(real, generated, 5)
    assert compare_features(real, generated, 5) == {
        "frechet_distance": frechet_distance(real, generated),
        "kid": 1000 * kid,
        "kid_std": 1000 * kid_std,
        **precision_recall_density_coverage(real, generated),
    }
    assert compare_features(real, generated, 6)["kid"] != 1000 * kid


def test_kernel_distance_draws_its_subsets_from_the_seed_alone(monkeypatch):
    monkeypatch.setattr(metrics, "KID_SUBSET_SIZE", 10)
    real, generated = gaussian(40, 3), gaussian(50, 3, seed=1) + 1
    torch.manual_seed(123)
    state = torch.get_rng_state()
    first = kernel_distance(real, generated, seed=5)
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(1)
    assert kernel_distance(real, generated, seed=5) == first
    other = kernel_distance(real, generated, seed=6)
    assert other != first and first[1] > 0
    assert other[0] == pytest.approx(first[0], abs=6 * first[1] / math.sqrt(metrics.KID_SUBSETS))


# ---- Neighbours -----------------------------------------------------------------------------------------------------


def distances(points: torch.Tensor, others: torch.Tensor) -> np.ndarray:
    """All of them, without the shortcut |x|² + |y|² - 2xy."""
    return np.array([np.sqrt(((others.double() - point.double()) ** 2).sum(dim=1).numpy()) for point in points])


@pytest.mark.parametrize("k", [1, 3])
def test_nearest_is_that_of_a_loop(k):
    points, others = gaussian(1003, 3).float(), gaussian(50, 3, seed=1).float()  # more than it takes at once
    found, indices = nearest(points, others, k)
    table = distances(points, others)
    assert np.array_equal(indices, table.argsort(axis=1)[:, k - 1])
    assert np.allclose(found, np.sort(table, axis=1)[:, k - 1], atol=1e-3)

    found, indices = nearest(points, points, k, without_self=True)
    table = distances(points, points)
    np.fill_diagonal(table, np.inf)
    assert np.array_equal(indices, table.argsort(axis=1)[:, k - 1])
    assert np.allclose(found, np.sort(table, axis=1)[:, k - 1], atol=1e-3)


@pytest.mark.parametrize(("count", "other_count", "k"), [(60, 50, 3), (60, 1101, 5)])
def test_precision_recall_density_coverage_are_those_of_a_loop(count, other_count, k):
    real, generated = gaussian(count, 2).float(), gaussian(other_count, 2, seed=1).float() * 0.5 + 0.5

    def radii(points):
        return np.sort(distances(points, points), axis=1)[:, k]  # the first is the point itself

    table, real_radii, generated_radii = distances(generated, real), radii(real), radii(generated)
    precise = dense = recalled = covered = 0
    for j in range(other_count):
        balls = sum(table[j, i] < real_radii[i] for i in range(count))
        precise, dense = precise + (balls > 0), dense + balls
    for i in range(count):
        recalled += any(table[j, i] < generated_radii[j] for j in range(other_count))
        covered += any(table[j, i] < real_radii[i] for j in range(other_count))
    assert precision_recall_density_coverage(real, generated, k) == pytest.approx(
        {
            "precision": precise / other_count,
            "recall": recalled / count,
            "density": dense / (k * other_count),
            "coverage": covered / count,
        }
    )
    assert 0 < precise < other_count and 0 < recalled < count and 0 < covered < count


def test_one_distribution_has_the_expected_density_and_coverage():
    """Real and generated points are exchangeable then, so both follow from counting (2002.09797, section 3.3)."""
    count, k = 1500, 5
    figures = precision_recall_density_coverage(gaussian(count, 3).float(), gaussian(count, 3, seed=1).float(), k)
    assert figures["precision"] > 0.95 and figures["recall"] > 0.95
    assert figures["density"] == pytest.approx(1, abs=0.05)
    # A ball is empty if the k points nearest to its centre, out of both sets, are all real.
    empty = math.prod((count - 1 - i) / (2 * count - 1 - i) for i in range(k))
    assert figures["coverage"] == pytest.approx(1 - empty, abs=0.02)


def test_collapsed_and_far_points():
    modes = torch.arange(10).repeat_interleave(50)
    real = gaussian(500, 2).float()
    real[:, 0] += 100 * modes
    one_mode = precision_recall_density_coverage(real, gaussian(500, 2, seed=1).float())
    assert one_mode["precision"] > 0.9 and one_mode["density"] > 0.8
    assert one_mode["recall"] < 0.11 and 0.08 < one_mode["coverage"] < 0.11
    one_point = precision_recall_density_coverage(real, real[:1].repeat(20, 1))
    assert one_point["precision"] == 1 and one_point["recall"] <= 0.02 and one_point["coverage"] < 0.05
    far = precision_recall_density_coverage(real, gaussian(100, 2, seed=1).float() + 5000)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}


def test_memorization_of_copies_and_of_what_is_far_off():
    train = random_images(60, 1, 6, 6)
    radii = pixel_radii(train)
    table = distances(train.flatten(1), train.flatten(1))
    np.fill_diagonal(table, np.inf)
    assert np.allclose(radii, table.min(axis=1), rtol=1e-4)
    assert memorization(train[20:50], train, radii) == 1
    nearly = train[:20].float().add(gaussian(20, 36).view(20, 1, 6, 6) * 2).clamp(0, 255).round().to(torch.uint8)
    assert memorization(torch.cat([nearly, nearly, 255 * (train[:10] > 127)]), train, radii) >= 0.8
    # From the corner of the cube each is further than the training images, in its midst, are from another.
    assert memorization(torch.zeros(30, 1, 6, 6, dtype=torch.uint8), train, radii) == 0


@pytest.mark.parametrize(("pixels", "union"), [(2, 4 / 3 + math.sqrt(3) / 2 / math.pi), (3, 27 / 16)])
def test_memorization_of_unseen_images_is_the_chance_of_mutual_neighbours(pixels, union):
    """An image and the training image nearest to it are each other's nearest: a ball empty, out of two that overlap.

    For uniform points its chance is the volume of a ball over that of the union of two, each with its centre on the
    other's surface; 1/2 where there are so many dimensions that they hardly overlap.
    """
    shares = []
    for seed in range(8):
        train = random_images(150 if pixels == 2 else 1500, 1, 1, pixels, seed=seed)
        fresh = random_images(1000, 1, 1, pixels, seed=100 + seed) // 2 + 64  # away from the border
        shares.append(memorization(fresh, train, pixel_radii(train)))
    assert np.mean(shares) == pytest.approx(1 / union, abs=0.03)


# ---- Feature networks -----------------------------------------------------------------------------------------------


def tiny_resnet(folder: Path, seed: int = 0, cls: type = ResNetModel, **config) -> ResNetModel:
    """A network of 16 features for grey images, saved to a folder without an image processor."""
    torch.manual_seed(seed)
    config = ResNetConfig(
        num_channels=1, embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **config
    )
    network = cls(config).eval()
    if cls is ResNetForImageClassification:  # about every class is read, whatever the initialization
        with torch.no_grad():
            network.classifier[-1].weight.normal_()
            network.classifier[-1].bias.sub_(network(torch.rand(64, 1, 8, 8).round() * 2 - 1).logits.mean(dim=0))
    network.save_pretrained(folder)
    return network


def vit_config() -> ViTConfig:
    return ViTConfig(
        image_size=16,
        patch_size=8,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )


def test_network_without_a_processor(tmp_path):
    network = tiny_resnet(tmp_path / "network")
    extractor = transformers_extractor(str(tmp_path / "network"))
    images = random_images(7, 1, 8, 8)
    with torch.no_grad():
        features = extractor.run(images)
        expected = network(images / 127.5 - 1).pooler_output[:, :, 0, 0]
        assert torch.allclose(features, expected, atol=1e-6)
        assert torch.allclose(torch.cat([extractor.run(images[:3]), extractor.run(images[3:])]), features, atol=1e-6)
    assert (features.shape, features.dtype) == ((7, 16), torch.float32)
    assert features.std(dim=0).max() > 0.1 and extractor.name == "network"

    tiny_resnet(tmp_path / "same")
    tiny_resnet(tmp_path / "other", seed=1)
    assert transformers_extractor(str(tmp_path / "same")).key == extractor.key
    assert transformers_extractor(str(tmp_path / "other")).key != extractor.key
    half = transformers_extractor(str(tmp_path / "network"), feature_dtype="bf16")
    assert half.key != extractor.key
    with torch.no_grad():
        rounded = half.run(images)
    assert rounded.dtype == torch.float32 and 0 < (rounded - features).abs().max() < 0.1 * features.abs().max()


def test_network_with_a_processor(tmp_path):
    torch.manual_seed(0)
    network = ViTModel(vit_config()).eval()
    network.save_pretrained(tmp_path)
    processor = {"size": {"height": 16, "width": 16}, "image_mean": [0.3] * 3, "image_std": [0.2] * 3}
    ViTImageProcessor(**processor, do_resize=False).save_pretrained(tmp_path)
    extractor = transformers_extractor(str(tmp_path))
    images = random_images(5, 1, 16, 16)
    with torch.no_grad():
        features = extractor.run(images)
        expected = network(((images / 255 - 0.3) / 0.2).expand(-1, 3, -1, -1)).pooler_output
        assert torch.allclose(features, expected, atol=1e-5) and features.shape == (5, 16)
        assert torch.equal(extractor.run(images.expand(-1, 3, -1, -1)), features)  # grey is colour without a tint
    # What the same weights give depends on their processor, so does what may be taken out of the cache.
    ViTImageProcessor(**processor).save_pretrained(tmp_path)
    resizing = transformers_extractor(str(tmp_path))
    assert resizing.key != extractor.key
    with torch.no_grad():
        assert resizing.run(random_images(2, 1, 8, 8)).shape == (2, 16)


def test_networks_that_give_no_features(tmp_path):
    ViTForImageClassification(vit_config()).save_pretrained(tmp_path / "headless")
    with pytest.raises(ValueError, match="headless' has no weights for pooler"):
        transformers_extractor(str(tmp_path / "headless"))
    ViTModel(vit_config()).save_pretrained(tmp_path / "unclassed")
    with pytest.raises(ValueError, match="classifier='.*unclassed' has no weights for classifier"):
        load_classifier(str(tmp_path / "unclassed"), None, "cpu")
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    BertModel(BertConfig(vocab_size=8, **sizes)).save_pretrained(tmp_path / "text")
    with pytest.raises(ValueError, match="text' is not a vision model: it takes input_ids"):
        transformers_extractor(str(tmp_path / "text"))


def test_features_are_computed_once_and_in_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path))
    sizes = []

    def run(images):
        sizes.append(len(images))
        return images.flatten(1).float()

    images = random_images(25, 1, 2, 2)
    monkeypatch.setattr(features_module, "SHARD_SIZE", 10)
    extractor = FeatureExtractor("pixels", "key", run)
    assert torch.equal(extract_features(images, extractor, "", batch_size=4), images.flatten(1).float())
    assert sizes == [4, 4, 2, 4, 4, 2, 4, 1]
    assert torch.equal(extract_features(images, extractor, ""), images.flatten(1).float()) and len(sizes) == 8
    extract_features(images, FeatureExtractor("pixels", "other", run), "")
    assert sizes[8:] == [10, 10, 5]
    images[13] ^= 1
    extract_features(images, extractor, "")
    assert sizes[11:] == [10]
    monkeypatch.undo()
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path))
    extract_features(random_images(1001, 1, 2, 2), extractor, "")
    assert sizes[12:] == [250] * 4 + [1]
    assert len(cached_files(tmp_path, "features")) == 3 + 3 + 1 + 2  # a thousand images in a file


@pytest.mark.slow
@pytest.mark.network
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")  # there is no other form of that network
def test_inception_is_the_network_of_the_file(monkeypatch):
    """The folded graph against the file as it is, on images that are prepared by other code."""
    monkeypatch.undo()  # fetched once, into the user's own cache
    try:
        file = fetch_inception()
    except OSError as error:
        pytest.skip(str(error))
    images = random_images(4, 3, 20, 28)

    def weights(size):  # bilinear interpolation by the centres of pixels, (299, size)
        where = ((torch.arange(299, dtype=torch.float64) + 0.5) * size / 299 - 0.5).clamp(0, size - 1)
        return (1 - (where[:, None] - torch.arange(size)).abs()).clamp(min=0)

    prepared = (weights(20) @ images.double() @ weights(28).T - 127.5) / 127.5
    extractor = inception_extractor()
    with torch.no_grad():
        expected = torch.jit.load(file).eval()(prepared.float())
        features = extractor.run(images)
        assert features.shape == (4, 2048)
        assert (features - expected).abs().max() < 1e-4 and features.std(dim=0).max() > 0.1
        grey = images[:, :1]
        assert torch.allclose(extractor.run(grey), extractor.run(grey.repeat(1, 3, 1, 1)), atol=1e-6)
        half = inception_extractor(feature_dtype="bf16").run(images)
    assert 0 < (half - features).abs().max() < 0.2


# ---- A whole run ----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def parts(tiny_unet, tmp_path_factory):
    """Folders of pipelines, networks and images, all tiny."""
    root = tmp_path_factory.mktemp("parts")
    rng = np.random.default_rng(0)
    for split, times in (("test", 1), ("train", 2)):
        for index, (name, count) in enumerate(CLASSES.items()):
            (root / "images" / split / name).mkdir(parents=True)
            for i in range(count * times):
                pixels = rng.normal(60 + 60 * index, 40, (8, 8)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(root / "images" / split / name / f"{i}.png")
    scheduler = MiniDDIMScheduler(prediction_type="v_prediction")
    labelled, names = tiny_unet(num_class_embeds=len(CLASSES) + 1), dict(enumerate(CLASSES))
    with torch.no_grad():
        labelled.class_embedding.weight.mul_(30)  # so that the classes are told apart at a glance
    MiniDDPMClassConditionalPipeline(labelled, scheduler, id2label=names).save_pretrained(root / "conditional")
    with torch.no_grad():
        labelled.conv_out.weight.mul_(1.5)
    MiniDDPMClassConditionalPipeline(labelled, scheduler, id2label=names).save_pretrained(root / "retrained")
    MiniDDPMPipeline(tiny_unet(num_class_embeds=None), scheduler).save_pretrained(root / "plain")
    tiny_resnet(root / "features")
    tiny_resnet(root / "classifier", cls=ResNetForImageClassification, num_labels=3)
    return root


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def own_caches(caches, monkeypatch):
    monkeypatch.setenv("MINI_DDPM_CACHE", str(caches / "shared"))
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", caches / "datasets")


def config(parts: Path, output_dir: Path, pipeline: str = "conditional", **changes) -> EvaluateConfig:
    settings = {"num_inference_steps": (3, 4), "schedulers": ("ddim", "dpmsolver++"), "num_images": 24}
    settings |= {"feature_extractor": str(parts / "features"), "classifier": str(parts / "classifier")}
    settings |= {"dataset_name": str(parts / "images"), "device": "cpu", "output_dir": output_dir}
    return EvaluateConfig(str(parts / pipeline), **(settings | changes))


@pytest.fixture(scope="module")
def measured(parts, caches, tmp_path_factory):
    """Two numbers of steps with two schedulers; its cache is kept apart from that of the tests."""
    folder = tmp_path_factory.mktemp("measured")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MINI_DDPM_CACHE", str(caches / "measured"))
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", caches / "datasets")
        rows = evaluate(config(parts, folder))
    return SimpleNamespace(folder=folder, rows=rows, cache=caches / "measured")


@pytest.fixture
def again(measured, tmp_path, monkeypatch):
    """A copy of that run's results, with its cache in use."""
    monkeypatch.setenv("MINI_DDPM_CACHE", str(measured.cache))
    return shutil.copytree(measured.folder, tmp_path / "again")


def set_shard_size(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    monkeypatch.setattr(evaluate_module, "SHARD_SIZE", size)
    monkeypatch.setattr(features_module, "SHARD_SIZE", size)


def cached_files(cache: Path, folder: str = "*") -> list[Path]:
    """The finished files of a cache. A temporary file starts with a dot."""
    return sorted(file for file in cache.glob(f"{folder}/*/*.npz") if not file.name.startswith("."))


def samples(cache: Path) -> dict[str, np.ndarray]:
    """The drawn images in a cache, by the names of their files."""
    found = {}
    for file in cached_files(cache, "samples"):
        with np.load(file) as arrays:
            found[file.name] = arrays["images"].astype(int)
    return found


def draw(folder: Path, count: int, **options) -> np.ndarray:
    """Images of the seeds 0, 1, ... as bytes (B, C, H, W), by the pipeline itself."""
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(seed) for seed in range(count)]
    images = pipe(**options, generator=generator, output_type="np").images
    return (images * 255).round().astype(int).transpose(0, 3, 1, 2)


def same_settings(rows: list[dict]) -> list[tuple]:
    return [(row.get("scheduler", "real"), row.get("num_inference_steps"), row.get("guidance_scale")) for row in rows]


def test_rows_and_files(parts, measured):
    rows = measured.rows
    dpm, ddim = "DPMSolverMultistepScheduler", "MiniDDIMScheduler"
    expected = [("real", None, None), (dpm, 4, 1.5), (dpm, 3, 1.5), (ddim, 4, 1.5), (ddim, 3, 1.5)]
    assert same_settings(rows) == expected  # the floor first; the guidance is what the pipeline takes by itself
    reference, _ = image_dataset(parts / "images", "test").stack(progress=False)
    for row in rows:
        assert row["protocol"] == {
            "feature_extractor": "features",
            "feature_dtype": "fp32",
            "feature_hash": transformers_extractor(str(parts / "features")).key[:16],
            "dataset": "images",
            "split": "test",
            "reference_images": len(reference),
            "reference_hash": rows[0]["protocol"]["reference_hash"],
            "num_images": 24,
            "seed": 0,
            "classifier": "classifier",
            "classifier_hash": rows[0]["protocol"]["classifier_hash"],
        }
        assert row["num_images"] == 24 and row["frechet_distance"] > 0 and "fid" not in row
        assert 0 <= row["memorization"] <= 1 and 0 <= row["class_accuracy"] <= 1
    assert rows[0]["images"] == "real" and rows[0]["drawn_from"] == "train"
    assert [row["unet_evaluations"] for row in rows[1:]] == [8, 6, 8, 6]  # guidance asks the network twice
    assert len({row["weights"] for row in rows[1:]}) == 1 and all(row["seconds_per_image"] > 0 for row in rows[1:])
    assert len({row["frechet_distance"] for row in rows}) == 5

    assert sorted(os.listdir(measured.folder)) == FILES
    assert json.loads((measured.folder / "evaluation.json").read_text()) == rows
    with Image.open(measured.folder / "evaluation.png") as picture:
        picture.load()
        assert picture.size == (1200, 480)
    table = (measured.folder / "evaluation.md").read_text()
    assert table == markdown_table(rows)
    lines = table.splitlines()
    assert lines[0].startswith("| Images | Fréchet distance |") and len({line.count("|") for line in lines[:7]}) == 1
    assert lines[2].startswith(f"| real, 24 of train (the floor) | {rows[0]['frechet_distance']:.4g} |")
    for line, row in zip(lines[3:7], rows[1:], strict=True):
        assert line.startswith(f"| {row['scheduler']}, {row['num_inference_steps']} steps, guidance 1.5 | ")
        cells = [cell.strip() for cell in line.split("|")]
        for name, text in (("precision", "{:.3f}"), ("class_accuracy", "{:.2%}"), ("unet_evaluations", "{}")):
            assert text.format(row[name]) in cells
    assert "24 images (seeds from 0) against the 24 of images test; features of features in fp32; " in lines[-1]
    assert f"; class accuracy by classifier ({rows[0]['protocol']['classifier_hash']}). Drawn on" in lines[-1]


def test_figures_are_those_of_the_drawn_images(parts, measured):
    """By the pipeline, the networks and loops over the images, past everything in between."""
    by_class = np.stack(
        [
            draw(parts / "conditional", 24, class_labels=[label] * 24, num_inference_steps=3, guidance_scale=1.5)
            for label in range(3)
        ]
    )
    row = next(row for row in measured.rows[1:] if same_settings([row]) == [("MiniDDIMScheduler", 3, 1.5)])

    # Image i is that of seed i and of some class; which, the images themselves tell. One file holds those of this row.
    found = []
    for images in samples(measured.cache).values():
        deviations = np.abs(by_class - images).max(axis=(2, 3, 4))  # (3, 24)
        if deviations.min(axis=0).max() <= 1:
            found.append((torch.tensor(images, dtype=torch.uint8), deviations.argmin(axis=0)))
    ((drawn, labels),) = found
    assert np.sort(np.abs(by_class - drawn.numpy()).max(axis=(2, 3, 4)), axis=0)[1].min() > 10  # no two classes alike
    assert np.bincount(labels).tolist() == list(CLASSES.values())  # as in the reference
    assert (labels != np.sort(labels)).any()

    reference, _ = image_dataset(parts / "images", "test").stack(progress=False)
    train, _ = image_dataset(parts / "images", "train").stack(progress=False)
    network = ResNetModel.from_pretrained(parts / "features").eval()
    classifier = ResNetForImageClassification.from_pretrained(parts / "classifier").eval()
    with torch.no_grad():
        real, generated = (
            network(images / 127.5 - 1).pooler_output.flatten(1).double() for images in (reference, drawn)
        )
        read = classifier(drawn / 127.5 - 1).logits.argmax(dim=1).numpy()
    assert len(set(read)) > 1
    assert row["class_accuracy"] == pytest.approx((read == labels).mean(), abs=1e-6)

    covariances = np.cov(real.T), np.cov(generated.T)
    root = square_root(covariances[0])
    expected = float((real.mean(0) - generated.mean(0)).square().sum())
    expected += np.trace(covariances[0] + covariances[1] - 2 * square_root(root @ covariances[1] @ root))
    assert row["frechet_distance"] == pytest.approx(expected, rel=1e-3)
    kernels = [((a @ b.T) / 16 + 1) ** 3 for a, b in ((real, real), (generated, generated), (real, generated))]
    expected = sum((k.sum() - k.trace()) / (24 * 23) for k in kernels[:2]) - 2 * kernels[2].mean()
    assert row["kid"] == pytest.approx(1000 * float(expected), abs=0.05)
    figures = precision_recall_density_coverage(real.float(), generated.float())
    assert {name: row[name] for name in figures} == pytest.approx(figures, abs=1e-5)

    to_train, within = distances(drawn.flatten(1), train.flatten(1)), distances(train.flatten(1), train.flatten(1))
    np.fill_diagonal(within, np.inf)
    copies = to_train.min(axis=1) < within.min(axis=1)[to_train.argmin(axis=1)]
    assert row["memorization"] == pytest.approx(copies.mean(), abs=1e-4)


def test_samples_drawn_before_are_measured_as_those_drawn_now(parts, tmp_path, capsys):
    command = ["sample", str(parts / "plain"), "--num-images", "24", "--steps", "3", "--eta", "0.5", "--device", "cpu"]
    assert mini_ddpm_cli.main([*command, "--out", str(tmp_path / "x.npz")]) == 0
    settings = {"num_inference_steps": (3,), "schedulers": (), "eta": 0.5}
    drawn = evaluate(config(parts, tmp_path / "drawn", "plain", **settings))[-1]
    read = evaluate(config(parts, tmp_path / "read", "plain", samples=tmp_path / "x.npz", num_images=10_000))[-1]
    assert {key: drawn[key] for key in read} == read and drawn.keys() - read.keys() == {"seconds_per_image"}
    assert (
        evaluate(config(parts, tmp_path / "few", "plain", samples=tmp_path / "x.npz", num_images=12))[-1]["num_images"]
        == 12
    )
    np.savez(tmp_path / "bare.npz", images=np.zeros((24, 8, 8, 1), dtype=np.uint8))
    (tmp_path / "text.npz").write_text("no arrays")
    for name in ("bare.npz", "text.npz"):
        with pytest.raises(ValueError, match=rf"{name}' must be a file that `mini-ddpm sample --out FILE.npz` wrote"):
            evaluate(config(parts, tmp_path / "bad", "plain", samples=tmp_path / name))


def test_floor_of_a_split_against_itself_is_zero(parts, tmp_path):
    rows = evaluate(config(parts, tmp_path, "plain", other_split="test", schedulers=(), num_inference_steps=(1,)))
    floor = rows[0]
    assert floor["drawn_from"] == "test" and floor["frechet_distance"] < 1e-6
    assert floor["precision"] == floor["recall"] == floor["coverage"] == 1
    assert floor["kid"] < 0  # unbiased, so less than nothing for images that are the same


def test_floor_of_sorted_folders_is_of_all_classes(parts, tmp_path):
    """The first images of such a folder are those of the first class."""
    rows = evaluate(config(parts, tmp_path, "plain", schedulers=(), num_inference_steps=(1,), num_images=12))
    train, _ = image_dataset(parts / "images", "train").stack(progress=False)
    test, labels = image_dataset(parts / "images", "test").stack(progress=False)  # what nothing was trained on
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))[:12]
    assert len(set(labels[order].tolist())) == 3
    classifier = ResNetForImageClassification.from_pretrained(parts / "classifier").eval()
    with torch.no_grad():
        right = classifier(test[order] / 127.5 - 1).logits.argmax(dim=1) == labels[order]
    assert rows[0]["class_accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert rows[0]["memorization"] == pytest.approx(memorization(test[order], train, pixel_radii(train)), abs=1e-4)


def test_more_images_than_the_reference_has(parts, tmp_path, monkeypatch):
    """Each class as often as in the reference, twice; and in parts."""
    set_shard_size(monkeypatch, 20)
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "cache"))
    options = {"num_inference_steps": (2,), "schedulers": ("ddim",), "guidance_scale": 1, "batch_size": 7}
    rows = evaluate(config(parts, tmp_path / "out", num_images=48, **options))
    by_class = np.stack(
        [
            draw(parts / "conditional", 48, class_labels=[label] * 48, num_inference_steps=2, guidance_scale=1)
            for label in range(3)
        ]
    )
    counts = np.zeros(3, dtype=int)
    firsts = []
    for images in samples(tmp_path / "cache").values():
        starts = [first for first in (0, 20, 40) if first + len(images) <= 48]
        deviations = [np.abs(by_class[:, i : i + len(images)] - images).max(axis=(2, 3, 4)) for i in starts]
        (fits,) = [i for i, deviation in enumerate(deviations) if deviation.min(axis=0).max() <= 1]
        counts += np.bincount(deviations[fits].argmin(axis=0), minlength=3)
        firsts.append(starts[fits])
    assert sorted(firsts) == [0, 20, 40]
    assert counts.tolist() == [2 * count for count in CLASSES.values()]
    assert rows[1]["num_images"] == 48 and rows[1]["unet_evaluations"] == 2


def test_pipeline_without_classes(parts, tmp_path, monkeypatch, capsys):
    """By the command, into the pipeline's own folder."""
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "cache"))
    folder = shutil.copytree(parts / "plain", tmp_path / "plain")
    arguments = ["evaluate", str(folder), "--dataset-name", str(parts / "images"), "--num-images", "24"]
    arguments += ["--steps", "3", "--feature-extractor", str(parts / "features"), "--device", "cpu", "--eta", "0.5"]
    arguments += ["--classifier", str(parts / "classifier")]
    assert mini_ddpm_cli.main(arguments) == 0
    assert capsys.readouterr().out == (folder / "evaluation.md").read_text()
    floor, row = json.loads((folder / "evaluation.json").read_text())
    assert "guidance_scale" not in row and row["unet_evaluations"] == 3 and row["eta"] == 0.5
    assert "class_accuracy" in floor and "class_accuracy" not in row
    (drawn,) = samples(tmp_path / "cache").values()
    expected = draw(parts / "plain", 24, batch_size=24, num_inference_steps=3, eta=0.5)
    assert np.abs(drawn - expected).max() <= 1


def test_batch_size_does_not_change_an_image(parts, tmp_path, monkeypatch):
    drawn = []
    for batch_size in (24, 7):
        monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / str(batch_size)))
        options = {"num_inference_steps": (3,), "schedulers": ("ddpm",), "batch_size": batch_size}
        evaluate(config(parts, tmp_path / f"out-{batch_size}", **options))
        drawn.append(samples(tmp_path / str(batch_size)))
    ((name, whole),) = drawn[0].items()
    assert drawn[1].keys() == {name}
    # one grey level: a convolution over another batch size may round otherwise
    assert np.abs(whole - drawn[1][name]).max() <= 1
    assert np.abs(whole[1:] - whole[:-1]).max(axis=(1, 2, 3)).min() > 10


def test_defaults(parts, tmp_path, monkeypatch):
    assert vars(EvaluateConfig("x")) == {
        "pipeline": "x",
        "dataset_name": "ylecun/mnist",
        "split": "test",
        "other_split": None,
        "train_split": "train",
        "image_column": None,
        "label_column": None,
        "samples": None,
        "resolution": None,
        "num_images": 10_000,
        "num_inference_steps": (),
        "schedulers": (),
        "guidance_scale": None,
        "guidance_interval": None,
        "eta": None,
        "seed": 0,
        "feature_extractor": "inception",
        "inception": None,
        "feature_dtype": "fp32",
        "classifier": None,
        "dtype": "fp32",
        "batch_size": 250,
        "torch_compile": False,
        "device": "auto",
        "output_dir": None,
    }
    assert [EvaluateConfig("x", split=split).floor_split for split in ("test", "train", "all")] == [
        "train",
        "test",
        None,
    ]
    assert EvaluateConfig("x", other_split="all").floor_split == "all"
    defaults = {"num_inference_steps": (), "schedulers": (), "classifier": None}
    rows = evaluate(config(parts, tmp_path / "plain", "plain", **defaults))
    assert same_settings(rows) == [("real", None, None), ("MiniDDIMScheduler", 20, None)]
    assert rows[1]["eta"] == 0 and rows[1]["dtype"] == "fp32" and "class_accuracy" not in rows[0]

    # Without a folder, results go into that of the pipeline, or, for a bundled one, to evaluation/NAME.
    monkeypatch.chdir(tmp_path)
    for pipeline, folder in ((str(tmp_path / "plain"), tmp_path / "plain"), ("mnist", Path("evaluation/mnist"))):
        assert evaluate_module._default_output_dir(pipeline) == folder


# ---- Results that are there already ---------------------------------------------------------------------------------


def test_same_command_again_draws_nothing(parts, measured, again):
    times = {file: file.stat().st_mtime_ns for file in cached_files(measured.cache)}
    assert evaluate(config(parts, again)) == measured.rows  # the seconds too: they are those of the drawing
    assert {file: file.stat().st_mtime_ns for file in cached_files(measured.cache)} == times


METRICS = Path(metrics.__file__).read_text()
WORDS_CHANGED = (
    METRICS.replace('"""Distances and shares', '"""Reworded: distances and shares')
    .replace('    """Find the k-th nearest', '    """Look for the k-th nearest')
    .replace(
        "    rank = k + without_self",
        "    # The rank among all candidates.\n\n    rank = k + without_self  # at least 1",
    )
)
CODE_CHANGED = {
    "operator": METRICS.replace("distances < real_radii", "distances <= real_radii"),
    "constant": METRICS.replace("NEIGHBOURS = 5", "NEIGHBOURS = 6"),
    "default": METRICS.replace("k: int = 1,", "k: int = 2,"),
    "text": METRICS.replace('"kid": 1000 * kid,', '"kernel": 1000 * kid,'),
}


def test_code_hash_ignores_words_and_sees_code(tmp_path):
    def of(source):
        (tmp_path / "metrics.py").write_text(source)
        return code_hash(tmp_path / "metrics.py")

    assert of(METRICS) == code_hash(Path(metrics.__file__)) and len(of(METRICS)) == 64
    assert WORDS_CHANGED.count("\n") == METRICS.count("\n") + 2 and WORDS_CHANGED.count("Reworded") == 1
    assert of(WORDS_CHANGED) == of(METRICS)
    assert all(source != METRICS for source in CODE_CHANGED.values())
    assert len({of(METRICS), *map(of, CODE_CHANGED.values())}) == 1 + len(CODE_CHANGED)


def test_figures_are_computed_again_only_when_their_code_changed(parts, measured, again, tmp_path, monkeypatch):
    cache = shutil.copytree(measured.cache, tmp_path / "cache")
    monkeypatch.setenv("MINI_DDPM_CACHE", str(cache))
    before = cached_files(cache)
    source = tmp_path / "metrics.py"
    monkeypatch.setattr(metrics, "__file__", str(source))
    source.write_text(WORDS_CHANGED)
    evaluate(config(parts, again))
    assert cached_files(cache) == before
    source.write_text(CODE_CHANGED["operator"])
    assert evaluate(config(parts, again)) == measured.rows  # the running code is the same
    added = [file.parents[1].name for file in cached_files(cache) if file not in before]
    assert sorted(added) == ["figures"] * 5 + ["radii"]


def test_other_samplers_join_the_table(parts, measured, again):
    rows = evaluate(config(parts, again, num_inference_steps=(5,), schedulers=("ddim",)))
    rows = evaluate(config(parts, again, num_inference_steps=(3,), schedulers=("ddim",), guidance_scale=1.0))
    assert [row for row in rows if row in measured.rows] == measured.rows
    added = [row for row in rows if row not in measured.rows]
    assert same_settings(added) == [("MiniDDIMScheduler", 5, 1.5), ("MiniDDIMScheduler", 3, 1.0)]
    assert [row["unet_evaluations"] for row in added] == [10, 3]  # half without guidance
    assert same_settings(rows)[3] == ("MiniDDIMScheduler", 5, 1.5)  # in its place
    assert json.loads((again / "evaluation.json").read_text()) == rows
    assert (again / "evaluation.md").read_text() == markdown_table(rows)
    (plain,) = (row for row in rows if row.get("guidance_scale") == 1)
    guided = next(row for row in rows if same_settings([row]) == [("MiniDDIMScheduler", 3, 1.5)])
    assert plain["frechet_distance"] != guided["frechet_distance"]
    limited = {"guidance_scale": 1.5, "guidance_interval": (0.3, 0.7)}
    rows = evaluate(config(parts, again, num_inference_steps=(3,), schedulers=("ddim",), **limited))
    (row,) = (row for row in rows if row.get("guidance_interval"))
    assert row["unet_evaluations"] == 5  # steps 1 and 2 of 0, 1, 2
    assert "steps, guidance 1.5 from 0.3 to 0.7 | " in (again / "evaluation.md").read_text()
    assert len(json.loads((again / "evaluation.json").read_text())) == len(rows) == len(measured.rows) + 3


def test_results_of_another_protocol_are_left_alone(parts, again, tmp_path):
    before = {name: (again / name).read_bytes() for name in FILES}
    tiny_resnet(tmp_path / "features", seed=1)  # another network that is called the same
    other_images = shutil.copytree(parts / "images", tmp_path / "images")
    Image.new("L", (8, 8)).save(other_images / "test" / "bag" / "0.png")
    for changes, field in (
        ({"num_images": 20}, "num_images=24 and num_images=20 "),
        ({"seed": 1}, "seed=0 and seed=1 "),
        ({"split": "train"}, "split='test' and split='train' "),
        ({"feature_dtype": "bf16"}, "feature_dtype='fp32' and feature_dtype='bf16' "),
        ({"feature_extractor": str(tmp_path / "features")}, "feature_hash="),
        ({"dataset_name": str(other_images)}, "reference_hash="),
    ):
        with pytest.raises(ValueError, match=f"evaluation.json.*another protocol.*{field}.*another `output_dir`"):
            evaluate(config(parts, again, **changes))
    assert {name: (again / name).read_bytes() for name in os.listdir(again)} == before


@pytest.mark.parametrize("content", ["", '[{"accuracy": 1}]', '{"accuracy": 1}', "[1]"])
def test_file_of_something_else_is_left_alone(parts, tmp_path, content):
    (tmp_path / "evaluation.json").write_text(content)
    with pytest.raises(
        ValueError, match="evaluation.json does not hold results of an evaluation.*another `output_dir`"
    ):
        evaluate(config(parts, tmp_path))
    assert (tmp_path / "evaluation.json").read_text() == content and os.listdir(tmp_path) == ["evaluation.json"]


def test_changed_weights_drop_the_rows_of_the_old_ones(parts, measured, again):
    options = {"num_inference_steps": (3,), "schedulers": ("ddim",)}
    rows = evaluate(config(parts, again, "retrained", **options))
    assert same_settings(rows) == [("real", None, None), ("MiniDDIMScheduler", 3, 1.5)]
    assert rows[0] == measured.rows[0]
    old = next(row for row in measured.rows if same_settings([row]) == [("MiniDDIMScheduler", 3, 1.5)])
    assert rows[1]["weights"] != old["weights"]
    assert rows[1]["frechet_distance"] != old["frechet_distance"]  # not the old images out of the cache
    assert json.loads((again / "evaluation.json").read_text()) == rows


def test_table_of_two_protocols_is_refused(measured):
    other = measured.rows[1] | {"protocol": measured.rows[1]["protocol"] | {"num_images": 50_000}}
    with pytest.raises(ValueError, match="num_images=24 and num_images=50000 cannot be compared"):
        markdown_table([*measured.rows, other])


def test_class_accuracies_of_two_classifiers_never_share_a_table(parts, measured, again, tmp_path):
    one = {"num_inference_steps": (3,), "schedulers": ("ddim",)}
    before = (again / "evaluation.json").read_bytes()
    tiny_resnet(tmp_path / "classifier", seed=1, cls=ResNetForImageClassification, num_labels=3)
    with pytest.raises(
        ValueError,
        match=r"another protocol. Class accuracies with classifier=classifier \((\w{16})\) and "
        r"classifier=classifier \((?!\1)\w{16}\) cannot be compared.*another `output_dir`",
    ):
        evaluate(
            config(parts, again, **one, classifier=str(tmp_path / "classifier"))
        )  # another that is called the same
    assert (again / "evaluation.json").read_bytes() == before
    # The same one by another name, and none: their other figures compare.
    shutil.copytree(parts / "classifier", tmp_path / "renamed")
    rows = evaluate(config(parts, again, **one, classifier=str(tmp_path / "renamed")))
    assert same_settings(rows) == same_settings(measured.rows)
    rows = evaluate(config(parts, again, num_inference_steps=(5,), schedulers=("ddim",), classifier=None))
    assert "classifier" not in rows[0]["protocol"] and "class_accuracy" not in rows[0]  # the floor, measured again
    assert "class accuracy by " in markdown_table(rows)

    # Results of earlier versions do not say whose they are. They open, and are joined by none.
    old = json.loads(before)
    for row in old:
        del row["protocol"]["classifier"], row["protocol"]["classifier_hash"]
    assert "class accuracy by" not in markdown_table(old)
    (again / "evaluation.json").write_text(json.dumps(old))
    with pytest.raises(ValueError, match=r"classifier=unknown \(unknown\) and classifier=classifier \("):
        evaluate(config(parts, again, **one))
    assert len(evaluate(config(parts, again, num_inference_steps=(5,), schedulers=("ddim",), classifier=None))) == 6


def test_columns_of_the_images_and_their_classes_are_chosen(parts, tmp_path):
    """As in training: a dataset may hold several of each."""
    folder = tmp_path / "table"
    for split in ("train", "test"):
        images = image_dataset(parts / "images", split)
        pixels, labels = images.stack(progress=False)
        features = datasets.Features(
            {
                "thumbnail": datasets.Image(),
                "picture": datasets.Image(),
                "colour": datasets.ClassLabel(names=["red"]),
                "kind": datasets.ClassLabel(names=list(CLASSES)),
            }
        )
        columns = {
            "thumbnail": [Image.new("L", (4, 4))] * len(pixels),
            "picture": [Image.fromarray(image[0].numpy()) for image in pixels],
            "colour": [0] * len(pixels),
            "kind": labels.tolist(),
        }
        folder.mkdir(exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(folder / f"{split}-0000.parquet")
    one = {"num_inference_steps": (3,), "schedulers": ("ddim",)}
    expected = evaluate(config(parts, tmp_path / "expected", **one))
    settings = {"dataset_name": str(folder), "image_column": "picture", "label_column": "kind"}
    rows = evaluate(config(parts, tmp_path / "out", **one, **settings))
    for row in (*rows, *expected):
        row["protocol"].pop("dataset", None)
    assert rows == expected
    with pytest.raises(ValueError, match="no column 'photo'; it has thumbnail, picture"):
        evaluate(config(parts, tmp_path / "bad", **one, **settings | {"image_column": "photo"}))


SHARED = """
import sys
import mini_ddpm_cli
from mini_ddpm.evaluation import evaluate, features

evaluate.SHARD_SIZE = features.SHARD_SIZE = 8
sys.exit(mini_ddpm_cli.main(sys.argv[1:]))
"""


def test_processes_share_the_work_and_find_the_same(parts, tmp_path, caches, monkeypatch, two_processes):
    set_shard_size(monkeypatch, 8)
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "alone"))
    flags = ["evaluate", str(parts / "conditional"), "--dataset-name", str(parts / "images"), "--num-images", "24"]
    flags += ["--steps", "3", "--schedulers", "ddim", "dpmsolver++", "--feature-extractor", str(parts / "features")]
    flags += ["--classifier", str(parts / "classifier"), "--batch-size", "8", "--device", "cpu"]
    assert mini_ddpm_cli.main([*flags, "--output-dir", str(tmp_path / "expected")]) == 0

    script = tmp_path / "shared.py"
    script.write_text(SHARED)
    environment = {"MINI_DDPM_CACHE": str(tmp_path / "both"), "HF_DATASETS_CACHE": str(caches / "datasets")}
    environment["PYTHONPATH"] = str(Path(mini_ddpm_cli.__file__).parents[1])
    command = [sys.executable, *two_processes, str(script), *flags, "--output-dir", str(tmp_path / "out")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120, env=os.environ | environment)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == (tmp_path / "out" / "evaluation.md").read_text()  # one process speaks
    assert sorted(os.listdir(tmp_path / "out")) == FILES
    rows, expected = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("out", "expected"))
    for row in (*rows, *expected):
        row.pop("seconds_per_image", None)
        row.pop("device", None)  # the number of threads
    assert rows == expected
    for folder in ("samples", "features"):
        names = [[file.name for file in cached_files(tmp_path / cache, folder)] for cache in ("alone", "both")]
        assert names[0] == names[1] and len(names[0]) > 5


def test_an_error_of_several_processes_is_told_once(parts, tmp_path, two_processes):
    command = [sys.executable, *two_processes, "-m", "mini_ddpm", "evaluate", str(parts / "plain"), "--device", "cpu"]
    command += ["--dataset-name", str(tmp_path / "nowhere"), "--output-dir", str(tmp_path / "out")]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert answer.returncode != 0 and not (tmp_path / "out").exists()
    assert answer.stderr.count("mini-ddpm: ") == 1 and "nowhere' is not there" in answer.stderr


# ---- Interrupted runs -----------------------------------------------------------------------------------------------

KILLED = """
import json, sys
from pathlib import Path
from mini_ddpm.evaluation import evaluate, features

evaluate.SHARD_SIZE = features.SHARD_SIZE = 8
settings = json.loads(sys.argv[1])
evaluate.evaluate(evaluate.EvaluateConfig(**settings | {"output_dir": Path(settings["output_dir"])}))
"""


def test_killed_run_resumes(parts, tmp_path, caches, monkeypatch):
    settings = {"num_images": 48, "num_inference_steps": (15,), "schedulers": ("euler-ancestral",), "batch_size": 8}
    settings |= {"classifier": None}
    set_shard_size(monkeypatch, 8)
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "undisturbed"))
    expected = evaluate(config(parts, tmp_path / "expected", **settings))
    undisturbed = samples(tmp_path / "undisturbed")
    assert len(undisturbed) == 6

    cache, out = tmp_path / "cache", tmp_path / "out"
    arguments = vars(config(parts, out, **settings))
    environment = {"MINI_DDPM_CACHE": str(cache), "HF_DATASETS_CACHE": str(caches / "datasets")}
    environment["PYTHONPATH"] = str(Path(mini_ddpm_cli.__file__).parents[1])
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, json.dumps(arguments, default=str)],
        env=os.environ | environment,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        deadline = time.monotonic() + 300
        while not cached_files(cache, "samples"):
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    times = {file: file.stat().st_mtime_ns for file in cached_files(cache)}
    left = samples(cache)
    assert 0 < len(left) < len(undisturbed)
    assert [row["images"] for row in json.loads((out / "evaluation.json").read_text())] == ["real"]

    # A file that was half written when the process was killed is not a result.
    missing = next(name for name in undisturbed if name not in left)
    source = next((tmp_path / "undisturbed").rglob(missing))
    leftover = (cache / "samples" / source.parent.name / missing).with_name(f".{Path(missing).stem}.1.npz")
    leftover.parent.mkdir(exist_ok=True)
    leftover.write_bytes(source.read_bytes()[:100])

    monkeypatch.setenv("MINI_DDPM_CACHE", str(cache))
    rows = evaluate(config(parts, out, **settings))
    assert {file: file.stat().st_mtime_ns for file in times} == times  # neither drawn nor computed again
    drawn = samples(cache)
    assert drawn.keys() == undisturbed.keys()
    assert all(np.abs(drawn[name] - undisturbed[name]).max() <= 1 for name in drawn)
    assert same_settings(rows) == same_settings(expected) and rows[1]["num_images"] == 48
    assert rows[0] == expected[0] and rows[1]["frechet_distance"] == pytest.approx(
        expected[1]["frechet_distance"], rel=0.01
    )
    assert sorted(os.listdir(out)) == FILES
    assert list(cache.rglob(".*")) == [leftover]


# ---- What goes wrong ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pipeline", "arguments", "message"),
    [
        ("plain", ["--schedulers", "pndm"], "scheduler='pndm' must be one of ddpm, ddim"),
        ("plain", ["--num-images", "1"], "num_images=1 must be at least 10"),
        ("plain", ["--batch-size", "0"], "batch_size=0 must be at least 1"),
        ("plain", ["--steps", "20", "0"], "num_inference_steps=0 must be at least 1"),
        ("plain", ["--steps", "2001"], "num_inference_steps=2001 must be at most 1000, the number of noise levels"),
        (
            "plain",
            ["--guidance-scale", "2"],
            "guidance_scale=2.0: {parts}/plain is unconditional and takes no guidance",
        ),
        (
            "conditional",
            ["--guidance-interval", "0.5", "1.5"],
            "guidance_interval=(0.5, 1.5) must satisfy 0 <= start < end <= 1",
        ),
        ("plain", ["--dataset-name", "{parts}/nowhere"], "'{parts}/nowhere' is not there"),
        ("plain", ["--split", "validation"], "split 'validation'"),
        ("plain", ["--other-split", "validation"], "split 'validation'"),
        (
            "plain",
            ["--dataset-name", "{tmp}/colour"],
            "'{tmp}/colour': its images have 3 channels, but those of {parts}/plain have 1",
        ),
        (
            "plain",
            ["--resolution", "16"],
            "resolution=16: the images of '{parts}/images' have 16x16 pixels, but those of {parts}/plain have 8x8.",
        ),
        (
            "plain",
            ["--feature-extractor", "inception", "--inception", "{tmp}/none"],
            "inception='{tmp}/none': there is no such file",
        ),
        (
            "plain",
            ["--feature-extractor", "inception", "--inception", "{tmp}/bad"],
            "inception='{tmp}/bad' is not the Inception",
        ),
        ("plain", ["--feature-extractor", "{tmp}/nowhere"], "{tmp}/nowhere"),
        ("plain", ["--classifier", "{tmp}/five"], "classifier='{tmp}/five' has 5 classes, but the dataset has 3"),
        ("plain", ["--device", "gpu"], "device='gpu' must be auto, cpu"),
        ("nowhere", [], "nowhere"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_code_2(parts, tmp_path, capsys, pipeline, arguments, message):
    (tmp_path / "bad").write_bytes(b"not a network")
    for split in ("train", "test"):
        (tmp_path / "colour" / split).mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (8, 8), (10, 20, 30)).save(tmp_path / "colour" / split / f"{i}.png")
    if "{tmp}/five" in arguments:
        tiny_resnet(tmp_path / "five", cls=ResNetForImageClassification, num_labels=5)
    where = {"parts": parts, "tmp": tmp_path}
    flags = ["--dataset-name", "{parts}/images", "--feature-extractor", "{parts}/features", "--device", "cpu"]
    flags += ["--num-images", "24", "--output-dir", "{tmp}/out", *arguments]
    capsys.readouterr()
    assert mini_ddpm_cli.main(["evaluate", str(parts / pipeline), *(flag.format(**where) for flag in flags)]) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("mini-ddpm: ")]
    assert captured.out == "" and lines == captured.err.splitlines()[-1:]
    assert message.format(**where) in lines[0]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": -1}, "seed=-1 must be at least 0"),
        ({"seed": 10**20}, "seed=100000000000000000000 must be at most"),
        ({"seed": 1.5}, "seed=1.5 must be a whole number"),
        ({"eta": math.nan}, "eta=nan must be a finite number"),
        ({"eta": -1.0}, "eta=-1.0 must be at least 0"),
        ({"num_images": "24"}, "num_images='24' must be a whole number"),
        ({"num_inference_steps": 5}, "num_inference_steps=5 must be several values"),
        ({"dtype": "half"}, "dtype='half' must be one of fp32, fp16, bf16"),
        ({"feature_dtype": "fp16"}, "feature_dtype='fp16' must be one of fp32, bf16"),
        ({"resolution": 0}, "resolution=0 must be at least 1"),
        ({"guidance_scale": math.inf}, "guidance_scale=inf must be a finite number"),
    ],
)
def test_values_of_another_type_or_out_of_range_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        EvaluateConfig("mnist", **changes)


def test_paths_of_a_configuration_may_be_strings_and_start_at_home(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    config = EvaluateConfig(Path("runs/x"), output_dir="~/out", inception="~/f.pt")
    assert (config.pipeline, config.output_dir) == ("runs/x", Path("/home/someone/out"))
    assert config.inception == Path("/home/someone/f.pt")
    with pytest.raises(OSError, match="inception='/home/someone/f.pt': there is no such file"):
        inception_extractor(file="~/f.pt")
    with pytest.raises(OSError, match="/home/someone/vit"):
        transformers_extractor("~/vit")


@pytest.mark.parametrize("module", ["torchmetrics", "matplotlib", "transformers", "datasets"])
def test_a_missing_package_is_one_line_that_names_the_extra(parts, tmp_path, monkeypatch, capsys, module):
    importlib.import_module("torchmetrics")  # which imports some of the others
    monkeypatch.setitem(sys.modules, module, None)
    flags = ["--dataset-name", str(parts / "images"), "--feature-extractor", str(parts / "features")]
    flags += ["--device", "cpu", "--num-images", "24", "--output-dir", str(tmp_path)]
    capsys.readouterr()
    assert mini_ddpm_cli.main(["evaluate", str(parts / "plain"), *flags]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"mini-ddpm: {module} cannot be imported")
    assert "pip install 'mini-ddpm[eval]'" in last and os.listdir(tmp_path) == []


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@torch.no_grad()
def test_another_default_dtype_changes_no_figure(tmp_path, dtype):
    tiny_resnet(tmp_path)
    images = random_images(40, 1, 8, 8)

    def run():
        features = transformers_extractor(str(tmp_path)).run(images)
        figures = compare_features(features[:20], features[20:])
        return {**figures, "memorization": memorization(images[:20], images[20:], pixel_radii(images[20:]))}

    expected = run()
    torch.set_default_dtype(dtype)
    try:
        assert run() == pytest.approx(expected, rel=1e-4)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("open_network", ["transformers_extractor({!r})", "load_classifier({!r}, None, 'cpu')"])
def test_code_in_a_models_folder_never_runs(open_network, tmp_path):
    """transformers would ask on the terminal whether to run it."""
    classes = ("AutoConfig", "AutoModel", "AutoModelForImageClassification", "AutoImageProcessor")
    config = {"model_type": "evil", "auto_map": dict.fromkeys(classes, "evil.Evil")}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()\nclass Evil: pass\n")
    code = "from mini_ddpm.evaluation.features import *\n" + open_network.format(str(tmp_path))
    environment = os.environ | {"PYTHONPATH": str(Path(mini_ddpm_cli.__file__).parents[1]), "HF_HUB_OFFLINE": "1"}
    answer = subprocess.run([sys.executable, "-c", code], input="y\n", capture_output=True, text=True, env=environment)
    assert answer.returncode != 0 and not (tmp_path / "ran").exists(), answer.stdout
    assert "Do you wish to run" not in answer.stdout + answer.stderr
