"""Speed beside peers, measured in one run, taking turns: python benchmarks/speed.py

Sampling through each one's own pipeline, a training step, the host's share of a step, memory, start-up. Peers:
diffusers' UNet2DModel as its course trains it on these images, with its own pipelines; denoising-diffusion-pytorch
(`pip install denoising-diffusion-pytorch`; left out where it is not installed); the tutorial's network, repaired.

All take turns, round after round, so that a machine that slows down slows all of them; a ratio is the median of the
rounds' ratios, with the smallest and largest. Writes speed.json, speed.md and speed.png to `benchmarks/results`.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import types
import unittest.mock
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
import tyro
from tqdm.auto import tqdm

SIZE = 28
Numbers = dict[str, list[float]]


@dataclass
class Args:
    """Measure speed beside peers.

    Attributes:
        device: Where.
        rounds: How often each is measured; all take turns.
        num_inference_steps: Steps of sampling.
        batch_sizes: Images drawn at once.
        train_batch_size: Images of a training step.
        compiled: Measure ours and diffusers' with torch.compile too.
        only: Parts to run: sampling, student, training, scheduler, memory, process, scaling. None: all.
        results: Folder of the results.
        child: Used by the benchmark itself: draw with this one, and tell the memory it took.
    """

    device: Literal["cpu", "cuda"] = "cpu"
    rounds: int = 5
    num_inference_steps: int = 50
    batch_sizes: tuple[int, ...] = (1, 16, 64)
    train_batch_size: int = 128
    compiled: bool = True
    only: tuple[str, ...] = ()
    results: Path = Path("benchmarks/results")
    child: str | None = None


@dataclass
class Contestant:
    """What is measured: `draw(n)` makes n images, `loss(images)` is that of a training step."""

    network: torch.nn.Module
    draw: Callable[[int], Any]
    loss: Callable[[torch.Tensor], torch.Tensor]
    dtype: torch.dtype = torch.float32  # of sampling; training has autocast


def ours(args: Args, preset: str = "mini", dtype: torch.dtype = torch.float32, compiled: bool = False) -> Contestant:
    from mini_ddpm import MiniDDIMScheduler, MiniDDPMPipeline, MiniUNet2DModel
    from mini_ddpm.training.loss import compute_loss

    network = MiniUNet2DModel.from_preset(preset, sample_size=SIZE, in_channels=1, out_channels=1)
    network = network.to(args.device, dtype).eval()
    scheduler = MiniDDIMScheduler(prediction_type="v_prediction")
    pipe = MiniDDPMPipeline(network, scheduler)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        network.compile(mode="reduce-overhead" if args.device == "cuda" else None)

    def loss(images: torch.Tensor) -> torch.Tensor:
        timesteps = torch.randint(0, 1000, (len(images),), device=images.device)
        return compute_loss(network, scheduler, images, torch.randn_like(images), timesteps)

    def draw(count: int) -> Any:
        return pipe(batch_size=count, num_inference_steps=args.num_inference_steps, output_type="np").images

    return Contestant(network, draw, loss, dtype)


def diffusers(args: Args, dtype: torch.dtype = torch.float32, compiled: bool = False) -> Contestant:
    from diffusers import DDIMPipeline, DDIMScheduler, UNet2DModel

    network = UNet2DModel(
        sample_size=SIZE,
        in_channels=1,
        out_channels=1,
        layers_per_block=2,
        block_out_channels=(32, 64, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    ).to(args.device)
    scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    pipe = DDIMPipeline(network.eval(), scheduler)
    pipe.set_progress_bar_config(disable=True)
    if compiled:
        network.compile(mode="reduce-overhead" if args.device == "cuda" else None)

    def loss(images: torch.Tensor) -> torch.Tensor:
        noise = torch.randn_like(images)
        timesteps = torch.randint(0, 1000, (len(images),), device=images.device)
        return F.mse_loss(network(scheduler.add_noise(images, noise, timesteps), timesteps).sample, noise)

    def draw(count: int) -> Any:
        # Cast to bfloat16 itself, its pipeline cannot turn what it drew into an array.
        with torch.autocast(args.device, torch.bfloat16, enabled=dtype == torch.bfloat16):
            return pipe(batch_size=count, num_inference_steps=args.num_inference_steps, output_type="np").images

    return Contestant(network, draw, loss, dtype)


def lucidrains(args: Args) -> Contestant:
    # Its trainer, which is not used here, needs torchvision: an empty one does, where there is none.
    empty: Any = types.ModuleType("torchvision")
    empty.transforms, empty.utils = types.ModuleType("transforms"), types.ModuleType("utils")
    absent = importlib.util.find_spec("torchvision") is None
    with unittest.mock.patch.dict(sys.modules, {"torchvision": empty} if absent else {}):
        from denoising_diffusion_pytorch import GaussianDiffusion, Unet

    network = Unet(dim=32, dim_mults=(1, 2, 4), channels=1)
    diffusion = GaussianDiffusion(
        network, image_size=SIZE, timesteps=1000, sampling_timesteps=args.num_inference_steps
    ).to(args.device)

    def draw(count: int) -> Any:
        with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):  # its bar cannot be turned off
            return diffusion.sample(batch_size=count)

    return Contestant(network.eval(), draw, lambda images: diffusion(images / 2 + 0.5))


def contestants(args: Args) -> dict[str, Callable[[], Contestant]]:
    """By name, how each is made; the first is ours."""
    found: dict[str, Callable[[], Contestant]] = {
        "mini-ddpm": lambda: ours(args),
        "mini-ddpm, bf16": lambda: ours(args, dtype=torch.bfloat16),
        "mini-ddpm, bf16, compiled": lambda: ours(args, dtype=torch.bfloat16, compiled=True),
        "diffusers": lambda: diffusers(args),
        "diffusers, bf16": lambda: diffusers(args, dtype=torch.bfloat16),
        "diffusers, bf16, compiled": lambda: diffusers(args, dtype=torch.bfloat16, compiled=True),
        "denoising-diffusion-pytorch": lambda: lucidrains(args),
        "tutorial, repaired": lambda: ours(args, preset="tutorial-32"),
    }
    if not args.compiled:
        found = {name: make for name, make in found.items() if "compiled" not in name}
    if importlib.util.find_spec("denoising_diffusion_pytorch") is None:
        print("denoising-diffusion-pytorch is not installed, and is left out.", file=sys.stderr)
        del found["denoising-diffusion-pytorch"]
    return found


def seconds(call: Callable[[], Any], device: str) -> float:
    started = time.perf_counter()
    call()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started


def take_turns(args: Args, calls: dict[str, Callable[[], Any]], title: str) -> Numbers:
    """The seconds that each call takes, round by round, after one to warm up."""
    taken: Numbers = {name: [] for name in calls}
    with tqdm(total=(args.rounds + 1) * len(calls), desc=title, disable=None) as bar:
        for turn in range(args.rounds + 1):
            for name, call in calls.items():
                value = seconds(call, args.device)
                if turn:
                    taken[name].append(value)
                bar.update()
    return taken


def sampling(args: Args) -> list[dict[str, Any]]:
    """Images per second through each pipeline."""
    made = {name: make() for name, make in contestants(args).items()}
    rows = []
    for count in args.batch_sizes:
        calls = {name: lambda one=one, count=count: one.draw(count) for name, one in made.items()}
        title = f"{args.num_inference_steps} steps, {count} images"
        values = take_turns(args, calls, title)
        column = f"{count} image{'s' * (count > 1)}, s"
        rows.append({"row": f"draw, {title}", "unit": "s", "values": values, "column": column})
    parameters, flops = facts(made)
    shares = {}
    for name, one in made.items():
        work = flops["values"][name][0] / 1e3 * args.batch_sizes[-1] * args.num_inference_steps  # TFLOP
        speed = peak(args.device)["bf16" if one.dtype == torch.bfloat16 else "fp32"]
        shares[name] = [100 * work / value / speed for value in values[name]]
    share = {"row": f"share of a matrix product's speed, {title}", "unit": "%", "values": shares}
    return [parameters, flops, *rows, share | {"column": "% of the peak"}]


def facts(made: dict[str, Contestant]) -> list[dict[str, Any]]:
    """What the networks are: parameters, and operations of a forward pass."""
    from torch.utils.flop_counter import FlopCounterMode

    parameters: Numbers = {}
    flops: Numbers = {}
    for name, one in made.items():
        parameters[name] = [sum(parameter.numel() for parameter in one.network.parameters()) / 1e6]
        parameter = next(one.network.parameters())
        images = torch.randn(1, 1, SIZE, SIZE, device=parameter.device, dtype=parameter.dtype)
        timesteps = torch.tensor([500], device=parameter.device)
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            one.network(images, timesteps)
        flops[name] = [counter.get_total_flops() / 1e9]
    return [
        {"row": "parameters", "unit": "million", "values": parameters, "column": "Parameters, M"},
        {"row": "forward pass of an image", "unit": "GFLOP", "values": flops, "column": "GFLOP an image"},
    ]


@functools.cache
def peak(device: str) -> dict[str, float]:
    """This machine's matrix product, in TFLOP/s, by precision: what the shares are of."""
    size = 1024 if device == "cpu" else 8192
    speeds = {}
    for name, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        a, b = torch.randn(2, size, size, device=device).to(dtype)
        best = min(seconds(lambda a=a, b=b: a @ b, device) for _ in range(10))
        speeds[name] = round(2 * size**3 / best / 1e12, 3)
    return speeds


