"""What the pipelines share: the checks of their arguments, the denoising loop, and the state of a call.

A pipeline object serves many threads at once. What a call changes (the scheduler's timesteps, the guidance, the
interrupt flag) belongs to that call alone.
"""

import copy
import inspect
import io
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from diffusers.utils import BaseOutput, make_image_grid, numpy_to_pil
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image, ImageOps

# The number of denoising steps of a call that gives none, unless the pipeline has its own.
DEFAULT_NUM_INFERENCE_STEPS = 20
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


def default_steps(pipe: Any) -> int:
    """Return the number of steps of a call that gives none: the pipeline's own, else 20, at most T."""
    steps = int(pipe.config.get("default_num_inference_steps", DEFAULT_NUM_INFERENCE_STEPS))
    return min(steps, int(pipe.scheduler.config.get("num_train_timesteps", steps)))


def default_eta(pipe: Any, num_inference_steps: int | None) -> float:
    """Return the η of a call that gives none: the pipeline's own if it gives no number of steps either, else 0."""
    return float(pipe.config.get("default_eta", 0.0)) if num_inference_steps is None else 0.0


def check_interval(name: str, interval: Any) -> tuple[float, float]:
    """Return two shares of the steps, 0 <= start < end <= 1; else raise a `ValueError` that names the argument."""
    is_pair = isinstance(interval, (tuple, list)) and len(interval) == 2
    start, end = interval if is_pair else (None, None)
    numbers = (int, float, np.number)
    if not (isinstance(start, numbers) and isinstance(end, numbers) and 0 <= start < end <= 1):
        raise ValueError(
            f"`{name}` must be two numbers with 0 <= start < end <= 1, but is {interval!r}. To turn guidance off, pass"
            " guidance_scale=1."
        )
    return float(start), float(end)


