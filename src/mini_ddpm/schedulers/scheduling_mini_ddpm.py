"""Ancestral sampling of denoising diffusion models (DDPM) on the cosine noise schedule.

The notation is that of `scheduling_base.py`. σ²_t is the variance of a step. `variance_type` chooses it: β̃_t (small),
β_t (large), or a learned value between the two.

Papers: DDPM arXiv 2006.11239, Improved DDPM arXiv 2102.09672.
"""

from typing import Any, NamedTuple, get_args

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
    VarianceType,
    add_scaled_,
    check_choice,
    draw_noise,
    in_float32,
    scaled,
    split_output,
)


class DDPMCoefficients(NamedTuple):
    """The coefficients of one ancestral step: floats, or tensors that broadcast to the sample.

    x̂_0 = from_sample · x_t + from_output · model_output; the mean of x_s is x0_weight · x̂_0 + sample_weight · x_t; its
    standard deviation is `std`. A learned variance lies between `log_low` = log β̃_t and `log_high` = log β_t.
    """

    from_sample: Any
    from_output: Any
    x0_weight: Any
    sample_weight: Any
    std: Any
    log_low: Any
    log_high: Any


class MiniDDPMScheduler(MiniSchedulerBase):
    """Ancestral sampler of DDPM (arXiv 2006.11239): one Gaussian step p(x_s | x_t) at a time.

    A drop-in replacement for diffusers' `DDPMScheduler`, with the same config keys, calls and results. It corrects
    these errors of that class: `trailing` spacing has exactly n steps, the last step adds no noise, half precision
    keeps the noise of the first timesteps, and zero terminal SNR stays finite. The defaults are the cosine schedule
    and `trailing` spacing.

    Args:
        num_train_timesteps: T, at least 1.
        beta_start: First β of the linear, scaled_linear and sigmoid schedules.
        beta_end: Last β of these schedules.
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2`, `sigmoid` or `laplace`. `cosine` is another word
            for `squaredcos_cap_v2`, which is what the config then holds.
        trained_betas: T betas that replace the named schedule.
        variance_type: `fixed_small` (β̃_t) or `fixed_large` (β_t), with or without `_log`, which has no effect here;
            `learned` or `learned_range` (arXiv 2102.09672, eq. 15) for a model with 2C output channels. The first step
            that adds noise refuses an unknown value.
        clip_sample: Whether to clip x̂_0 to [-clip_sample_range, clip_sample_range].
        prediction_type: What the model predicts: `epsilon`, `sample` (x_0) or `v_prediction` (arXiv 2202.00512,
            appendix D).
        thresholding: Whether to apply dynamic thresholding to x̂_0 (arXiv 2205.11487) instead of clipping. Not for
            latent diffusion.
        dynamic_thresholding_ratio: The quantile that becomes the threshold.
        clip_sample_range: See `clip_sample`.
        sample_max_value: Upper bound of the threshold.
        timestep_spacing: `leading`, `linspace` or `trailing`.
        steps_offset: Shift of `leading` timesteps, at least 0.
        rescale_betas_zero_snr: Whether to make x_{T-1} pure noise (arXiv 2305.08891). ε then holds no information
            about x_0 at T - 1, so with `epsilon` x̂_0 is 0 there. Use `v_prediction`.

    Raises:
        ValueError: A value is outside the allowed set.

    Examples:
        >>> scheduler = MiniDDPMScheduler(prediction_type="v_prediction")
        >>> scheduler.set_timesteps(50)
        >>> for t in scheduler.timesteps:
        ...     sample = scheduler.step(model(sample, t), t, sample).prev_sample
    """

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000, beta_start: float = 0.0001, beta_end: float = 0.02,
        beta_schedule: BetaSchedule = "squaredcos_cap_v2", trained_betas: np.ndarray | list[float] | None = None,
        variance_type: VarianceType = "fixed_small",
        clip_sample: bool = True, prediction_type: PredictionType = "epsilon",
        thresholding: bool = False, dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0, sample_max_value: float = 1.0,
        timestep_spacing: TimestepSpacing = "trailing", steps_offset: int = 0, rescale_betas_zero_snr: bool = False,
    ) -> None:  # fmt: skip
        self.variance_type = variance_type or "fixed_small"  # a saved config of DPM-Solver has null here
        with torch.device("cpu"):  # whatever default device the user has set
            self._set_up_noise_schedule()
            self.final_alpha_cumprod = torch.tensor(1.0, dtype=torch.float32)
            self._lay_out_steps(None)

    def _variance_bounds(self, timestep: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the bounds of the variance in float64: β̃_t = (1-ᾱ_s)/(1-ᾱ_t) β_t (arXiv 2006.11239, eq. 7), β_t."""
        alpha_prod_t, alpha_prod_s, beta = self._levels(timestep, self.previous_timestep(timestep))
        return ((1 - alpha_prod_s) / (1 - alpha_prod_t) * beta).clamp(min=1e-20), beta  # above 0 for the logarithm

    def _get_variance(
        self,
        t: int | torch.Tensor,
        predicted_variance: torch.Tensor | None = None,
        variance_type: str | None = None,
    ) -> torch.Tensor:
        """Return the variance of `variance_type` (the config's if `None`) in the unit that diffusers uses.

        The unit is σ², except σ for `fixed_small_log`, and log σ² for `fixed_large_log` and `learned_range`.
        """
        variance_type = variance_type or self.variance_type
        check_choice("variance_type", variance_type, get_args(VarianceType))
        low, high = (bound.float() for bound in self._variance_bounds(t))
        if variance_type.startswith("learned"):
            if predicted_variance is None:
                raise ValueError(f"`variance_type`={variance_type!r} needs the variance that the model predicts.")
            if variance_type == "learned":
                return predicted_variance
            fraction = (predicted_variance + 1) / 2
            return fraction * high.log() + (1 - fraction) * low.log()
        return {
            "fixed_small": low,
            "fixed_small_log": low.sqrt(),
            "fixed_large": high,
            "fixed_large_log": high.log(),
        }[variance_type]

    def _lay_out_steps(self, device: str | torch.device | None) -> None:
        """Compute the coefficients of the step from each t. The posterior mean is arXiv 2006.11239, eq. 7."""
        t = torch.arange(len(self._previous))
        alpha_prod_t, alpha_prod_s, beta = self._levels(t, self._previous)
        low, _ = self._variance_bounds(t)
        if self.variance_type.startswith("learned"):
            std = torch.ones_like(beta)  # `step` multiplies by the model's value
        else:
            std = (beta if self.variance_type.startswith("fixed_large") else low).sqrt()
        columns = DDPMCoefficients(
            *self._x0_columns(alpha_prod_t),
            x0_weight=alpha_prod_s.sqrt() * beta / (1 - alpha_prod_t),
            sample_weight=(1 - beta).sqrt() * (1 - alpha_prod_s) / (1 - alpha_prod_t),
            std=torch.where(self._previous < 0, 0, std),  # the last step adds no noise
            log_low=low.log(),
            log_high=beta.log(),
        )
        self._store_steps(columns, device)

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MiniSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draw x_s from p(x_s | x_t) = N(c_0 x̂_0 + c_t x_t, σ²_t) (arXiv 2006.11239, eq. 4 and 7).

        Args:
            model_output: The model's prediction, (B, C, H, W), or (B, 2C, H, W) with a variance.
            timestep: t in [0, T - 1], an int or a tensor, 0-d or (B,). A tensor on the device is never read on the
                host, and `torch.compile` compiles once for all t.
            sample: x_t, (B, C, H, W).
            generator: Source of the noise. Generator k of a list draws row k.
            return_dict: Whether to return an output object instead of a tuple.

        Returns:
            x_s and x̂_0 in the dtype of `sample`, x̂_0 clipped or thresholded as the config says. Half precision is
            computed in float32. The last step adds no noise.

        Raises:
            ValueError: The timestep, a shape or `variance_type` is invalid, or the number of generators is not B.
        """
        c = self._coefficients_at(timestep, sample)
        model_output, predicted_variance = split_output(model_output, sample)
        prediction, x_t = in_float32(model_output), in_float32(sample)

        # 1. x̂_0, bounded
        pred_original_sample = self._bound_x0_(add_scaled_(scaled(c.from_sample, x_t), c.from_output, prediction))
        # 2. the mean of the posterior
        prev_sample = add_scaled_(scaled(c.sample_weight, x_t), c.x0_weight, pred_original_sample)
        # 3. noise
        std = c.std
        if isinstance(std, torch.Tensor) or std > 0:
            check_choice("variance_type", self.variance_type, get_args(VarianceType))
            if self.variance_type.startswith("learned"):
                if predicted_variance is None:
                    raise ValueError(
                        f"`variance_type`={self.variance_type!r} needs a model with twice the channels of `sample`, "
                        f"{tuple(sample.shape)}; got {tuple(model_output.shape)}."
                    )
                predicted_variance = predicted_variance.to(x_t.dtype)
                if self.variance_type == "learned":
                    std = std * predicted_variance.clamp(min=0).sqrt()
                else:  # arXiv 2102.09672, eq. 15
                    fraction = (predicted_variance + 1) / 2
                    std = std * (0.5 * (fraction * c.log_high + (1 - fraction) * c.log_low)).exp()
            prev_sample = add_scaled_(prev_sample, std, draw_noise(model_output, generator))

        return self._result(prev_sample, pred_original_sample, sample.dtype, return_dict)
