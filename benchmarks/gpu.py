"""Ten minutes of a GPU: train the weights that ship, draw what their evaluation needs, and measure speed.

    python benchmarks/gpu.py --pack mnist.npz --data ylecun/mnist      # where `datasets` is installed: one packed file
    python benchmarks/gpu.py --data mnist.npz --minutes 9 --output out  # on the GPU; nothing is downloaded

The parts run in the order of `PARTS`, in one process, each within its share of the minutes, so that what is there when
the time is over counts. `--only` chooses parts. `out` then holds networks in half precision (NAME.safetensors, with
the configuration as metadata), sets of samples (NAME.npz, for `mini-ddpm evaluate --samples`), and gpu-PARTS.json,
what was done and how long it took. Working files are in `out/runs`.

On an H200 with 16 slow cores the host sets the pace: 12,500 images/s at batch 512, 25,000 to 37,000 at 1,024.
Compilation takes 70 s of the first part, and 60 s of the second network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from safetensors.torch import load_file, save_file

from mini_ddpm import extrapolate, load_pipeline
from mini_ddpm.data import ImageDataset, image_dataset
from mini_ddpm.options import device_name
from mini_ddpm.training.distill import DistillConfig, distill
from mini_ddpm.training.train import TrainConfig, train


@dataclass
class Args:
    """Train, draw and measure on a GPU within some minutes.

    Attributes:
        data: The packed images of `--pack`; for `--pack` itself a Hub id or folder.
        pack: Write this file with the images and labels of both splits, and stop.
        minutes: When to stop. Each part gets a share.
        only: Parts to run; none: all.
        output: Folder of the results.
        device: Where. The CPU is for a rehearsal.
        batch_size: Images per training step.
        images_per_second: Speed of training, if it is known. Otherwise it is measured first.
        learning_rate: Peak learning rate of training.
        images_per_round: Images of each round of distillation.
        draw_batch_size: Images drawn at once.
        num_images: Images of each set of samples.
        num_final_images: Images of the last and largest set.
        num_inference_steps: Steps of the samples.
        block_out_channels: Width of each level of the network.
    """

    data: str = "mnist.npz"
    pack: Path | None = None
    minutes: float = 9.0
    only: tuple[str, ...] = ()
    output: Path = Path("runs/gpu")
    device: Literal["cuda", "cpu"] = "cuda"
    batch_size: int = 1024
    images_per_second: float | None = None
    learning_rate: float = 3e-3
    images_per_round: int = 40_000
    draw_batch_size: int = 2500
    num_images: int = 10_000
    num_final_images: int = 50_000
    num_inference_steps: int = 50
    block_out_channels: tuple[int, ...] | None = None


class Run:
    """What the parts share: the settings, the images and the clock."""

    def __init__(self, args: Args) -> None:
        self.args, self.seconds = args, 0.0
        self.runs = args.output / "runs"
        self.is_gpu = args.device == "cuda"
        with np.load(args.data) as arrays:
            packed = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
        self.dataset = ImageDataset.from_tensors(packed["train_images"], packed["train_labels"])
        self.test_labels, self.train_labels = packed["test_labels"], packed["train_labels"]
        self.networks: dict[type, Any] = {}  # the compiled network of each kind of pipeline

    def config(self, name: str, **settings: Any) -> TrainConfig:
        """The settings of a training in this run."""
        return TrainConfig(
            **{
                "output_dir": self.runs / name,
                "class_conditional": True,
                "train_batch_size": self.args.batch_size,
                "learning_rate": self.args.learning_rate,
                "mixed_precision": "bf16" if self.is_gpu else "no",
                "torch_compile": self.is_gpu,
                "device": self.args.device,
                "save_images_epochs": 0,
                "log_with": "none",
                **settings,
            }
        )

    def speed(self, **settings: Any) -> float:
        """Images per second of training, measured after compilation."""
        if self.args.images_per_second:
            return self.args.images_per_second
        folder = train(
            self.config("probe", max_train_steps=200 if self.is_gpu else 4, logging_steps=50, **settings),
            dataset=self.dataset,
        )
        return float(last_line(folder)["images_per_second"])

    def steps(self, speed: float, compilation: float) -> int:
        """Optimizer steps that fit into the part's time."""
        return max(8, round((self.seconds - compilation) * speed / self.args.batch_size))

    def save(self, name: str, network: Any, dtype: torch.dtype = torch.float16, **facts: Any) -> None:
        """Write a network's weights in half precision."""
        weights = {key: value.detach().cpu().to(dtype).contiguous() for key, value in network.state_dict().items()}
        config = {key: value for key, value in network.config.items() if not key.startswith("_")}
        metadata = {"config": json.dumps(config), "facts": json.dumps(facts)}
        save_file(weights, self.args.output / f"{name}.safetensors", metadata)

    def draw(self, name: str, pipe: Any, count: int, weights: dict[str, torch.Tensor] | None = None, seed: int = 0,
             **options: Any) -> None:  # fmt: skip
        """Write `count` samples of a pipeline, in the frequencies of the split that they will be compared with."""
        conditional = pipe.unet.config.num_class_embeds is not None
        labels = self.test_labels if count <= len(self.test_labels) else self.train_labels
        labels = labels[torch.arange(count) % len(labels)]
        # One network for each kind, so that other weights need no other compilation.
        if type(pipe) not in self.networks:
            self.networks[type(pipe)] = self._compiled(pipe)
        unet = self.networks[type(pipe)]
        unet.load_state_dict(weights or pipe.unet.state_dict())
        pipe = type(pipe)(**{**pipe.components, "unet": unet}, **_defaults(pipe))
        pipe.set_progress_bar_config(disable=True)
        batches, began = [], time.monotonic()
        guided = options.get("guidance_scale", 1.0) > 1
        size = self.args.draw_batch_size // (2 if guided else 1)
        for start in range(0, count, size):
            generator = torch.Generator(self.args.device).manual_seed(seed + start)
            end = min(start + size, count)
            call = {"class_labels": labels[start:end]} if conditional else {"batch_size": end - start}
            drawn = pipe(**call, **options, generator=generator, output_type="pt").images
            batches.append((drawn * 255).round().to("cpu", torch.uint8))
        seconds = time.monotonic() - began
        settings = {"scheduler": type(pipe.scheduler).__name__, "eta": 0.0, **options, "dtype": str(unet.dtype)[6:]}
        settings |= {"device": device_name(torch.device(self.args.device)), "batch_size": size, "seed": seed}
        settings["unet_evaluations"] = pipe.num_timesteps + getattr(pipe, "num_guided_timesteps", 0)
        arrays = {"images": torch.cat(batches).permute(0, 2, 3, 1).numpy(), "settings": np.array(json.dumps(settings))}
        if conditional:
            arrays["class_labels"] = labels.numpy()
        np.savez_compressed(self.args.output / f"{name}.npz", **arrays)  # type: ignore[arg-type]
        print(f"{name}: {count} images in {seconds:.1f} s", flush=True)

    def _compiled(self, pipe: Any) -> Any:
        unet = type(pipe.unet).from_config(pipe.unet.config).eval()
        unet = unet.to(self.args.device, torch.float16 if self.is_gpu else torch.float32)
        if self.is_gpu:
            unet = unet.to(memory_format=torch.channels_last)
            unet.compile(dynamic=False)
        return unet


