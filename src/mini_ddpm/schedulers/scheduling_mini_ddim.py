"""Deterministic to stochastic sampling in few steps (DDIM) on the cosine noise schedule.

The notation is that of `scheduling_base.py`. `eta` is η: 0 is deterministic, 1 has the variance of DDPM. A step adds
noise of standard deviation σ_t = η σ_t(1).

Paper: DDIM arXiv 2010.02502.
"""

from typing import Any, NamedTuple

import numpy as np
import torch
from diffusers.configuration_utils import register_to_config
from diffusers.schedulers.scheduling_utils import SchedulerMixin  # noqa: F401  # diffusers looks it up in this module

from .scheduling_base import (
    BetaSchedule,
    MiniSchedulerBase,
    MiniSchedulerOutput,
    PredictionType,
    TimestepSpacing,
    add_scaled_,
    draw_noise,
    in_float32,
    scaled,
    split_output,
)


class DDIMCoefficients(NamedTuple):
    """The coefficients of one DDIM step: floats, or tensors that broadcast to the sample.

    x̂_0 = from_sample · x_t + from_output · model_output. `signal` = √ᾱ_t, `signal_s` = √ᾱ_s,
    `noise_ratio` = √((1-ᾱ_s) / (1-ᾱ_t)), `variance_share` = σ_t(1)² / (1-ᾱ_s), `std` = σ_t(1).
    """

    from_sample: Any
    from_output: Any
    signal: Any
    signal_s: Any
    noise_ratio: Any
    variance_share: Any
    std: Any


