"""Class-conditional image generation with classifier-free guidance."""

from collections.abc import Callable, Sequence
from typing import Any, Never

import numpy as np
import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .pipeline_base import (
    CallAttribute,
    DenoisingPipelineMixin,
    MiniDDPMPipelineOutput,
    check_interval,
    refuse_unknown,
)
from .portable import PortablePipelineMixin


class MiniDDPMClassConditionalPipeline(DenoisingPipelineMixin, PortablePipelineMixin, DiffusionPipeline):  # type: ignore[misc]
    """Class-conditional image generation with [classifier-free guidance](https://arxiv.org/abs/2207.12598).

    Args:
        unet: The network, `MiniUNet2DModel` or any with the call and configuration of `UNet2DModel`, with
            `num_class_embeds` labels. The last label is the null label, "no class". A network that learned the
            variance too (`out_channels = 2 * in_channels`) works with every scheduler.
        scheduler: Any scheduler of a variance-preserving process: ours, or one of `scheduler.compatibles`.
        id2label: Class names by label. The string keys of JSON are accepted for integers.
        default_num_inference_steps: Default number of steps; a distilled network's own step count.
        default_eta: η of a call that gives neither η nor a number of steps, at least 0.
        default_guidance_scale: Default guidance scale; 1 (no guidance) if guidance was distilled into the weights.
        default_guidance_interval: Guidance interval of a call that gives neither an interval nor a guidance scale, two
            shares of the steps.
        black_level: The darkest level of the images, 0 to 255. Samples are clamped to it. Default: 0.
        white_level: The lightest level of the images; MNIST's is 253. Default: 255.

    Example:
        >>> from mini_ddpm import MiniDDPMClassConditionalPipeline, PRETRAINED
        >>> pipe = MiniDDPMClassConditionalPipeline.from_pretrained(PRETRAINED / "mnist-class-conditional")
        >>> images = pipe([3, 1, 4], num_inference_steps=20).images
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents", "class_labels"]

    _guidance_scale = CallAttribute(1.0)
    _guidance_interval = CallAttribute((0.0, 1.0))
    _num_guided_timesteps = CallAttribute(0)

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        id2label: dict[Any, Any] | None = None,
        default_num_inference_steps: int | None = None,
        default_eta: float | None = None,
        default_guidance_scale: float | None = None,
        default_guidance_interval: list[float] | tuple[float, float] | None = None,
        black_level: int | None = None,
        white_level: int | None = None,
    ) -> None:
        super().__init__()
        self._register_levels(black_level, white_level)
        self._register_defaults(
            default_num_inference_steps=default_num_inference_steps,
            default_eta=default_eta,
            default_guidance_scale=default_guidance_scale,
            default_guidance_interval=default_guidance_interval,
        )
        if id2label is not None:
            is_dict = isinstance(id2label, dict)
            bad = [label for label in id2label if not str(label).isdecimal()] if is_dict else [id2label]
            if bad:
                raise ValueError(
                    f"`id2label` must be a dict of names by label, {{0: 'cat'}}, but is or has {bad[0]!r:.80}."
                )
            id2label = {int(label): str(name) for label, name in id2label.items()}
        self.register_to_config(id2label=id2label)
        self.register_modules(unet=unet, scheduler=scheduler)

    @property
    def guidance_scale(self) -> float:
        """The guidance scale of the call, read at each step. A callback may set `pipe._guidance_scale`."""
        return self._guidance_scale  # type: ignore[no-any-return]

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the current step is guided: `guidance_scale > 1`, and the step is in the guidance interval."""
        start, end = self._guidance_interval
        return self._guidance_scale > 1 and start <= self._step / max(1, self._num_timesteps) < end  # type: ignore[no-any-return]

    @property
    def num_guided_timesteps(self) -> int:
        """Number of guided steps of the call. Each of them evaluates the network twice per image."""
        return self._num_guided_timesteps  # type: ignore[no-any-return]

    @torch.no_grad()
    def __call__(  # noqa: D417
        self,
        class_labels: int | str | Sequence[int | str] | torch.Tensor,
        *unnamed: Never,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        use_clipped_model_output: bool = True,
        height: int | None = None,
        width: int | None = None,
        latents: torch.Tensor | None = None,
        generator: int | torch.Generator | Sequence[int | torch.Generator] | None = None,
        return_trajectory: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **unknown: Any,
    ) -> MiniDDPMPipelineOutput | tuple[Any, ...]:
        """Draw one image for each label. The arguments without a description are those of [`MiniDDPMPipeline`]'s call.

        Args:
            class_labels: The classes: a label, a name out of `id2label`, a list of those, or an integer tensor (B,).
                Labels are 0 to `num_class_embeds - 2`. The last one, `num_class_embeds - 1`, means "no class".
            guidance_scale: s in uncond + s·(cond - uncond). Guidance is active above 1 and doubles the cost of a step.
                Default: `default_guidance_scale` of the pipeline's configuration, else 1.5.
            guidance_interval: Guide only the steps i of N with start <= i/N < end; 0 is noise, 1 the image. Early
                guidance reduces variety and late guidance has no effect; in between it decides which class an image
                becomes ([2404.07724](https://arxiv.org/abs/2404.07724)). Default: every step; if `guidance_scale` is
                not given either, `default_guidance_interval` of the pipeline's configuration.
            generator: Makes the result repeatable: a seed, a `torch.Generator`, or a list with one of them per image.

        Returns:
            [`MiniDDPMPipelineOutput`], or a tuple of its fields that are not `None`.

        Raises:
            ValueError: An argument is out of range, a label is unknown, the network takes no labels, the scheduler
                belongs to another process, or the images became NaN or infinite.
            TypeError: A label is neither an integer nor a name, there is no argument of this name, or an argument
                other than the first has no name.
        """
        # the arguments that the unconditional pipeline has too, by name
        own = ("self", "class_labels", "guidance_scale", "guidance_interval", "unnamed", "unknown")
        options = {name: value for name, value in locals().items() if name not in own}
        refuse_unknown(type(self).__call__, unnamed, unknown)
        labels = self.get_label_ids(class_labels)
        every_step = (0.0, 1.0)
        if guidance_interval is None:
            is_own = guidance_scale is None
            guidance_interval = self.config.get("default_guidance_interval", every_step) if is_own else every_step
        if guidance_scale is None:
            guidance_scale = float(self.config.get("default_guidance_scale", 1.5))
        if not isinstance(guidance_scale, (int, float, np.number)) or not np.isfinite(guidance_scale):
            raise ValueError(f"`guidance_scale` must be a finite number, but is {guidance_scale!r}.")
        interval = check_interval("guidance_interval", guidance_interval)
        values = {"_guidance_scale": guidance_scale, "_guidance_interval": interval, "_num_guided_timesteps": 0}
        return self._draw(len(labels), {"class_labels": torch.tensor(labels)}, values, options)

    def get_label_ids(self, class_labels: int | str | Sequence[int | str] | torch.Tensor) -> list[int]:
        """Return the labels as integers, one for each image, after the checks that `__call__` describes."""
        count = self.unet.config.get("num_class_embeds")
        if count is None:
            raise ValueError(
                "This network takes no class labels (its `num_class_embeds` is None). Use MiniDDPMPipeline for it."
            )
        if isinstance(class_labels, (torch.Tensor, np.ndarray)):
            class_labels = class_labels.tolist()
        if isinstance(class_labels, str) or not isinstance(class_labels, Sequence):
            class_labels = [class_labels]
        if not class_labels:
            raise ValueError("`class_labels` is empty. Give one label for each image.")

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

    def _check_condition(self, name: str, value: Any, current: torch.Tensor) -> torch.Tensor:
        """Return the labels that a callback returned as a tensor like the current ones, after the checks of a call."""
        labels = self.get_label_ids(value)
        if len(labels) != len(current):
            raise ValueError(f"`callback_on_step_end` returned {len(labels)} class labels for {len(current)} images.")
        return torch.tensor(labels, device=current.device)

    def _predict(self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        """Return the network's output for x_t, in x_t's dtype, (B, C or 2C, H, W), guided if the step is.

        Guidance extrapolates the prediction only. A learned variance is the conditional one.
        """
        if not self.do_classifier_free_guidance:
            return super()._predict(sample, timestep, **conditions)
        values = self._call_values()
        values["_num_guided_timesteps"] = values.get("_num_guided_timesteps", 0) + 1
        class_labels = conditions["class_labels"]
        null_labels = torch.full_like(class_labels, self.unet.config.num_class_embeds - 1)
        labels = torch.cat([class_labels, null_labels])
        output = super()._predict(torch.cat([sample, sample]), timestep, class_labels=labels)  # (2B, C or 2C, H, W)
        cond, uncond = output.chunk(2)
        channels = sample.shape[1]
        guided = uncond[:, :channels] + self._guidance_scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([guided, cond[:, channels:]], dim=1)
