"""What the DDPM and DDIM schedulers share: noise schedules, timestep grids, coefficients of a step, forward process.

Notation; t counts from 0 (almost clean) to T - 1 (noise):

    ==============================  ===========================================================
    `num_train_timesteps`           T
    `betas[t]`, `alphas[t]`         β_t, α_t = 1 - β_t
    `alphas_cumprod[t]`             ᾱ_t = α_0 ... α_t (written α_t in the DDIM paper)
    `sample`, `prev_sample`         x_t, x_s, where s is the previous timestep (ᾱ_s = 1 if s < 0)
    `model_output`                  ε, x_0 or v, as `prediction_type` says
    `pred_original_sample`          x̂_0
    ==============================  ===========================================================

Papers: DDPM arXiv 2006.11239, Improved DDPM arXiv 2102.09672, v-prediction arXiv 2202.00512, zero terminal SNR
arXiv 2305.08891.
"""

import math
import numbers
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from diffusers.configuration_utils import ConfigMixin
from diffusers.schedulers.scheduling_utils import KarrasDiffusionSchedulers, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor

BetaSchedule = Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]
TimestepSpacing = Literal["leading", "linspace", "trailing"]
VarianceType = Literal["fixed_small", "fixed_small_log", "fixed_large", "fixed_large_log", "learned", "learned_range"]

# Config keys whose default differs from that of diffusers' schedulers.
OWN_DEFAULTS = ("beta_schedule", "timestep_spacing")
ZERO = torch.zeros((), dtype=torch.float32, device="cpu")

# Config keys that are numbers, with their bounds: above `low`, at most `high`. diffusers' own tests have a `beta_end`
# of 2. The tables of a schedule grow with T; the bound keeps a typing error from filling the memory.
MAX_TRAIN_TIMESTEPS = 100_000
NUMBER_BOUNDS = {
    "num_train_timesteps": (0, MAX_TRAIN_TIMESTEPS),
    "steps_offset": (-1, MAX_TRAIN_TIMESTEPS),
    "beta_start": (0, math.inf),
    "beta_end": (0, math.inf),
    "dynamic_thresholding_ratio": (0, 1),
    "clip_sample_range": (0, math.inf),
    "sample_max_value": (0, math.inf),
}
WHOLE_NUMBERS = ("num_train_timesteps", "steps_offset")
SWITCHES = ("clip_sample", "thresholding", "rescale_betas_zero_snr", "set_alpha_to_one")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise a `ValueError` that lists the allowed values if `value` is not one of them."""
    if value not in allowed:
        raise ValueError(f"`{name}` must be one of {', '.join(allowed)}; got {value!r}.")


def check_config(config: dict[str, Any]) -> None:
    """Raise a `ValueError` for the first key of a scheduler's config that has a wrong type or is out of range."""
    check_choice("prediction_type", config["prediction_type"], get_args(PredictionType))
    check_choice("timestep_spacing", config["timestep_spacing"], get_args(TimestepSpacing))
    check_choice("beta_schedule", config["beta_schedule"], get_args(BetaSchedule))
    for name, (low, high) in NUMBER_BOUNDS.items():
        value, is_whole = config[name], name in WHOLE_NUMBERS
        is_number = isinstance(value, numbers.Integral if is_whole else numbers.Real) and not isinstance(value, bool)
        if not is_number or not (low < value <= high and value < math.inf):
            bounds = f"above {low}" + (f", at most {high}" if high < math.inf else "")
            raise ValueError(f"`{name}` must be a {'whole' if is_whole else 'finite'} number {bounds}; got {value!r}.")
    for name in SWITCHES:
        if not isinstance(config.get(name, True), (bool, np.bool_)):
            raise ValueError(f"`{name}` must be True or False; got {config[name]!r}.")


