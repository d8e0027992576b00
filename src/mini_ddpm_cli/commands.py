"""The commands other than `sample`. Each imports what it needs when it runs."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

if TYPE_CHECKING:
    from mini_ddpm.evaluation.evaluate import EvaluateConfig
    from mini_ddpm.training.config import TrainConfig
    from mini_ddpm.training.distill import DistillConfig
    from mini_ddpm.training.sharpen import SharpenConfig


def hide_loading_bar() -> None:
    """Turn off diffusers' progress bar for reading files, which finishes at once. Other bars stay."""
    from diffusers.utils import logging

    logging.disable_progress_bar()


def train(config: TrainConfig) -> None:
    """Train a pipeline on MNIST or on your own images."""
    from mini_ddpm.options import process_rank
    from mini_ddpm.training import train as training

    folder = training.train(config)
    if process_rank()[0] == 0:
        print(f"{folder}: training finished. Draw images with: mini-ddpm sample {folder}")


def sharpen(config: SharpenConfig) -> None:
    """Improve a trained pipeline with samples of its own."""
    from mini_ddpm.options import process_rank
    from mini_ddpm.training import sharpen as sharpening

    hide_loading_bar()
    folder = sharpening.sharpen(config)
    if process_rank()[0] == 0:
        print(f"{folder}: sharpened. Draw images with: mini-ddpm sample {folder}")


def distill(config: DistillConfig) -> None:
    """Distill a pipeline into one that draws in four steps, two, or one."""
    from mini_ddpm.options import process_rank
    from mini_ddpm.training import distill as distillation

    hide_loading_bar()
    folders = distillation.distill(config)
    if process_rank()[0] == 0:
        print(f"{folders[-1]}: distillation finished. Draw images with: mini-ddpm sample {folders[-1]}")


def evaluate(config: EvaluateConfig) -> None:
    """Measure a pipeline against real images: FID and more."""
    from mini_ddpm.evaluation import evaluate as evaluation

    hide_loading_bar()
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

    hide_loading_bar()
    dataset = None if config.dataset_name is None else image_dataset(config.dataset_name, "train[:2]")
    images = None if dataset is None else [dataset[index]["images"] for index in range(len(dataset))]
    picture = run_curves(config.run, images=images, timesteps=config.timesteps or None)
    with atomic_write(out) as temporary:
        picture.save(temporary)
    print(f"{out}: {picture.width}x{picture.height}")


@dataclass
class ExportConfig:
    """Write the whole sampler of a pipeline as one graph that needs neither torch nor this package.

    The graph is compared with the pipeline before the file is kept.
    """

    pipeline: tyro.conf.Positional[str]
    """Bundled name, folder, or Hub repository."""
    revision: str | None = None
    """Branch, tag, commit or refs/pr/N of a Hub repository. Default: main."""
    num_inference_steps: Annotated[int | None, tyro.conf.arg(aliases=["--steps"])] = None
    """Denoising steps. Default: the pipeline's own, else 20."""
    guidance_scale: float | None = None
    """Scale of classifier-free guidance; 1 turns it off. Default: the pipeline's own."""
    guidance_interval: tuple[float, float] | None = None
    """Guide only between these two shares of the steps; 0 is noise, 1 is the image. Default: the pipeline's
    own if --guidance-scale is not given, else every step."""
    scheduler: Annotated[Literal["ddim"] | None, tyro.conf.arg(metavar="ddim")] = None
    """Sample with DDIM, whatever the pipeline's own sampler is. Others add noise, and cannot be exported."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Precision of the stored weights. The graph computes in fp32."""
    unet_only: bool = False
    """Export the network alone, for a denoising loop of your own."""
    out: Path | None = None
    """*.onnx for onnxruntime, or *.pt2 for torch.export.load. Default: onnx/sampler.onnx in the pipeline's folder, to
    push with it; ./sampler.onnx for a bundled name or a Hub repository."""

    def __post_init__(self) -> None:
        """Expand `~`."""
        self.out = None if self.out is None else Path(os.path.expanduser(self.out))


def export(config: ExportConfig) -> None:
    """Write the whole sampler as one ONNX graph, for onnxruntime and browsers."""
    import torch

    from mini_ddpm.export import export_sampler
    from mini_ddpm.hub.load import is_bundled, load_pipeline
    from mini_ddpm.options import counted, replace_scheduler

    hide_loading_bar()
    pipe: Any = load_pipeline(config.pipeline, dtype=torch.float32, revision=config.revision)
    if config.scheduler is not None:
        pipe.scheduler = replace_scheduler(pipe.scheduler, config.scheduler)
    pipe.set_progress_bar_config(disable=True)
    out, folder = config.out, Path(os.path.expanduser(config.pipeline))
    if out is None:
        out = Path("unet.onnx" if config.unet_only else "sampler.onnx")
        out = folder / "onnx" / out if folder.is_dir() and not is_bundled(config.pipeline) else out
    fields = ("num_inference_steps", "guidance_scale", "guidance_interval", "dtype", "unet_only")
    print(f"{out}: exporting {config.pipeline}, which takes a while ...", flush=True)
    result = export_sampler(pipe, out, **{name: getattr(config, name) for name in fields})
    steps = result.num_inference_steps  # None: the network alone
    content = "the network" if steps is None else counted(steps, "step")
    print(f"{out}: {content}, {config.dtype}, {result.num_bytes / 1e6:.1f} MB")
    print(
        f"Compared with the pipeline at batch 1 and 3: largest difference {result.difference:.1g}. One image takes"
        f" {result.seconds * 1000:.0f} ms, with the pipeline {result.pipeline_seconds * 1000:.0f} ms."
    )


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

    hide_loading_bar()
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
