"""The command line: `mini-ddpm sample`, `train`, `distill`, `plot`, `evaluate`, `card`, `push`, `verify`.

Importing the package `mini_ddpm` imports torch and diffusers (5 s). This module is outside the package, so that
`mini-ddpm --help` does not wait for them. Each command imports what it needs when it runs.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import inspect
import io
import itertools
import json
import math
import os
import pkgutil
import re
import shlex
import shutil
import signal
import sys
import threading
import time
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    import numpy as np

    from mini_ddpm.evaluation.evaluate import EvaluateConfig
    from mini_ddpm.training.config import TrainConfig
    from mini_ddpm.training.distill import DistillConfig

# Help texts show PIPELINE instead of [STR], and INT instead of {None}|INT.
_TYRO = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
_CONFIG_HELP = "--config PATH starts from the settings of a run: its folder or train_config.json. Other flags win."
# The flag that is probably meant by a word without a flag.
_FLAGS_OF_WORDS = dict.fromkeys(("train", "distill", "evaluate"), "--dataset-name") | {"sample": "--class-labels"}
_FILM_SUFFIXES = (".gif", ".webp")
_FILES_OF_A_SAMPLE_FOLDER = re.compile(r"\d{5,}(_[\w-]+)?\.png")


@dataclass
class SampleConfig:
    """Draw images with a trained pipeline. Without arguments: a labelled grid of digits, samples.png."""

    pipeline: tyro.conf.Positional[str | None] = None
    """Bundled name, folder, or Hub repository. Default: mnist-distilled (four steps); mnist-class-conditional if you
    set steps, scheduler, eta, guidance, or write a film."""
    revision: str | None = None
    """Branch, tag, commit or refs/pr/N of a Hub repository. Default: main."""
    class_labels: tuple[str, ...] = ()
    """Classes to draw, by name or number, e.g. 3 1 4. With --num-images they repeat. Default: all classes."""
    num_images: int | None = None
    """Number of images. Default: one per label in --class-labels, else 10 per class (2 in a film); without classes 64
    (16)."""

    num_inference_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """Denoising steps. Default: a distilled pipeline's own step count, else 20."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. Default: the pipeline's own."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two shares of the steps, e.g. 0.35 0.6; 0 is noise, 1 is the image. Default: every
    step."""
    eta: float = 0.0
    """Noise that DDIM adds at each step: 0 is deterministic, 1 is as much as DDPM."""
    scheduler: Annotated[str | None, tyro.conf.arg(metavar="ddpm|ddim|dpmsolver++|unipc|euler|euler-ancestral")] = None
    """Sampler. Default: the pipeline's own."""
    seed: int = 0
    """Image i is drawn from seed + i, so it does not depend on --num-images or --batch-size."""

    batch_size: int = 128
    """Number of images drawn at once (a film draws all at once). Lower it if memory runs out. Finished batches are
    saved, so an interrupted command resumes when run again. `accelerate launch -m mini_ddpm sample` splits them among
    processes."""
    device: str = "auto"
    """auto (cuda, else mps, else cpu), cpu, cuda, cuda:1, mps."""
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32"
    """Precision of the network. bf16 is faster on processors with native bf16."""
    torch_compile: bool = False
    """Compile the network. Takes a minute on a CPU and pays off above a few thousand images."""
    out: Path = Path("samples.png")
    """*.png: labelled grid; *.gif, *.webp: film of the denoising; *.npz: arrays; no suffix: folder of PNGs."""

    def __post_init__(self) -> None:
        """Expand `~`, which a shell leaves alone in `--out=~/x.png`."""
        self.out = Path(os.path.expanduser(self.out))


def pipeline_to_sample(config: SampleConfig) -> str:
    """Return the pipeline to draw with. The distilled model only works with its own sampler settings."""
    settings = (config.num_inference_steps, config.scheduler, config.guidance_scale, config.guidance_interval)
    if config.pipeline is not None:
        return config.pipeline
    if any(value is not None for value in settings) or config.eta or config.out.suffix.lower() in _FILM_SUFFIXES:
        return "mnist-class-conditional"
    return "mnist-distilled"


