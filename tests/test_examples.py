"""The examples, run at a small size, give the results that they state."""

import importlib.util
import io
import json
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import uvicorn
from PIL import Image
from safetensors.torch import load_file

import mini_ddpm
from mini_ddpm import ImageDataset, load_pipeline, sample_grid

EXAMPLES = Path(__file__).parents[1] / "examples"
NAMES = sorted(file.stem for file in EXAMPLES.glob("*.py"))
needs_weights = pytest.mark.skipif(
    not (mini_ddpm.PRETRAINED / "mnist").exists(), reason="the weights are not in this checkout"
)
SETTINGS = {"block_out_channels": (8, 16), "layers_per_block": 1, "train_batch_size": 8, "save_images_epochs": 0}
SETTINGS |= {"log_with": "none", "device": "cpu", "mixed_precision": "no"}


@pytest.fixture(scope="module")
def load():
    """Import an example by name."""

    def import_example(name):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        # Registered, because the source of a class is looked up through its module.
        module = sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module

    yield import_example
    for name in NAMES:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", NAMES)
def test_examples_are_short_and_name_their_command(name, load):
    source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert len(source.splitlines()) <= 60
    module = load(name)  # nothing runs
    assert f"\n    python examples/{name}.py" in module.__doc__ and callable(module.main)
    assert source.endswith(")\n") and '\n\nif __name__ == "__main__":\n    ' in source


@needs_weights
@pytest.mark.parametrize("num_inference_steps", [5, 7])
def test_every_equation(load, tmp_path, num_inference_steps):
    out = tmp_path / "digits.png"
    assert load("every_equation").main(num_inference_steps=num_inference_steps, out=str(out)) < 1e-4
    assert out.stat().st_size > 1000


def test_own_pictures(pictures, loopback_hub, fresh_process, tmp_path):
    """Nothing is pushed unless a repository is named. The client reads the address of the Hub once per process."""
    settings = SETTINGS | {"max_train_steps": 4, "rows": 3, "resolution": None}
    code = f"""
import json, runpy
main = runpy.run_path({str(EXAMPLES / "own_pictures.py")!r})["main"]
folder = main({str(pictures)!r}, output_dir="run", **{settings!r})
from huggingface_hub import HfApi
before = HfApi().repo_exists("user/left-right")
main({str(pictures)!r}, "user/left-right", "run", **{settings!r})
from mini_ddpm import load_pipeline
pipe = load_pipeline("user/left-right")
print(json.dumps([before, pipe.config.id2label, len(pipe(["left", "right"], num_inference_steps=2).images)]))
"""
    assert fresh_process(code, home=tmp_path).result == [False, {"0": "left", "1": "right"}, 2]
    files = loopback_hub.files("user/left-right")
    assert {"model_index.json", "README.md", "samples.png", "unet/config.json"} <= set(files)
    width, height, _ = size_of(tmp_path / "run/samples.png")
    assert width > 2 * 2 * 8 and height > 3 * 2 * 8
    assert (tmp_path / "run/samples.png").read_bytes() == files["samples.png"]
    assert str(tmp_path) not in files["README.md"].decode() and "4 steps" in files["README.md"].decode()


def size_of(picture):
    """Return width, height and number of frames."""
    with Image.open(picture) as image:
        return *image.size, getattr(image, "n_frames", 1)


@pytest.fixture(scope="module")
def squares():
    """Sixty-four grey 8x8 pictures of a white square, at 25 places."""
    images = torch.zeros(64, 1, 8, 8, dtype=torch.uint8)
    for index, image in enumerate(images):
        row, column = index // 5 % 5, index % 5
        image[:, row : row + 4, column : column + 4] = 255
    return ImageDataset.from_tensors(images)


