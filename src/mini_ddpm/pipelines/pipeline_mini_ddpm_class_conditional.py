"""Images of asked-for classes from noise: the sampling loop with class labels and classifier-free guidance.

The file is self-contained. Saved pipelines carry a copy of it, which `DiffusionPipeline.from_pretrained(...,
trust_remote_code=True)` runs where this package is not installed. The functions that the unconditional pipeline
needs as well are therefore written out in both files, word for word; a test compares them.
"""

import hashlib
import inspect
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput, logging
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi

# A portable module's name: in the package `unet_mini`, in a saved pipeline `unet_mini_0a1b2c3d`.
PORTABLE_MODULE = re.compile(r"((?:unet|scheduling|pipeline)_mini(?:_[a-z]+)*?)(_[0-9a-f]{8})?")

OUTPUT_TYPES = ("pil", "np", "pt", "latent")

logger = logging.get_logger(__name__)

# The model card of a pipeline of which nothing is known but what it is.
CARD = """---
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- mini-ddpm
---

A small denoising diffusion model. `DiffusionPipeline.from_pretrained(..., trust_remote_code=True)` opens it with
diffusers alone, `mini_ddpm.load_pipeline(...)` where the package mini-ddpm is installed.
"""


@dataclass
class MiniDDPMPipelineOutput(BaseOutput):  # type: ignore[misc]
    """What a pipeline call returns.

    Attributes:
        images: B images: a list of `PIL.Image` ("pil"), an array (B, H, W, C) in [0, 1] ("np"), a tensor (B, C, H, W)
            in [0, 1] ("pt"), or the sample x_0 itself, (B, C, H, W), about [-1, 1] and not clamped ("latent").
        latents_trajectory: With `return_trajectory=True`, x_T ... x_0 as the scheduler scales them,
            (steps + 1, B, C, H, W). Schedulers that evaluate the network more than once a step count each time.
        pred_original_samples: With `return_trajectory=True`, the x_0 predicted at each step, (steps, B, C, H, W):
            the scheduler's own, clipped if it clips, or derived from the network's output, not clipped, if the
            scheduler returns none.
    """

    images: list[Any] | np.ndarray[Any, Any] | torch.Tensor
    latents_trajectory: torch.Tensor | None = None
    pred_original_samples: torch.Tensor | None = None


