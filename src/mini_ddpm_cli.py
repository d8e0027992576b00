"""The command line: `mini-ddpm sample`, `train`, `evaluate`, `card`, `push`, `verify`.

This is a module beside the package `mini_ddpm`, not in it, since importing anything from the package imports torch and
diffusers (5 s): `mini-ddpm --help` answers without them. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import math
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import numpy as np

    from mini_ddpm.evaluation.evaluate import EvaluateConfig
    from mini_ddpm.training.distill import DistillConfig
    from mini_ddpm.training.train import TrainConfig

# PIPELINE, not [STR]; INT, not {None}|INT
_TYRO = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
_FILES_OF_A_SAMPLE_FOLDER = re.compile(r"\d{5,}(_[\w-]+)?\.png")


@dataclass
class SampleConfig:
    """Draw images with a trained pipeline: without arguments, a labelled grid of digits in samples.png."""

    pipeline: tyro.conf.Positional[str | None] = None
    """Name that ships with the package, folder, or repository on the Hub. None: mnist-distilled, in four steps; its
    teacher, mnist-class-conditional, where steps, a sampler, eta, guidance or a film are asked for."""

    revision: str | None = None
    """Branch, tag, commit or refs/pr/N of a repository on the Hub. None: main."""

    class_labels: tuple[str, ...] = ()
    """What to draw, by name or number, e.g. 3 1 4: one image each, or in turn up to --num-images. None: all."""

    num_images: int | None = None
    """How many images. None: one per label given, else 10 per class (2 in a film), or 64 (16) without classes."""

    num_inference_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """Denoising steps. None: those that a distilled pipeline is for, else 20."""

    guidance_scale: float | None = None
    """Strength of classifier-free guidance; 1 turns it off. None: what the pipeline takes by itself."""

    guidance_interval: tuple[float, float] | None = None
    """Guide only between these shares of the way from noise, 0, to image, 1, e.g. 0.35 0.6. None: all the way."""

    eta: float = 0.0
    """Noise that DDIM adds back at each step: 0 is deterministic, 1 is as much as DDPM."""

    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ddpm|ddim|dpmsolver++|unipc|euler|euler-ancestral")] = None
    """Sampler. None: the one the pipeline was saved with."""

    seed: int = 0
    """Image i is drawn from seed + i, so it does not depend on --num-images or --batch-size."""

    batch_size: int = 128
    """Images drawn at once (all, in a film); lower it when memory runs out. Several batches are kept as they are done:
    cut off, the same command goes on. `accelerate launch -m mini_ddpm sample` shares them among processes."""

    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""

    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the network. bf16 is faster where the processor computes in it."""

    torch_compile: bool = False
    """Compile the network: a minute on a CPU, which pays from some thousand images on."""

    out: Path = Path("samples.png")
    """*.png: labelled grid; *.gif, *.webp: film of the denoising; *.npz: arrays; no suffix: folder of PNGs."""


def pipeline_to_sample(config: SampleConfig) -> str:
    """The pipeline asked for, or the one of ours that suits the rest: a student of few steps has only its own way."""
    own_way = (config.num_inference_steps, config.scheduler, config.guidance_scale, config.guidance_interval)
    if config.pipeline is not None:
        return config.pipeline
    if any(value is not None for value in own_way) or config.eta or config.out.suffix.lower() in (".gif", ".webp"):
        return "mnist-class-conditional"
    return "mnist-distilled"