def training(args: Args) -> list[dict[str, Any]]:
    """A whole step of AdamW: forward, backward, update; ours in bf16 as `mini-ddpm train --mixed-precision bf16`."""
    images = torch.rand(args.train_batch_size, 1, SIZE, SIZE, device=args.device) * 2 - 1
    made = {name: make() for name, make in contestants(args).items()}
    calls = {}
    for name, one in made.items():
        one.network.float()
        optimizer = torch.optim.AdamW(one.network.train().parameters(), lr=1e-4, fused=name.startswith("mini-ddpm"))

        def step(one: Contestant = one, optimizer: Any = optimizer) -> None:
            with torch.autocast(args.device, torch.bfloat16, enabled=one.dtype == torch.bfloat16):
                loss = one.loss(images)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()

        calls[name] = step
    title = f"a training step, batch {args.train_batch_size}"
    row = {"row": title, "unit": "s", "values": take_turns(args, calls, title)}
    return [row | {"column": "Training, images/s", "images": args.train_batch_size}]


def scheduler(args: Args) -> list[dict[str, Any]]:
    """The host's time for a scheduler step of one small image, by which a GPU waits."""
    from diffusers import DDIMScheduler, DDPMScheduler

    from mini_ddpm import MiniDDIMScheduler, MiniDDPMScheduler

    rows = []
    sample, output = torch.randn(2, 1, 1, SIZE, SIZE, device=args.device)
    for kind, classes in (
        ("DDIM", {"mini-ddpm": MiniDDIMScheduler, "diffusers": DDIMScheduler}),
        ("DDPM", {"mini-ddpm": MiniDDPMScheduler, "diffusers": DDPMScheduler}),
    ):
        calls = {}
        for name, cls in classes.items():
            one = cls(beta_schedule="squaredcos_cap_v2")
            one.set_timesteps(args.num_inference_steps, device=args.device)

            def steps(one: Any = one) -> None:
                for _ in range(4):
                    for t in one.timesteps:
                        one.step(output, t, sample)

            calls[name] = steps
        values = take_turns(args, calls, f"{kind} steps")
        count = 4 * args.num_inference_steps / 1e6
        values = {name: [value / count for value in row] for name, row in values.items()}
        rows.append({"row": f"a {kind} step of the scheduler", "unit": "us", "values": values})
    return rows


