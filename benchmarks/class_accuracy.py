"""Class accuracy: of N conditional samples, how many does a classifier trained only on real images read as asked?

    python benchmarks/class_accuracy.py --pipeline mnist-class-conditional --num-inference-steps 10 50

The classifier is a small ResNet of transformers. It is trained on the real training split the first time (two
minutes of one CPU core on MNIST), kept in `--classifier`, and loaded from there afterwards. Generated images
pass through 8-bit pixels, as the real ones did. One line of JSON is printed for each number of steps.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from tqdm.auto import tqdm
from transformers import AutoModelForImageClassification, ResNetConfig, ResNetForImageClassification

import mini_ddpm
from mini_ddpm.data import image_dataset, to_model_range

BATCH_SIZE = 128
LEARNING_RATE = 3e-3
MAX_SHIFT = 2
MAX_CONFUSIONS = 10


@dataclass
class Args:
    """What to measure.

    Attributes:
        pipeline: A bundled class-conditional pipeline, a folder, or a Hub id.
        dataset: The real images, for the classifier: a Hub id or a folder.
        classifier: The classifier's folder; trained and saved here if there is none.
        epochs: Passes over the training split, when the classifier is trained.
        min_test_accuracy: A classifier below this on the real test split is not trusted, and not saved.
        num_images: Samples to draw, an equal number of each class.
        num_inference_steps: Denoising steps; several numbers are measured one after the other.
        guidance_scale: Guidance; the pipeline's own default if not given.
        seed: Image i is drawn with a generator seeded `seed + i`, so the batch size changes nothing.
        batch_size: Images drawn at once.
        device: Where to run; CUDA if there is one.
        dtype: The pipeline's dtype. The classifier runs in float32.
        out: A JSON file for the results, a list.
    """

    pipeline: str = "mnist-class-conditional"
    dataset: str = "ylecun/mnist"
    classifier: Path = Path("runs/mnist-classifier")
    epochs: int = 8
    min_test_accuracy: float = 0.992
    num_images: int = 1000
    num_inference_steps: Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT ...")] = (50,)
    guidance_scale: float | None = None
    seed: int = 0
    batch_size: int = 100
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    out: Path | None = None


def load_classifier(args: Args) -> Any:
    """Loads the classifier, or trains and saves it; its test accuracy is in its config."""
    if not (args.classifier / "config.json").is_file():
        train_classifier(args)
    return AutoModelForImageClassification.from_pretrained(args.classifier).to(args.device).eval()


def train_classifier(args: Args) -> None:
    train, test = (image_dataset(args.dataset, split) for split in ("train", "test"))
    if train.id2label is None:
        raise ValueError(f"Dataset {args.dataset!r} has no labels to train a classifier on.")
    images, labels = train.stack()
    assert labels is not None
    torch.manual_seed(args.seed)
    config = ResNetConfig(
        num_channels=train.shape[0],
        embedding_size=32,
        hidden_sizes=[32, 64, 128],
        depths=[1, 1, 1],
        layer_type="basic",
        id2label=train.id2label,
        label2id={name: label for label, name in train.id2label.items()},
    )
    model = ResNetForImageClassification(config).to(args.device, memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.05)
    steps = args.epochs * (len(images) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=LEARNING_RATE, total_steps=steps)

    with tqdm(total=steps, desc="Training the classifier", unit="step") as progress:
        for _ in range(args.epochs):
            order = torch.randperm(len(images))
            for batch in order[: len(order) // BATCH_SIZE * BATCH_SIZE].split(BATCH_SIZE):
                pixels = to_model_range(shifted(images[batch])).to(args.device, memory_format=torch.channels_last)
                with torch.autocast(torch.device(args.device).type, torch.bfloat16):
                    loss = model(pixels, labels=labels[batch].to(args.device)).loss
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                progress.update()
                if progress.n % 20 == 0:
                    progress.set_postfix(loss=f"{loss.item():.3f}")

    images, labels = test.stack()
    accuracy = (classify(model.eval(), images) == labels).double().mean().item()
    print(f"Classifier: {accuracy:.2%} of the {len(images):,} real test images.", file=sys.stderr)
    if accuracy < args.min_test_accuracy:
        raise ValueError(
            f"The classifier reads only {accuracy:.2%} of the real test images, less than --min-test-accuracy "
            f"{args.min_test_accuracy:.2%}: raise --epochs."
        )
    model.config.test_accuracy = accuracy
    model.save_pretrained(args.classifier)


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Shifts each image, (B, C, H, W) uint8, by up to MAX_SHIFT pixels each way; what comes in is black."""
    count, _, height, width = images.shape
    padded = torch.nn.functional.pad(images, (MAX_SHIFT,) * 4).permute(0, 2, 3, 1)  # (B, H + 2m, W + 2m, C)
    offsets = torch.randint(2 * MAX_SHIFT + 1, (2, count, 1))
    rows = (offsets[0] + torch.arange(height))[:, :, None]  # (B, H, 1)
    columns = (offsets[1] + torch.arange(width))[:, None, :]  # (B, 1, W)
    return padded[torch.arange(count)[:, None, None], rows, columns].permute(0, 3, 1, 2)  # (B, C, H, W)