def sample(config: SampleConfig) -> None:
    """Draw images with trained weights: a grid, a folder, arrays, or a film."""
    if config.num_images is not None and config.num_images < 1:
        raise ValueError(f"--num-images must be at least 1, not {config.num_images}")
    if config.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, not {config.batch_size}")
    kind = config.out.suffix.lower()
    if kind not in ("", ".png", ".npz", ".gif", ".webp"):
        raise ValueError(f"--out {config.out}: choose .png, .gif, .webp, .npz, or a name without suffix for a folder")

    # With `accelerate launch` each process draws a share, and the first writes the images of all.
    first, processes = os.environ.get("RANK", "0") == "0", int(os.environ.get("WORLD_SIZE", "1"))
    parts = config.out.parent / f".{config.out.name}.parts"
    with contextlib.ExitStack() as stack:
        # The output is opened first: nobody should wait for images that cannot be written.
        target = stack.enter_context(_replacing(config.out, folder=kind == "")) if first else config.out
        import numpy as np
        import torch
        from diffusers.utils import logging as diffusers_logging

        from mini_ddpm import options as choices
        from mini_ddpm import plots
        from mini_ddpm.hub.load import load_pipeline
        from mini_ddpm.sampling import draw

        device = choices.find_device(config.device)
        diffusers_logging.disable_progress_bar()  # the one for reading files, over before it can be seen
        name = pipeline_to_sample(config)
        pipe: Any = load_pipeline(name, dtype=choices.DTYPES[config.dtype], revision=config.revision)
        if config.scheduler is not None:
            pipe.scheduler = choices.replace_scheduler(pipe.scheduler, config.scheduler)
        pipe.to(device)

        film = kind in (".gif", ".webp")
        rows = 2 if film else 10  # frames of noise do not compress: 100 images would make a film of 15 MB
        labels, names, columns = _labels(pipe, config.class_labels, config.num_images, rows)
        count = len(labels) if labels else config.num_images or (16 if film else 64)
        steps = config.num_inference_steps
        steps = pipe.config.get("default_num_inference_steps", 20) if steps is None else steps
        options: dict[str, Any] = {"num_inference_steps": steps, "eta": config.eta}
        options |= choices.resolve_guidance(pipe, name, config.guidance_scale, config.guidance_interval)

        if config.torch_compile:
            pipe.unet.compile()
        several = count > config.batch_size or processes > 1
        goes_on = several and parts.is_dir()
        # disable=None: a bar on a terminal, none in a log file
        pipe.set_progress_bar_config(desc=f"{count} images", disable=True if several and not film else None)
        started = time.perf_counter()
        if film:
            if not first:
                return
            which = {"batch_size": count} if labels is None else {"class_labels": labels}
            generator = [torch.Generator("cpu").manual_seed(config.seed + i) for i in range(count)]
            drawn = pipe(**options, **which, generator=generator, output_type="np", return_trajectory=True)
            images = drawn.images  # (B, H, W, C)
        else:
            try:
                tensor, _, _ = draw(
                    pipe,
                    count,
                    options,
                    labels=labels,
                    seed=config.seed,
                    batch_size=config.batch_size,
                    shard_size=config.batch_size,
                    folder=parts if several else None,
                    shared=True,
                    title=f"{count} images",
                )
            except KeyboardInterrupt:
                if parts.is_dir():
                    print(f"\nThe images drawn so far are kept in {parts}; the same command goes on.", file=sys.stderr)
                raise
            if not first:
                return
            images = tensor.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        seconds = time.perf_counter() - started
        if film:
            frames = plots.denoising_film(drawn.latents_trajectory, drawn.pred_original_samples, columns=columns)
            plots.save_film(frames, target)
        elif kind == ".png":
            plots.sample_grid(images, names, columns=columns).save(target)
        elif kind == ".npz":
            arrays: dict[str, Any] = {"images": images, "seeds": config.seed + np.arange(count)}
            np.savez_compressed(target, **arrays | ({} if labels is None else {"class_labels": np.array(labels)}))
        else:
            _save_folder(target, images, names)
    shutil.rmtree(parts, ignore_errors=True)
    height, width = images.shape[1:3]
    pace = "" if goes_on else f", {count / seconds:.1f} images/s"  # of which some may be there already
    print(
        f"{config.out}: {count} images of {width}x{height}, {steps} steps of "
        f"{type(pipe.scheduler).__name__}, {seconds:.1f} s{pace} ({device}, {config.dtype})"
    )


def train(config: TrainConfig) -> None:
    """Train a pipeline on MNIST or on images of your own."""
    from mini_ddpm.training import train as training

    folder = training.train(config)
    if os.environ.get("RANK", "0") == "0":  # one line from `accelerate launch` with many processes
        print(f"{folder}: trained; draw from it with: mini-ddpm sample {folder}")