def memory(args: Args) -> list[dict[str, Any]]:
    """Peak memory of a process that draws once, and of one that takes a training step."""
    rows = []
    for what in ("draw", "train"):
        values = {}
        for name in tqdm(contestants(args), desc=f"memory, {what}", disable=None):
            if "bf16" not in name:
                command = [sys.executable, __file__, "--child", f"{what}:{name}", "--device", args.device]
                command += [
                    "--train-batch-size",
                    str(args.train_batch_size),
                    "--batch-sizes",
                    str(args.batch_sizes[-1]),
                ]
                answer = subprocess.run(command, capture_output=True, text=True, check=True)
                values[name] = [float(answer.stdout.splitlines()[-1])]
        count = args.batch_sizes[-1] if what == "draw" else args.train_batch_size
        column = f"Memory, {what} {count}, GB"
        rows.append({"row": f"peak memory, {what} {count}", "unit": "GB", "values": values, "column": column})
    return rows


def child(args: Args) -> None:
    """Draws or trains, and prints the peak of this process's memory in GB."""
    what, _, name = str(args.child).partition(":")
    one = contestants(args)[name]()
    if what == "draw":
        one.draw(args.batch_sizes[-1])
    else:
        images = torch.rand(args.train_batch_size, 1, SIZE, SIZE, device=args.device) * 2 - 1
        one.network.train()
        one.loss(images).backward()  # type: ignore[no-untyped-call]
    if args.device == "cuda":
        print(torch.cuda.max_memory_allocated() / 1e9)
    else:  # not getrusage's, which begins with what the parent took
        status = Path("/proc/self/status").read_text(encoding="utf-8")
        print(next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) / 1e6)