def test_own_network(load, pictures, tmp_path):
    """It stops early, at the same step if it was interrupted while it waited, and the network opens again."""
    example = load("own_network")
    # The learning rate is too small for a second minimum of the validation loss.
    settings = {"dataset_name": str(pictures), "train_batch_size": 4, "learning_rate": 1e-30, "save_images_epochs": 0}
    settings |= {"checkpointing_steps": 2, "log_with": "none", "device": "cpu", "mixed_precision": "no"}
    stopped = []
    for name, runs in (("whole", (40,)), ("interrupted", (4, 40))):
        for max_train_steps in runs:
            torch.manual_seed(0)
            unet = example.ClippedUNet(sample_size=8, block_out_channels=(8, 16), layers_per_block=1)
            pipe = example.main(
                tmp_path / name, unet=unet, max_train_steps=max_train_steps, lr_scheduler="constant", **settings
            )
        log = (tmp_path / name / "train_log.jsonl").read_text(encoding="utf-8").splitlines()
        stopped.append(json.loads(log[-1])["step"])
    assert stopped == [6, 6]  # a minimum at step 2, none at 4 and 6
    assert json.loads((tmp_path / "whole/train_config.json").read_text())["loss_fn"].endswith("huber_loss")
    assert type(pipe.unet) is example.ClippedUNet
    output = pipe.unet(torch.full((1, 1, 8, 8), 1e6), 0).sample
    assert output.shape == (1, 1, 8, 8) and output.abs().max() <= 4
    assert len(pipe(batch_size=2, num_inference_steps=2).images) == 2


def test_huber_loss(load):
    scheduler = mini_ddpm.MiniDDPMScheduler()
    images, noise = torch.zeros(2, 1, 4, 4), torch.zeros(2, 1, 4, 4)  # v is 0
    unet = torch.nn.Module()
    unet.forward = lambda x, t: SimpleNamespace(sample=torch.tensor([0.1, 2.0])[:, None, None, None].expand_as(x))
    losses = load("own_network").huber_loss(unet, scheduler, images, noise, torch.tensor([10, 900]), None)
    torch.testing.assert_close(losses, torch.tensor([0.1**2 / 2, 0.5 * (2.0 - 0.25)]))


def test_hf_course_loop(load, squares, tmp_path):
    out = tmp_path / "both.png"
    torch.manual_seed(0)
    runs = load("hf_course_loop").main(squares, num_inference_steps=3, out=out, num_epochs=4, batch_size=8)
    for losses in runs:  # 1 is the loss of a network that predicts zero
        assert len(losses) == 32 and losses[0] > 0.8 and np.mean(losses[-8:]) < 0.7
    assert len(runs) == 2 and size_of(out)[0] > 8 * 2 * 8


@needs_weights
def test_inpaint(load, tmp_path):
    """The left half is kept, the right half is filled in, and both fit each other."""
    out = tmp_path / "inpaint.png"
    originals, filled = load("inpaint").main([3, 5, 8], num_inference_steps=8, jumps=2, out=out)
    left, right = filled[..., :14], filled[..., 14:]
    assert filled.shape == (6, 1, 28, 28) and torch.equal(left, originals[..., :14].repeat(2, 1, 1, 1))
    assert (right[:3] - originals[..., 14:]).abs().mean() > 0.02 and (right > 0).flatten(1).any(dim=1).all()

    def seam(left, right):  # the mean difference between the two columns at the border
        return (left[..., -1] - right[..., 0]).abs().mean()

    assert seam(left, right) < 0.7 * seam(left, right.roll(1, 0))  # the right half of another digit
    assert size_of(out)[1] > 4 * 2 * 28