def distill(config: DistillConfig) -> None:
    """Distil a pipeline into one that draws in four steps, two, or one."""
    from diffusers.utils import logging as diffusers_logging

    from mini_ddpm.training import distill as distillation

    diffusers_logging.disable_progress_bar()  # the one for reading files
    folders = distillation.distill(config)
    if os.environ.get("RANK", "0") == "0":
        print(f"{folders[-1]}: distilled; draw from it with: mini-ddpm sample {folders[-1]}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure a pipeline against real images: FID and more."""
    from diffusers.utils import logging as diffusers_logging

    from mini_ddpm.evaluation import evaluate as evaluation

    diffusers_logging.disable_progress_bar()  # the one for reading files
    print(evaluation.markdown_table(evaluation.evaluate(config)), end="")


@dataclass
class CardConfig:
    """Render the model card of a pipeline from what its folder tells: configuration, training, evaluation, picture."""

    pipeline: tyro.conf.Positional[str]
    """A name that ships with the package, or a folder."""

    out: Path | None = None
    """Folder for README.md, facts.json and the picture. None: only print the card."""

    repo_id: str | None = None
    """Repository that the card is for, user/name. None: it speaks of a folder."""


def card(config: CardConfig) -> None:
    """Show the model card of a pipeline, or write it with its facts."""
    from mini_ddpm.hub.card import export_card, render_card
    from mini_ddpm.hub.facts import read_facts
    from mini_ddpm.hub.load import local_folder

    folder = local_folder(config.pipeline)
    facts = read_facts(folder) | ({"repo_id": config.repo_id} if config.repo_id else {})
    if config.out is None:
        print(render_card(facts), end="")
    else:
        export_card(folder, facts, config.out)
        print(f"{config.out}: README.md, facts.json" + (", samples.png" if "picture" in facts else ""))


@dataclass
class PushConfig:
    """Publish a pipeline's folder on the Hub, with a model card. Log in first: hf auth login."""

    folder: tyro.conf.Positional[str]
    """The folder, such as that of a training run, or a name that ships with the package."""

    repo_id: tyro.conf.Positional[str]
    """Where to: user/name; made if there is none."""

    private: bool = False
    """Make the repository private, if it has to be made."""

    revision: str | None = None
    """Branch to push to, made if there is none. None: main."""

    create_pr: bool = False
    """Open a pull request instead."""

    message: str | None = None
    """Title of the commit."""

    dry_run: bool = False
    """Only list the files and their sizes."""


def push(config: PushConfig) -> None:
    """Publish a pipeline on the Hub."""
    from diffusers.utils import logging as diffusers_logging

    from mini_ddpm.hub import publish

    diffusers_logging.disable_progress_bar()  # the one for reading files; that of the upload stays
    if config.dry_run:
        with publish.stage(config.folder) as folder:
            files = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        for path, size in sorted(files.items()):
            print(f"{size:>12,}  {path.as_posix()}")
        print(f"{sum(files.values()):>12,}  bytes in {len(files)} files for {config.repo_id}; nothing was pushed")
        return
    commit = publish.push(
        config.folder,
        config.repo_id,
        commit_message=config.message,
        private=config.private or None,
        create_pr=config.create_pr,
        revision=config.revision,
    )
    print(commit.pr_url or f"{commit.repo_url}" + (f"/tree/{config.revision}" if config.revision else ""))


@dataclass
class VerifyConfig:
    """Compare what was pulled from the Hub with the Hub's checksums; what is damaged is removed from the cache."""

    repo_id: tyro.conf.Positional[str]
    """The repository, user/name."""

    revision: str | None = None
    """Branch, tag or commit. None: main."""


def verify(config: VerifyConfig) -> None:
    """Check a pulled pipeline against the Hub's checksums."""
    from mini_ddpm.hub import download

    commit, count = download.verify(config.repo_id, revision=config.revision)
    print(f"{config.repo_id} at {commit}: {count} files are what the Hub has")


# What runs, and the dataclass its flags are made from, imported only when the command is asked for.
COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "sample": (sample, "mini_ddpm_cli.SampleConfig"),
    "train": (train, "mini_ddpm.training.train.TrainConfig"),
    "distill": (distill, "mini_ddpm.training.distill.DistillConfig"),
    "evaluate": (evaluate, "mini_ddpm.evaluation.evaluate.EvaluateConfig"),
    "card": (card, "mini_ddpm_cli.CardConfig"),
    "push": (push, "mini_ddpm_cli.PushConfig"),
    "verify": (verify, "mini_ddpm_cli.VerifyConfig"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return the exit code: 0, 2 after a bad argument (one line on stderr), 130 after Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
        elif argv[0] == "--version":
            print(importlib.metadata.version("mini-ddpm"))
        else:
            config = parse(argv)
            COMMANDS[argv[0]][0](config)
    except BrokenPipeError:  # `mini-ddpm sample --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("\nmini-ddpm: interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        if os.environ.get("MINI_DDPM_DEBUG"):
            raise
        print(f"mini-ddpm: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def _help() -> str:
    commands = "\n".join(f"  {name:10}{(run.__doc__ or '').splitlines()[0]}" for name, (run, _) in COMMANDS.items())
    return f"""usage: mini-ddpm COMMAND [OPTIONS]

A small, fast denoising diffusion model. Commands:

{commands}

  mini-ddpm COMMAND --help   the options of one command
  mini-ddpm --version        the version

Start with:

  mini-ddpm sample                            a grid of digits, samples.png
  mini-ddpm sample --class-labels 3 1 4       these digits
  mini-ddpm sample --out film.webp            how they come out of the noise

With MINI_DDPM_DEBUG=1 in the environment an error shows its traceback."""


def parse(argv: Sequence[str]) -> Any:
    """Turn a command and its flags into the command's configuration.

    Raises:
        ValueError: There is no such command or flag, or a flag's value is of another type.
        SystemExit: With code 0 after `--help`.
    """
    command, *flags = argv
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; choose one of {', '.join(COMMANDS)}, or --help")
    config = _import(COMMANDS[command][1])
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            return tyro.cli(config, prog=f"mini-ddpm {command}", args=flags, config=_TYRO)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    # tyro draws a box: title, message, and below a rule the help of the argument, which --help has too.
    lines = [line.strip("│ ") for line in stderr.getvalue().splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    message = " ".join(lines[:rule]) or stderr.getvalue()
    raise ValueError(f"{message.rstrip('.')}; see mini-ddpm {command} --help")


def _import(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _labels(
    pipe: Any, asked: Sequence[str], count: int | None, rows: int
) -> tuple[list[int] | None, list[str] | None, int | None]:
    """Class label of every image, their names, and the number of columns that puts one class in each column."""
    if not hasattr(pipe, "get_label_ids"):
        if asked:
            raise ValueError(f"--class-labels {' '.join(asked)}: this pipeline is not class-conditional")
        return None, None, None
    names = pipe.config.id2label or {}
    if asked:
        is_number = [label.isdecimal() and label not in names.values() for label in asked]
        cycle = pipe.get_label_ids([int(x) if number else x for x, number in zip(asked, is_number, strict=True)])
    else:
        cycle = list(range(pipe.unet.config.num_class_embeds - 1))  # the last one is the null label
    labels = [cycle[i % len(cycle)] for i in range(count or len(cycle) * (1 if asked else rows))]
    return labels, [names.get(label, str(label)) for label in labels], len(cycle) if len(cycle) <= 20 else None


@contextlib.contextmanager
def _replacing(out: Path, *, folder: bool) -> Iterator[Path]:
    """Give a temporary name beside `out`; put it in the place of `out` when the block ends well, else remove it.

    A file or folder that was there stays whole until then. A folder with files that are not ours is never replaced.
    """
    if folder and out.exists():
        if not out.is_dir():
            raise ValueError(f"--out {out} is a file; for a grid choose a name that ends in .png")
        foreign = [path.name for path in out.iterdir() if not _FILES_OF_A_SAMPLE_FOLDER.fullmatch(path.name)]
        if foreign:
            raise ValueError(f"--out {out} holds other files ({foreign[0]}, ...); choose a new or an empty folder")
    elif not folder and out.is_dir():
        raise ValueError(f"--out {out} is a folder")
    # Unlike tempfile's, this name keeps the suffix, and what is made has the permissions the user's umask gives.
    temporary = out.with_name(f".{out.stem}.{os.getpid()}{out.suffix}")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir() if folder else temporary.touch()
    except OSError as error:
        raise OSError(f"--out {out} cannot be written: {error.strerror}") from error
    try:
        yield temporary
        if folder and out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        if folder:
            shutil.rmtree(temporary, ignore_errors=True)
        else:
            temporary.unlink(missing_ok=True)


def _save_folder(folder: Path, images: np.ndarray[Any, Any], names: Sequence[str] | None) -> None:
    from PIL import Image

    digits = max(5, math.ceil(math.log10(len(images) + 1)))
    for i, image in enumerate(images):
        label = "" if names is None else "_" + re.sub(r"[^\w-]+", "-", names[i])
        Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image).save(
            folder / f"{i:0{digits}}{label}.png"
        )


if __name__ == "__main__":
    sys.exit(main())