def cpu_seconds(args: Args, commands: dict[str, list[str]]) -> Numbers:
    """The CPU seconds of processes, round by round, after one to warm up."""
    values: Numbers = {name: [] for name in commands}
    for turn in tqdm(range(args.rounds + 1), desc="processes", disable=None):
        for name, command in commands.items():
            before = resource.getrusage(resource.RUSAGE_CHILDREN)
            subprocess.run(command, check=True, capture_output=True)
            after = resource.getrusage(resource.RUSAGE_CHILDREN)
            if turn:
                used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                values[name].append(used)
    return values


def process(args: Args) -> list[dict[str, Any]]:
    """CPU seconds of whole processes, from start to the saved picture."""
    with tempfile.TemporaryDirectory() as folder:
        python = [sys.executable, "-c"]
        draw = [sys.executable, "-m", "mini_ddpm", "sample", "--device", args.device, "--out", f"{folder}/x.png"]
        commands = {
            "import torch": [*python, "import torch"],
            "import torch, diffusers' base classes": [
                *python,
                "import torch; from diffusers import DiffusionPipeline, ModelMixin",
            ],
            "import torch, UNet2DModel, DDIMPipeline": [
                *python,
                "import torch; from diffusers import UNet2DModel, DDIMPipeline",
            ],
            "import mini_ddpm": [*python, "import mini_ddpm"],
            "mini-ddpm sample, 1 image": [*draw, "--num-images", "1"],
            "mini-ddpm sample, 64 images": [*draw, "--num-images", "64"],
        }
        values = cpu_seconds(args, commands)
    return [{"row": "a whole process", "unit": "s of CPU", "values": values}]


