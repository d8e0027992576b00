"""Export a pipeline as one graph that runs without this package: for onnxruntime, or for `torch.export`.

    noise (B, C, H, W), class labels (B,) ──► N steps of network, guidance and DDIM ──► images (B, C, H, W) in [0, 1]

An ONNX graph holds the network once. Its steps are one `Loop` over the timesteps, whose body is the network, the
guidance and the scheduler's step. So file size and export time do not depend on the number of steps. The network and
the step are traced from the pipeline's own code.

The weights are initializers of the loop's body, not of the graph around it: only there onnxruntime takes them for
constants and lays them out for its fastest convolutions (1.4 times as fast).
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import logging
import os
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch

from .files import atomic_write
from .hub.card import holds_weights
from .hub.facts import read_facts
from .options import default_steps, require, resolve_guidance
from .pipelines.portable import weights_checksums
from .schedulers.scheduling_mini_ddim import MiniDDIMScheduler

WeightsDtype = Literal["fp32", "fp16"]
SUFFIXES = (".onnx", ".pt2")
OPSET = 20

MAX_DIFFERENCE = {"fp32": 2e-5, "fp16": 0.02}
"""The largest difference to the pipeline's own result that `export_sampler` accepts, by `dtype`."""

Arrays = dict[str, Any]


@dataclass(frozen=True)
class ExportedSampler:
    """A file that `export_sampler` wrote and compared with the pipeline.

    Attributes:
        path: The file.
        num_bytes: Its size.
        num_inference_steps: Number of steps of the sampler in it; `None` for the network alone.
        difference: The largest difference to the pipeline's result, at batch sizes 1 and 3.
        seconds: Seconds that the file takes for one image, with torch's number of threads.
        pipeline_seconds: Seconds that the pipeline takes for it.
    """

    path: Path
    num_bytes: int
    num_inference_steps: int | None
    difference: float
    seconds: float
    pipeline_seconds: float


def export_sampler(
    pipe: Any,
    path: str | Path,
    *,
    num_inference_steps: int | None = None,
    guidance_scale: float | None = None,
    guidance_interval: tuple[float, float] | None = None,
    dtype: WeightsDtype = "fp32",
    unet_only: bool = False,
) -> ExportedSampler:
    """Write the whole sampler of a pipeline, or its network alone, as one graph, and compare it with the pipeline.

    The graph of a sampler has the inputs `noise` (B, C, H, W) float32, standard normal, and, of a class-conditional
    pipeline, `class_labels` (B,) int64. Its output is `images` (B, C, H, W) float32, in [0, 1]. B is free, C, H and W
    are those of the network's configuration. The graph of a network has the inputs `sample`, `timestep` (B,) int64 and
    `class_labels`, and the output `model_output` (B, C or 2C, H, W).

    The file's metadata (ONNX `metadata_props`; `metadata.json` in a `.pt2`) tells steps, guidance, class names,
    licence, measured figures and the version of this package.

    Args:
        pipe: A pipeline of this package with a `MiniDDIMScheduler`, in float32 on the CPU. It is sampled with eta 0.
        path: The file to write: `.onnx` for onnxruntime, or `.pt2` for `torch.export.load`.
        num_inference_steps: Number of steps. Default: the pipeline's own, else 20.
        guidance_scale: Scale of classifier-free guidance; 1 turns it off. Default: the pipeline's own.
        guidance_interval: Guide only between these two shares of the steps. Default: the pipeline's own if
            `guidance_scale` is not given, else every step.
        dtype: Precision in which an ONNX file stores the weights. It computes in float32 either way, so weights that
            were float16 before lose nothing.
        unet_only: Whether to export the network alone, for a denoising loop of your own.

    Returns:
        The file, its size, its difference to the pipeline, and the times of both.

    Raises:
        ImportError: onnx, onnxscript or onnxruntime is not installed.
        OSError: The file cannot be written.
        ValueError: An argument is invalid, the scheduler is not deterministic, or the result differs from the
            pipeline's by more than `MAX_DIFFERENCE`. No file is written then.
    """
    path = Path(os.path.expanduser(path))
    _check_arguments(pipe, path, dtype)
    sampler = None
    if unet_only:
        given = {"num_inference_steps": num_inference_steps, "guidance_scale": guidance_scale}
        for name, value in (given | {"guidance_interval": guidance_interval}).items():
            if value is not None:
                raise ValueError(f"{name}={value}: the network alone takes no steps and no guidance. Omit it.")
    else:
        sampler = _Sampler(pipe, num_inference_steps, guidance_scale, guidance_interval)
    model: torch.nn.Module = _Network(pipe.unet) if sampler is None else sampler
    run: Callable[[Arrays], Any]
    examples, reference = _example_call(pipe, sampler)
    metadata = _metadata(pipe, sampler, dtype)
    with atomic_write(path) as file, torch.no_grad():
        if path.suffix == ".pt2":
            program = _trace(model, examples(2))
            with _quiet():
                torch.export.save(program, file, extra_files={"metadata.json": json.dumps(metadata, indent=2)})
                run = _torch_program(file)
        else:
            _save_onnx(pipe, sampler, examples(2), dtype, metadata, file)
            run = _onnx_session(file)
        difference, seconds, pipeline_seconds = _compare(run, reference, examples)
        if not difference <= MAX_DIFFERENCE[dtype]:  # also of NaN
            raise ValueError(
                f"{path} was not written: its result differs from the pipeline's by {difference:.2g}, more than"
                f" {MAX_DIFFERENCE[dtype]:g} ({dtype})."
            )
        size = file.stat().st_size
    steps = None if sampler is None else len(sampler.timesteps)
    return ExportedSampler(path, size, steps, difference, seconds, pipeline_seconds)


