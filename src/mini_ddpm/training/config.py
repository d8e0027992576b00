"""The settings of training, with their types, defaults and ranges."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..models.unet_mini import PRESETS
from ..options import check_fields

# Smallest and largest value of numbers; an open end is `None`. A learning rate must be above zero, a share below one.
_SMALLEST, _LARGEST_SHARE = 1e-30, 1 - 1e-9
RANGES: dict[str, tuple[float | None, float | None]] = {
    **dict.fromkeys(("num_epochs", "max_train_steps", "train_batch_size", "gradient_accumulation_steps"), (1, None)),
    **dict.fromkeys(("checkpointing_steps", "checkpoints_total_limit", "logging_steps"), (1, None)),
    **dict.fromkeys(("resolution", "block_out_channels", "layers_per_block"), (1, None)),
    **dict.fromkeys(("lr_warmup_steps", "save_images_epochs", "dataloader_num_workers"), (0, None)),
    **dict.fromkeys(("learning_rate", "max_grad_norm", "snr_gamma"), (_SMALLEST, None)),
    **dict.fromkeys(("class_dropout_prob", "dropout", "validation_share"), (0, _LARGEST_SHARE)),
    **dict.fromkeys(("ema_max_decay", "adam_beta2"), (0, _LARGEST_SHARE)),
    "adam_weight_decay": (0, None),
    "saturation_margin": (0, 1),
    "num_train_timesteps": (1, 100_000),
    "seed": (0, 2**32 - 1),
}


@dataclass(frozen=True)
class RunConfig:
    """The settings that training and distillation share, with the defaults of training."""

    dataset_name: str = "ylecun/mnist"
    """Hub id, folder in a Hub dataset's layout, or folder of pictures (one sub-folder per class)."""
    _: KW_ONLY
    split: str = "train"
    """Split of the dataset."""
    validation_share: float = 0.0
    """Share of the images to hold out, at random; the log gets the loss on up to 1,000 of them, with fixed noise."""
    image_column: str | None = None
    """Column of the pictures. Default: the first that holds images."""
    label_column: str | None = None
    """Column of the class indices. Default: the first that holds class labels."""
    resolution: int | None = None
    """Crop pictures to a square and resize them to this many pixels. Default: keep their size."""

    train_batch_size: int = 128
    """Images per process and forward pass."""
    gradient_accumulation_steps: int = 1
    """Forward passes per optimizer step."""
    learning_rate: float = 1e-3
    """Peak learning rate of AdamW."""
    lr_warmup_steps: int = 200
    """Steps over which the learning rate rises from zero, at most a tenth of all."""
    class_dropout_prob: float = 0.1
    """Share of labels replaced by the null label; guidance needs it (arXiv 2207.12598)."""
    ema_max_decay: float = 0.9995
    """Largest decay of the moving average of the weights, which is what is saved. The decay rises to it gradually."""

    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Where to train. Auto: cuda, else mps, else cpu."""
    mixed_precision: Literal["auto", "no", "fp16", "bf16"] = "auto"
    """Precision of the network. Auto: bf16 on GPUs that support it, else no. bf16 also suits AVX512-BF16 CPUs."""
    torch_compile: bool = False
    """Compile the network: about a minute to start, then a third less time per step."""
    seed: int = 0
    """Seed of everything random."""
    checkpointing_steps: int = 500
    """Optimizer steps between checkpoints."""
    log_with: Literal["tensorboard", "wandb", "trackio", "none"] = "tensorboard"
    """Experiment tracker. train_log.jsonl is always written too."""


@dataclass(frozen=True)
class TrainConfig(RunConfig):
    """Train a small diffusion model and write it as a pipeline folder.

    The defaults train on MNIST from scratch. To resume an interrupted run, give the same command again.
    """

    output_dir: Path = Path("runs/mnist")
    """Folder for the pipeline, its checkpoints, sample grids and logs."""
    _: KW_ONLY
    cache_dataset: bool | None = None
    """Keep all images on the device as bytes. Default: yes if they take less than 2 GB."""
    dataloader_num_workers: int = 2
    """Processes that decode images when the dataset is not cached."""

    class_conditional: bool = False
    """Train on class labels too, to generate images of a chosen class."""
    pretrained_model_name_or_path: str | None = None
    """Fine-tune this pipeline (bundled name, folder or Hub id); its network shape and noise schedule are kept.
    Default: train from scratch."""
    preset: str = "mini"
    """Shape of the U-Net: mini, tutorial-32 or tutorial-64."""
    block_out_channels: tuple[int, ...] | None = None
    """Width of each level; all levels but the first have attention. Default: the preset's."""
    layers_per_block: int | None = None
    """Residual blocks per level. Default: the preset's."""
    dropout: float = 0.0
    """Dropout in the residual blocks."""

    saturation_margin: float = 0.1
    """Train black (white) as -1 - margin (1 + margin) if 5 % of pixels are it: clamping makes it exact. 0: off."""

    num_train_timesteps: int = 1000
    """Number T of noise levels."""
    beta_schedule: Literal["squaredcos_cap_v2", "linear", "scaled_linear", "sigmoid", "laplace", "cosine"] = (
        "squaredcos_cap_v2"
    )
    """Noise schedule; squaredcos_cap_v2 is the cosine schedule, which may be called cosine too."""
    prediction_type: Literal["epsilon", "sample", "v_prediction"] = "v_prediction"
    """What the network predicts: the noise, the clean image or the velocity."""
    snr_gamma: float | None = None
    """Gamma of the min-SNR loss weights; 5.0 is usual. Default: no weights."""

    num_epochs: int = 20
    """Passes over the dataset."""
    max_train_steps: int | None = None
    """Optimizer steps. Default: as many as num_epochs takes."""
    lr_scheduler: Literal[
        "cosine", "linear", "constant_with_warmup", "constant", "polynomial", "cosine_with_restarts"
    ] = "cosine"
    """Decay after the warm-up."""
    adam_beta2: tyro.conf.Suppress[float] = 0.99
    """Decay of AdamW's second moment."""
    adam_weight_decay: float = 0.01
    """Weight decay of AdamW."""
    max_grad_norm: float = 1.0
    """Gradients are clipped to this norm."""

    checkpoints_total_limit: int = 2
    """How many checkpoints are kept."""
    save_images_epochs: int = 1
    """Epochs between sample grids; 0: none."""
    logging_steps: int = 50
    """Optimizer steps between log lines."""

    def __post_init__(self) -> None:
        """Raise a `ValueError` for a value that cannot work: it names the field, the value and what is allowed."""
        check_fields(self, RANGES)
        if self.beta_schedule == "cosine":
            object.__setattr__(self, "beta_schedule", "squaredcos_cap_v2")
        if self.preset not in PRESETS:
            raise ValueError(f"preset={self.preset!r} must be one of {', '.join(PRESETS)}.")