@dataclass
class MiniDDPMPipelineOutput(BaseOutput):  # type: ignore[misc]
    """The result of a pipeline call. A notebook shows its images where it is the last line of a cell.

    Attributes:
        images: B images: a list of `PIL.Image` ("pil"), an array (B, H, W, C) in [0, 1] ("np"), a tensor (B, C, H, W)
            in [0, 1] ("pt"), or x_0 itself, (B, C, H, W), about [-1, 1] and not clamped ("latent").
        latents_trajectory: With `return_trajectory=True`, x_T ... x_0 as the scheduler scales them,
            (steps + 1, B, C, H, W). A scheduler that evaluates the network several times per step counts each time.
        pred_original_samples: With `return_trajectory=True`, x̂_0 of each step, (steps, B, C, H, W): the scheduler's
            own, clipped if it clips. If the scheduler returns none: derived from the network's output, not clipped.
    """

    images: list[Any] | np.ndarray[Any, Any] | torch.Tensor
    latents_trajectory: torch.Tensor | None = None
    pred_original_samples: torch.Tensor | None = None

    def _repr_png_(self) -> bytes | None:
        """Return the first 64 images as one PNG, for a notebook; `None` if they are neither grey nor RGB."""
        images: Any = self.images[:64]
        if not isinstance(images, list):
            if isinstance(images, torch.Tensor):
                images = images.detach().float().cpu().permute(0, 2, 3, 1).numpy()  # (B, H, W, C)
            if images.shape[-1] not in (1, 3):
                return None
            is_latent = images.min() < 0  # in [-1, 1]; the others are in [0, 1]
            images = numpy_to_pil((images / 2 + 0.5 if is_latent else images).clip(0, 1))
        scale = max(1, 64 // max(images[0].size))
        tiles = [ImageOps.expand(ImageOps.scale(image.convert("RGB"), scale, 0), 2, "white") for image in images]
        columns = min(10, len(tiles))
        tiles += [Image.new("RGB", tiles[0].size, "white")] * (-len(tiles) % columns)
        file = io.BytesIO()
        make_image_grid(tiles, len(tiles) // columns, columns).save(file, format="png")
        return file.getvalue()


class CallAttribute:
    """An attribute that every running call of a pipeline has for itself.

    Inside a call, also in its callback, reading and setting concern that call. Outside, reading gives the value of the
    call that ended last; setting also changes all running calls, so that a stop button can interrupt them.
    """

    def __init__(self, default: Any) -> None:
        self.default = default

    def __set_name__(self, owner: type, name: str) -> None:
        self.name = name

    def __get__(self, pipe: Any, owner: type | None = None) -> Any:
        return self.default if pipe is None else pipe._call_values().get(self.name, self.default)

    def __set__(self, pipe: Any, value: Any) -> None:
        current = pipe._call_values()
        current[self.name] = value
        if current is pipe.__dict__:
            for other, values in tuple(pipe._running_calls.values()):
                if other is pipe:
                    values[self.name] = value


class DenoisingPipelineMixin:
    """The part of a pipeline that draws images. It is no `DiffusionPipeline`, since a file may define only one."""

    # The calls that run in this thread, innermost last, and those that run in any thread: (pipeline, values of the
    # call). They are attributes of the class, since loading a saved pipeline again executes its file again.
    _calls: ContextVar[tuple[tuple[Any, dict[str, Any]], ...]] = ContextVar("calls", default=())
    _running_calls: dict[int, tuple[Any, dict[str, Any]]] = {}

    _num_timesteps = CallAttribute(0)
    _step = CallAttribute(0)
    _interrupt = CallAttribute(False)

    # Attributes of `DiffusionPipeline`.
    unet: Any
    config: Any
    _callback_tensor_inputs: list[str]

    def _call_values(self) -> dict[str, Any]:
        """Return the values of this thread's running call of the pipeline, else the pipeline's own attributes."""
        for pipe, values in reversed(self._calls.get()):
            if pipe is self:
                return values  # type: ignore[no-any-return]
        return self.__dict__

    @contextmanager
    def _call(self, values: dict[str, Any]) -> Iterator[None]:
        """Run the block as a call with these values of its `CallAttribute`s, and with a scheduler of its own.

        At the end the values and the scheduler's timesteps become those of the pipeline, where they can be read.
        """
        shared = self.__dict__["scheduler"]
        # A compiled or patched step is bound to the object that it was made for.
        scheduler = shared if "step" in vars(shared) else copy.copy(shared)
        values = {"_interrupt": False, **values, "scheduler": scheduler}
        token = self._calls.set((*self._calls.get(), (self, values)))
        self._running_calls[id(values)] = (self, values)
        try:
            yield
        finally:
            self._calls.reset(token)
            del self._running_calls[id(values)]
            vars(shared).update(vars(values.pop("scheduler")))
            self.__dict__.update(values)

    @property
    def scheduler(self) -> Any:
        """The scheduler. Inside a call it is that call's copy, which holds the timesteps of the call."""
        values = self._call_values()
        if "scheduler" not in values:
            raise AttributeError("The pipeline has no scheduler yet.")
        return values["scheduler"]

    @scheduler.setter
    def scheduler(self, scheduler: Any) -> None:
        self.__dict__["scheduler"] = scheduler

    @property
    def num_timesteps(self) -> int:
        """Number of denoising steps of the call."""
        return self._num_timesteps  # type: ignore[no-any-return]

    @property
    def interrupt(self) -> bool:
        """Whether the call stops before its next step. A callback sets it by `pipe._interrupt = True`."""
        return self._interrupt  # type: ignore[no-any-return]

    def _register_levels(self, black_level: Any, white_level: Any) -> None:
        """Add the levels that are given to the configuration, as `_register_defaults` does."""
        black, white = 0 if black_level is None else black_level, 255 if white_level is None else white_level
        if not (type(black) is type(white) is int and 0 <= black < white <= 255):
            raise ValueError(
                "`black_level` and `white_level` must be whole numbers with 0 <= black_level < white_level <= 255, but"
                f" are {black!r} and {white!r}."
            )
        for name, value in (("black_level", black_level), ("white_level", white_level)):
            if value is not None:
                self.register_to_config(**{name: value})  # type: ignore[attr-defined]

    def _register_defaults(self, **defaults: Any) -> None:
        """Add the given defaults to the configuration. Other pipeline classes, which do not know them, get none."""
        for name, value in defaults.items():
            if value is not None:
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and value < float("inf")
                if name == "default_guidance_interval":
                    value = list(check_interval(name, value))
                elif name == "default_eta":
                    if not (is_number and value >= 0):
                        raise ValueError(f"`{name}` must be a number of at least 0, but is {value!r}.")
                elif not (is_number and value > 0):
                    raise ValueError(f"`{name}` must be a number above 0, but is {value!r}.")
                elif name == "default_num_inference_steps" and value != int(value):
                    raise ValueError(f"`{name}` must be a whole number, but is {value!r}.")
                self.register_to_config(**{name: value})  # type: ignore[attr-defined]

    def _predict(self, sample: torch.Tensor, timestep: torch.Tensor, **conditions: torch.Tensor) -> torch.Tensor:
        """Return the network's output for x_t, in x_t's dtype, (B, C or 2C, H, W)."""
        output: torch.Tensor = self.unet(sample.to(self.unet.dtype), timestep, **conditions).sample
        return output.to(sample.dtype)

    def _draw(
        self, batch_size: int, conditions: dict[str, torch.Tensor], values: dict[str, Any], options: dict[str, Any]
    ) -> MiniDDPMPipelineOutput | tuple[Any, ...]:
        """Draw images.

        `conditions` go to `_predict`, `values` are those of the call's `CallAttribute`s, `options` are the arguments
        of the call that all pipelines have, by name.
        """
        steps, output_type = options["num_inference_steps"], options["output_type"]
        eta = default_eta(self, steps) if options["eta"] is None else options["eta"]
        steps = default_steps(self) if steps is None else steps
        options = options | {"eta": eta, "generator": seeded_generator(options["generator"])}
        self._check_inputs(options | {"batch_size": batch_size, "num_inference_steps": steps})
        latents = self._prepare_latents(batch_size, options)
        conditions = {name: tensor.to(latents.device) for name, tensor in conditions.items()}
        with self._call(values):
            latents, trajectory, predictions = self._denoise(latents, conditions, steps, options)
        images: Any = latents
        if output_type != "latent":
            black, white = self.config.get("black_level", 0), self.config.get("white_level", 255)
            images = (latents / 2 + 0.5).clamp(black / 255, white / 255).float()
        if output_type in ("np", "pil"):
            images = images.permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, C)
        if output_type == "pil":
            images = self.numpy_to_pil(images)  # type: ignore[attr-defined]
        self.maybe_free_model_hooks()  # type: ignore[attr-defined]

        result = MiniDDPMPipelineOutput(images=images)
        if options["return_trajectory"]:
            result = MiniDDPMPipelineOutput(images, torch.stack(trajectory), torch.stack(predictions))
        return result if options["return_dict"] else result.to_tuple()

    def _check_inputs(self, options: dict[str, Any]) -> None:
        """Raise a `ValueError` of one line for the first argument that is invalid."""
        if getattr(self.scheduler, "alphas_cumprod", None) is None:
            raise ValueError(
                f"{type(self.scheduler).__name__} does not work with this pipeline: it has no `alphas_cumprod`. EDM"
                " and flow-matching schedulers scale the network's input and output differently from a DDPM. Use DDPM,"
                " DDIM or another of `pipe.scheduler.compatibles` that has it."
            )
        for name in ("batch_size", "num_inference_steps", "height", "width"):
            n = options[name]
            is_size_by_default = n is None and name in ("height", "width")
            if not is_size_by_default and (isinstance(n, bool) or not isinstance(n, (int, np.integer)) or n < 1):
                raise ValueError(f"`{name}` must be a whole number, at least 1, but is {n!r}.")
        steps, limit = options["num_inference_steps"], self.scheduler.config.num_train_timesteps
        if steps > limit:
            raise ValueError(
                f"`num_inference_steps` must be at most {limit}, the scheduler's `num_train_timesteps`,"
                f" but is {steps}."
            )
        eta, generator, batch_size = options["eta"], options["generator"], options["batch_size"]
        if not isinstance(eta, (int, float, np.number)) or not 0 <= eta < float("inf"):
            raise ValueError(f"`eta` must be a number of at least 0, usually 0 to 1, but is {eta!r}.")
        generators = generator if isinstance(generator, list) else [generator]
        if len(generators) != batch_size and generators is generator:
            raise ValueError(
                f"`generator` is a list of {len(generators)} for {batch_size} images. Give one seed or generator per"
                " image."
            )
        if generator is not None:
            for one in generators:
                if not isinstance(one, torch.Generator):
                    raise ValueError(
                        "`generator` must be a seed, such as 0, a torch.Generator, or a list with one of them per"
                        f" image, but is or holds {one!r}."
                    )
            device = self._execution_device  # type: ignore[attr-defined]
            # A generator on the CPU serves every device.
            places = {(one.device.type, one.device.index or 0) for one in generators}
            if places not in ({("cpu", 0)}, {(device.type, device.index or 0)}):
                found = ", ".join(sorted({str(one.device) for one in generators}))
                raise ValueError(
                    f"`generator` is on {found}, but must be on the CPU, torch.Generator().manual_seed(0), or on"
                    f" {device}, where the pipeline is."
                )
        if options["output_type"] not in OUTPUT_TYPES:
            raise ValueError(
                f"`output_type` must be one of {', '.join(OUTPUT_TYPES)}, but is {options['output_type']!r}."
            )
        callback, tensor_inputs = options["callback_on_step_end"], options["callback_on_step_end_tensor_inputs"]
        if callback is not None and not callable(callback):
            raise ValueError(f"`callback_on_step_end` must be a function, but is {callback!r}.")
        if not isinstance(tensor_inputs, (list, tuple)):
            raise ValueError(f"`callback_on_step_end_tensor_inputs` must be a list, but is {tensor_inputs!r}.")
        for name in tensor_inputs:
            if name not in self._callback_tensor_inputs:
                allowed = ", ".join(self._callback_tensor_inputs)
                raise ValueError(f"`callback_on_step_end_tensor_inputs` may hold {allowed}, but holds {name!r}.")

    def _prepare_latents(self, batch_size: int, options: dict[str, Any]) -> torch.Tensor:
        """Return standard normal noise, (B, C, H, W), drawn or checked, on the execution device.

        x_t is float32 in whichever precision the network runs. Rounding x_t to half precision at every step would add
        up to a visible background, and one seed would give different noise in each dtype.
        """
        config, height, width = self.unet.config, options["height"], options["width"]
        latents: torch.Tensor | None = options["latents"]
        if not isinstance(latents, torch.Tensor):
            size = config.sample_size
            if size is None and (height is None or width is None):
                raise ValueError("The network has no `sample_size`. Pass `height` and `width`.")
            default_height, default_width = size if isinstance(size, (list, tuple)) else (size, size)
        else:
            default_height, default_width = latents.shape[-2:] if latents.ndim == 4 else ("H", "W")
        shape = (
            batch_size,
            config.in_channels,
            default_height if height is None else height,
            default_width if width is None else width,
        )
        device = self._execution_device  # type: ignore[attr-defined]
        if latents is not None:
            latents = check_latents("`latents`", latents, shape).to(device=device, dtype=torch.float32)
            if not latents.isfinite().all():
                raise ValueError("`latents` must be finite, but holds NaN or infinity.")
            return latents
        noise: torch.Tensor = randn_tensor(shape, options["generator"], device, torch.float32)
        return noise

    def _denoise(
        self,
        latents: torch.Tensor,
        conditions: dict[str, torch.Tensor],
        num_inference_steps: int,
        options: dict[str, Any],
    ) -> tuple[torch.Tensor, list[torch.Tensor], list[torch.Tensor]]:
        """Run the loop from x_T, noise (B, C, H, W), to x_0. Return x_0, and if asked for every x_t and x̂_0."""
        scheduler = self.scheduler
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        if hasattr(scheduler, "set_begin_index"):
            # Without this, schedulers that keep a step counter look up the first timestep. A Karras grid can hold it
            # twice; they then take the second match, start one step late and run off the end.
            scheduler.set_begin_index(0)
        if type(scheduler).__name__ in ("HeunDiscreteScheduler", "KDPM2AncestralDiscreteScheduler"):
            # Half the slope of their correction comes from σ_1: an error e of x̂_0 moves x by e·σ_0 / 2σ_1.
            first, second = scheduler.sigmas[:2].tolist()
            if first > second**2:
                raise ValueError(
                    f"{type(scheduler).__name__} diverges here: its first step leads from σ = {first:.5g} to"
                    f" {second:.5g}. Create it with `timestep_spacing='leading'`, or use another of"
                    " `pipe.scheduler.compatibles`."
                )
        latents = latents * scheduler.init_noise_sigma
        channels = latents.shape[1]

        # Pass to a scheduler's step the arguments that it accepts.
        accepted = inspect.signature(scheduler.step).parameters
        names = ("eta", "use_clipped_model_output", "generator")
        step_kwargs = {name: options[name] for name in names if name in accepted}
        # A learned variance is in channels C..2C. Only the step of DDPM uses it, if configured to. Other schedulers
        # get the prediction alone. The config key does not tell them apart, since `from_config` keeps it.
        takes_variance = scheduler.config.get("variance_type") in ("learned", "learned_range") and (
            "predicted_variance" in inspect.signature(getattr(scheduler, "_get_variance", len)).parameters
        )

        values = self._call_values()
        values["_num_timesteps"] = len(scheduler.timesteps)
        callback, tensor_inputs = options["callback_on_step_end"], options["callback_on_step_end_tensor_inputs"]
        trajectory, predictions = [latents], []
        prediction = latents
        with self.progress_bar(total=len(scheduler.timesteps)) as progress_bar:  # type: ignore[attr-defined]
            for i, t in enumerate(scheduler.timesteps):
                if values["_interrupt"]:
                    break
                values["_step"] = i
                model_output = self._predict(scheduler.scale_model_input(latents, t), t, **conditions)
                prediction = model_output[:, :channels]  # (B, C, H, W)
                output = scheduler.step(model_output if takes_variance else prediction, t, latents, **step_kwargs)
                if options["return_trajectory"]:
                    pred_original_sample = output.get("pred_original_sample")
                    if pred_original_sample is None:
                        pred_original_sample = predict_x0(scheduler, prediction, i, t, latents)
                    predictions.append(pred_original_sample)
                latents = output.prev_sample

                if callback is not None:
                    state = {"latents": latents, **conditions}
                    changed = callback(self, i, t, {name: state[name] for name in tensor_inputs})
                    latents, conditions = self._take_changes(changed, latents, conditions, tensor_inputs)
                if options["return_trajectory"]:
                    trajectory.append(latents)
                progress_bar.update()
        # NaN stays in x_t until the last step, so one look at the end finds it, without waiting for a GPU in the loop.
        if not math.isfinite(latents.sum() + prediction.sum()):
            dtype = str(self.unet.dtype).removeprefix("torch.")
            raise ValueError(
                f"The images became NaN or infinite (a network in {dtype}, {type(scheduler).__name__}, step"
                f" {values['_step'] + 1} of {len(scheduler.timesteps)}). "
                + ("float16 overflows: use bfloat16 or float32, or check" if dtype == "float16" else "Check")
                + (" what `callback_on_step_end` returns, and" if callback is not None else "")
                + " the weights and the scheduler."
            )
        return latents, trajectory, predictions

    def _take_changes(
        self, changed: Any, latents: torch.Tensor, conditions: dict[str, torch.Tensor], seen: Sequence[str]
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return x_t and the conditions, checked, after a callback that returned `None` or a dict of new ones."""
        name = "`callback_on_step_end`"
        if changed is not None and not isinstance(changed, dict):
            raise ValueError(
                f"{name} must return a dict of new tensors or None, but returned a {type(changed).__name__}."
            )
        for key in changed or {}:
            if key not in ("latents", *conditions):
                raise ValueError(f"{name} returned {key!r}. It may return {', '.join(('latents', *conditions))}.")
        changed = {**{key: tensor for key, tensor in conditions.items() if key in seen}, **(changed or {})}
        if "latents" in changed:
            new = check_latents(f"`latents` that {name} returned", changed.pop("latents"), tuple(latents.shape))
            latents = new.to(device=latents.device, dtype=latents.dtype)
        new_conditions = {key: self._check_condition(key, new, conditions[key]) for key, new in changed.items()}
        return latents, {**conditions, **new_conditions}

    def _check_condition(self, name: str, value: Any, current: torch.Tensor) -> torch.Tensor:
        """Return the new value of a condition that a callback returned, checked, on the device of the current one."""
        raise NotImplementedError

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Create a pipeline of this class from the parts of another one. The weights are shared, not copied."""
        # diffusers shares a model only if the signature names its very class, and ours names the base class. It also
        # casts the shared weights to float32 unless given a dtype.
        kwargs = {"unet": pipeline.unet, **kwargs}
        if "torch_dtype" not in kwargs:
            kwargs.setdefault("dtype", pipeline.dtype)
        return super().from_pipe(pipeline, **kwargs)  # type: ignore[misc]


def check_latents(name: str, latents: Any, shape: tuple[Any, ...]) -> torch.Tensor:
    """Return latents that are a tensor of floats of this shape; else raise a `ValueError` that calls them `name`."""
    if not isinstance(latents, torch.Tensor) or not latents.is_floating_point():
        kind = latents.dtype if isinstance(latents, torch.Tensor) else type(latents).__name__
        raise ValueError(f"{name} must be a tensor of floats, but is {kind}.")
    if tuple(latents.shape) != shape:
        raise ValueError(f"{name} must have the shape {shape}, but has {tuple(latents.shape)}.")
    return latents


def seeded_generator(generator: Any) -> Any:
    """Return the argument `generator`, in which a seed s stands for `torch.Generator().manual_seed(s)`.

    Of a list, tuple or range of seeds and generators that is a list. Anything else is returned unchanged.
    """
    if isinstance(generator, (list, tuple, range)):
        return [seeded_generator(one) for one in generator]
    if isinstance(generator, bool) or not isinstance(generator, (int, np.integer)):
        return generator
    if not 0 <= generator < 2**64:
        raise ValueError(f"`generator` must be a seed of 0 to 2**64 - 1, but is or holds {generator}.")
    return torch.Generator("cpu").manual_seed(int(generator))


def refuse_unknown(call: Any, unnamed: tuple[Any, ...], unknown: dict[str, Any]) -> None:
    """Raise a `TypeError` for the first argument that a pipeline's call takes by name only, or does not have."""
    if not (unnamed or unknown):
        return
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    parameters = inspect.signature(call).parameters.values()
    _, first, *names = (parameter.name for parameter in parameters if parameter.kind not in variadic)
    if unnamed:
        value = unnamed[0] if isinstance(unnamed[0], (int, float)) else 20
        examples = [f"{name}={value}" for name in ("num_inference_steps", "guidance_scale") if name in names]
        raise TypeError(
            f"The pipeline's call takes only `{first}` without a name. Write the name of each other argument:"
            f" {' or '.join(examples)}."
            + (" Several labels are a list: [3, 1, 4]." if first == "class_labels" else "")
        )
    for name, value in unknown.items():
        hint = f"the arguments are {', '.join((first, *names))}"
        if "seed" in name:
            hint = f"for the same images again, pass generator={value!r}"
        raise TypeError(f"The pipeline's call has no argument `{name}`: {hint}.")


def predict_x0(
    scheduler: Any, prediction: torch.Tensor, i: int, timestep: torch.Tensor, sample: torch.Tensor
) -> torch.Tensor:
    """Return x̂_0 of step i, from x_t = α x_0 + σ ε, for a scheduler whose step returns none.

    PNDM, DPM-Solver++, UniPC and DEIS are such schedulers.
    """
    if hasattr(scheduler, "_sigma_to_alpha_sigma_t"):  # its grid may lie between whole timesteps
        alpha, sigma = scheduler._sigma_to_alpha_sigma_t(scheduler.sigmas[i])
    else:
        alpha_squared = scheduler.alphas_cumprod.to(timestep.device)[timestep]
        alpha, sigma = alpha_squared**0.5, (1 - alpha_squared) ** 0.5
    x0 = prediction
    if scheduler.config.prediction_type == "epsilon":
        x0 = (sample - sigma * prediction) / alpha
    elif scheduler.config.prediction_type == "v_prediction":
        x0 = alpha * sample - sigma * prediction
    return x0