def _check_arguments(pipe: Any, path: Path, dtype: str) -> None:
    if path.suffix not in SUFFIXES:
        raise ValueError(f"path={str(path)!r} must end in {' or '.join(SUFFIXES)}.")
    if path.is_dir():
        raise ValueError(f"path={str(path)!r} is a folder. Give a file in it.")
    if dtype not in get_args(WeightsDtype):
        raise ValueError(f"dtype={dtype!r} must be one of {', '.join(get_args(WeightsDtype))}.")
    if path.suffix == ".pt2" and dtype != "fp32":
        raise ValueError(f"dtype={dtype!r}: a .pt2 file is written in fp32. Write an .onnx file.")
    if path.suffix == ".onnx":
        require("export", "onnx", "onnxscript", "onnxruntime")
    if not isinstance(pipe.scheduler, MiniDDIMScheduler):
        raise ValueError(
            f"scheduler={type(pipe.scheduler).__name__} cannot be exported: only DDIM without added noise is one"
            " deterministic graph. Use --scheduler ddim, or in Python"
            " pipe.scheduler = MiniDDIMScheduler.from_config(pipe.scheduler.config)."
        )
    if pipe.unet.dtype != torch.float32 or pipe.unet.device.type != "cpu":
        raise ValueError(
            f"The network is in {str(pipe.unet.dtype).removeprefix('torch.')} on {pipe.unet.device}. Move it first:"
            ' pipe.to("cpu", torch.float32).'
        )
    if pipe.unet.config.get("sample_size") is None:
        raise ValueError("The network has no `sample_size`, and a graph has a fixed height and width. Set it first.")


class _Network(torch.nn.Module):
    """The network, with the tensor of its output instead of an object."""

    def __init__(self, unet: Any) -> None:
        super().__init__()
        self.unet = unet

    def forward(
        self, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor | None = None
    ) -> torch.Tensor:
        conditions = {} if class_labels is None else {"class_labels": class_labels}
        return self.unet(sample, timestep, **conditions).sample  # type: ignore[no-any-return]