def make_betas(
    beta_schedule: str,
    num_train_timesteps: int,
    beta_start: float,
    beta_end: float,
    trained_betas: np.ndarray | Sequence[float] | None,
) -> torch.Tensor:
    """Compute β_t, bit-equal to diffusers' betas of the same name.

    `squaredcos_cap_v2` is the cosine schedule (arXiv 2102.09672, eq. 17): ᾱ(u) = cos²(((u + s) / (1 + s)) π/2) with
    s = 0.008, β_t = min(1 - ᾱ((t + 1) / T) / ᾱ(t / T), 0.999). It is computed in float64 and cast once. In float32 its
    relative error reaches 1e-3.

    Returns:
        Betas of shape (T,), float32.
    """
    if trained_betas is not None:
        try:
            betas = torch.as_tensor(trained_betas, dtype=torch.float32, device="cpu").clone()
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"`trained_betas` must be a list of numbers ({error}).") from error
        if betas.ndim != 1 or not ((betas > 0) & (betas <= 1)).all():
            raise ValueError("`trained_betas` must be a list of numbers above 0, at most 1.")
        return betas
    if beta_schedule == "linear":
        return torch.linspace(beta_start, beta_end, num_train_timesteps, dtype=torch.float32)
    if beta_schedule == "scaled_linear":
        return torch.linspace(beta_start**0.5, beta_end**0.5, num_train_timesteps, dtype=torch.float32) ** 2
    if beta_schedule == "sigmoid":
        return (
            torch.sigmoid(torch.linspace(-6, 6, num_train_timesteps, dtype=torch.float32)) * (beta_end - beta_start)
            + beta_start
        )

    def alpha_bar(u: float) -> float:
        if beta_schedule == "squaredcos_cap_v2":
            return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2
        # laplace: the log-SNR follows a Laplace distribution
        snr = math.exp(-0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * math.fabs(0.5 - u) + 1e-6))
        return math.sqrt(snr / (1 + snr))

    levels = [alpha_bar(i / num_train_timesteps) for i in range(num_train_timesteps + 1)]
    return torch.tensor([min(1 - b / a, 0.999) for a, b in pairwise(levels)], dtype=torch.float32)