def sample(config: SampleConfig) -> None:
    """Draw images with a trained pipeline: a grid, a folder, arrays, or a film."""
    for flag, value in (("--num-images", config.num_images), ("--batch-size", config.batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"{flag}={value} must be at least 1.")
    _check_output(config.out)

    import numpy as np
    import torch

    from mini_ddpm import options as choices
    from mini_ddpm import plots
    from mini_ddpm.files import atomic_write
    from mini_ddpm.hub.load import load_pipeline
    from mini_ddpm.sampling import draw

    choices.check_fields(config, {"seed": (0, choices.MAX_SEED), "eta": (0, None)})
    # With `accelerate launch` every process draws a share, and rank 0 writes the images of all.
    rank, processes = choices.process_rank()
    suffix = config.out.suffix.lower()
    is_film = suffix in _FILM_SUFFIXES
    shard_folder = config.out.parent / f".{config.out.name}.parts"
    with contextlib.ExitStack() as stack:
        target = config.out
        if rank == 0:  # Open the output first: images that cannot be written should not be drawn.
            try:
                target = stack.enter_context(atomic_write(config.out, folder=not suffix))
            except OSError as error:
                raise OSError(f"--out={config.out} cannot be written: {error.strerror}.") from error

        device = choices.find_device(config.device)
        _hide_loading_bar()
        name = pipeline_to_sample(config)
        pipe: Any = load_pipeline(name, dtype=choices.DTYPES[config.dtype], revision=config.revision)
        if config.scheduler is not None:
            pipe.scheduler = choices.replace_scheduler(pipe.scheduler, config.scheduler)
        pipe.to(device)

        rows = 2 if is_film else 10  # noise does not compress: a film of 100 images would have 15 MB
        labels, names, columns = choices.resolve_labels(pipe, config.class_labels, config.num_images, rows)
        count = len(labels) if labels else config.num_images or (16 if is_film else 64)
        steps = choices.default_steps(pipe) if config.num_inference_steps is None else config.num_inference_steps
        options: dict[str, Any] = {"num_inference_steps": steps, "eta": config.eta}
        options |= choices.resolve_guidance(pipe, name, config.guidance_scale, config.guidance_interval)

        if config.torch_compile:
            pipe.unet.compile()
        has_shards = not is_film and (count > config.batch_size or processes > 1)
        is_resumed = has_shards and shard_folder.is_dir()
        title = f"{count} images"
        # disable=None: show a bar on a terminal, not in a log file
        pipe.set_progress_bar_config(desc=title, disable=True if has_shards else None)
        started = time.perf_counter()
        if is_film:
            if rank > 0:
                return
            size_or_labels = {"batch_size": count} if labels is None else {"class_labels": labels}
            generator = [torch.Generator("cpu").manual_seed(config.seed + i) for i in range(count)]
            film = pipe(**options, **size_or_labels, generator=generator, output_type="np", return_trajectory=True)
            images = film.images  # (B, H, W, C)
        else:
            work: dict[str, Any] = {"batch_size": config.batch_size, "shard_size": config.batch_size, "shared": True}
            work |= {"seed": config.seed, "title": title, "folder": shard_folder if has_shards else None}
            try:
                tensor, _, evaluations = draw(pipe, count, options, labels=labels, **work)
            except KeyboardInterrupt as stop:
                if shard_folder.is_dir():
                    saved = f"Finished batches are saved in {shard_folder}. Run the same command again to resume."
                    stop.args = (saved,)
                raise
            if rank > 0:
                return
            images = tensor.permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
        seconds, legend = time.perf_counter() - started, ""
        if is_film:
            frames = plots.denoising_film(film.latents_trajectory, film.pred_original_samples, columns=columns)
            plots.save_film(frames, target)
        elif suffix == ".png":
            grid = plots.sample_grid(images, names, columns=columns)
            grid.save(target)
            legend = grid.info.get("legend", "")
        elif suffix == ".npz":
            arrays: dict[str, Any] = {"images": images, "seeds": config.seed + np.arange(count)}
            arrays |= {} if labels is None else {"class_labels": np.array(labels)}
            settings = {"scheduler": type(pipe.scheduler).__name__, **options, "dtype": config.dtype}
            settings |= {"device": choices.device_name(device), "unet_evaluations": evaluations}
            np.savez_compressed(target, **arrays, settings=np.array(json.dumps(settings)))
        else:
            _save_folder(target, images, names)
    shutil.rmtree(shard_folder, ignore_errors=True)
    height, width = images.shape[1:3]
    pace = "" if is_resumed else f", {count / seconds:.1f} images/s"  # a resumed run did not draw all images
    sampler = f"{steps} steps of {type(pipe.scheduler).__name__}"
    print(f"{config.out}: {title} of {width}x{height}, {sampler}, {seconds:.1f} s{pace} ({device}, {config.dtype})")
    if legend:
        print(f"Numbers in place of names: {', '.join(legend.splitlines())}")


def train(config: TrainConfig) -> None:
    """Train a pipeline on MNIST or on your own images."""
    from mini_ddpm.options import process_rank
    from mini_ddpm.training import train as training

    folder = training.train(config)
    if process_rank()[0] == 0:
        print(f"{folder}: training finished. Draw images with: mini-ddpm sample {folder}")


def distill(config: DistillConfig) -> None:
    """Distill a pipeline into one that draws in four steps, two, or one."""
    from mini_ddpm.options import process_rank
    from mini_ddpm.training import distill as distillation

    _hide_loading_bar()
    folders = distillation.distill(config)
    if process_rank()[0] == 0:
        print(f"{folders[-1]}: distillation finished. Draw images with: mini-ddpm sample {folders[-1]}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure a pipeline against real images: FID and more."""
    from mini_ddpm.evaluation import evaluate as evaluation

    _hide_loading_bar()
    if rows := evaluation.evaluate(config, shared=True):  # rank 0 has them
        print(evaluation.markdown_table(rows), end="")


@dataclass
class PlotConfig:
    """Plot a training run: loss, loss by noise level, learning rate, gradient norm, and its noise schedule."""

    run: tyro.conf.Positional[Path]
    """Folder of the run. Of a distillation, one of its folders, such as steps-4."""
    timesteps: tuple[int, ...] = ()
    """Timesteps of the noised images. Default: 0 200 500 999, scaled to the run's number of timesteps."""
    dataset_name: str | None = None
    """Show the first two images of this dataset's train split noised: Hub id, folder, or .parquet file. Default: two
    images that the run's pipeline draws."""
    out: Path | None = None
    """*.png. Default: plot.png in the folder of the run."""

    def __post_init__(self) -> None:
        """Expand `~`."""
        self.run = Path(os.path.expanduser(self.run))
        self.out = None if self.out is None else Path(os.path.expanduser(self.out))


def plot(config: PlotConfig) -> None:
    """Plot a training run: its curves and its noise schedule."""
    out = config.run / "plot.png" if config.out is None else config.out
    if out.suffix.lower() != ".png" or out.is_dir():
        raise ValueError(f"--out={out} must be a file that ends in .png.")

    from mini_ddpm.curves import run_curves
    from mini_ddpm.data import image_dataset
    from mini_ddpm.files import atomic_write

    _hide_loading_bar()
    dataset = None if config.dataset_name is None else image_dataset(config.dataset_name, "train[:2]")
    images = None if dataset is None else [dataset[index]["images"] for index in range(len(dataset))]
    picture = run_curves(config.run, images=images, timesteps=config.timesteps or None)
    with atomic_write(out) as temporary:
        picture.save(temporary)
    print(f"{out}: {picture.width}x{picture.height}")


@dataclass
class CardConfig:
    """Render a pipeline's model card from the files in its folder: configuration, training, evaluation, picture."""

    pipeline: tyro.conf.Positional[str]
    """Bundled name, or folder."""
    out: Path | None = None
    """Folder for README.md, facts.json and the picture. Default: print the card."""
    repo_id: str | None = None
    """Hub repository of the card, user/name. Default: the card refers to a local folder."""

    def __post_init__(self) -> None:
        """Expand `~`."""
        self.out = None if self.out is None else Path(os.path.expanduser(self.out))


def card(config: CardConfig) -> None:
    """Print or write the model card of a pipeline."""
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
    """Push a pipeline to the Hub, with a model card. Log in first: hf auth login."""

    folder: tyro.conf.Positional[str]
    """Folder, such as that of a training run, or bundled name."""
    repo_id: tyro.conf.Positional[str]
    """Hub repository, user/name. It is created if it does not exist."""
    private: bool = False
    """Make a new repository private."""
    revision: str | None = None
    """Branch to push to. It is created if it does not exist. Default: main."""
    create_pr: bool = False
    """Open a pull request instead of pushing to the branch."""
    message: str | None = None
    """Title of the commit. Default: a generated one."""
    dry_run: bool = False
    """List the files and their sizes; push nothing."""


def push(config: PushConfig) -> None:
    """Push a pipeline to the Hub."""
    from mini_ddpm.hub import publish

    _hide_loading_bar()
    if config.dry_run:
        with publish.staged_pipeline(config.folder) as folder:
            files = {path.relative_to(folder): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        for path, size in sorted(files.items()):
            print(f"{size:>12,}  {path.as_posix()}")
        print(f"{sum(files.values()):>12,}  bytes in {len(files)} files for {config.repo_id}; nothing was pushed")
        return
    options: dict[str, Any] = {"revision": config.revision, "create_pr": config.create_pr}
    options |= {"private": config.private or None, "commit_message": config.message}
    commit = publish.push(config.folder, config.repo_id, **options)
    print(commit.pr_url or f"{commit.repo_url}" + (f"/tree/{config.revision}" if config.revision else ""))


@dataclass
class VerifyConfig:
    """Compare a downloaded pipeline with the Hub's checksums; delete corrupt files from the cache."""

    repo_id: tyro.conf.Positional[str]
    """Hub repository, user/name."""
    revision: str | None = None
    """Branch, tag or commit. Default: main."""


def verify(config: VerifyConfig) -> None:
    """Compare a downloaded pipeline with the Hub's checksums."""
    from mini_ddpm.hub import download

    commit, count = download.verify(config.repo_id, revision=config.revision)
    print(f"{config.repo_id} at {commit}: {count} files match the Hub's checksums")


# Each command's function, and the dataclass of its flags, which is imported only when the command runs.
COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "sample": (sample, "mini_ddpm_cli:SampleConfig"),
    "train": (train, "mini_ddpm.training.config:TrainConfig"),
    "distill": (distill, "mini_ddpm.training.distill:DistillConfig"),
    "plot": (plot, "mini_ddpm_cli:PlotConfig"),
    "evaluate": (evaluate, "mini_ddpm.evaluation.evaluate:EvaluateConfig"),
    "card": (card, "mini_ddpm_cli:CardConfig"),
    "push": (push, "mini_ddpm_cli:PushConfig"),
    "verify": (verify, "mini_ddpm_cli:VerifyConfig"),
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which job schedulers and containers send. It ends a command in the same good order as Ctrl-C."""


@contextlib.contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise `Terminated` at a SIGTERM in the block; only the main thread can do so."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit code.

    It is 0 after success, 2 after an error, which is one line on stderr, 130 after Ctrl-C, and 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # print what a terminal cannot show as an escape sequence
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
        elif argv[0] == "--version":
            print(importlib.metadata.version("mini-ddpm"))
        else:
            with _sigterm_as_exception():
                config = parse(argv)
                COMMANDS[argv[0]][0](config)
    except BrokenPipeError:  # `mini-ddpm sample --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        name, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"\nmini-ddpm: {name}{''.join(f'. {text}' for text in stop.args)}", file=sys.stderr)
        return code
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
  mini-ddpm sample --out film.webp            how digits emerge from noise

Set MINI_DDPM_DEBUG=1 to see the traceback of an error."""


def parse(argv: Sequence[str]) -> Any:
    """Return the configuration of a command, from its name and its flags.

    Raise `ValueError` if the command, a flag or the type of a value is unknown, and `SystemExit(0)` after `--help`.
    """
    command, *flags = argv
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; choose one of {', '.join(COMMANDS)}, or --help.")
    config = pkgutil.resolve_name(COMMANDS[command][1])
    options: dict[str, Any] = {"prog": f"mini-ddpm {command}", "config": _TYRO}
    if command == "train":
        options["description"] = f"{inspect.getdoc(config)}\n\n{_CONFIG_HELP}"
        flags = [word for flag in flags for word in re.split(r"(?<=^--config)=", flag)]
        if "--config" in flags:
            from mini_ddpm.options import saved_config

            at = flags.index("--config")
            options["default"] = saved_config(config, "".join(flags[at + 1 : at + 2]))
            del flags[at : at + 2]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed, unknown = tyro.cli(config, args=flags, return_unknown_args=True, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    else:
        if command == "sample" and (parsed.pipeline or "").isdecimal() and not Path(parsed.pipeline).is_dir():
            unknown = [parsed.pipeline, *unknown]  # a class, unless a folder is called so
        if not unknown:
            return parsed
        raise ValueError(f"{_explain_unknown(command, config, unknown)} See mini-ddpm {command} --help.")
    # tyro prints a box with a title and a message, then a horizontal rule and the argument's help. Keep the message.
    lines = [line.strip("│ ") for line in stderr.getvalue().splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    message = " ".join(lines[:rule]) or stderr.getvalue()
    raise ValueError(f"{message.rstrip('.')}. See mini-ddpm {command} --help.")


def _explain_unknown(command: str, config: Any, unknown: Sequence[str]) -> str:
    """Return what is wrong with words that no flag takes, and which flag may be meant."""
    word, _, value = unknown[0].partition("=")
    values = [value] if value else list(itertools.takewhile(lambda word: not word.startswith("-"), unknown[1:]))
    if word.startswith("-"):
        found, told = _similar_flags(word, config), f"unknown option {word}."
    else:
        found, told = _FLAGS_OF_WORDS.get(command, "").split(), f"unexpected argument {unknown[0]!r}."
        values = [unknown[0], *values]
    if len(found) == 1:
        return f"{told} Did you mean {shlex.join([*found, *values])}?"
    return f"{told} Did you mean one of {', '.join(found)}?" if found else told


def _similar_flags(word: str, config: Any) -> list[str]:
    """Return the flags of a command that hold the words of `word`, or their beginnings; else the most similar one."""
    flags: dict[str, str] = {}  # the flag of each field, by its name and its aliases
    for field, hint in typing.get_type_hints(config, include_extras=True).items():
        extras, names = getattr(hint, "__metadata__", ()), [field.replace("_", "-")]
        names += [alias.strip("-") for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        if "Positional" not in map(str, extras):
            flags |= dict.fromkeys(names, f"--{names[0]}")
    asked = word.strip("-").replace("_", "-").lower()
    pattern = re.compile("(.*-)?" + ".*-".join(map(re.escape, asked.split("-"))))
    holding = [name for name in flags if len(asked) > 2 and pattern.match(name)]
    return list(dict.fromkeys(flags[name] for name in holding or difflib.get_close_matches(asked, flags, 1, 0.7)))


def _hide_loading_bar() -> None:
    """Turn off diffusers' progress bar for reading files, which finishes at once. Other bars stay."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def _check_output(out: Path) -> None:
    """Raise `ValueError` if `out` has an unknown suffix, or is a file or folder that must not be replaced."""
    suffix = out.suffix.lower()
    if suffix not in ("", ".png", ".npz", *_FILM_SUFFIXES):
        raise ValueError(f"--out={out} must end in .png, .gif, .webp or .npz, or have no suffix, for a folder.")
    if suffix and out.is_dir():
        raise ValueError(f"--out={out} is a folder. Choose another name.")
    if not suffix and out.exists():
        if not out.is_dir():
            raise ValueError(f"--out={out} is a file. Choose another name; for a grid, one that ends in .png.")
        foreign = [path.name for path in out.iterdir() if not _FILES_OF_A_SAMPLE_FOLDER.fullmatch(path.name)]
        if foreign:
            raise ValueError(f"--out={out} holds other files ({foreign[0]}, ...). Choose a new or an empty folder.")


def _save_folder(folder: Path, images: np.ndarray[Any, Any], names: Sequence[str] | None) -> None:
    """Save images (B, H, W, C) as `NUMBER_LABEL.png`."""
    from PIL import Image

    digits = max(5, math.ceil(math.log10(len(images) + 1)))
    for i, image in enumerate(images):
        label = "" if names is None else "_" + _file_label(names[i])
        pixels = image.squeeze(-1) if image.shape[-1] == 1 else image
        Image.fromarray(pixels).save(folder / f"{i:0{digits}}{label}.png")


def _file_label(name: str) -> str:
    """Return a class name as a part of a file name: short, and of characters that the file system takes."""
    label = re.sub(r"[^\w-]+", "-", name)
    try:
        os.fsencode(label)
    except UnicodeEncodeError:
        label = re.sub(r"[^\w-]+", "-", name, flags=re.ASCII)
    return label[:50]


if __name__ == "__main__":
    sys.exit(main())