class _Step(torch.nn.Module):
    """One step of the scheduler, as the pipeline calls it."""

    def __init__(self, scheduler: Any) -> None:
        super().__init__()
        self.scheduler = scheduler

    def forward(self, model_output: torch.Tensor, timestep: torch.Tensor, sample: torch.Tensor) -> torch.Tensor:
        prediction = model_output[:, : sample.shape[1]]  # a learned variance is not used without noise
        output = self.scheduler.step(prediction, timestep, sample, eta=0.0, use_clipped_model_output=True)
        return output.prev_sample  # type: ignore[no-any-return]


class _Sampler(torch.nn.Module):
    """All steps of the pipeline, one after the other, with its settings.

    Attributes:
        options: The arguments of the pipeline's call for the same images.
        timesteps: The timesteps, descending.
        guided: For each step, whether it is guided.
        levels: The darkest and the lightest value of the images, in [0, 1].
    """

    def __init__(
        self, pipe: Any, steps: int | None, scale: float | None, interval: tuple[float, float] | None
    ) -> None:
        super().__init__()
        steps = default_steps(pipe) if steps is None else steps
        guidance = resolve_guidance(pipe, type(pipe).__name__, scale, interval)
        self.options = guidance | {"num_inference_steps": steps, "eta": 0.0}
        self.network = _Network(pipe.unet)
        self.null_label = (pipe.unet.config.get("num_class_embeds") or 1) - 1
        self.scale: float = self.options.get("guidance_scale", 1.0)
        values = {"_guidance_scale": self.scale, "_guidance_interval": self.options.get("guidance_interval", (0, 1))}
        with pipe._call(values | {"_num_timesteps": steps}):
            scheduler = pipe.scheduler
            scheduler.set_timesteps(steps)
            self.guided = []
            for i in range(steps):
                pipe._step = i
                self.guided.append(bool(getattr(pipe, "do_classifier_free_guidance", False)))
        self.timesteps = [int(t) for t in scheduler.timesteps]
        self.step = _Step(scheduler)
        config = pipe.config
        self.levels = (config.get("black_level", 0) / 255, config.get("white_level", 255) / 255)

    def forward(self, noise: torch.Tensor, class_labels: torch.Tensor | None = None) -> torch.Tensor:
        sample, batch, both_labels = noise, noise.shape[0], None
        if class_labels is not None:
            both_labels = torch.cat([class_labels, torch.full_like(class_labels, self.null_label)])
        for t, guided in zip(self.timesteps, self.guided, strict=True):
            timestep = torch.tensor(t)
            if guided:
                both = self.network(torch.cat([sample, sample]), timestep, both_labels)
                conditional, unconditional = both[:batch], both[batch:]  # `chunk` would freeze the batch size
                output = unconditional + self.scale * (conditional - unconditional)
            else:
                output = self.network(sample, timestep, class_labels)
            sample = self.step(output, timestep, sample)
        return (sample / 2 + 0.5).clamp(*self.levels)


def _example_call(pipe: Any, sampler: _Sampler | None) -> tuple[Callable[[int], Arrays], Callable[[Arrays], Any]]:
    """Return a function that gives inputs of a batch size, and one that gives the pipeline's result for inputs."""
    config = pipe.unet.config
    size = config.sample_size
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    classes = config.get("num_class_embeds")

    def examples(batch: int) -> Arrays:
        random = np.random.default_rng(0)
        noise = random.standard_normal((batch, config.in_channels, height, width), dtype=np.float32)
        labels = {} if classes is None else {"class_labels": np.arange(batch, dtype=np.int64) % max(classes - 1, 1)}
        if sampler is not None:
            return {"noise": noise, **labels}
        count = pipe.scheduler.config.num_train_timesteps
        return {"sample": noise, "timestep": random.integers(count, size=batch, dtype=np.int64), **labels}

    def reference(arrays: Arrays) -> Any:
        tensors: Arrays = {name: torch.from_numpy(array) for name, array in arrays.items()}
        if sampler is None:
            return _Network(pipe.unet)(**tensors).numpy()
        latents = tensors.pop("noise")
        if not tensors:
            tensors["batch_size"] = len(latents)
        return pipe(**tensors, **sampler.options, latents=latents, output_type="pt").images.numpy()

    return examples, reference