def scaling(args: Args) -> list[dict[str, Any]]:
    """Seconds in which `mini-ddpm sample` draws, start-up not counted, by processes and threads of each."""
    count = args.batch_sizes[-1] * 2
    with tempfile.TemporaryDirectory() as folder:
        sample = ["-m", "mini_ddpm", "sample", "mnist", "--device", args.device, "--out", f"{folder}/x.npz"]
        sample += ["--num-images", str(count), "--batch-size", str(max(1, count // 8))]
        sample += ["--steps", str(args.num_inference_steps)]
        many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
        threads = len(os.sched_getaffinity(0))
        setups: dict[str, tuple[int, list[str]]] = {"1 process, 1 thread": (1, [])}
        if threads > 1:
            setups[f"1 process, {threads} threads"] = (threads, [])
            setups[f"{threads} processes, 1 thread each"] = (1, [*many, str(threads)])
        values: Numbers = {name: [] for name in setups}
        for _ in tqdm(range(args.rounds), desc="processes that share", disable=None):
            for name, (each, launcher) in setups.items():
                environment = {**os.environ, "OMP_NUM_THREADS": str(each)}
                command = [sys.executable, *launcher, *sample]
                answer = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
                values[name].append(float(answer.stdout.rpartition(" s,")[0].rpartition(" ")[2]))
    return [{"row": f"{count} images by processes that share them", "unit": "s", "values": values}]


COLD_DIGIT = """
import sys
import numpy as np
import onnxruntime
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = 1
session = onnxruntime.InferenceSession(sys.argv[1], options)
noise = np.random.default_rng(0).standard_normal((1, 1, 28, 28), dtype=np.float32)
images, = session.run(["images"], {"noise": noise, "class_labels": np.array([3])})
pixels = (images[0, 0] * 255).round().astype(np.uint8)
with open(sys.argv[2], "wb") as file:
    file.write(b"P5 28 28 255\\n" + pixels.tobytes())
"""


def student(args: Args) -> list[dict[str, Any]]:
    """The four-step student through its pipeline and as one ONNX graph: one image, and a process that draws one."""
    import numpy as np
    import onnxruntime

    from mini_ddpm import load_pipeline
    from mini_ddpm.export import export_sampler

    pipe: Any = load_pipeline("mnist-distilled")
    pipe.set_progress_bar_config(disable=True)
    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/sampler.onnx"
        export_sampler(pipe, file)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        session = onnxruntime.InferenceSession(file, options)
        noise = np.random.default_rng(0).standard_normal((1, 1, SIZE, SIZE), dtype=np.float32)
        inputs = {"noise": noise, "class_labels": np.array([3])}
        calls = {
            "mini-ddpm": lambda: pipe([3], latents=torch.from_numpy(noise), output_type="np"),
            "mini-ddpm, onnxruntime": lambda: session.run(["images"], inputs),
        }
        values = take_turns(args, calls, "4 steps, 1 image")
        rows = [{"row": "draw, 4 steps of the student, 1 image", "unit": "s", "values": values}]
        draw = [sys.executable, "-m", "mini_ddpm", "sample", "--class-labels", "3", "--device", "cpu"]
        commands = {
            "mini-ddpm sample": [*draw, "--out", f"{folder}/x.png"],
            "numpy, onnxruntime": [sys.executable, "-c", COLD_DIGIT, file, f"{folder}/x.pgm"],
        }
        rows.append(
            {"row": "from a cold process to a saved digit", "unit": "s of CPU", "values": cpu_seconds(args, commands)}
        )
    return rows


PARTS = {
    "sampling": sampling,
    "student": student,
    "training": training,
    "scheduler": scheduler,
    "memory": memory,
    "process": process,
    "scaling": scaling,
}


def summary(rows: list[dict[str, Any]]) -> str:
    """The medians of what has a column of its own, a line for each contestant."""
    shown = [row for row in rows if "column" in row]
    lines = ["| | " + " | ".join(row["column"] for row in shown) + " |", "|---|" + "--:|" * len(shown)]
    for name in dict.fromkeys(name for row in shown for name in row["values"]):
        cells = []
        for row in shown:
            median = statistics.median(row["values"].get(name, [math.nan]))
            value = row["images"] / median if "images" in row else median
            cells.append("" if math.isnan(value) else f"{value:.3g}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n" if shown else ""


def ratio(values: Numbers, name: str, base: str) -> str:
    """How many times as much as `base` it took: the median over the rounds, and the smallest and largest."""
    ratios = [value / other for value, other in zip(values[name], values[base], strict=True)]
    spread = f" ({min(ratios):.2f} to {max(ratios):.2f})" if len(ratios) > 1 and name != base else ""
    return f"{statistics.median(ratios):.2f}{spread}"


def table(result: dict[str, Any]) -> str:
    """The summary, and one table per row of the results: the medians, and how many times as much as ours each is."""
    lines = []
    for row in result["rows"]:
        names = list(row["values"])
        base = "import torch, diffusers' base classes" if names[0].startswith("import") else names[0]
        lines += [f"\n**{row['row']}**\n", f"| | {row['unit']} | times {base} |", "|---|--:|--:|"]
        for name, values in row["values"].items():
            lines.append(f"| {name} | {statistics.median(values):.3g} | {ratio(row['values'], name, base)} |")
    peaks = ", ".join(f"{speed:g} TFLOP/s in {name}" for name, speed in result["peak"].items())
    return (
        f"{result['machine']}, torch {result['torch']}, diffusers {result['diffusers']}, {result['date']}; a matrix "
        f"product here: {peaks}. Medians of {result['rounds']} rounds in which all took turns, with the smallest and "
        "the largest ratio.\n\n" + summary(result["rows"]) + "\n".join(lines) + "\n"
    )


def plot(result: dict[str, Any], file: Path) -> None:
    """Images per second by batch size, one bar each."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if row["row"].startswith("draw")]
    if not rows:
        return
    figure = Figure(figsize=(10, 4), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(1, len(rows), squeeze=False)[0], rows, strict=True):
        count = int(row["row"].split(",")[-1].split()[0])
        names = list(row["values"])[::-1]
        speeds = [count / statistics.median(row["values"][name]) for name in names]
        axes.barh(names, speeds, color=["tab:blue" if "mini" in name else "tab:grey" for name in names])
        title = f"{count} image{'s' * (count > 1)} at once"
        axes.set(title=title, xlabel="images per second")
        axes.bar_label(axes.containers[0], fmt="%.3g", padding=2)
        axes.margins(x=0.25)
    for axes in figure.axes[1:]:
        axes.set_yticklabels([])
    figure.savefig(file)


def main(args: Args) -> dict[str, Any]:
    """Runs the parts, and writes the results after each."""
    import diffusers as host

    if unknown := set(args.only) - set(PARTS):
        raise ValueError(f"--only {sorted(unknown)[0]}: choose of {', '.join(PARTS)}.")
    if args.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: PyTorch finds no such device here.")
    torch.manual_seed(0)
    model = "CPU"
    with contextlib.suppress(OSError):  # Linux
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        model = next((line.partition(": ")[2] for line in lines if line.startswith("model name")), model)
    machine = f"{model} ({platform.machine()}), {torch.get_num_threads()} threads"
    result: dict[str, Any] = {
        "machine": torch.cuda.get_device_name() if args.device == "cuda" else machine,
        "torch": torch.__version__,
        "diffusers": host.__version__,
        "date": datetime.date.today().isoformat(),
        "rounds": args.rounds,
        "peak": peak(args.device),
        "rows": [],
    }
    args.results.mkdir(parents=True, exist_ok=True)
    for name, part in PARTS.items():
        if not args.only or name in args.only:
            result["rows"] += part(args)
            (args.results / "speed.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
            (args.results / "speed.md").write_text(table(result), encoding="utf-8")
    plot(result, args.results / "speed.png")
    print(table(result))
    return result


if __name__ == "__main__":
    try:
        arguments = tyro.cli(Args, description=__doc__)
        child(arguments) if arguments.child else main(arguments)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