class MiniDDPMClassConditionalPipeline(DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional image generation with [classifier-free guidance](https://arxiv.org/abs/2207.12598).

    Args:
        unet: The network, `MiniUNet2DModel` or any that is called and configured like `UNet2DModel`, with
            `num_class_embeds` labels, of which the last is the null label: "no class". One that learned the variance
            too (`out_channels = 2 * in_channels`) works with every scheduler.
        scheduler: Any scheduler of a variance-preserving process: ours, or one of `scheduler.compatibles`.
        id2label: The classes' names by label. JSON's string keys are accepted for integers.
        default_num_inference_steps: Steps that a call takes if it is not told; those that a distilled network is for.
        default_guidance_scale: Guidance that a call takes if it is not told; 1, none, where it was distilled in.

    Example:
        >>> from mini_ddpm import MiniDDPMClassConditionalPipeline, PRETRAINED
        >>> pipe = MiniDDPMClassConditionalPipeline.from_pretrained(PRETRAINED / "mnist-class-conditional")
        >>> images = pipe([3, 1, 4], num_inference_steps=20).images
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "class_labels"]

    # Set by each call; the defaults let the properties be read before the first one.
    _num_timesteps = 0
    _step = 0
    _interrupt = False
    _guidance_scale = 1.0
    _guidance_interval = (0.0, 1.0)
    _num_guided_timesteps = 0

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[Any, Any] | None = None,
        default_num_inference_steps: int | None = None,
        default_guidance_scale: float | None = None,
    ) -> None:
        super().__init__()
        self._register_defaults(
            default_num_inference_steps=default_num_inference_steps, default_guidance_scale=default_guidance_scale
        )
        if id2label is not None:
            id2label = {int(label): str(name) for label, name in id2label.items()}
        self.register_to_config(id2label=id2label)
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale in force; read anew at each step, so that a callback may set `pipe._guidance_scale`."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running step is guided: `guidance_scale > 1`, and it lies in the guidance interval."""
        start, end = self._guidance_interval
        return self._guidance_scale > 1 and start <= self._step / max(1, self._num_timesteps) < end

    @property
    def num_guided_timesteps(self) -> int:
        """Number of steps in the latest call that were guided, and so asked the network about each image twice."""
        return self._num_guided_timesteps

    @torch.no_grad()
    def __call__(
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        eta: float = 0.0,
        use_clipped_model_output: bool = True,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_trajectory: bool = False,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
    ) -> MiniDDPMPipelineOutput | tuple[Any, ...]:
        """Draws one image for each label.

        Args:
            class_labels: The classes to draw: a label, a name out of `id2label`, a list of those, or an integer tensor
                (B,). Labels are 0 to `num_class_embeds - 2`; the last, `num_class_embeds - 1`, asks for no class.
            guidance_scale: s in uncond + s·(cond - uncond); active above 1, where a step costs twice as much. By
                default `default_guidance_scale` of the pipeline's configuration, or 1.5.
            num_inference_steps: Denoising steps, 1 to the scheduler's `num_train_timesteps`; by default
                `default_num_inference_steps` of the pipeline's configuration, or 50.
            eta: DDIM's η: 0 is deterministic, 1 has DDPM's noise. Ignored by schedulers whose step has no η.
            use_clipped_model_output: Whether DDIM takes for the noise in x_t what the clipped x_0 leaves of it. The
                network's own noise, which diffusers takes by default, does not fit a clipped x_0, and the misfit adds
                up over the steps: guided images drift off their class. Ignored by other schedulers.
            generator: Makes the result repeatable. With a list of B generators each image depends on its own
                generator alone, so that the same seed gives the same image however the batch is split.
            latents: The noise to start from, (B, C, H, W), standard normal; drawn with `generator` if None.
            height: Height H in pixels; by default the network's `sample_size`.
            width: Width W in pixels; by default the network's `sample_size`.
            output_type: "pil", "np", "pt" or "latent", see [`MiniDDPMPipelineOutput`].
            return_dict: Whether to return an output object instead of a tuple.
            callback_on_step_end: Called after each step as `callback(pipe, step, timestep, tensors)`; what it returns
                replaces the tensors of those names. Setting `pipe._interrupt = True` ends the loop.
            callback_on_step_end_tensor_inputs: Which tensors it is given, out of `pipe._callback_tensor_inputs`.
            return_trajectory: Whether to return x_t and the predicted x_0 of each step too.
            guidance_interval: Where on the way from noise, 0, to image, 1, guidance is active: at steps i of N with
                start <= i/N < end. At the start it takes variety, at the end it is not needed, and in between it makes
                a class of what could become several ([2404.07724](https://arxiv.org/abs/2404.07724)).

        Returns:
            [`MiniDDPMPipelineOutput`], or a tuple of its fields that are not None.

        Raises:
            ValueError: An argument is out of its range, a label is unknown, the network takes no labels, or the
                scheduler belongs to another process.
            TypeError: A label is neither an integer nor a name.
        """
        labels = self.get_label_ids(class_labels)
        if num_inference_steps is None:
            num_inference_steps = int(self.config.get("default_num_inference_steps", 50))
        if guidance_scale is None:
            guidance_scale = float(self.config.get("default_guidance_scale", 1.5))
        if not isinstance(guidance_scale, (int, float, np.number)) or not np.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, but is {guidance_scale!r}.")
        numbers = (int, float, np.number)
        pair = isinstance(guidance_interval, (tuple, list)) and len(guidance_interval) == 2
        start, end = guidance_interval if pair else (None, None)
        if not (isinstance(start, numbers) and isinstance(end, numbers) and 0 <= start < end <= 1):
            raise ValueError(
                "`guidance_interval` must be two numbers with 0 <= start < end <= 1 (guidance_scale=1 is no guidance),"
                f" but is {guidance_interval!r}."
            )
        self._guidance_scale, self._guidance_interval = guidance_scale, (start, end)
        self._num_guided_timesteps = 0
        batch_size = len(labels)
        self._check_inputs(
            batch_size,
            num_inference_steps,
            eta,
            height,
            width,
            generator,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        latents = self._prepare_latents(batch_size, height, width, generator, latents)
        return self._denoise(
            latents,
            {"class_labels": torch.tensor(labels, device=latents.device)},
            num_inference_steps,
            eta,
            use_clipped_model_output,
            generator,
            output_type,
            return_dict,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
            return_trajectory,
        )

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> list[int]:
        """Returns the labels as integers, one for each image, after the checks that `__call__` describes."""
        count = self.unet.config.get("num_class_embeds")
        if count is None:
            raise ValueError(
                "This network takes no class labels (its `num_class_embeds` is None); use MiniDDPMPipeline for it."
            )
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("`class_labels` is empty; give one label for each image.")

        names = {name: label for label, name in (self.config.id2label or {}).items()}
        labels = []
        for given in class_labels:
            if isinstance(given, str) and given not in names:
                known = f"one of {', '.join(names)}" if names else "an integer, since the pipeline has no `id2label`"
                raise ValueError(f"Unknown class label {given!r}; it must be {known}.")
            label = names[given] if isinstance(given, str) else given
            if isinstance(label, bool) or not isinstance(label, (int, np.integer)):
                raise TypeError(f"A class label must be an integer or a name, but one is {given!r}.")
            if not 0 <= label < count:
                raise ValueError(
                    f"Class label {given!r} is out of range; it must be 0 to {count - 2}, or {count - 1} for no class."
                )
            labels.append(int(label))
        return labels

    def _predict(self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Returns the network's guided output for x_t, in x_t's dtype, (B, C or 2C, H, W).

        Guidance extrapolates the prediction only; a learned variance is taken from the conditional half as it is.
        """
        inputs = sample.to(self.unet.dtype)
        output: torch.Tensor
        if not self.do_classifier_free_guidance:
            output = self.unet(inputs, timestep, class_labels=class_labels).sample
            return output.to(sample.dtype)
        self._num_guided_timesteps += 1
        null_labels = torch.full_like(class_labels, self.unet.config.num_class_embeds - 1)
        labels = torch.cat([class_labels, null_labels])
        output = self.unet(torch.cat([inputs, inputs]), timestep, class_labels=labels).sample  # (2B, C or 2C, H, W)
        cond, uncond = output.to(sample.dtype).chunk(2)
        channels = sample.shape[1]
        guided = uncond[:, :channels] + self.guidance_scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([guided, cond[:, channels:]], dim=1)

    # ---- From here to the end word for word in both pipelines ----------------------------------------------------

    def _register_defaults(self, **defaults: Any) -> None:
        """Puts into the configuration what is given: other pipelines open the folder too, and know no such keys."""
        for name, value in defaults.items():
            if value is not None:
                if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < float("inf"):
                    raise ValueError(f"`{name}` must be a number above 0, but is {value!r}.")
                self.register_to_config(**{name: value})

    @property
    def num_timesteps(self) -> int:
        """Number of network evaluations in the latest call."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """Whether a callback has asked the running call to stop, by `pipe._interrupt = True`."""
        return self._interrupt

    def _check_inputs(
        self,
        batch_size: int,
        num_inference_steps: int,
        eta: float,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        tensor_inputs: Sequence[str],
    ) -> None:
        """Raises a `ValueError` of one line for the first argument that cannot be used."""
        if getattr(self.scheduler, "alphas_cumprod", None) is None:
            raise ValueError(
                f"{type(self.scheduler).__name__} cannot drive this pipeline: it has no `alphas_cumprod`. EDM and"
                " flow-matching schedulers scale a network's input and output in another way than a network trained as"
                " a DDPM has learned. Use DDPM, DDIM or another of `pipe.scheduler.compatibles` that has it."
            )
        counts = {"batch_size": batch_size, "num_inference_steps": num_inference_steps}
        counts |= {name: n for name, n in (("height", height), ("width", width)) if n is not None}
        for name, n in counts.items():
            if isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1:
                raise ValueError(f"`{name}` must be a whole number, at least 1, but is {n!r}.")
        limit = self.scheduler.config.num_train_timesteps
        if num_inference_steps > limit:
            raise ValueError(
                f"`num_inference_steps` must be at most {limit}, the scheduler's `num_train_timesteps`,"
                f" but is {num_inference_steps}."
            )
        if not isinstance(eta, (int, float, np.number)) or not 0 <= eta < float("inf"):
            raise ValueError(f"`eta` must be a number of at least 0, usually 0 to 1, but is {eta!r}.")
        if isinstance(generator, (list, tuple)) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)} for {batch_size} images; give one each.")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {output_type!r}.")
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                allowed = ", ".join(self._callback_tensor_inputs)
                raise ValueError(f"`callback_on_step_end_tensor_inputs` must be out of {allowed}, but has {name!r}.")

    def _prepare_latents(
        self,
        batch_size: int,
        height: int | None,
        width: int | None,
        generator: torch.Generator | list[torch.Generator] | None,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Returns standard normal noise, (B, C, H, W), drawn or checked, on the execution device.

        x_t is kept in float32 also where the network runs in half precision: its rounding would add up over the steps
        to a visible background, and the same seed would not give the same noise in every dtype.
        """
        config = self.unet.config
        if latents is None:
            size = config.sample_size
            if size is None and (height is None or width is None):
                raise ValueError("The network has no `sample_size`; pass `height` and `width`.")
            default_height, default_width = size if isinstance(size, (list, tuple)) else (size, size)
            shape = (
                batch_size,
                config.in_channels,
                default_height if height is None else height,
                default_width if width is None else width,
            )
        else:
            rows, columns = latents.shape[-2:] if latents.ndim == 4 else ("H", "W")
            shape = (
                batch_size,
                config.in_channels,
                rows if height is None else height,
                columns if width is None else width,
            )
            if tuple(latents.shape) != shape:
                raise ValueError(f"`latents` must have the shape {shape}, but has {tuple(latents.shape)}.")
        dtype = torch.float64 if self.unet.dtype == torch.float64 else torch.float32
        if latents is not None:
            return latents.to(device=self._execution_device, dtype=dtype)
        generator = list(generator) if isinstance(generator, tuple) else generator
        noise: torch.Tensor = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)
        return noise

    def _denoise(
        self,
        latents: torch.Tensor,
        tensors: dict[str, Any],
        num_inference_steps: int,
        eta: float,
        use_clipped_model_output: bool,
        generator: torch.Generator | list[torch.Generator] | None,
        output_type: str,
        return_dict: bool,
        callback: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None,
        tensor_inputs: Sequence[str],
        return_trajectory: bool,
    ) -> MiniDDPMPipelineOutput | tuple[Any, ...]:
        """Runs the loop x_T -> x_0 from noise (B, C, H, W); `tensors` are what `_predict` takes besides x_t and t."""
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        if hasattr(scheduler, "set_begin_index"):
            # Else those that count steps look the first timestep up, and take its second place where a Karras grid has
            # it twice: they then start one step late and run off the end.
            scheduler.set_begin_index(0)
        if type(scheduler).__name__ in ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
            # Their correction takes half its slope from σ_1: an error e of the predicted x_0 moves x by e·σ_0 / 2σ_1.
            first, second = scheduler.sigmas[:2].tolist()
            if first > second**2:
                raise ValueError(
                    f"{type(scheduler).__name__} diverges here: its first step leads from σ = {first:.5g} straight to"
                    f" {second:.5g}. Make it with `timestep_spacing='leading'`, or take another of"
                    " `pipe.scheduler.compatibles`."
                )
        latents = latents * scheduler.init_noise_sigma
        channels = latents.shape[1]

        # Each scheduler's step takes what it needs and raises on the rest.
        accepted = inspect.signature(scheduler.step).parameters
        step_kwargs = {"eta": eta, "use_clipped_model_output": use_clipped_model_output, "generator": generator}
        step_kwargs = {name: value for name, value in step_kwargs.items() if name in accepted}
        # A learned variance comes in channels C..2C. Only DDPM's step uses it, if configured to; the others get the
        # prediction alone. The key in the config proves nothing: it stays there through `from_config`.
        takes_variance = scheduler.config.get("variance_type") in ("learned", "learned_range") and (
            "predicted_variance" in inspect.signature(getattr(scheduler, "_get_variance", len)).parameters
        )

        self._interrupt = False
        self._num_timesteps = len(scheduler.timesteps)
        trajectory, predictions = [latents], []
        with self.progress_bar(total=self._num_timesteps) as progress_bar:
            for i, t in enumerate(scheduler.timesteps):
                if self.interrupt:
                    break
                self._step = i
                model_output = self._predict(scheduler.scale_model_input(latents, t), t, **tensors)
                prediction = model_output[:, :channels]  # (B, C, H, W)
                output = scheduler.step(model_output if takes_variance else prediction, t, latents, **step_kwargs)
                if return_trajectory:
                    pred_original_sample = output.get("pred_original_sample")
                    if pred_original_sample is None:
                        pred_original_sample = self._pred_original_sample(prediction, i, t, latents)
                    predictions.append(pred_original_sample)
                latents = output.prev_sample

                if callback is not None:
                    state = {"latents": latents, **tensors}
                    changed = callback(self, i, t, {name: state[name] for name in tensor_inputs}) or {}
                    latents = changed.get("latents", latents)
                    tensors = {name: changed.get(name, tensor) for name, tensor in tensors.items()}
                if return_trajectory:
                    trajectory.append(latents)
                progress_bar.update()

        images: Any = latents
        if output_type != "latent":
            images = (latents / 2 + 0.5).clamp(0, 1).float()
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
        if output_type == "pil":
            images = self.numpy_to_pil(images)
        self.maybe_free_model_hooks()

        result = MiniDDPMPipelineOutput(images=images)
        if return_trajectory:
            result = MiniDDPMPipelineOutput(images, torch.stack(trajectory), torch.stack(predictions))
        return result if return_dict else result.to_tuple()

    def _pred_original_sample(self, prediction: torch.Tensor, i: int, t: torch.Tensor, sample: torch.Tensor) -> Any:
        """Returns x_0 from x_t = α x_0 + σ ε for a scheduler whose step does not (PNDM, DPM-Solver++, UniPC, DEIS)."""
        scheduler = self.scheduler
        if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # its grid need not be one of whole timesteps
            alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
        else:
            alpha_squared = scheduler.alphas_cumprod.to(t.device)[t]
            alpha, sigma = alpha_squared**0.5, (1 - alpha_squared) ** 0.5
        if scheduler.config.prediction_type == "epsilon":
            return (sample - sigma * prediction) / alpha
        if scheduler.config.prediction_type == "v_prediction":
            return alpha * sample - sigma * prediction
        return prediction

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Makes a pipeline of this class out of another one's parts, without a copy of the weights."""
        # The host takes a model over only if its very class is in the signature, where ours has the base class, and
        # casts the shared weights to float32 unless told not to.
        kwargs = {"unet": pipeline.unet, **kwargs}
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        return super().from_pipe(pipeline, **kwargs)

    def to_json_file(self, json_file_path: str | os.PathLike[str]) -> None:
        """Writes `model_index.json`, and beside it the source files that make the folder loadable by anyone.

        Every way to save or push a pipeline comes through here, after its parts are saved and before an upload. For
        the pipeline and each part that is defined in a portable module, the module's file is copied into the folder
        and named in the index as `[file stem, class name]`: the host's form for code that comes with the weights.

        The host runs all such files under one package, and a later file replaces an earlier one of the same name, also
        for models that are in use. So a file's name ends in a hash of its content, made anew here: two versions never
        collide, and saving what was itself loaded from such a file gives the same name again.
        """

        def write(file: Path, config: dict[str, Any]) -> None:
            config.pop("_name_or_path", None)  # a path on this machine is nobody's business
            file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")

        folder = Path(json_file_path).parent
        index = json.loads(self.to_json_string())
        for key, part in {"_class_name": self, **self.components}.items():
            cls = type(getattr(part, "_orig_mod", part))  # `torch.compile` wraps
            portable = PORTABLE_MODULE.fullmatch(cls.__module__.rpartition(".")[2])
            if portable is None:
                continue
            source = Path(inspect.getfile(cls)).read_bytes()
            stem = f"{portable[1]}_{hashlib.sha256(source).hexdigest()[:8]}"
            target = folder if key == "_class_name" else folder / key
            target.mkdir(parents=True, exist_ok=True)
            for old in target.glob("*.py"):
                match = PORTABLE_MODULE.fullmatch(old.stem)
                if match is not None and match[2] is not None:
                    old.unlink()
            (target / f"{stem}.py").write_bytes(source)
            index[key] = [stem, cls.__name__]
            config_file = target / cls.config_name
            if part is not self and config_file.is_file():
                write(config_file, json.loads(config_file.read_text(encoding="utf-8")))
        write(Path(json_file_path), index)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[str],
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str | None = None,
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes the pipeline's folder: weights, configurations, the source files that open it, a model card.

        Args:
            save_directory: The folder; made if need be.
            safe_serialization: Not heeded: weights are always safetensors, never pickles.
            variant: Goes into the names of the weights' files, `diffusion_pytorch_model.fp16.safetensors`.
            max_shard_size: Splits the weights into files of at most this size, such as "5GB".
            push_to_hub: Whether to publish it too, see [`push_to_hub`].
            **kwargs: `repo_id` (by default the folder's name) and further arguments of [`push_to_hub`].
        """
        folder = Path(save_directory)
        if not safe_serialization:
            logger.warning("Weights are saved as safetensors; `safe_serialization=False` is not heeded.")
        super().save_pretrained(str(folder), variant=variant, max_shard_size=max_shard_size)
        self._write_card(folder)
        if push_to_hub:
            repo_id = kwargs.pop("repo_id", None) or folder.resolve().name
            self.push_to_hub(repo_id, variant=variant, max_shard_size=max_shard_size, **kwargs)

    def push_to_hub(
        self,
        repo_id: str,
        commit_message: str | None = None,
        private: bool | None = None,
        token: str | bool | None = None,
        create_pr: bool = False,
        safe_serialization: bool = True,
        variant: str | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        max_shard_size: int | str | None = None,
    ) -> str:
        """Publishes the pipeline on the Hub, as [`save_pretrained`] writes it.

        Args:
            repo_id: "user/name"; made if need be. A model card that a person wrote there is kept.
            commit_message: Title of the commit.
            private: Whether a repository that is made is private.
            token: What to log in with; by default `HF_TOKEN` or what `hf auth login` stored.
            create_pr: Whether to open a pull request instead of changing the branch.
            safe_serialization: Not heeded, see [`save_pretrained`].
            variant: See [`save_pretrained`].
            subfolder: Folder in the repository; its root by default.
            revision: Branch to commit to, made if need be; "main" by default.
            max_shard_size: See [`save_pretrained`].

        Returns:
            The commit's address, with `.oid`, `.pr_url` and `.repo_url`.
        """
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, safe_serialization, variant, max_shard_size)
            return self._publish(
                Path(folder),
                repo_id,
                commit_message=commit_message or f"Upload {type(self).__name__}",
                private=private,
                token=token,
                create_pr=create_pr,
                subfolder=subfolder,
                revision=revision,
            )

    def _source_folder(self) -> Path | None:
        """Returns the pipeline's folder that the network was read from, if it was."""
        folder = Path(self.unet.config.get("_name_or_path") or "unknown").parent
        return folder if (folder / "model_index.json").is_file() else None

    def _write_card(self, folder: Path) -> None:
        """Brings along the card the pipeline came with, or writes a short one; one that is there is kept.

        This and `_publish` are what works without the package. The package replaces both in its own classes, see
        `hub.py`: it renders a card from what is known of the model, and knows its own cards from those of people.
        """
        if (folder / "README.md").is_file():
            return
        (folder / "README.md").write_text(CARD, encoding="utf-8")
        source = self._source_folder()
        for name in ("README.md", "facts.json", "samples.png"):
            if source is not None and (source / name).is_file():
                shutil.copyfile(source / name, folder / name)

    def _publish(
        self,
        folder: Path,
        repo_id: str,
        *,
        commit_message: str,
        private: bool | None,
        token: str | bool | None,
        create_pr: bool,
        subfolder: str | None,
        revision: str | None,
    ) -> str:
        """Uploads a saved pipeline."""
        api = HfApi(token=token)
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        is_carded = api.file_exists(repo_id, "README.md", revision=revision)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            path_in_repo=subfolder,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
            ignore_patterns=["README.md"] if is_carded else None,
        )