def _defaults(pipe: Any) -> dict[str, Any]:
    """The arguments that a pipeline was made with, beside its parts."""
    names = ("id2label", *(name for name in pipe.config if name.startswith("default_")), "black_level", "white_level")
    return {name: pipe.config[name] for name in names if pipe.config.get(name) is not None}


def class_conditional(run: Run) -> dict[str, Any]:
    """The class-conditional network, from scratch, with snapshots along the way."""
    shape = {"block_out_channels": run.args.block_out_channels}
    began = time.monotonic()
    speed = run.speed(**shape)
    run.seconds -= time.monotonic() - began
    steps = run.steps(speed, compilation=25.0 if run.is_gpu else 0.0)
    snapshots = 8
    config = run.config(
        "class-conditional",
        lr_warmup_steps=1000,
        max_train_steps=steps,
        checkpointing_steps=-(-steps // snapshots),
        checkpoints_total_limit=snapshots,
        **shape,
    )
    folder = train(config, dataset=run.dataset)
    run.save("class-conditional", load_pipeline(folder).unet)
    early = sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))[0]
    pipe: Any = load_pipeline(folder)
    pipe.unet.load_state_dict(averaged(early))
    run.save("class-conditional-early", pipe.unet, checkpoint=early.name)
    return {"steps": steps, "probed_images_per_second": speed, "log": last_line(folder)}