@needs_weights
def test_interpolate(load, tmp_path):
    """The ends are what their latents give alone, and neighbours are nearer than the ends."""
    example, out = load("interpolate"), tmp_path / "row.png"
    rows = example.main(labels=[3, 5], num_frames=5, num_inference_steps=4, seed=1, out=out)
    assert rows.shape == (2, 5, 1, 28, 28)
    ends = torch.randn(2, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    latents = example.slerp(*ends, torch.linspace(0, 1, 5))
    torch.testing.assert_close(latents[[0, -1]], ends)
    assert 0.95 < latents[2].std() < 1.05
    pipe = load_pipeline("mnist-class-conditional")
    alone = pipe([5, 5], latents=ends, num_inference_steps=4, output_type="pt").images
    torch.testing.assert_close(rows[1, [0, -1]], alone, atol=1e-4, rtol=0)
    steps = (rows[:, 1:] - rows[:, :-1]).abs().mean(dim=(2, 3, 4))
    assert (steps < (rows[:, -1:] - rows[:, :1]).abs().mean(dim=(2, 3, 4))).all() and (steps > 0).all()
    assert size_of(out.with_suffix(".gif"))[2] == 8


def slant(images):
    """Return how far each image (B, 1, H, W) leans to the right, pixels per row: the slope of a fit to its ink."""
    row, column = (
        axis.expand(len(images), 28, 28) for axis in torch.meshgrid(*2 * [torch.arange(28.0)], indexing="ij")
    )
    ink = images[:, 0] / images[:, 0].sum(dim=(1, 2), keepdim=True)
    row, column = (axis - (ink * axis).sum(dim=(1, 2), keepdim=True) for axis in (row, column))
    return -(ink * row * column).sum(dim=(1, 2)) / (ink * row**2).sum(dim=(1, 2))


@needs_weights
def test_lora(load, tmp_path):
    """The adapter alone is trained, towards the style, and it is saved and loaded; the shipped weights stay."""
    example, folder, out = load("lora"), tmp_path / "adapter", tmp_path / "lora.png"
    bar = torch.zeros(1, 1, 28, 28)
    bar[..., 6:22, 12:16] = 1.0
    assert slant(bar).item() == pytest.approx(0, abs=1e-6) and slant(example.italic(bar)).item() > 0.5

    torch.manual_seed(0)
    before, after = example.main(
        folder, num_images=20, max_train_steps=10, batch_size=8, num_inference_steps=4, out=out
    )
    assert (slant(after) - slant(before)).mean() > 0.03
    adapter = load_file(folder / "pytorch_lora_weights.safetensors")
    assert all("lora" in key for key in adapter)
    call = {"class_labels": range(10), "generator": 0, "num_inference_steps": 4, "output_type": "pt"}
    pipe = load_pipeline("mnist-class-conditional")
    torch.testing.assert_close(pipe(**call).images, before)
    pipe.unet.load_lora_adapter(folder, prefix=None, use_safetensors=True)
    torch.testing.assert_close(pipe(**call).images, after)
    assert size_of(out)[1] > 2 * 2 * 28


@needs_weights
def test_serve(load):
    """Eight callers at once, over sockets, each get what the pipeline draws alone; bad input is explained."""
    server = uvicorn.Server(uvicorn.Config(load("serve").app, port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started and thread.is_alive():
            time.sleep(0.01)
        address = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"

        def get(path, **query):
            try:
                with urllib.request.urlopen(f"{address}{path}?{urllib.parse.urlencode(query)}", timeout=60) as answer:
                    return answer.status, answer.headers["Content-Type"], answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    return error.code, error.headers["Content-Type"], error.read()

        callers = [{"labels": str(n) * (1 + n % 3), "seed": n, "steps": 2 + n % 4} for n in range(8)]
        barrier = threading.Barrier(len(callers))
        with ThreadPoolExecutor(len(callers)) as threads:
            answers = list(threads.map(lambda query: (barrier.wait(), get("/digits", **query))[1], callers))
        pipe = load_pipeline("mnist-class-conditional")
        for query, (status, kind, content) in zip(callers, answers, strict=True):
            labels = [int(digit) for digit in query["labels"]]
            images = pipe(labels, generator=query["seed"], num_inference_steps=query["steps"]).images
            assert (status, kind) == (200, "image/png")
            expected = np.asarray(sample_grid(images, columns=len(labels), scale=4))
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(content))), expected)
        assert get("/health")[0] == 200
        for query, name in (({}, "labels"), ({"labels": "3x"}, "labels"), ({"labels": "3", "seed": -1}, "seed")):
            status, _, content = get("/digits", **query)
            assert status == 422 and json.loads(content)["detail"][0]["loc"] == ["query", name]
    finally:
        server.should_exit = True
        thread.join(30)


@needs_weights
def test_serve_a_pipeline_of_fewer_classes(load, tiny_unet):
    """What the pipeline refuses is a 400 with its message."""
    example = load("serve")
    pipe = mini_ddpm.MiniDDPMClassConditionalPipeline(tiny_unet(num_class_embeds=3), mini_ddpm.MiniDDIMScheduler())
    request = SimpleNamespace(app=SimpleNamespace(state=SimpleNamespace(pipe=pipe)))
    with pytest.raises(Exception, match="Class label 7 is out of range") as caught:
        example.digits(request, "7", 0, 2)
    assert caught.value.status_code == 400
