"""Assemble the page in a folder that any static web server can serve.

    pip install "mini-ddpm[export]"
    python examples/browser/build.py dist/browser
    python -m http.server --directory dist/browser

The folder gets the files beside this one, the sampler as an ONNX graph, and onnxruntime-web from the npm registry,
for which `npm` must be installed.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

import onnx

from mini_ddpm import load_pipeline
from mini_ddpm.export import export_sampler

RUNTIME = "onnxruntime-web@1.30.0"
RUNTIME_FILES = ("ort.wasm.bundle.min.mjs", "ort-wasm-simd-threaded.wasm")
PAGE = Path(__file__).parent


def add_latents(graph):
    """Add the output `latents`, (S, B, C, H, W), about [-1, 1]: x_t after each step of the graph's loop."""
    (loop,) = [node for node in graph.node if node.op_type == "Loop"]
    body = loop.attribute[0].g
    body.node.add(op_type="Identity", input=[body.output[1].name], output=["latents_of_step"])
    body.output.add().CopyFrom(body.output[1])
    body.output[-1].name = "latents_of_step"
    loop.output.append("latents_of_steps")
    graph.node.add(op_type="Identity", input=["latents_of_steps"], output=["latents"])
    shape = [None, *(dim.dim_param or dim.dim_value for dim in body.output[1].type.tensor_type.shape.dim)]
    graph.output.append(onnx.helper.make_tensor_value_info("latents", onnx.TensorProto.FLOAT, shape))


def main(folder="dist/browser", pipeline="mnist-distilled", dtype="fp16"):
    """Write the page of a class-conditional pipeline of ten digits, 28x28, into a folder."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("index.html", "style.css", "digits.js", "README.md"):
        shutil.copy(PAGE / name, folder)

    model = folder / "sampler.onnx"
    pipe = load_pipeline(pipeline)
    pipe.set_progress_bar_config(disable=True)
    export_sampler(pipe, model, dtype=dtype)
    proto = onnx.load(model)
    add_latents(proto.graph)
    onnx.checker.check_model(proto)
    onnx.save(proto, model)

    with tempfile.TemporaryDirectory() as downloads:
        npm = shutil.which("npm") or sys.exit(f"npm was not found. Install Node.js, whose npm downloads {RUNTIME}.")
        subprocess.run(
            [npm, "pack", RUNTIME, "--silent", "--pack-destination", downloads], check=True, stdout=subprocess.DEVNULL
        )
        (archive,) = Path(downloads).glob("*.tgz")
        with tarfile.open(archive) as package:
            for name in RUNTIME_FILES:
                (folder / name).write_bytes(package.extractfile(f"package/dist/{name}").read())


if __name__ == "__main__":
    main(*sys.argv[1:])
