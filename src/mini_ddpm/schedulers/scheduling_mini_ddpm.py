"""Ancestral sampling of denoising diffusion models (DDPM) on the cosine noise schedule.

Notation, here and in the papers; t counts from 0 (almost clean) to T - 1 (noise):

    ==============================  ===========================================================
    `num_train_timesteps`           T
    `betas[t]`, `alphas[t]`         β_t, α_t = 1 - β_t
    `alphas_cumprod[t]`             ᾱ_t = α_0 ... α_t, the squared share of the image in x_t
    `sample`, `prev_sample`         x_t, x_s, where s is the previous timestep (ᾱ_s = 1 if s < 0)
    `model_output`                  ε, x_0 or v, as `prediction_type` says
    `pred_original_sample`          x̂_0
    `variance_type`                 σ²_t: β̃_t (small), β_t (large) or learned between the two
    ==============================  ===========================================================

Papers: DDPM 2006.11239, Improved DDPM 2102.09672, v-prediction 2202.00512, zero terminal SNR 2305.08891.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

BETA_SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace")
PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
TIMESTEP_SPACINGS = ("leading", "linspace", "trailing")
# Keys whose default here is not the default of diffusers' schedulers.
OWN_DEFAULTS = ("beta_schedule", "timestep_spacing")
ZERO = torch.zeros((), device="cpu")
VARIANCE_TYPES = ("fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a `ValueError` that names the allowed values if `value` is none of them."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {value!r}.")


def make_betas(
    beta_schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained_betas: np.ndarray | Sequence[float] | None,
) -> torch.Tensor:
    """Lay out β_t, equal to the last bit to diffusers' betas of the same name.

    `squaredcos_cap_v2` is the cosine schedule (2102.09672 eq 17): ᾱ(u) = cos²(((u + s) / (1 + s)) π/2) with s = 0.008,
    β_t = min(1 - ᾱ((t + 1) / T) / ᾱ(t / T), 0.999). It is computed in float64 and cast once: in float32 it is off by
    up to 1e-3 relative.

    Returns:
        Betas of shape (T,), float32.
    """
    if trained_betas is not None:
        return torch.tensor(trained_betas, dtype=torch.float32)
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    if beta_schedule == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, num_train_timesteps)) * (beta_end - beta_start) + beta_start

    def alpha_bar(u: float) -> float:
        if beta_schedule == "squaredcos_cap_v2":
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        # laplace: the log-SNR follows a Laplace distribution
        snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    levels = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(levels)], dtype=torch.float32)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale √ᾱ so that the last step is pure noise and the first stays (2305.08891 algorithm 1).

    Args:
        betas: β_t of shape (T,).

    Returns:
        Betas of shape (T,); the last is 1, so ᾱ_{T-1} = 0.
    """
    root = torch.cumprod(1.0 - betas, dim=0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


def spaced_timesteps(
    timestep_spacing: str, num_train_timesteps: int, num_inference_steps: int, steps_offset: int
) -> torch.Tensor:
    """Choose n of T timesteps (2305.08891 table 2), strictly descending and within [0, T - 1] for every n in [1, T].

    - trailing: round(i T / n) - 1 for i = n ... 1; starts at T - 1. The n steps are among the 2n steps.
    - linspace: round(i (T - 1) / (n - 1)) for i = n - 1 ... 0; T - 1 and 0 included (n = 1: T - 1).
    - leading: i (T // n) + steps_offset for i = n - 1 ... 0; the offset shrinks where it would lead beyond T - 1.

    Quotients are rounded half to even in exact integer arithmetic: a float step adds up to another count or grid.

    Returns:
        Timesteps of shape (n,), int64, on the CPU.
    """

    def divide(numerator: torch.Tensor, denominator: int) -> torch.Tensor:
        quotient = numerator // denominator
        return quotient + (2 * (numerator % denominator) + quotient % 2 > denominator)

    countdown = torch.arange(num_inference_steps, 0, -1)
    if timestep_spacing == "trailing":
        return divide(countdown * num_train_timesteps, num_inference_steps) - 1
    if timestep_spacing == "linspace":
        if num_inference_steps == 1:
            return torch.tensor([num_train_timesteps - 1])
        return divide((countdown - 1) * (num_train_timesteps - 1), num_inference_steps - 1)
    timesteps = (countdown - 1) * (num_train_timesteps // num_inference_steps)
    return timesteps + min(steps_offset, num_train_timesteps - 1 - int(timesteps[0]))


def scaled(coefficient: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Return coefficient * x in a tensor of its own."""
    if isinstance(coefficient, float):
        return torch.add(
            ZERO, x, alpha=coefficient
        )  # float * x would make a tensor of the float first: twice the time
    return coefficient * x


def add_scaled_(y: torch.Tensor, coefficient: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add coefficient * x to y in place, in one kernel, and return y."""
    if isinstance(coefficient, float):
        return y.add_(x, alpha=coefficient)
    return y.addcmul_(coefficient, x)


def split_output(model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split what a model with learned variance returns, (B, 2C, ...), in two (B, C, ...); else there is no second."""
    if model_output.shape == sample.shape:
        return model_output, None
    if sample.ndim < 2 or model_output.shape != (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:]):
        raise ValueError(
            f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, or twice its channels; "
            f"got {tuple(model_output.shape)}."
        )
    mean, variance = model_output.chunk(2, dim=1)  # 2 x (B, C, ...)
    return mean, variance


def draw_noise(like: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Draw standard normal noise of the shape, dtype and device of `like`; with a list, row k from generator k."""
    if isinstance(generator, list) and len(generator) != like.shape[0]:
        raise ValueError(f"A list of generators needs one for each of the {like.shape[0]} rows; got {len(generator)}.")
    noise: torch.Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=like.dtype)
    return noise


@dataclass
class MiniDDPMSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """What one step of the sampler returns.

    Args:
        prev_sample: x_s of shape (B, C, H, W), the model's next input.
        pred_original_sample: x̂_0 of shape (B, C, H, W), clipped or thresholded as the config says.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class MiniDDPMScheduler(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Ancestral sampler of DDPM (2006.11239): one Gaussian step p(x_s | x_t) at a time.

    A drop-in for diffusers' `DDPMScheduler`: the same config keys, the same calls, equal results. It differs where
    that one errs: `trailing` spacing has exactly n steps, nothing is added at the last step, half precision keeps the
    noise of the first timesteps, zero terminal SNR is finite. Its defaults are the cosine schedule and `trailing`.

    Args:
        num_train_timesteps: T, at least 1.
        beta_start: first β of the linear and sigmoid schedules.
        beta_end: last β of the same.
        beta_schedule: `linear`, `scaled_linear`, `squaredcos_cap_v2` (cosine), `sigmoid` or `laplace`.
        trained_betas: T betas to use instead of a named schedule.
        variance_type: `fixed_small` (β̃_t), `fixed_large` (β_t), either with `_log`, which is the same here; `learned`
            or `learned_range` (2102.09672 eq 15) for a model with 2C output channels. An unknown one is refused by the
            first step that adds noise.
        clip_sample: clip x̂_0 to [-clip_sample_range, clip_sample_range].
        prediction_type: what the model predicts: `epsilon`, `sample` (x_0) or `v_prediction` (2202.00512 appendix D).
        thresholding: dynamic thresholding of x̂_0 (2205.11487) instead of clipping; not for latents.
        dynamic_thresholding_ratio: the quantile taken as threshold.
        clip_sample_range: see `clip_sample`.
        sample_max_value: upper bound of the threshold.
        timestep_spacing: `leading`, `linspace` or `trailing`.
        steps_offset: shift of `leading` timesteps, at least 0.
        rescale_betas_zero_snr: make x_{T-1} pure noise (2305.08891). Then ε says nothing of x_0 there, so with
            `epsilon` x̂_0 is 0 at T - 1; `v_prediction` is meant for it.

    Raises:
        ValueError: a value outside the allowed set.

    Examples:
        >>> scheduler = MiniDDPMScheduler(prediction_type="v_prediction")
        >>> scheduler.set_timesteps(50)
        >>> for t in scheduler.timesteps:
        ...     sample = scheduler.step(model(sample, t), t, sample).prev_sample
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1

    @register_to_config  # type: ignore[untyped-decorator]
    def __init__(
        self,
        num_train_timesteps: int = 1000,
        beta_start: float = 0.0001,
        beta_end: float = 0.02,
        beta_schedule: Literal[
            "linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"
        ] = "squaredcos_cap_v2",
        trained_betas: np.ndarray | list[float] | None = None,
        variance_type: Literal[
            "fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"
        ] = "fixed_small",
        clip_sample: bool = True,
        prediction_type: Literal["epsilon", "sample", "v_prediction"] = "epsilon",
        thresholding: bool = False,
        dynamic_thresholding_ratio: float = 0.995,
        clip_sample_range: float = 1.0,
        sample_max_value: float = 1.0,
        timestep_spacing: Literal["linspace", "leading", "trailing"] = "trailing",
        steps_offset: int = 0,
        rescale_betas_zero_snr: bool = False,
    ) -> None:
        self.variance_type = variance_type or "fixed_small"  # DPM-Solver's saved config says null
        with torch.device("cpu"):  # also where the user has set another default device
            self._set_up_noise_schedule()
            self.final_alpha_cumprod = torch.tensor(1.0)
            self._lay_out_steps(None)

    def _set_up_noise_schedule(self) -> None:
        """Check the config and make what depends on nothing but it: betas, ᾱ, the full chain of timesteps."""
        config = self.config
        check_choice("prediction_type", config.prediction_type, PREDICTION_TYPES)
        check_choice("timestep_spacing", config.timestep_spacing, TIMESTEP_SPACINGS)
        check_choice("beta_schedule", config.beta_schedule, BETA_SCHEDULES)
        if config.num_train_timesteps < 1 or config.steps_offset < 0:
            raise ValueError(
                "`num_train_timesteps` must be at least 1 and `steps_offset` at least 0; "
                f"got {config.num_train_timesteps!r} and {config.steps_offset!r}."
            )
        if "_use_default_values" in config:
            # Another scheduler's `from_config` drops the keys listed here and takes ITS defaults, so a key whose
            # default is ours alone must not be listed, or the swap would change the noise schedule without a word.
            self.register_to_config(_use_default_values=sorted(set(config["_use_default_values"]) - set(OWN_DEFAULTS)))
        betas = make_betas(
            config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end, config.trained_betas
        )
        self.betas = rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(config.num_train_timesteps - 1, -1, -1)
        self._previous = torch.arange(len(self.betas)) - 1

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """Keep the other scheduler's schedule and spacing in `from_config`, even where it left them at its default."""
        left_out = [key for key in config_dict.get("_use_default_values", []) if key not in OWN_DEFAULTS]
        parts: tuple[dict[str, Any], ...] = super().extract_init_dict(
            {**config_dict, "_use_default_values": left_out}, **kwargs
        )
        return parts

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample` as it is: this sampler's x_t is what the model sees. Other schedulers scale it here."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps to sample at and lay out each step's coefficients on `device`.

        Args:
            num_inference_steps: how many, in [1, T], spaced as `timestep_spacing` says.
            device: where `timesteps` and the coefficients go; the CPU if None.
            timesteps: the timesteps themselves instead, strictly descending, within [0, T - 1].

        Raises:
            TypeError: `num_inference_steps` is not an integer.
            ValueError: a value out of range, both or none of the two given, or betas of another length than T.
        """
        total = self.config.num_train_timesteps
        if len(self.betas) != total:
            raise ValueError(
                f"`trained_betas` must have `num_train_timesteps`={total} entries; got {len(self.betas)}."
            )
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either `num_inference_steps` or `timesteps`, one of the two.")
        if timesteps is not None:
            chosen = torch.as_tensor(timesteps, device="cpu")
            if chosen.ndim != 1 or len(chosen) == 0 or chosen.is_floating_point():
                raise ValueError(f"`timesteps` must be a non-empty list of integers; got {timesteps!r}.")
            chosen = chosen.long()
            if (chosen.diff() >= 0).any() or chosen[0] >= total or chosen[-1] < 0:
                raise ValueError(
                    f"`timesteps` must be strictly descending and within [0, {total - 1}]; got {chosen.tolist()}."
                )
        else:
            if isinstance(num_inference_steps, bool) or not isinstance(num_inference_steps, numbers.Integral):
                raise TypeError(f"`num_inference_steps` must be an integer; got {num_inference_steps!r}.")
            if not 1 <= num_inference_steps <= total:
                raise ValueError(
                    f"`num_inference_steps` must be within [1, {total}], the timesteps trained on; "
                    f"got {num_inference_steps}."
                )
            with torch.device("cpu"):
                chosen = spaced_timesteps(
                    self.config.timestep_spacing, total, int(num_inference_steps), self.config.steps_offset
                )
        self.custom_timesteps = timesteps is not None
        self.num_inference_steps = len(chosen)
        self.timesteps = chosen.to(device)
        with torch.device("cpu"):
            # A step goes to the next of the timesteps; from a t that is not among them as far as diffusers' goes.
            self._previous = torch.arange(total) - total // len(chosen)
            self._previous[chosen] = torch.cat([chosen[1:], torch.tensor([-1])])
            self._lay_out_steps(device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """Return the timestep s that a step from `timestep` arrives at, below 0 at the end; 0-d, int64."""
        return self._previous[timestep]

    def _levels(
        self, timestep: int | torch.Tensor, prev_timestep: int | torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return ᾱ_t, ᾱ_s (`final_alpha_cumprod` where s < 0) and β = 1 - ᾱ_t/ᾱ_s of the whole step in float64."""
        alphas_cumprod = self.alphas_cumprod.cpu().double()
        prev = torch.as_tensor(prev_timestep).cpu()
        final = self.final_alpha_cumprod.cpu().double()
        alpha_prod_t, alpha_prod_s = alphas_cumprod[timestep], alphas_cumprod[prev.clamp(min=0)]
        alpha_prod_s = torch.where(prev >= 0, alpha_prod_s, final)
        # Rounded as diffusers rounds it, to be equal to it: near 1 the digits of float32 decide the fourth digit of β.
        alpha = (alpha_prod_t / alpha_prod_s).float().double()
        return alpha_prod_t, alpha_prod_s, 1 - alpha

    def _store_steps(self, columns: list[torch.Tensor], device: str | torch.device | None) -> None:
        """Keep the coefficients, `columns` of shape (T,) in float64, as a table on `device` and as rows of floats."""
        # A step looks its row up by t and keeps no state. Floats make the cheapest kernels where the host knows t;
        # where it does not, a look-up on the device spares the synchronisation.
        table = torch.stack(columns)  # (columns, T)
        self._table = table.float().to(device)
        self._rows: list[list[float]] = table.t().tolist()

    def _coefficients_at(self, timestep: int | torch.Tensor, sample: torch.Tensor) -> Sequence[float | torch.Tensor]:
        """Look up the coefficients of the step from `timestep`: floats, or tensors that broadcast to `sample`."""
        on_host = not isinstance(timestep, torch.Tensor) or (timestep.is_cpu and timestep.numel() == 1)
        if on_host and not torch.compiler.is_compiling():
            t = operator.index(timestep)
            if not 0 <= t < len(self._rows):
                raise ValueError(f"`timestep` must be within [0, {len(self._rows) - 1}]; got {t}.")
            return self._rows[t]
        if self._table.device != sample.device:
            self._table = self._table.to(sample.device)
        if isinstance(timestep, torch.Tensor):
            index = timestep.reshape(-1).to(sample.device, torch.long)
        else:  # an int while compiling; `as_tensor` would make each a constant and compile anew
            index = torch.full((1,), timestep, device=sample.device)
        # Not `table[:, t]`: indexing with a 0-d tensor reads it on the host.
        rows = self._table.index_select(1, index)  # (columns, 1 or B)
        return rows.reshape(*rows.shape, *[1] * (sample.ndim - 1)).unbind(0)

    def _x0_columns(self, alphas_cumprod: torch.Tensor) -> list[torch.Tensor]:
        """Return the two columns a, b of x̂_0 = a x_t + b model_output.

        - epsilon: x̂_0 = (x_t - √(1-ᾱ) ε) / √ᾱ (2006.11239 eq 15)
        - v_prediction: x̂_0 = √ᾱ x_t - √(1-ᾱ) v (2202.00512 appendix D)
        """
        signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        if self.config.prediction_type == "epsilon":
            # Where ᾱ = 0 (zero terminal SNR) ε says nothing of x_0: take 0, the middle of the data's range.
            inverse = torch.where(signal == 0, 0, 1 / signal)
            return [inverse, -noise * inverse]
        if self.config.prediction_type == "sample":
            return [torch.zeros_like(signal), torch.ones_like(signal)]
        return [signal, -noise]

    def _bound_x0_(self, pred_original_sample: torch.Tensor) -> torch.Tensor:
        """Threshold x̂_0, or clip it in place, as the config says."""
        config = self.config
        if config.thresholding:
            return self._threshold_sample(pred_original_sample)
        if config.clip_sample:
            return pred_original_sample.clamp_(-config.clip_sample_range, config.clip_sample_range)
        return pred_original_sample

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Threshold x̂_0 dynamically (2205.11487 section 2.3): clip each image to its quantile of |x̂_0|, scale to 1.

        Args:
            sample: x̂_0 of shape (B, C, H, W).

        Returns:
            The same shape and dtype, within [-1, 1].
        """
        flat = sample.flatten(1)
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()  # no quantile in half precision
        limit = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)  # (B, 1)
        # A limit below 1 would amplify; at 1 this is plain clipping.
        limit = limit.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-limit, limit) / limit).reshape(sample.shape).to(sample.dtype)

    def _variance_bounds(self, timestep: int | torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the variance's bounds in float64: β̃_t = (1-ᾱ_s)/(1-ᾱ_t) β_t (2006.11239 eq 7) and β_t."""
        alpha_prod_t, alpha_prod_s, beta = self._levels(timestep, self.previous_timestep(timestep))
        return ((1 - alpha_prod_s) / (1 - alpha_prod_t) * beta).clamp(min=1e-20), beta  # its logarithm must exist

    def _get_variance(
        self,
        t: int | torch.Tensor,
        predicted_variance: torch.Tensor | None = None,
        variance_type: str | None = None,
    ) -> torch.Tensor:
        """Return what `variance_type` (the config's if None) names, in diffusers' sense.

        That is σ² as a rule, but σ for `fixed_small_log`, log σ² for `fixed_large_log` and `learned_range`.
        """
        variance_type = variance_type or self.variance_type
        check_choice("variance_type", variance_type, VARIANCE_TYPES)
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
        """Make the row of coefficients for a step from each t; the posterior mean is 2006.11239 eq 7."""
        t = torch.arange(len(self._previous))
        alpha_prod_t, alpha_prod_s, beta = self._levels(t, self._previous)
        low, _ = self._variance_bounds(t)
        if self.variance_type.startswith("learned"):
            std = torch.ones_like(beta)  # the model's own factor comes in `step`
        else:
            std = (beta if self.variance_type.startswith("fixed_large") else low).sqrt()
        self._store_steps(
            [
                *self._x0_columns(alpha_prod_t),
                alpha_prod_s.sqrt() * beta / (1 - alpha_prod_t),
                (1 - beta).sqrt() * (1 - alpha_prod_s) / (1 - alpha_prod_t),
                torch.where(self._previous < 0, 0, std),  # the last step arrives at the image: no noise
                low.log(),
                beta.log(),
            ],
            device,
        )

    def step(
        self,
        model_output: torch.Tensor,
        timestep: int | torch.Tensor,
        sample: torch.Tensor,
        generator: torch.Generator | list[torch.Generator] | None = None,
        return_dict: bool = True,
    ) -> MiniDDPMSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Draw x_s from p(x_s | x_t) = N(c_0 x̂_0 + c_t x_t, σ²_t) (2006.11239 eq 4 and 7).

        Args:
            model_output: what the model predicts, (B, C, H, W), or (B, 2C, H, W) with its variance.
            timestep: t in [0, T - 1], an int or a tensor, 0-d or (B,). With a tensor on the device nothing is read
                back to the host, and `torch.compile` compiles once for all t.
            sample: x_t, (B, C, H, W).
            generator: source of the noise; with a list, row k draws from generator k.
            return_dict: return the output class instead of a tuple.

        Returns:
            x_s and x̂_0, the latter bounded as the config says, in the dtype of `sample`; half precision is computed in
            float32. The last step adds no noise.

        Raises:
            ValueError: timestep, a shape or `variance_type` is not allowed, or a list of generators has another
                length than B.
        """
        from_sample, from_output, x0_weight, sample_weight, std, log_low, log_high = self._coefficients_at(
            timestep, sample
        )
        model_output, predicted_variance = split_output(model_output, sample)
        prediction, x_t = model_output, sample
        if sample.dtype in (torch.float16, torch.bfloat16):
            prediction, x_t = prediction.float(), x_t.float()

        # 1. x̂_0, bounded
        pred_original_sample = self._bound_x0_(add_scaled_(scaled(from_sample, x_t), from_output, prediction))
        # 2. the posterior's mean
        prev_sample = add_scaled_(scaled(sample_weight, x_t), x0_weight, pred_original_sample)
        # 3. noise
        if isinstance(std, torch.Tensor) or std > 0:
            check_choice("variance_type", self.variance_type, VARIANCE_TYPES)
            if self.variance_type.startswith("learned"):
                if predicted_variance is None:
                    raise ValueError(
                        f"`variance_type`={self.variance_type!r} needs a model with twice the channels of `sample`, "
                        f"{tuple(sample.shape)}; got {tuple(model_output.shape)}."
                    )
                predicted_variance = predicted_variance.to(x_t.dtype)
                if self.variance_type == "learned":
                    std = std * predicted_variance.clamp(min=0).sqrt()
                else:  # 2102.09672 eq 15
                    fraction = (predicted_variance + 1) / 2
                    std = std * (0.5 * (fraction * log_high + (1 - fraction) * log_low)).exp()
            prev_sample = add_scaled_(prev_sample, std, draw_noise(model_output, generator))

        if sample.dtype != prev_sample.dtype:
            prev_sample, pred_original_sample = prev_sample.to(sample.dtype), pred_original_sample.to(sample.dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return MiniDDPMSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _noise_levels(self, timesteps: int | torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return √ᾱ_t and √(1-ᾱ_t), each (1 or B, 1, 1, 1), in the dtype and on the device of `like`."""
        if self.alphas_cumprod.device != like.device:
            self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        index = torch.as_tensor(timesteps, device=like.device).reshape(-1).long()
        # Cast after 1 - ᾱ: in bfloat16 ᾱ is 1 at small t, and the noise would be 0.
        alpha_prod = self.alphas_cumprod.index_select(0, index).reshape(-1, *[1] * (like.ndim - 1))
        return alpha_prod.sqrt().to(like.dtype), (1 - alpha_prod).sqrt().to(like.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Draw x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε from q(x_t | x_0) (2006.11239 eq 4).

        Args:
            original_samples: x_0, (B, C, H, W).
            noise: ε, (B, C, H, W).
            timesteps: t within [0, T - 1], which the caller sees to; one for all, 0-d or (1,), or one per row, (B,).

        Returns:
            x_t, (B, C, H, W).
        """
        signal_level, noise_level = self._noise_levels(timesteps, original_samples)
        return signal_level * original_samples + noise_level * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Return v = √ᾱ_t ε - √(1-ᾱ_t) x_0 (2202.00512 appendix D), the target of `v_prediction`.

        Args:
            sample: x_0, (B, C, H, W).
            noise: ε, (B, C, H, W).
            timesteps: as in `add_noise`.

        Returns:
            v, (B, C, H, W).
        """
        signal_level, noise_level = self._noise_levels(timesteps, sample)
        return signal_level * noise - noise_level * sample

    def __len__(self) -> int:
        """Return T."""
        return int(self.config.num_train_timesteps)