def averaged(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The averaged weights of a checkpoint, by name."""
    return load_file(checkpoint / "averaged_weights.safetensors")


def unconditional(run: Run) -> dict[str, Any]:
    """The unconditional network, which starts from the class-conditional one."""
    source = run.runs / "class-conditional"
    speed = last_line(source)["images_per_second"]
    steps = run.steps(speed, compilation=60.0 if run.is_gpu else 0.0)
    config = run.config(
        "unconditional",
        class_conditional=False,
        pretrained_model_name_or_path=str(source),
        learning_rate=run.args.learning_rate / 2,
        max_train_steps=steps,
        checkpointing_steps=-(-steps // 3),
    )
    folder = train(config, dataset=run.dataset)
    run.save("unconditional", load_pipeline(folder).unet)
    pipe = load_pipeline(folder)
    for eta in (1.0, 0.7):
        name = f"samples-unconditional-eta-{eta:g}"
        run.draw(name, pipe, run.args.num_images, num_inference_steps=run.args.num_inference_steps, eta=eta)
    return {"steps": steps, "log": last_line(folder)}


def students(run: Run) -> dict[str, Any]:
    """Students of few steps, from a teacher that is guided in the middle steps."""
    config = DistillConfig(
        str(run.runs / "class-conditional"),
        output_dir=run.runs / "distilled",
        num_inference_steps=1,
        images_per_round=run.args.images_per_round,
        guidance_scale=1.5,
        guidance_interval=(0.35, 0.6),
        train_batch_size=min(256, run.args.batch_size),
        learning_rate=8e-4,
        mixed_precision="bf16" if run.is_gpu else "no",
        device=run.args.device,
        checkpointing_steps=10**6,
        log_with="none",
    )
    deadline = time.monotonic() + run.seconds
    folders = distill(config, dataset=run.dataset)
    for folder in folders[-3:]:
        run.save(folder.name, load_pipeline(folder).unet)
    return {"rounds": [last_line(folder) for folder in folders], "seconds_left": deadline - time.monotonic()}


def samples(run: Run) -> dict[str, Any]:
    """Samples of the class-conditional network for each setting of the sampler."""
    pipe: Any = load_pipeline(run.runs / "class-conditional")
    steps, count = run.args.num_inference_steps, run.args.num_images
    plain: dict[str, Any] = {"guidance_scale": 1.0}
    for eta in (1.0, 0.7, 0.5):
        run.draw(f"samples-eta-{eta:g}", pipe, count, num_inference_steps=steps, eta=eta, **plain)
    run.draw("samples-20-steps", pipe, count, num_inference_steps=min(20, steps), eta=0.0, **plain)
    run.draw("samples-20-steps-eta-1", pipe, count, num_inference_steps=min(20, steps), eta=1.0, **plain)
    return {}


def sharpen(run: Run) -> dict[str, Any]:
    """Networks that move away from what training on their own samples teaches (arXiv 2510.03597).

    θ = (1 + w)·θ_r - w·θ_s, where θ_s is the network θ_r after some steps of training on its own samples.
    """
    pipe: Any = load_pipeline(run.runs / "class-conditional")
    own_count = min(30_000, run.args.num_final_images)
    run.draw("own-images", pipe, own_count, num_inference_steps=min(20, run.args.num_inference_steps),
             guidance_scale=1.0, seed=10**6)  # fmt: skip
    with np.load(run.args.output / "own-images.npz") as arrays:
        images = torch.from_numpy(arrays["images"]).permute(0, 3, 1, 2).contiguous()
        own = ImageDataset.from_tensors(images, torch.from_numpy(arrays["class_labels"]), run.dataset.id2label)
    (run.args.output / "own-images.npz").unlink()
    steps = 200 if run.is_gpu else 2
    config = run.config(
        "on-own-images",
        pretrained_model_name_or_path=str(run.runs / "class-conditional"),
        learning_rate=1e-4,
        lr_scheduler="constant_with_warmup",
        lr_warmup_steps=0,
        ema_max_decay=0.0,
        max_train_steps=3 * steps,
        checkpointing_steps=steps,
        checkpoints_total_limit=3,
        torch_compile=False,
    )
    folder = train(config, dataset=own)
    base = pipe.unet.state_dict()
    for index in (1, 2, 3):
        tuned = averaged(folder / f"checkpoint-{index * steps}")
        difference = {name: value.double() - tuned[name].double() for name, value in base.items()}
        network = type(pipe.unet).from_config(pipe.unet.config)
        network.load_state_dict({name: value.float() * 256 for name, value in difference.items()})
        run.save(f"difference-{index * steps}", network, scale=256)
        for w in (0.5, 1.0, 2.0):
            weights = extrapolate(base, tuned, w)
            run.draw(f"samples-sharpened-{index * steps}-{w:g}", pipe, run.args.num_images // 2, weights,
                     num_inference_steps=run.args.num_inference_steps, eta=1.0, guidance_scale=1.0)  # fmt: skip
    return {"own_images": own_count}


def final_samples(run: Run) -> dict[str, Any]:
    """Many samples, to compare with the training split."""
    pipe: Any = load_pipeline(run.runs / "class-conditional")
    run.draw("samples-many", pipe, run.args.num_final_images, num_inference_steps=run.args.num_inference_steps,
             eta=1.0, guidance_scale=1.0, seed=10**7)  # fmt: skip
    return {}


def tests(run: Run) -> dict[str, Any]:
    """The tests that need a GPU."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"]
    answer = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, run.seconds), check=False)
    (run.args.output / "tests.log").write_text(answer.stdout + answer.stderr, encoding="utf-8")
    print(answer.stdout[-2000:], flush=True)
    return {"returncode": answer.returncode, "summary": answer.stdout.strip().splitlines()[-1:]}


