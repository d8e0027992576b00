"""Unconditional image generation: the denoising loop around a U-Net and any scheduler of the DDPM process."""

from collections.abc import Callable, Sequence
from typing import Any, Never

import torch
from diffusers import DiffusionPipeline, ModelMixin, SchedulerMixin

from .pipeline_base import DenoisingPipelineMixin, MiniDDPMPipelineOutput, refuse_unknown
from .portable import PortablePipelineMixin


class MiniDDPMPipeline(DenoisingPipelineMixin, PortablePipelineMixin, DiffusionPipeline):  # type: ignore[misc]
    """Unconditional image generation by iterative denoising ([DDPM](https://arxiv.org/abs/2006.11239)).

    Args:
        unet: The network, `MiniUNet2DModel` or any with the call and configuration of `UNet2DModel`. A network that
            learned the variance too (`out_channels = 2 * in_channels`) works with every scheduler.
        scheduler: Any scheduler of a variance-preserving process: ours, or one of `scheduler.compatibles`.
        default_num_inference_steps: Default number of steps; a distilled network's own step count.
        default_eta: η of a call that gives neither η nor a number of steps, at least 0.
        black_level: The darkest level of the images, 0 to 255. Samples are clamped to it. Default: 0.
        white_level: The lightest level of the images; MNIST's is 253. Default: 255.

    Example:
        >>> from mini_ddpm import MiniDDPMPipeline, PRETRAINED
        >>> pipe = MiniDDPMPipeline.from_pretrained(PRETRAINED / "mnist")
        >>> images = pipe(batch_size=4, num_inference_steps=20).images
    """

    model_cpu_offload_seq = "unet"
    _callback_tensor_inputs = ["latents"]

    def __init__(
        self,
        unet: ModelMixin,
        scheduler: SchedulerMixin,
        default_num_inference_steps: int | None = None,
        default_eta: float | None = None,
        black_level: int | None = None,
        white_level: int | None = None,
    ) -> None:
        super().__init__()
        self._register_levels(black_level, white_level)
        self._register_defaults(default_num_inference_steps=default_num_inference_steps, default_eta=default_eta)
        self.register_modules(unet=unet, scheduler=scheduler)

    @torch.no_grad()
    def __call__(  # noqa: D417
        self,
        batch_size: int = 1,
        *unnamed: Never,
        num_inference_steps: int | None = None,
        eta: float | None = None,
        use_clipped_model_output: bool = True,
        generator: int | torch.Generator | Sequence[int | torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        height: int | None = None,
        width: int | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        return_trajectory: bool = False,
        **unknown: Any,
    ) -> MiniDDPMPipelineOutput | tuple[Any, ...]:
        """Draw `batch_size` images.

        Args:
            batch_size: Number of images B, at least 1.
            num_inference_steps: Denoising steps, 1 to the scheduler's `num_train_timesteps`. Default:
                `default_num_inference_steps` of the pipeline's configuration, else 20.
            eta: DDIM's η: 0 is deterministic, 1 has the noise of DDPM. Schedulers without η ignore it. Default:
                0; if `num_inference_steps` is not given either, `default_eta` of the pipeline's configuration.
            use_clipped_model_output: Whether DDIM recomputes ε from x_t and the clipped x̂_0. diffusers' default keeps
                the network's ε, which is inconsistent with a clipped x̂_0. The error accumulates over the steps, and
                guided images drift off their class. Other schedulers ignore this argument.
            generator: Makes the result repeatable: a seed, 0 to 2**64 - 1, or a `torch.Generator`. A seed s means
                `torch.Generator().manual_seed(s)`, on every device. With a list of B seeds or generators each image
                depends on its own alone, so the same seed gives the same image in every batch.
            latents: The initial noise, (B, C, H, W), standard normal. Default: drawn with `generator`.
            height: Height H in pixels. Default: the network's `sample_size`.
            width: Width W in pixels. Default: the network's `sample_size`.
            output_type: "pil", "np", "pt" or "latent", see [`MiniDDPMPipelineOutput`].
            return_dict: Whether to return an output object instead of a tuple.
            callback_on_step_end: Called after each step as `callback(pipe, step, timestep, tensors)`. It may return a
                dict of new tensors. `pipe._interrupt = True` in the callback ends the loop. `pipe.scheduler` is the
                call's own copy of the scheduler.
            callback_on_step_end_tensor_inputs: Names of the tensors for the callback, out of
                `pipe._callback_tensor_inputs`.
            return_trajectory: Whether to return x_t and x̂_0 of each step too.

        Returns:
            [`MiniDDPMPipelineOutput`], or a tuple of its fields that are not `None`.

        Raises:
            ValueError: An argument is out of range, the scheduler belongs to another process, or the images became
                NaN or infinite.
            TypeError: There is no argument of this name, or an argument other than the first has no name.
        """
        # all arguments but the first, by name
        options = {
            name: value for name, value in locals().items() if name not in ("self", "batch_size", "unnamed", "unknown")
        }
        refuse_unknown(type(self).__call__, unnamed, unknown)
        return self._draw(batch_size, {}, {}, options)