def rescale_zero_terminal_snr(betas: torch.Tensor) -> torch.Tensor:
    """Shift and scale √ᾱ so that x_{T-1} is pure noise and ᾱ_0 is unchanged (arXiv 2305.08891, algorithm 1).

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
    """Choose n of T timesteps (arXiv 2305.08891, table 2), strictly descending, within [0, T - 1], for n in [1, T].

    - trailing: round(i T / n) - 1 for i = n ... 1. Starts at T - 1. The n timesteps are a subset of the 2n timesteps.
    - linspace: round(i (T - 1) / (n - 1)) for i = n - 1 ... 0. Includes T - 1 and 0 (for n = 1: T - 1).
    - leading: i (T // n) + steps_offset for i = n - 1 ... 0. The offset is reduced if the first would exceed T - 1.

    Quotients are rounded half to even in integer arithmetic. With a float step, rounding errors would change the count
    or the grid.

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
    """Return coefficient * x as a new tensor."""
    if isinstance(coefficient, float):
        # `float * x` converts the float to a tensor first, which takes twice as long.
        return torch.add(ZERO, x, alpha=coefficient)
    return coefficient * x


def add_scaled_(y: torch.Tensor, coefficient: float | torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """Add coefficient * x to y in place, in one kernel, and return y."""
    if isinstance(coefficient, float):
        return y.add_(x, alpha=coefficient)
    return y.addcmul_(coefficient, x)


def split_output(model_output: torch.Tensor, sample: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Split the output of a model with learned variance, (B, 2C, ...), into prediction and variance, (B, C, ...) each.

    The variance is `None` if the output has the shape of `sample`.
    """
    if model_output.shape == sample.shape:
        return model_output, None
    if sample.ndim < 2 or model_output.shape != (sample.shape[0], 2 * sample.shape[1], *sample.shape[2:]):
        raise ValueError(
            f"`model_output` must have the shape of `sample`, {tuple(sample.shape)}, or twice its channels; "
            f"got {tuple(model_output.shape)}."
        )
    mean, variance = model_output.chunk(2, dim=1)  # 2 x (B, C, ...)
    return mean, variance


def in_float32(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor in half precision as float32, any other unchanged."""
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def draw_noise(like: torch.Tensor, generator: torch.Generator | list[torch.Generator] | None) -> torch.Tensor:
    """Draw standard normal noise of the shape, dtype and device of `like`; generator k of a list draws row k.

    It is drawn in float32, so that one seed gives the same noise in every dtype.
    """
    if isinstance(generator, list) and len(generator) != like.shape[0]:
        raise ValueError(f"A list of generators needs one for each of the {like.shape[0]} rows; got {len(generator)}.")
    noise: torch.Tensor = randn_tensor(like.shape, generator=generator, device=like.device, dtype=torch.float32)
    return noise.to(like.dtype)


@dataclass
class MiniSchedulerOutput(BaseOutput):  # type: ignore[misc]
    """The result of one step.

    Args:
        prev_sample: x_s of shape (B, C, H, W), the model's next input.
        pred_original_sample: x̂_0 of shape (B, C, H, W), clipped or thresholded as the config says.
    """

    prev_sample: torch.Tensor
    pred_original_sample: torch.Tensor | None = None


class MiniSchedulerBase(SchedulerMixin, ConfigMixin):  # type: ignore[misc]
    """Noise schedule, timestep grid and forward process of a variance-preserving diffusion.

    A subclass registers its config in `__init__`, calls `_set_up_noise_schedule`, sets `final_alpha_cumprod`, and
    implements `_lay_out_steps` and `step`.
    """

    _compatibles = [scheduler.name for scheduler in KarrasDiffusionSchedulers]
    order = 1
    final_alpha_cumprod: torch.Tensor

    def _set_up_noise_schedule(self) -> None:
        """Check the config and compute what depends on it alone: betas, ᾱ, the full chain of timesteps."""
        if self.config.beta_schedule == "cosine":  # a common name; saved is the one that all tools and versions know
            self.register_to_config(beta_schedule="squaredcos_cap_v2")
        config = self.config
        check_config(config)
        if "_use_default_values" in config:
            # Another scheduler's `from_config` drops the keys in this list and uses its own defaults for them. A key
            # with a default of our own must not be in it, or the swap would silently change the noise schedule.
            self.register_to_config(_use_default_values=sorted(set(config["_use_default_values"]) - set(OWN_DEFAULTS)))
        betas = make_betas(
            config.beta_schedule, config.num_train_timesteps, config.beta_start, config.beta_end, config.trained_betas
        )
        self.betas = rescale_zero_terminal_snr(betas) if config.rescale_betas_zero_snr else betas
        if not self.betas.isfinite().all():
            raise ValueError(
                "`rescale_betas_zero_snr` gives no finite betas with `num_train_timesteps`="
                f"{config.num_train_timesteps} and `beta_end`={config.beta_end}."
            )
        self.alphas = 1.0 - self.betas
        self.alphas_cumprod = torch.cumprod(self.alphas, dim=0)
        self.init_noise_sigma = 1.0
        self.custom_timesteps = False
        self.num_inference_steps: int | None = None
        self.timesteps = torch.arange(config.num_train_timesteps - 1, -1, -1)
        self._previous = torch.arange(len(self.betas)) - 1

    @classmethod
    def extract_init_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> tuple[dict[str, Any], ...]:
        """Keep the other scheduler's schedule and spacing in `from_config`, also where they are its defaults."""
        left_out = [key for key in config_dict.get("_use_default_values", []) if key not in OWN_DEFAULTS]
        parts: tuple[dict[str, Any], ...] = super().extract_init_dict(
            {**config_dict, "_use_default_values": left_out}, **kwargs
        )
        return parts

    def scale_model_input(self, sample: torch.Tensor, timestep: int | torch.Tensor | None = None) -> torch.Tensor:
        """Return `sample` unchanged. Other schedulers scale the model's input here."""
        return sample

    def set_timesteps(
        self,
        num_inference_steps: int | None = None,
        device: str | torch.device | None = None,
        timesteps: Sequence[int] | None = None,
    ) -> None:
        """Choose the timesteps of a sampling run and compute the coefficients of its steps.

        Args:
            num_inference_steps: Number of steps, in [1, T], spaced as `timestep_spacing` says.
            device: Device of `timesteps` and of the coefficients; the CPU if `None`.
            timesteps: The timesteps themselves, strictly descending, within [0, T - 1]. Give these or
                `num_inference_steps`, not both.

        Raises:
            TypeError: `num_inference_steps` is not an integer.
            ValueError: A value is out of range, both or neither of the two are given, or the number of
                `trained_betas` is not T.
        """
        total = self.config.num_train_timesteps
        if len(self.betas) != total:
            raise ValueError(
                f"`trained_betas` must have `num_train_timesteps`={total} entries; got {len(self.betas)}."
            )
        if (num_inference_steps is None) == (timesteps is None):
            raise ValueError("Give either `num_inference_steps` or `timesteps`, not both.")
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
            # A step leads to the next of the timesteps. For a t outside them, s follows diffusers' formula.
            self._previous = torch.arange(total) - total // len(chosen)
            self._previous[chosen] = torch.cat([chosen[1:], torch.tensor([-1])])
            self._lay_out_steps(device)

    def previous_timestep(self, timestep: int | torch.Tensor) -> torch.Tensor:
        """Return the timestep s that a step from `timestep` leads to, int64; negative for the last step."""
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
        # Round to float32 as diffusers does. Near 1 this rounding changes the fourth digit of β.
        alpha = (alpha_prod_t / alpha_prod_s).float().double()
        return alpha_prod_t, alpha_prod_s, 1 - alpha

    def _lay_out_steps(self, device: str | torch.device | None) -> None:
        """Compute the coefficients of the step from each t and pass them to `_store_steps`."""
        raise NotImplementedError

    def _store_steps(self, columns: NamedTuple, device: str | torch.device | None) -> None:
        """Store the coefficients, float64 columns (T,), as a table on `device` and as rows of floats."""
        # A step looks up its row by t and keeps no state. If t is on the host, floats make the cheapest kernels. If t
        # is on the device, a look-up there avoids a synchronisation.
        table = torch.stack([*columns])  # (columns, T)
        self._coefficients: Any = type(columns)
        self._table = table.float().to(device)
        self._rows: list[list[float]] = table.t().tolist()

    def _coefficients_at(self, timestep: int | torch.Tensor, sample: torch.Tensor) -> Any:
        """Look up the coefficients of the step from `timestep`: floats, or tensors that broadcast to `sample`."""
        on_host = not isinstance(timestep, torch.Tensor) or (timestep.is_cpu and timestep.numel() == 1)
        if on_host and not torch.compiler.is_compiling():
            t = operator.index(timestep)
            if not 0 <= t < len(self._rows):
                raise ValueError(f"`timestep` must be within [0, {len(self._rows) - 1}]; got {t}.")
            return self._coefficients._make(self._rows[t])
        if self._table.device != sample.device:
            self._table = self._table.to(sample.device)
        if isinstance(timestep, torch.Tensor):
            index = timestep.reshape(-1).to(sample.device, torch.long)
        else:  # an int while compiling: `as_tensor` would make it a constant and recompile for each t
            index = torch.full((1,), timestep, device=sample.device)
        # `table[:, t]` would read a 0-d tensor on the host.
        rows = self._table.index_select(1, index)  # (columns, 1 or B)
        return self._coefficients(*rows.reshape(*rows.shape, *[1] * (sample.ndim - 1)).unbind(0))

    def _x0_columns(self, alphas_cumprod: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the columns a, b of x̂_0 = a x_t + b model_output.

        - epsilon: x̂_0 = (x_t - √(1-ᾱ) ε) / √ᾱ (arXiv 2006.11239, eq. 15)
        - v_prediction: x̂_0 = √ᾱ x_t - √(1-ᾱ) v (arXiv 2202.00512, appendix D)
        """
        signal, noise = alphas_cumprod.sqrt(), (1 - alphas_cumprod).sqrt()
        if self.config.prediction_type == "epsilon":
            # At ᾱ = 0 (zero terminal SNR) ε holds no information about x_0. Use 0, the middle of the data range.
            inverse = torch.where(signal == 0, 0, 1 / signal)
            return inverse, -noise * inverse
        if self.config.prediction_type == "sample":
            return torch.zeros_like(signal), torch.ones_like(signal)
        return signal, -noise

    def _result(
        self, prev_sample: torch.Tensor, pred_original_sample: torch.Tensor, dtype: torch.dtype, return_dict: bool
    ) -> MiniSchedulerOutput | tuple[torch.Tensor, torch.Tensor]:
        """Return the two tensors of a step in `dtype`, as an output object or as a tuple."""
        if dtype != prev_sample.dtype:
            prev_sample, pred_original_sample = prev_sample.to(dtype), pred_original_sample.to(dtype)
        if not return_dict:
            return prev_sample, pred_original_sample
        return MiniSchedulerOutput(prev_sample=prev_sample, pred_original_sample=pred_original_sample)

    def _bound_x0_(self, pred_original_sample: torch.Tensor) -> torch.Tensor:
        """Threshold x̂_0, or clip it in place, as the config says. Return the result."""
        config = self.config
        if config.thresholding:
            return self._threshold_sample(pred_original_sample)
        if config.clip_sample:
            return pred_original_sample.clamp_(-config.clip_sample_range, config.clip_sample_range)
        return pred_original_sample

    def _threshold_sample(self, sample: torch.Tensor) -> torch.Tensor:
        """Apply dynamic thresholding to x̂_0 (arXiv 2205.11487, section 2.3).

        Each image is clipped to a quantile of its |x̂_0| and divided by it.

        Args:
            sample: x̂_0 of shape (B, C, H, W).

        Returns:
            The same shape and dtype, within [-1, 1].
        """
        flat = sample.flatten(1)
        if flat.dtype not in (torch.float32, torch.float64):
            flat = flat.float()  # torch has no quantile in half precision
        limit = torch.quantile(flat.abs(), self.config.dynamic_thresholding_ratio, dim=1, keepdim=True)  # (B, 1)
        # A limit below 1 would amplify the image. A limit of 1 is plain clipping.
        limit = limit.clamp(min=1, max=self.config.sample_max_value)
        return (flat.clamp(-limit, limit) / limit).reshape(sample.shape).to(sample.dtype)

    def _noise_levels(self, timesteps: int | torch.Tensor, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return √ᾱ_t and √(1-ᾱ_t), each (1 or B, 1, 1, 1), in the dtype and on the device of `like`."""
        if self.alphas_cumprod.device != like.device:
            self.alphas_cumprod = self.alphas_cumprod.to(like.device)
        index = torch.as_tensor(timesteps, device=like.device).reshape(-1).long()
        # Cast after computing 1 - ᾱ. In bfloat16 ᾱ rounds to 1 at small t, and the noise would be 0.
        alpha_prod = self.alphas_cumprod.index_select(0, index).reshape(-1, *[1] * (like.ndim - 1))
        return alpha_prod.sqrt().to(like.dtype), (1 - alpha_prod).sqrt().to(like.dtype)

    def add_noise(
        self, original_samples: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor
    ) -> torch.Tensor:
        """Return x_t = √ᾱ_t x_0 + √(1-ᾱ_t) ε, a draw from q(x_t | x_0) (arXiv 2006.11239, eq. 4).

        Args:
            original_samples: x_0, (B, C, H, W).
            noise: ε, (B, C, H, W).
            timesteps: t in [0, T - 1], not checked: one for all rows, 0-d or (1,), or one per row, (B,).

        Returns:
            x_t, (B, C, H, W).
        """
        signal_level, noise_level = self._noise_levels(timesteps, original_samples)
        return signal_level * original_samples + noise_level * noise

    def get_velocity(self, sample: torch.Tensor, noise: torch.Tensor, timesteps: int | torch.Tensor) -> torch.Tensor:
        """Return v = √ᾱ_t ε - √(1-ᾱ_t) x_0, the target of `v_prediction` (arXiv 2202.00512, appendix D).

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