def speed(run: Run) -> dict[str, Any]:
    """The rows of speed.py."""
    command = [sys.executable, str(Path(__file__).with_name("speed.py")), "--device", run.args.device, "--rounds"]
    command += ["3", "--batch-sizes", "1", "64", "1024", "--only", "sampling", "--results", str(run.args.output)]
    for compiled in ("--no-compiled", "--compiled"):
        subprocess.run([*command, compiled], timeout=max(1.0, run.seconds), check=False)
        for file in ("speed.json", "speed.md"):
            with contextlib.suppress(FileNotFoundError):
                (run.args.output / file).replace(run.args.output / file.replace("speed", f"speed{compiled[1:]}"))
    return {}


# By name: the part, and its share of the time.
PARTS: dict[str, tuple[Callable[[Run], dict[str, Any]], float]] = {
    "class-conditional": (class_conditional, 0.50),
    "samples": (samples, 0.06),
    "unconditional": (unconditional, 0.16),
    "sharpen": (sharpen, 0.06),
    "final-samples": (final_samples, 0.04),
    "students": (students, 0.12),
    "tests": (tests, 0.03),
    "speed": (speed, 0.03),
}


def last_line(folder: Path) -> dict[str, Any]:
    """The last entry of a training's log."""
    entry: dict[str, Any] = json.loads((folder / "train_log.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return entry


def pack(args: Args) -> None:
    """Write the images and labels of both splits to one file."""
    arrays: dict[str, Any] = {}
    for split in ("train", "test"):
        images, labels = image_dataset(args.data, split).stack()
        if labels is None:
            raise ValueError(f"--data {args.data}: the images have no labels.")
        arrays |= {f"{split}_images": images.numpy(), f"{split}_labels": labels.numpy()}
    assert args.pack is not None
    np.savez_compressed(args.pack, **arrays)


@contextlib.contextmanager
def _announced(name: str, seconds: float) -> Iterator[None]:
    began = time.monotonic()
    print(f"== {name}: at most {seconds:.0f} s", flush=True)
    yield
    print(f"== {name}: {time.monotonic() - began:.1f} s", flush=True)


def main(args: Args) -> None:
    """Run the parts one after the other."""
    if args.pack is not None:
        return pack(args)
    if unknown := set(args.only) - set(PARTS):
        raise ValueError(f"--only {sorted(unknown)[0]}: choose of {', '.join(PARTS)}.")
    if args.device == "cuda":
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    args.output.mkdir(parents=True, exist_ok=True)
    deadline = time.monotonic() + 60 * args.minutes
    run = Run(args)
    chosen = {name: part for name, part in PARTS.items() if not args.only or name in args.only}
    result: dict[str, Any] = {"settings": {key: str(value) for key, value in dataclasses.asdict(args).items()}}
    if run.is_gpu:
        result["device"] = torch.cuda.get_device_name()
    for name, (part, share) in chosen.items():
        rest = sum(share for _, share in list(chosen.values())[list(chosen).index(name) :])
        run.seconds = (deadline - time.monotonic()) * share / rest
        if run.seconds <= 0:
            print(f"== {name}: left out, the time is over", flush=True)
            continue
        began = time.monotonic()
        with _announced(name, run.seconds):
            try:
                result[name] = part(run)
            except Exception as error:  # the other parts may still work, and the machine is lent for minutes
                result[name] = {"error": f"{type(error).__name__}: {error}"}
                traceback.print_exc()
        result[name]["seconds"] = round(time.monotonic() - began, 1)
        result_file = args.output / f"gpu-{'-'.join(chosen) if args.only else 'all'}.json"
        result_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