@torch.no_grad()
def classify(model: Any, images: torch.Tensor) -> torch.Tensor:
    """Returns the class read in each image, (N,), of uint8 images (N, C, H, W)."""
    if images.shape[1] != model.config.num_channels:
        raise ValueError(f"The images have {images.shape[1]} channels, the classifier {model.config.num_channels}.")
    batches = [model(to_model_range(batch).to(model.device)).logits.argmax(dim=1) for batch in images.split(500)]
    return torch.cat(batches).cpu()


def sample(pipe: Any, labels: list[int], num_inference_steps: int, args: Args) -> torch.Tensor:
    """Draws one image per label as uint8, (N, C, H, W)."""
    guidance = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
    images = []
    with tqdm(total=len(labels), desc=f"{num_inference_steps} steps", unit="img") as progress:
        for start in range(0, len(labels), args.batch_size):
            batch = labels[start : start + args.batch_size]
            seeds = range(args.seed + start, args.seed + start + len(batch))
            output = pipe(
                class_labels=batch,
                num_inference_steps=num_inference_steps,
                generator=[torch.Generator(args.device).manual_seed(seed) for seed in seeds],
                output_type="pt",
                **guidance,
            )
            images.append((output.images * 255).round().to("cpu", torch.uint8))
            progress.update(len(batch))
    return torch.cat(images)


def main(args: Args) -> list[dict[str, Any]]:
    """Measures, prints and returns one record per number of steps."""
    pipe: Any = mini_ddpm.load_pipeline(args.pipeline, dtype=getattr(torch, args.dtype)).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if not pipe.unet.config.get("num_class_embeds"):
        raise ValueError(f"The pipeline {args.pipeline!r} is unconditional: it cannot be asked for a class.")
    classifier = load_classifier(args)
    names = classifier.config.id2label
    if pipe.unet.config.num_class_embeds - 1 != len(names):  # the last label means "no class"
        raise ValueError(
            f"The pipeline {args.pipeline!r} has {pipe.unet.config.num_class_embeds - 1} classes, "
            f"the classifier {len(names)}."
        )
    if args.num_images < 1 or args.num_images % len(names):
        raise ValueError(f"num_images={args.num_images} must be a positive multiple of the {len(names)} classes.")
    if args.batch_size < 1:
        raise ValueError(f"batch_size={args.batch_size} must be positive.")

    asked = [index % len(names) for index in range(args.num_images)]
    results = []
    for num_inference_steps in args.num_inference_steps:
        start = time.perf_counter()
        images = sample(pipe, asked, num_inference_steps, args)
        seconds = time.perf_counter() - start
        read = classify(classifier, images).tolist()
        counts = Counter(zip(asked, read, strict=True))
        per_class = args.num_images // len(names)
        wrong = Counter({pair: count for pair, count in counts.items() if pair[0] != pair[1]})
        results.append(
            {
                "accuracy": sum(counts[label, label] for label in names) / args.num_images,
                "accuracy_per_class": {names[label]: counts[label, label] / per_class for label in names},
                "confusions": [
                    {"asked": names[pair[0]], "read": names[pair[1]], "count": count}
                    for pair, count in wrong.most_common(MAX_CONFUSIONS)
                ],
                "classifier_test_accuracy": classifier.config.test_accuracy,
                "pipeline": args.pipeline,
                "num_images": args.num_images,
                "num_inference_steps": num_inference_steps,
                "guidance_scale": pipe.guidance_scale,
                "scheduler": type(pipe.scheduler).__name__,
                "seed": args.seed,
                "dtype": args.dtype,
                "device": args.device,
                "seconds": round(seconds, 1),
            }
        )
        print(json.dumps(results[-1]), flush=True)
    if args.out is not None:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