class MiniDDIMScheduler(MiniSchedulerBase):
    """Sampler of DDIM (arXiv 2010.02502): deterministic at η = 0, as noisy as DDPM at η = 1, good in few steps.

    A drop-in replacement for diffusers' `DDIMScheduler`, with the same config keys, calls and results. It corrects
    these errors of that class: the previous timestep is the next entry of `timesteps`, also if the number of steps
    does not divide T; `trailing` spacing has exactly n steps; the last step adds no noise; half precision keeps the
    noise of the first timesteps; zero terminal SNR stays finite. The defaults are the cosine schedule and `trailing`
    spacing.

    Args:
        set_alpha_to_one: Whether the last step leads to ᾱ = 1, the clean image, instead of ᾱ_0.
        num_train_timesteps, beta_start, beta_end, beta_schedule, trained_betas: See [`MiniDDPMScheduler`].
        clip_sample, clip_sample_range, prediction_type: See [`MiniDDPMScheduler`].
        thresholding, dynamic_thresholding_ratio, sample_max_value: See [`MiniDDPMScheduler`].
        timestep_spacing, steps_offset, rescale_betas_zero_snr: See [`MiniDDPMScheduler`].

    Examples:
        >>> scheduler = MiniDDIMScheduler(prediction_type="v_prediction")
        >>> scheduler.set_timesteps(20)
        >>> for t in scheduler.timesteps:
        ...     sample = scheduler.step(model(sample, t), t, sample, eta=0.5).prev_sample
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "squaredcos_cap_v2", trained_betas: np.ndarray | list[float] | None = None,
        clip_sample: bool = True, set_alpha_to_one: bool = True, steps_offset: int = 0,
        prediction_type: PredictionType = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0, sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "trailing", rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        with torch.device("cpu"):  # whatever default device the user has set
            self._set_up_noise_schedule()
            self.final_alpha_cumprod = (
                torch.tensor(1.0, dtype=torch.float32) if set_alpha_to_one else self.alphas_cumprod[0]
            )
            self._lay_out_steps(None)

    def _get_variance(self, timestep: int | torch.Tensor, prev_timestep: int | torch.Tensor) -> torch.Tensor:
        """Return σ_t(1)² = (1-ᾱ_s)/(1-ᾱ_t) (1 - ᾱ_t/ᾱ_s) in float64 (arXiv 2010.02502, eq. 16)."""
        alpha_prod_t, alpha_prod_s, beta = self._levels(timestep, prev_timestep)
        return (1 - alpha_prod_s) / (1 - alpha_prod_t) * beta

    def _lay_out_steps(self, device: str | torch.device | None) -> None:
        """Compute the coefficients of the step from each t."""
        t = torch.arange(len(self._previous))
        alpha_prod_t, alpha_prod_s, _ = self._levels(t, self._previous)
        # The last step adds no noise, also without `set_alpha_to_one`.
        variance = torch.where(self._previous < 0, 0, self._get_variance(t, self._previous))
        columns = DDIMCoefficients(
            *self._x0_columns(alpha_prod_t),
            signal=alpha_prod_t.sqrt(),
            signal_s=alpha_prod_s.sqrt(),
            noise_ratio=((1 - alpha_prod_s) / (1 - alpha_prod_t)).sqrt(),
            variance_share=torch.where(variance == 0, 0, variance / (1 - alpha_prod_s)).clamp(max=1),
            std=variance.sqrt(),
        )
        self._store_steps(columns, device)

    def step(
        self, model_output: torch.Tensor, timestep: int | torch.Tensor, sample: torch.Tensor,
        eta: float = 0.0,
        use_clipped_model_output: bool = False,
        generator: torch.Generator | list[torch.Generator] | None = None,
        variance_noise: torch.Tensor | None = None,
        return_dict: bool = True,
    ) -> MiniSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Step from x_t to x_s = √ᾱ_s x̂_0 + √(1-ᾱ_s-σ²) ε̂ + σ z, σ = η σ_t(1) (arXiv 2010.02502, eq. 12 and 16).

        Args:
            model_output: The model's prediction, (B, C, H, W). The variance half of (B, 2C, H, W) is ignored.
            timestep: t, see [`MiniDDPMScheduler.step`].
            sample: x_t, (B, C, H, W).
            eta: η in [0, 1].
            use_clipped_model_output: Whether to recompute ε̂ from x_t and the clipped x̂_0.
            generator: Source of the noise z. Generator k of a list draws row k.
            variance_noise: z itself, (B, C, H, W). Give this or `generator`, not both.
            return_dict: Whether to return an output object.

        Returns:
            See [`MiniDDPMScheduler.step`].

        Raises:
            ValueError: `set_timesteps` was not called; η, the timestep or a shape is invalid; the number of generators
                is not B; or both `generator` and `variance_noise` are given.
        """
        # Compiled code skips this check, which would tie the graph to the number of steps.
        if not torch.compiler.is_compiling() and self.num_inference_steps is None:
            raise ValueError("The number of inference steps is unknown. Call `set_timesteps` before `step`.")
        if not 0 <= eta <= 1:
            raise ValueError(f"`eta` must be within [0, 1]; got {eta!r}.")
        c = self._coefficients_at(timestep, sample)
        model_output, _ = split_output(model_output, sample)
        prediction, x_t = in_float32(model_output), in_float32(sample)

        # 1. x̂_0, not clipped yet
        pred_original_sample = add_scaled_(scaled(c.from_sample, x_t), c.from_output, prediction)
        if use_clipped_model_output:
            pred_original_sample = self._bound_x0_(pred_original_sample)
        # 2. The direction pointing to x_t. Every prediction type has x_t = √ᾱ_t x̂_0 + √(1-ᾱ_t) ε̂, so
        # √(1-ᾱ_s-σ²) ε̂ = r (x_t - √ᾱ_t x̂_0) with r = √((1-ᾱ_s-σ²) / (1-ᾱ_t)) <= 1: no digits are lost.
        ratio = c.noise_ratio * (1 - eta**2 * c.variance_share) ** 0.5 if eta > 0 else c.noise_ratio
        prev_sample = add_scaled_(scaled(ratio, x_t), -ratio * c.signal, pred_original_sample)
        # 3. x_s without noise, from the clipped x̂_0
        if not use_clipped_model_output:
            pred_original_sample = self._bound_x0_(pred_original_sample)
        prev_sample = add_scaled_(prev_sample, c.signal_s, pred_original_sample)
        # 4. noise
        if eta > 0 and (isinstance(c.std, torch.Tensor) or c.std > 0):
            if variance_noise is None:
                variance_noise = draw_noise(model_output, generator)
            elif generator is not None:
                raise ValueError("Give either `generator` or `variance_noise`, not both.")
            prev_sample = add_scaled_(prev_sample, eta * c.std, variance_noise)

        return self._result(prev_sample, pred_original_sample, sample.dtype, return_dict)
