"""Train the image classifier that class accuracy is measured with, on real images alone.

    python benchmarks/train_classifier.py --dataset-name ylecun/mnist --output-dir runs/mnist-classifier
    mini-ddpm evaluate runs/mnist-class-conditional --classifier runs/mnist-classifier

It is a small ResNet of transformers, trained on the training split and tested on the test split; on MNIST that takes
some minutes of one CPU core. Its test accuracy is kept in its config.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import tyro
from tqdm.auto import tqdm
from transformers import ResNetConfig, ResNetForImageClassification

from mini_ddpm.data import image_dataset, to_model_range
from mini_ddpm.options import find_device

BATCH_SIZE = 128
LEARNING_RATE = 3e-3


@dataclass(frozen=True)
class Config:
    """Train the image classifier that class accuracy is measured with, on real images alone."""

    dataset_name: str = "ylecun/mnist"
    """Labelled images with the splits train and test: Hub id or folder."""
    output_dir: Path = Path("runs/mnist-classifier")
    """New or empty folder for the classifier."""
    resolution: int | None = None
    """Crop the images to a square and resize them to this many pixels, as in the pipeline's training."""
    epochs: int = 8
    """Passes over the training split."""
    max_shift: int = 2
    """Training images are shifted by up to so many pixels each way; what comes in is black."""
    min_test_accuracy: float = 0.992
    """A classifier below this on the test split is not trusted, and not saved."""
    seed: int = 0
    """Seed of everything random."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""


def train_classifier(config: Config) -> float:
    """Train, test and save the classifier.

    Returns:
        Its accuracy on the test split, which is `test_accuracy` in its config too.

    Raises:
        ValueError: The dataset or the folder cannot be used, or the classifier is too bad to be; nothing is saved.
    """
    for name, least in (("epochs", 1), ("max_shift", 0)):
        if getattr(config, name) < least:
            raise ValueError(f"{name}={getattr(config, name)} must be at least {least}.")
    folder = config.output_dir.expanduser()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} is there already. Remove it, or use another output_dir.")
    device = find_device(config.device)
    train, test = (
        image_dataset(config.dataset_name, split, resolution=config.resolution) for split in ("train", "test")
    )
    if train.id2label is None or test.id2label is None:
        raise ValueError(f"{config.dataset_name!r} has no labels to train a classifier on.")
    if (train.shape, train.id2label) != (test.shape, test.id2label):
        raise ValueError(f"The splits of {config.dataset_name!r} differ in the size or the classes of their images.")
    images, labels = train.stack()
    test_images, test_labels = test.stack()
    assert labels is not None and test_labels is not None

    torch.manual_seed(config.seed)
    model: Any = ResNetForImageClassification(
        ResNetConfig(
            num_channels=train.shape[0],
            embedding_size=32,
            hidden_sizes=[32, 64, 128],
            depths=[1, 1, 1],
            layer_type="basic",
            id2label=train.id2label,
            label2id={name: label for label, name in train.id2label.items()},
        )
    ).to(device, memory_format=torch.channels_last)
    batch_size = min(BATCH_SIZE, len(images))
    steps = config.epochs * (len(images) // batch_size)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)

    with tqdm(total=steps, desc="Training the classifier", unit="step") as bar:
        for _ in range(config.epochs):
            order = torch.randperm(len(images))
            for batch in order[: len(order) // batch_size * batch_size].split(batch_size):
                pixels = to_model_range(shifted(images[batch], config.max_shift))
                with torch.autocast(device.type, torch.bfloat16):
                    loss = model(
                        pixels.to(device, memory_format=torch.channels_last), labels=labels[batch].to(device)
                    ).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                if bar.n % 20 == 0:
                    bar.set_postfix(loss=f"{loss.item():.3f}")

    model.eval()
    with torch.inference_mode():
        read = [model(to_model_range(part).to(device)).logits.argmax(1).cpu() for part in test_images.split(500)]
    accuracy = (torch.cat(read) == test_labels).double().mean().item()
    if accuracy < config.min_test_accuracy:
        raise ValueError(
            f"The classifier reads only {accuracy:.2%} of the real test images, less than min_test_accuracy="
            f"{config.min_test_accuracy:.2%}, and is not saved. Raise epochs."
        )
    model.config.test_accuracy = accuracy
    model.save_pretrained(folder)
    return accuracy


def shifted(images: torch.Tensor, max_shift: int) -> torch.Tensor:
    """Shift each image, (B, C, H, W) uint8, by up to `max_shift` pixels each way; what comes in is black."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (max_shift,) * 4).permute(0, 2, 3, 1)  # (B, H + 2m, W + 2m, C)
    offsets = torch.randint(2 * max_shift + 1, (2, count, 1))
    rows = (offsets[0] + torch.arange(height))[:, :, None]  # (B, H, 1)
    columns = (offsets[1] + torch.arange(width))[:, None, :]  # (B, 1, W)
    return padded[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)  # (B, C, H, W)


if __name__ == "__main__":
    config = tyro.cli(Config)
    try:
        accuracy = train_classifier(config)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{config.output_dir}: right on {accuracy:.2%} of the real test images")
