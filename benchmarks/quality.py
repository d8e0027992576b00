"""The quality tables: the recipe's parts, the tutorial's table, samplers, distilled students, the weights that ship.

    python benchmarks/quality.py ablation     # each part of the recipe changed alone, at a small budget
    python benchmarks/quality.py tutorial     # the tutorial's training and ours, FID at epochs 10, 50, 100
    python benchmarks/quality.py samplers     # DDPM, DDIM, DPM-Solver++, UniPC: by steps, and by their spacing
    python benchmarks/quality.py distillation # students of few steps beside their teacher, by steps, and a picture
    python benchmarks/quality.py weights      # train the weights that ship, and measure them

Each writes `benchmarks/results/NAME.json` and `.md`, row by row: cut off, the same command goes on where it was. The
tables of trainings keep the rows that are there and have the same settings, so several machines can share the work.
The defaults are for one GPU (minutes to an hour each); `--help` says how to make them smaller, and the tables state
what was run. Every distance is `mini-ddpm evaluate`'s, with its protocol in every row.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from mini_ddpm import load_pipeline
from mini_ddpm.evaluation.evaluate import COLUMNS, EvaluateConfig, evaluate, markdown_table
from mini_ddpm.options import counted, default_steps, distilled_steps
from mini_ddpm.plots import sample_grid, sampling_options
from mini_ddpm.training.train import TrainConfig, train

# One part of the recipe changed at a time; the first row is the recipe. Networks of another size also for about the
# same time, at so many times the images.
ABLATION: dict[str, dict[str, Any]] = {
    "the recipe": {},
    "epsilon": {"prediction_type": "epsilon"},
    "min-SNR, gamma 5": {"snr_gamma": 5.0},
    "linear schedule": {"beta_schedule": "linear"},
    "batch 128": {"train_batch_size": 128},
    "learning rate 5e-4": {"learning_rate": 5e-4},
    "learning rate 2e-3": {"learning_rate": 2e-3},
    "EMA 0.999": {"ema_max_decay": 0.999},
    "EMA 0.9999": {"ema_max_decay": 0.9999},
    "no saturation margin": {"saturation_margin": 0.0},
    "dropout 0.1": {"dropout": 0.1},
    "widths 32, 64": {"block_out_channels": (32, 64)},
    "widths 32, 64, twice the images": {"block_out_channels": (32, 64), "images": 2},
    "widths 96, 128": {"block_out_channels": (96, 128)},
    "widths 96, 128, half the images": {"block_out_channels": (96, 128), "images": 0.5},
    "one layer per block": {"layers_per_block": 1},
    "widths 32, 64, 96, no patches": {"preset": "tutorial-32", "block_out_channels": (32, 64, 96)},
}
# The tutorial: a plain U-Net of width 32, noise prediction, batch 128, a constant learning rate of 2e-4.
_TUTORIAL: dict[str, Any] = {
    "preset": "tutorial-32",
    "prediction_type": "epsilon",
    "train_batch_size": 128,
    "learning_rate": 2e-4,
    "lr_scheduler": "constant_with_warmup",
    "saturation_margin": 0.0,
}
TUTORIAL: dict[str, dict[str, Any]] = {
    "tutorial, linear, T = 1000": {**_TUTORIAL, "beta_schedule": "linear"},
    "tutorial, cosine, T = 1000": _TUTORIAL,
    "tutorial, linear, T = 800": {**_TUTORIAL, "beta_schedule": "linear", "num_train_timesteps": 800},
    "tutorial, cosine, T = 800": {**_TUTORIAL, "num_train_timesteps": 800},
    "ours": {},
}
SAMPLERS = {
    "ddpm": (1000, 100, 50),
    "ddim": (1000, 250, 100, 50, 20, 10, 5),
    "dpmsolver++": (20, 10, 5),
    "unipc": (20, 10, 5),
}
SPACINGS = ("leading", "linspace")  # beside trailing, which all else has
SPACED_SAMPLERS = {"ddim": (50, 10)}


# Arguments of a table of trainings that its rows must share.
SHARED = (
    "dataset_name", "num_images", "split", "num_inference_steps", "train_batch_size", "feature_extractor",
    "feature_dtype", "dtype", "mixed_precision", "classifier",
)  # fmt: skip
identity = itemgetter("variant", "epochs", "training_seed")  # of such a row


@dataclass
class Args:
    """Make one of the quality tables.

    Attributes:
        table: Which.
        dataset_name: Hub id or folder.
        only: Rows of the ablation, or trainings of the tutorial's table, to run, by name. None: all.
        seeds: Seeds of the trainings; with several, a table shows mean and standard deviation.
        epochs: Epochs of training: of an ablation the first number; of the tutorial's table a column each.
        num_images: Images per distance.
        split: Split of the reference images.
        num_inference_steps: Steps of DDIM, in all tables but that of the samplers.
        max_steps: Leaves out the samplers' rows of more steps.
        pipelines: Pipelines of the samplers' table; the first is the teacher of that of distillation.
        students: Distilled pipelines, one for each number of steps.
        train_batch_size: Images per step, but for the rows that change it.
        feature_extractor: inception, or a vision model of transformers.
        feature_dtype: Precision of the feature network.
        dtype: Precision of the sampling network.
        mixed_precision: Precision of training.
        torch_compile: Compile, in training and in sampling.
        classifier: Classifier of transformers for class accuracy, see train_classifier.py.
        runs: Folder of the training runs.
        results: Folder of the tables.
    """

    table: tyro.conf.Positional[Literal["ablation", "tutorial", "samplers", "distillation", "weights"]]
    dataset_name: str = "ylecun/mnist"
    only: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    epochs: tuple[float, ...] = (10, 50, 100)
    num_images: int = 10_000
    split: str = "test"
    num_inference_steps: int = 50
    max_steps: int = 1000
    pipelines: tuple[str, ...] = ("mnist-class-conditional", "mnist")
    students: tuple[str, ...] = ("mnist-distilled",)
    train_batch_size: int = 64
    feature_extractor: str = "inception"
    feature_dtype: Literal["fp32", "bf16"] = "bf16"
    dtype: Literal["fp32", "fp16", "bf16"] = "bf16"
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "bf16"
    torch_compile: bool = True
    classifier: str | None = None
    runs: Path = Path("runs/quality")
    results: Path = Path("benchmarks/results")


def settings(args: Args, overrides: dict[str, Any]) -> dict[str, Any]:
    """What a row of a table of trainings was made with, as JSON returns it."""
    shared = {name: getattr(args, name) for name in SHARED}
    result: dict[str, Any] = json.loads(json.dumps(shared | overrides))
    return result


def kept_rows(args: Args) -> list[dict[str, Any]]:
    """The rows of an earlier run, here or on another machine, that this run would make again."""
    variants = {"ablation": ABLATION, "tutorial": TUTORIAL}.get(args.table, {})
    file = args.results / f"{args.table}.json"
    if not variants or not file.is_file():
        return []
    rows: list[dict[str, Any]] = json.loads(file.read_text(encoding="utf-8"))
    wanted = {variant: settings(args, overrides) for variant, overrides in variants.items()}
    return [row for row in rows if "settings" in row and row["settings"] == wanted.get(row["variant"])]


def train_and_measure(
    args: Args, variant: str, overrides: dict[str, Any], epochs: float, seed: int, folder: Path, images_per_epoch: int
) -> dict[str, Any]:
    """Trains a class-conditional network, unless it was trained before, and measures it unguided."""
    for row in kept_rows(args):
        if identity(row) == (variant, epochs, seed):
            return row
    changed = {"train_batch_size": args.train_batch_size, "seed": seed, **overrides}
    changed.pop("images", None)
    config = TrainConfig(
        dataset_name=args.dataset_name,
        output_dir=folder,
        class_conditional=True,
        max_train_steps=round(round(epochs * images_per_epoch) / changed["train_batch_size"]),
        mixed_precision=args.mixed_precision,
        torch_compile=args.torch_compile,
        save_images_epochs=0,
        log_with="none",
        **changed,
    )
    train(config)
    log = json.loads((config.output_dir / "train_log.jsonl").read_text().splitlines()[-1])
    measured = measure(args, str(config.output_dir), (args.num_inference_steps,), guidance_scale=1.0)[-1]
    training = {"images_seen": log["images"], "training_seconds": round(log["seconds"]), "training_loss": log["loss"]}
    key = {"variant": variant, "training_seed": seed, "epochs": epochs}
    return key | training | measured | {"settings": settings(args, overrides)}


def measure(
    args: Args, pipeline: str, steps: tuple[int, ...], schedulers: tuple[str, ...] = (), **options: Any
) -> list[dict[str, Any]]:
    return evaluate(
        EvaluateConfig(
            pipeline,
            args.dataset_name,
            args.split,
            num_images=args.num_images,
            num_inference_steps=steps,
            schedulers=schedulers,
            feature_extractor=args.feature_extractor,
            feature_dtype=args.feature_dtype,
            classifier=args.classifier,
            dtype=args.dtype,
            torch_compile=args.torch_compile and args.num_images * max(steps) >= 20_000,  # else it does not pay
            **options,
        )
    )


def chosen(args: Args, variants: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any]]]:
    """Those of the variants that --only names."""
    if unknown := set(args.only) - set(variants):
        raise ValueError(f"--only {min(unknown)}: choose of {'; '.join(variants)}.")
    return [(name, overrides) for name, overrides in variants.items() if not args.only or name in args.only]


def ablation(args: Args, images_per_epoch: int) -> Iterator[dict[str, Any]]:
    """One row per variant and seed."""
    for variant, overrides in chosen(args, ABLATION):
        epochs = args.epochs[0] * overrides.get("images", 1)
        for seed in args.seeds:
            folder = args.runs / "ablation" / f"{variant}-{seed}".replace(" ", "-").replace(",", "")
            yield train_and_measure(args, variant, overrides, epochs, seed, folder, images_per_epoch)


def tutorial(args: Args, images_per_epoch: int) -> Iterator[dict[str, Any]]:
    """One row per training, number of epochs and seed."""
    for variant, overrides in chosen(args, TUTORIAL):
        for seed in args.seeds:
            shorter: Path | None = None
            for epochs in sorted(args.epochs):
                name = f"{variant}-{seed}-{epochs:g}".replace(" ", "").replace(",", "-")
                folder = args.runs / "tutorial" / name
                # A constant learning rate lets a run go on from the column before; ours decays, and starts anew.
                if shorter and shorter.exists() and "lr_scheduler" in overrides and not folder.exists():
                    copy = folder.with_name(folder.name + ".tmp")
                    shutil.rmtree(copy, ignore_errors=True)
                    shutil.copytree(shorter, copy, ignore=shutil.ignore_patterns("evaluation*"))
                    os.replace(copy, folder)
                shorter = folder
                yield train_and_measure(args, variant, overrides, epochs, seed, folder, images_per_epoch)


def samplers(args: Args, images_per_epoch: int) -> Iterator[dict[str, Any]]:
    """One row per pipeline, scheduler, spacing and number of steps; guidance 1 where there is any."""
    for pipeline in args.pipelines:
        options = {"guidance_scale": 1.0} if "conditional" in pipeline else {}
        for spacing in ("", *SPACINGS):
            name, measured = Path(pipeline).name, pipeline
            folder = args.runs / "samplers" / f"{name}-{spacing}".removesuffix("-")
            if spacing:
                pipe = load_pipeline(pipeline)
                pipe.scheduler.register_to_config(timestep_spacing=spacing)
                pipe.save_pretrained(folder)
                name, measured = f"{name}, {spacing}", str(folder)
            done: list[dict[str, Any]] = []
            for scheduler, counts in (SPACED_SAMPLERS if spacing else SAMPLERS).items():
                steps = tuple(count for count in counts if count <= args.max_steps)
                if steps:
                    done = measure(args, measured, steps, (scheduler,), output_dir=folder, **options)
            yield from ({"variant": name, **row} for row in done)


def distillation(args: Args, images_per_epoch: int) -> Iterator[dict[str, Any]]:
    """By number of steps: the students; their teacher with DDIM, from four steps on; the teacher as it is called."""
    teacher = args.pipelines[0]
    if distilled_steps(load_pipeline(teacher).config):
        raise ValueError(f"{teacher} is a student itself.")
    students: dict[int, str] = {}
    for name in args.students:
        steps = distilled_steps(load_pipeline(name).config)
        if not steps:
            raise ValueError(f"{name} is no student. Make some: mini-ddpm distill --help.")
        students[steps] = name
    students = dict(sorted(students.items()))
    folder = args.runs / "distillation"
    for steps, name in students.items():
        rows = measure(args, name, (steps,), output_dir=folder / f"steps-{steps}")
        yield {"variant": "student", **rows[-1]}
    for counts in (tuple(steps for steps in students if steps >= 4), ()):
        rows = measure(args, teacher, counts, output_dir=folder / "teacher")  # with those that are there
    yield from ({"variant": "teacher", **row} for row in rows)
    picture(args, [*students.values(), teacher])


def picture(args: Args, pipelines: list[str]) -> None:
    """Up to ten classes from one noise, by each of the pipelines: RESULTS/distillation.png."""
    drawn, titles = [], []
    for name in pipelines:
        pipe: Any = load_pipeline(name)
        pipe.set_progress_bar_config(disable=True)
        classes = list(range(min(10, pipe.unet.config.num_class_embeds - 1)))
        titles.append(counted(default_steps(pipe), "step"))
        drawn.append(pipe(classes, generator=torch.Generator().manual_seed(0), eta=0.0).images)
    pairs = [classes[i : i + 2] for i in range(0, len(classes), 2)]
    images = [column[k] for pair in pairs for column in drawn for k in pair]
    labels = [title for pair in pairs for title in titles for _ in pair]
    sample_grid(images, labels, columns=2 * len(titles)).save(args.results / "distillation.png")


def distillation_table(rows: list[dict[str, Any]]) -> str:
    """By evaluations of the network: what the distances say, the share of the classes that are right, and time."""
    distance = "fid" if "fid" in rows[-1] else "frechet_distance"
    keys = [key for key in (distance, "kid", "recall", "coverage", "class_accuracy") if key in rows[-1]]
    head = "".join(f" {COLUMNS[key][0]} |" for key in keys)
    lines = [f"| Steps | Sampler | U-Net calls |{head} Seconds |"]
    lines.append("|--:|---|--:|" + "--:|" * (len(keys) + 1))
    generated = [row for row in rows if row["images"] == "generated"]
    for row in sorted(generated, key=lambda row: (row["unet_evaluations"], row["variant"])):
        eta = f", eta {row['eta']:g}" if row["eta"] else ""
        title = "**student**" if row["variant"] == "student" else f"teacher{eta}"
        cells = "".join(f" {COLUMNS[key][1].format(row[key]).replace('%', ' %')} |" for key in keys)
        lines.append(
            f"| {row['num_inference_steps']} | {title} | {row['unet_evaluations']} |{cells} "
            f"{1000 * row['seconds_per_image']:.1f} |"
        )
    floor = next((f"Real images: {row[distance]:.2f}. " for row in rows if row["images"] == "real"), "")
    guidance = f"The teacher: {sampling_options(rows[-1] | {'eta': 0}).removeprefix(', ')}. "
    return "\n".join(lines) + f"\n\n{floor}{guidance}{markdown_table(rows[-1:]).split(chr(10) * 2)[-1]}"


def weights(args: Args, images_per_epoch: int) -> Iterator[dict[str, Any]]:
    """Trains the two pipelines that ship, the second from the first, and measures both as README does."""
    shared: dict[str, Any] = {"mixed_precision": args.mixed_precision, "torch_compile": args.torch_compile}
    shared |= {"dataset_name": args.dataset_name, "train_batch_size": args.train_batch_size}
    shared |= {"num_epochs": max(1, round(args.epochs[-1]))}
    conditional = args.runs / "mnist-class-conditional"
    train(TrainConfig(output_dir=conditional, class_conditional=True, **shared))
    start = {"pretrained_model_name_or_path": str(conditional), "learning_rate": 8e-4}
    train(TrainConfig(output_dir=args.runs / "mnist", **start, **shared))
    steps, guided_steps = (args.num_inference_steps,), (round(0.8 * args.num_inference_steps),)  # as many evaluations
    guided = {"guidance_scale": 1.5, "guidance_interval": (0.35, 0.6)}
    measure(args, str(conditional), steps, eta=1.0, guidance_scale=1.0)
    for row in measure(args, str(conditional), guided_steps, eta=1.0, **guided):
        yield {"variant": "mnist-class-conditional", **row}
    for row in measure(args, str(args.runs / "mnist"), steps, eta=1.0):
        yield {"variant": "mnist", **row}


def table(rows: list[dict[str, Any]]) -> str:
    """The rows in Markdown, by what was varied in front of the evaluation's own table."""
    if any(row["variant"] == "student" for row in rows):
        return distillation_table(rows)
    training = "training_seconds" in rows[-1]
    if not training:
        parts = []
        for variant in dict.fromkeys(row["variant"] for row in rows):
            parts.append(f"`{variant}`\n\n" + markdown_table([row for row in rows if row["variant"] == variant]))
        return "\n".join(parts)
    distance = "fid" if "fid" in rows[-1] else "frechet_distance"
    read = "class_accuracy" in rows[-1]  # by a classifier
    lines = [
        f"| | Epochs | Images seen | {COLUMNS[distance][0]} | Recall |{' Class accuracy |' * read} Minutes | Seeds |"
    ]
    lines.append("|---|--:|--:|--:|--:|--:|--:|" + "--:|" * read)
    groups: dict[Any, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["variant"], row["epochs"]), []).append(row)
    for (variant, epochs), group in groups.items():

        def mean(key: str, digits: int, scale: int = 1, group: list[dict[str, Any]] = group) -> str:
            values = scale * torch.tensor([row[key] for row in group], dtype=torch.float64)
            spread = f" ± {values.std():.{digits}f}" if len(group) > 1 else ""
            return f"{values.mean():.{digits}f}{spread}"

        minutes = sum(row["training_seconds"] for row in group) / len(group) / 60
        lines.append(
            f"| {variant} | {epochs:.3g} | {group[0]['images_seen']:,} | {mean(distance, 2)} | {mean('recall', 3)} | "
            f"{mean('class_accuracy', 1, 100) + ' % | ' if read else ''}{minutes:.1f} | {len(group)} |"
        )
    protocol = markdown_table(rows[-1:]).split("\n\n")[-1]
    first = rows[-1]
    return "\n".join(lines) + f"\n\n{first['num_inference_steps']} steps of {first['scheduler']}. {protocol}"


def main(args: Args) -> list[dict[str, Any]]:
    """Makes the table, row by row."""
    from mini_ddpm.data import image_dataset

    images_per_epoch = len(image_dataset(args.dataset_name))
    file = args.results / f"{args.table}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = kept_rows(args)
    variants = [*ABLATION, *TUTORIAL]
    for row in globals()[args.table](args, images_per_epoch):
        row.pop("weights", None)
        if "settings" in row:
            rows = [kept for kept in rows if identity(kept) != identity(row)] + [row]
            rows.sort(key=lambda row: (variants.index(row["variant"]), row["epochs"], row["training_seed"]))
        else:
            rows.append(row)
        for path, text in ((file, json.dumps(rows, indent=2) + "\n"), (file.with_suffix(".md"), table(rows))):
            temporary = path.with_suffix(".tmp")
            temporary.write_text(text, encoding="utf-8")
            os.replace(temporary, path)
        print(json.dumps({key: row[key] for key in ("variant", "epochs", "fid") if key in row}), flush=True)
    print(table(rows))
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