def _metadata(pipe: Any, sampler: _Sampler | None, dtype: str) -> dict[str, str]:
    """Return what the file tells of itself. Values that are no texts are JSON."""
    folder = pipe._source_folder()
    if folder is not None and not holds_weights(folder, pipe.unet):
        folder = None  # what is known of the folder does not hold for these weights
    facts = {} if folder is None else read_facts(folder)
    scheduler = pipe.scheduler.config
    values: dict[str, Any] = {
        "mini_ddpm_version": importlib.metadata.version("mini-ddpm"),
        "license": facts.get("license"),
        "description": facts.get("description"),
        "dtype": dtype,
        "class_names": list(names.values()) if (names := pipe.config.get("id2label")) else None,
        "evaluation": facts.get("evaluation"),
        "weights_sha256": None if folder is None else sorted(weights_checksums(folder).values()),
        "prediction_type": scheduler.prediction_type,
    }
    if classes := pipe.unet.config.get("num_class_embeds"):
        values |= {"null_label": classes - 1}
    if sampler is not None:
        values |= {"scheduler": type(pipe.scheduler).__name__, **sampler.options}
        values |= {"timesteps": sampler.timesteps}
    else:
        values["alphas_cumprod"] = [float(f"{a:.9g}") for a in pipe.scheduler.alphas_cumprod.tolist()]
    return {
        name: value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
        for name, value in values.items()
        if value not in (None, "", [])
    }


def _compare(
    run: Callable[[Arrays], Any], reference: Callable[[Arrays], Any], examples: Callable[[int], Arrays]
) -> tuple[float, float, float]:
    """Return the largest difference of two functions at batch sizes 1 and 3, and the seconds of each at batch size 1.

    A graph in which the exporter froze the batch size fails here.
    """
    differences = [float(np.abs(run(arrays) - reference(arrays)).max()) for arrays in map(examples, (1, 3))]

    def seconds(function: Callable[[Arrays], Any]) -> float:
        arrays, times = examples(1), []
        for _ in range(3):
            started = time.perf_counter()
            function(arrays)
            times.append(time.perf_counter() - started)
        return min(times)

    return float(np.max(differences)), seconds(run), seconds(reference)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hide what the exporter tells its own authors: deprecations in torch, and that torchvision is not installed."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _trace(model: torch.nn.Module, arrays: Arrays) -> Any:
    """Trace a module with a free batch size, from examples of batch size 2. A 0-d example has no batch.

    `Dim.AUTO` lets networks of diffusers pass, which ask whether the batch is large. `_compare` finds a frozen batch.
    """
    tensors = {name: torch.from_numpy(np.asarray(array)) for name, array in arrays.items()}
    shapes = {name: {0: torch.export.Dim.AUTO} if tensor.ndim else None for name, tensor in tensors.items()}
    with _quiet():
        return torch.export.export(model, (), tensors, dynamic_shapes=shapes, strict=False)


# ---- ONNX ---------------------------------------------------------------------------------------------------------


def _onnx_graph(model: torch.nn.Module, arrays: Arrays, output: str) -> Any:
    """Return the ONNX model of a module, without the exporter's notes (a quarter of the file)."""
    program = _trace(model, arrays)
    with _quiet():
        exported = torch.onnx.export(program, dynamo=True, optimize=True, verbose=False, opset_version=OPSET,
                                     input_names=list(arrays), output_names=[output])  # fmt: skip
    assert exported is not None
    proto = exported.model_proto  # made anew by each access
    graph = proto.graph
    graph.ClearField("value_info")
    for item in (proto, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        item.ClearField("doc_string")
        item.ClearField("metadata_props")
    for node in graph.node:
        node.ClearField("name")
    for value in (*graph.input, *graph.output):
        for axis in value.type.tensor_type.shape.dim[:1]:
            axis.dim_param = "batch"
    return proto


def _save_onnx(
    pipe: Any, sampler: _Sampler | None, arrays: Arrays, dtype: str, metadata: dict[str, str], file: Path
) -> None:
    """Write the ONNX file of a sampler, or of the network alone."""
    import onnx

    noise = arrays["sample" if sampler is None else "noise"]
    labels = {name: array for name, array in arrays.items() if name == "class_labels"}
    timestep = np.arange(len(noise), dtype=np.int64)
    model = _onnx_graph(_Network(pipe.unet), {"sample": noise, "timestep": timestep, **labels}, "model_output")
    if dtype == "fp16":
        _halve_weights(model.graph, pipe.unet)
    if sampler is not None:
        channels = pipe.unet.config.get("out_channels", noise.shape[1])
        output = np.zeros((len(noise), channels, *noise.shape[2:]), np.float32)
        inputs = {"model_output": output, "timestep": np.int64(0), "sample": noise}
        step = _onnx_graph(sampler.step, inputs, "prev_sample")
        model.graph.CopyFrom(_sampler_graph(sampler, model.graph, step.graph, noise.shape[1:], bool(labels)))
    del model.metadata_props[:]
    onnx.helper.set_model_props(model, metadata)
    model.producer_name, model.producer_version = "mini-ddpm", metadata["mini_ddpm_version"]
    onnx.checker.check_model(model)
    onnx.save(model, file)


def _halve_weights(graph: Any, unet: torch.nn.Module) -> None:
    """Store the weights in float16, with a cast to float32 after each.

    The exporter transposes and renames weights. What holds the values of a parameter in any order is a weight. Other
    constants, such as the frequencies of the sinusoids, stay as they are.
    """
    from onnx import TensorProto, helper, numpy_helper

    def values(array: Any) -> bytes:
        return np.sort(array, axis=None).tobytes()

    weights = {values(parameter.detach().numpy()) for parameter in unet.parameters() if parameter.numel() >= 64}
    casts = []
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT and values(array := numpy_helper.to_array(tensor)) in weights:
            name = tensor.name
            tensor.CopyFrom(numpy_helper.from_array(array.astype(np.float16), f"{name}/fp16"))
            casts.append(helper.make_node("Cast", [f"{name}/fp16"], [name], to=TensorProto.FLOAT))
    nodes = [*casts, *graph.node]
    graph.ClearField("node")
    graph.node.extend(nodes)


def _sampler_graph(sampler: _Sampler, unet: Any, step: Any, shape: tuple[int, ...], conditional: bool) -> Any:
    """Return the graph of a sampler, made of that of the network and that of the scheduler's step.

    A guided step runs the network on the images twice: with their labels, then with the null label.
    """
    from onnx import TensorProto, helper, numpy_helper

    _rename(step, {"timestep": "t", "sample": "x", "prev_sample": "x_next"}, "step/")
    is_guided = any(sampler.guided)
    constants: dict[str, Any] = {"timesteps": np.array(sampler.timesteps), "steps": np.int64(len(sampler.guided))}
    constants |= {"half": np.float32(0.5), "low": np.float32(sampler.levels[0]), "high": np.float32(sampler.levels[1])}

    def add(target: list[Any], op: str, inputs: str, outputs: str, **attributes: Any) -> None:
        target.append(helper.make_node(op, inputs.split(), outputs.split(), **attributes))

    nodes: list[Any] = []
    body: list[Any] = []
    add(body, "Gather", "timesteps i", "t")
    if is_guided:
        constants |= {"zero": np.array([0]), "ones": np.array([1, 1, 1]), "last": np.array([np.iinfo(np.int64).max])}
        constants |= {"copies": np.array([[1 + guided] for guided in sampler.guided])}
        constants |= {"scale": np.float32(sampler.scale)}
        constants |= {"null": np.int64(sampler.null_label)}
        add(nodes, "Shape", "class_labels", "batch")
        add(nodes, "Expand", "null batch", "null_labels")
        add(nodes, "Concat", "class_labels null_labels", "both_labels", axis=0)
        add(body, "Gather", "copies i", "copies_now")  # 1 or 2
        add(body, "Concat", "copies_now ones", "repeats", axis=0)
        add(body, "Tile", "x repeats", "x_in")
        add(body, "Mul", "copies_now batch", "rows")
        add(body, "Slice", "both_labels zero rows zero", "labels_in")
    else:
        add(nodes, "Shape", "noise", "batch", end=1)
    add(body, "Expand", "t rows" if is_guided else "t batch", "t_in")
    names = {"sample": "x_in" if is_guided else "x", "timestep": "t_in", "model_output": "step/model_output"}
    if is_guided:
        names |= {"class_labels": "labels_in", "model_output": "output"}
    _rename(unet, names, "unet/", keep={"class_labels"})
    body.extend(unet.node)
    if is_guided:
        add(body, "Slice", "output zero batch zero", "conditional")
        add(body, "Sub", "rows batch", "second")
        add(body, "Slice", "output second last zero", "unconditional")  # of a step without guidance the same
        add(body, "Sub", "conditional unconditional", "direction")
        add(body, "Mul", "direction scale", "push")
        add(body, "Add", "unconditional push", "step/model_output")
    body.extend(step.node)
    add(body, "Identity", "go", "go_on")

    def images(name: str) -> Any:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", *shape])

    counter = helper.make_tensor_value_info("i", TensorProto.INT64, [])
    flags = [helper.make_tensor_value_info(name, TensorProto.BOOL, []) for name in ("go", "go_on")]
    loop = helper.make_graph(body, "step", [counter, flags[0], images("x")], [flags[1], images("x_next")],
                             [*unet.initializer, *step.initializer])  # fmt: skip
    nodes.append(helper.make_node("Loop", ["steps", "", "noise"], ["x_0"], body=loop))
    add(nodes, "Mul", "x_0 half", "x_0/half")
    add(nodes, "Add", "x_0/half half", "x_0/shifted")
    add(nodes, "Clip", "x_0/shifted low high", "images")
    inputs = [images("noise")]
    if conditional:
        inputs.append(helper.make_tensor_value_info("class_labels", TensorProto.INT64, ["batch"]))
    tensors = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    return helper.make_graph(nodes, "sampler", inputs, [images("images")], tensors)


def _rename(graph: Any, names: dict[str, str], prefix: str, keep: set[str] | None = None) -> None:
    """Rename the values of a graph as `names` says, the others by a prefix, so that graphs can be put together."""
    names = {"": ""} | dict.fromkeys(keep or (), "") | names

    def renamed(name: str) -> str:
        return (names[name] or name) if name in names else prefix + name

    for tensor in graph.initializer:
        tensor.name = renamed(tensor.name)
    for node in graph.node:
        node.input[:] = map(renamed, node.input)
        node.output[:] = map(renamed, node.output)


def _torch_program(file: Path) -> Callable[[Arrays], Any]:
    """Return a function that runs a file of `torch.export`."""
    program = torch.export.load(file).module()
    return lambda arrays: program(**{name: torch.from_numpy(array) for name, array in arrays.items()}).numpy()


def _onnx_session(file: Path) -> Callable[[Arrays], Any]:
    """Return a function that runs an ONNX file with as many threads as torch."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    return lambda arrays: session.run(None, arrays)[0]
