"""The page of examples/browser and the app of examples/space, in a real browser (`make test-browser`)."""

import functools
import io
import itertools
import json
import os
import re
import shutil
import socket
import statistics
import subprocess
import threading
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import mini_ddpm
from mini_ddpm import load_pipeline

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
SITE = ROOT / "dist" / "browser"
SPACE_PYTHON = ROOT / ".venv" / "space" / "bin" / "python"
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTLED = "#picture[aria-busy=false]"

pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="Chromium is not installed (Debian: apt-get install chromium)"),
    pytest.mark.skipif(not EXAMPLES.is_dir(), reason="the examples are not in this checkout"),
    pytest.mark.skipif(
        not (mini_ddpm.PRETRAINED / "mnist-distilled").exists(), reason="the weights are not in this checkout"
    ),
]


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline("mnist-distilled")
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def read(pipe):
    """Return a function that reads digits, (B, 28, 28) in [0, 1]: kernel ridge regression on digits drawn in torch."""
    labels = np.arange(600) % 10
    drawn = pipe(labels.tolist(), generator=0, output_type="np").images[..., 0]

    def features(images):
        blurred = torch.nn.functional.avg_pool2d(torch.as_tensor(images, dtype=torch.float32)[:, None], 3, 2)
        return blurred.flatten(1)

    def kernel(images):
        return torch.exp(-(torch.cdist(features(images), known) ** 2) / 20)

    known = features(drawn)
    weights = torch.linalg.solve(kernel(drawn) + 0.1 * torch.eye(600), torch.eye(10)[labels])
    return lambda images: (kernel(np.asarray(images)) @ weights).argmax(1).tolist()


@pytest.fixture(scope="module")
def chromium():
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with api.sync_playwright() as playwright:
        # Chromium's sandbox does not run as root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server():
    """The built page, served as a static host would. While `gate` is cleared, only half of the model comes."""
    if not (SITE / "sampler.onnx").exists() or not list(SITE.glob("*.wasm")):
        pytest.skip("the page is not built: make browser")
    gate = threading.Event()
    gate.set()

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def copyfile(self, source, outputfile):
            content = source.read()
            half = len(content) // 2
            outputfile.write(content[:half])
            if source.name.endswith(".onnx"):
                gate.wait(60)
            outputfile.write(content[half:])

    server = ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=SITE))
    server.daemon_threads = True
    server.gate = gate
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def site(server):
    return f"http://127.0.0.1:{server.server_address[1]}/"


@pytest.fixture
def visit(chromium, site):
    """Open the page in a browser of its own. It must log no error, and make no request to another host."""
    contexts, requests, errors = [], [], []

    def open_page(address=site, prepare=lambda page: None, settle=True, **options):
        context = chromium.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(60_000)
        page.on("request", lambda request: requests.append(request.url))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        prepare(page)
        page.goto(address)
        if settle:
            page.wait_for_selector(SETTLED)
        return page

    open_page.errors = errors
    yield open_page
    for context in contexts:
        context.close()
    assert requests and all(url.startswith((site, "data:", f"blob:{site}")) for url in requests), requests
    assert errors == []


def pictures(page):
    """The digits as they stand in the canvases, (B, 28, 28) in [0, 1]; ink is opaque."""
    script = """() => [...document.querySelectorAll("#picture canvas")].map((canvas) => Array.from(
        canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data.filter((_, i) => i % 4 === 3)))"""
    return np.array(page.evaluate(script)).reshape(-1, 28, 28) / 255


def change(page, name, value):
    """Set a field as its user would, and return the pictures when all are drawn."""
    page.fill(f"#{name}", str(value))
    page.wait_for_selector(SETTLED)
    return pictures(page)


# ---- the page -----------------------------------------------------------------------------------------------------


def test_the_page_draws_what_is_typed(visit, read, capsys):
    page = visit()
    assert read(change(page, "text", "314")) == [3, 1, 4]
    assert page.get_attribute("#picture", "aria-label") == "Handwritten digits: 314"

    phone = change(page, "text", "(030) 123-4567")
    assert page.eval_on_selector_all("#picture > div", "(groups) => groups.map((g) => g.children.length)") == [3, 3, 4]
    many = np.concatenate([phone, change(page, "text", "24.12.2025 08:59"), change(page, "text", "0123456789" * 2)])
    asked = [int(c) for c in "0301234567" + "241220250859" + "0123456789" * 2]
    right = sum(a == b for a, b in zip(asked, read(many), strict=True))
    assert right >= 0.9 * len(asked)

    milliseconds = page.evaluate("() => performance.getEntriesByName('digit').map((entry) => entry.duration)")
    assert re.fullmatch(r"Drawn in \d+ ms a digit\.", page.inner_text("#status"))
    with capsys.disabled():
        print(f"\nChromium draws a digit in {statistics.median(milliseconds):.0f} ms (median of {len(milliseconds)})")
    assert change(page, "text", "none").size == 0 and page.inner_text("#status") == "Type digits to draw."


def test_the_first_digit_comes_soon_when_the_files_are_cached(visit, site, capsys):
    page = visit()
    started = time.perf_counter()
    page.goto(site)
    page.wait_for_selector("#steps canvas")
    seconds = time.perf_counter() - started
    with capsys.disabled():
        print(f"\nfirst digit {seconds:.1f} s after the page was opened again")
    assert seconds < 15  # 3 where nothing else runs


def test_each_step_is_that_of_the_pipeline(visit, pipe):
    """The page's noise, given to the pipeline, leads to the page's picture, step by step."""
    page = visit()
    change(page, "text", "314")
    noise = page.evaluate("() => [0, 1, 2].map((position) => Array.from(noiseAt(7, position, 0)))")
    latents = torch.tensor(noise).reshape(3, 1, 28, 28)
    assert abs(latents.mean()) < 0.1 and abs(latents.std() - 1) < 0.05
    assert len(set(map(tuple, noise))) == 3
    result = pipe([3, 1, 4], latents=latents, output_type="pt", return_trajectory=True)
    film = (result.latents_trajectory / 2 + 0.5).clamp(0, 1)[:, :, 0]
    names = ["Noise", "Step 1", "Step 2", "Step 3", "Step 4"]
    assert page.locator("#steps label").all_inner_texts() == names
    film[-1] = result.images[:, 0]  # the finished picture knows the level of white, 253 of 255
    for name, frame in zip(names, film, strict=True):
        page.get_by_label(name).check()
        assert np.abs(pictures(page) - frame.numpy()).max() <= 1.01 / 255, name

    page.get_by_role("button", name="Play").click()
    assert page.get_by_label("Noise").is_checked()
    page.wait_for_selector("#play:text('Play')")  # at the end it is no longer "Stop"
    assert page.get_by_label("Step 4").is_checked()


def test_a_seed_has_one_picture(visit):
    page = visit()
    first = change(page, "text", "27")
    other = change(page, "seed", 8)
    assert np.abs(first - other).mean() > 0.02
    assert (change(page, "seed", 7) == first).all()
    assert (change(page, "text", "271")[:2] == first).all()  # what follows changes nothing
    page.get_by_role("button", name="New seed").click()
    page.wait_for_selector(SETTLED)
    assert page.input_value("#seed") not in ("7", "8")
    assert (change(visit(), "text", "27") == first).all()  # in another browser too
    assert page.eval_on_selector("#seed", "(seed) => { seed.value = -1; return seed.checkValidity(); }") is False


def test_the_slider_changes_the_handwriting_little_by_little(visit):
    page = visit()
    change(page, "text", "258")
    path = [change(page, "angle", degrees) for degrees in (0, 5, 10, 15, 20, 90, 180, 360)]
    near = [np.abs(a - b).mean() for a, b in itertools.pairwise(path[:5])]
    far = min(np.abs(path[0] - path[5]).mean(), np.abs(path[0] - path[6]).mean())
    assert min(near) > 0 and max(near) < far / 2
    assert (path[-1] == path[0]).all()


def test_the_page_needs_no_mouse(visit, read):
    page = visit()
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "text"
    page.keyboard.press("Control+a")
    page.keyboard.type("90")
    page.wait_for_selector(SETTLED)
    first = pictures(page)
    assert read(first) == [9, 0]
    order = []
    for _ in range(6):
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id || document.activeElement.type"))
        if order[-1] == "angle":
            page.keyboard.press("ArrowRight")
            page.wait_for_selector(SETTLED)
            assert page.get_attribute("#angle", "aria-valuetext") == "5 degrees"
        if order[-1] == "download":
            with page.expect_download() as download:
                page.keyboard.press("Enter")
        if order[-1] == "radio":
            page.keyboard.press("ArrowUp")
            assert page.get_by_label("Step 3").is_checked()
    assert order == ["seed", "new", "angle", "play", "download", "radio"]
    assert download.value.suggested_filename == "90-seed-7.png"
    picture = Image.open(download.value.path()).convert("L")
    assert picture.size == (2 * 8 * 28, 8 * 28)
    ink = 1 - np.asarray(picture)[4::8, 4::8] / 255
    assert read([ink[:, :28], ink[:, 28:]]) == [9, 0] and np.abs(ink[:, :28] - first[0]).mean() < 0.1
    names = "(all) => all.map((e) => e.labels?.[0]?.textContent || e.ariaLabel || e.textContent)"
    assert all(page.eval_on_selector_all("input, button", names))


def test_the_page_fits_a_phone(visit):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    for typed in ("314", "030-123.4567", "1" * 24):
        change(page, "text", typed)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        right = "(all) => all.map((element) => element.getBoundingClientRect().right)"
        assert max(page.eval_on_selector_all("#picture canvas, #steps canvas", right)) <= 390
    heights = "(all) => all.map((element) => element.offsetHeight)"  # high enough for a finger
    assert min(page.eval_on_selector_all("input:not([type=radio]), button, #steps label", heights)) >= 44


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_follows_the_colour_scheme(visit, scheme):
    page = visit(color_scheme=scheme)
    shot = np.asarray(Image.open(io.BytesIO(page.locator("#picture").screenshot())).convert("L"), dtype=float)
    paper, ink = np.median(shot), shot.min() if scheme == "light" else shot.max()
    assert (paper > 200 and ink < 60) if scheme == "light" else (paper < 60 and ink > 200)
    text = page.eval_on_selector("body", "(body) => getComputedStyle(body).color")
    level = np.mean([int(value) for value in re.findall(r"\d+", text)[:3]])
    assert level < 60 if scheme == "light" else level > 200


def test_the_page_says_what_is_missing(visit):
    def without_model(page):
        page.route("**/sampler.onnx", lambda route: route.fulfill(status=404))

    page = visit(prepare=without_model)
    page.wait_for_selector("#problem:visible")
    assert page.inner_text("#problem") == "The model could not be loaded. sampler.onnx is missing (status 404)."
    assert page.locator("#progress").is_hidden()

    page = visit(prepare=lambda page: page.add_init_script("delete globalThis.WebAssembly"))
    assert "no WebAssembly" in page.inner_text("#problem")
    assert [error for error in visit.errors if "404" not in error] == []
    visit.errors.clear()


def test_the_page_shows_how_much_is_loaded(visit, server):
    server.gate.clear()
    try:
        page = visit(settle=False)
        page.wait_for_selector("#status:text-matches('^Loading the model: [0-9.]+ of [0-9.]+ MB$')")
        # In one call: the download goes on meanwhile.
        told, share = page.evaluate(
            "() => [document.querySelector('#status').innerText, document.querySelector('#progress').value]"
        )
        loaded, total = map(float, re.findall(r"[\d.]+(?= of| MB)", told))
        assert 0 < loaded < total - 2 and total == pytest.approx(20, abs=2)
        assert share == pytest.approx(loaded / total, abs=0.01)
        assert page.get_by_role("button", name="Play").is_disabled()
    finally:
        server.gate.set()
    page.wait_for_selector(SETTLED)
    assert page.locator("#progress").is_hidden()


# ---- the app ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def app():
    """The address of the Gradio app, which runs in a process and an environment of its own."""
    if not SPACE_PYTHON.exists():
        pytest.skip("Gradio is not installed: make test-browser does")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    environment = os.environ | {"GRADIO_SERVER_PORT": str(port), "GRADIO_SERVER_NAME": "127.0.0.1"}
    environment["PYTHONUNBUFFERED"] = "1"  # else the line with the address stays in the buffer of the pipe
    process = subprocess.Popen(
        [SPACE_PYTHON, EXAMPLES / "space" / "app.py"], env=environment, stdout=subprocess.PIPE, text=True
    )
    try:
        for line in process.stdout:
            if url.rstrip("/") in line:
                break
        else:
            pytest.fail(f"The app ended with status {process.wait()}.")
        threading.Thread(target=process.stdout.read, daemon=True).start()
        yield url
    finally:
        process.terminate()
        process.wait(30)
        process.stdout.close()


def digits_of(picture, count, rows=1):
    """The digits of a picture of the app without gaps, (rows * count, 28, 28) in [0, 1]."""
    pixels = 1 - np.asarray(Image.open(io.BytesIO(picture)).convert("L"))[2::4, 2::4] / 255
    assert pixels.shape == (28 * rows, 28 * count)
    return pixels.reshape(rows, 28, count, 28).swapaxes(1, 2).reshape(-1, 28, 28)


def fetch(url, payload=None):
    body = None if payload is None else json.dumps(payload).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=120) as answer:
        return answer.read()


def call(app, *arguments):
    """Call the app as a program does; return the picture and the film."""
    event = json.loads(fetch(f"{app}gradio_api/call/draw", {"data": arguments}))["event_id"]
    answer = fetch(f"{app}gradio_api/call/draw/{event}").decode()
    assert "event: complete" in answer, answer
    picture, film = json.loads(answer.rsplit("data: ", 1)[1])
    return fetch(picture["url"]), fetch(film["url"])


def test_the_app_draws_what_is_typed(chromium, app, read):
    context = chromium.new_context()
    page = context.new_page()
    requests = []
    page.on("request", lambda request: requests.append(request.url))
    page.goto(app)
    before = page.wait_for_selector("#picture img", timeout=60_000).get_attribute("src")
    page.get_by_label("Digits").fill("2718")
    page.get_by_role("button", name="Draw").click()
    image = page.wait_for_selector(f"#picture img:not([src='{before}'])", timeout=60_000)
    picture = context.request.get(image.get_attribute("src")).body()
    assert read(digits_of(picture, 4)) == [2, 7, 1, 8]
    context.close()
    assert [url for url in requests if not url.startswith((app, "data:", "blob:"))] == []


def test_the_app_serves_many_at_once(app, read):
    texts = [f"{i}{(i + 3) % 10}{(i + 6) % 10}" for i in range(8)]
    alone = {text: call(app, text, 3, 40) for text in texts[:2]}
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda text: call(app, text, 3, 40), texts))
    digits = np.concatenate([digits_of(picture, 3) for picture, _ in answers])
    asked = [int(digit) for digit in "".join(texts)]
    assert sum(a == b for a, b in zip(asked, read(digits), strict=True)) >= 22
    for text, (picture, film) in zip(texts, answers, strict=True):
        assert (digits_of(film, 3, rows=5)[-3:] == digits_of(picture, 3)).all()
        if text in alone:
            assert (digits_of(picture, 3) == digits_of(alone[text][0], 3)).all()


# ---- what the Hub reads -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["browser", "space"])
def test_the_front_matter_is_what_the_hub_expects(folder):
    import yaml

    example = EXAMPLES / folder
    front = yaml.safe_load((example / "README.md").read_text(encoding="utf-8").split("---")[1])
    assert front["sdk"] == {"browser": "static", "space": "gradio"}[folder]
    assert (example / front["app_file"]).is_file()
    assert len(front["short_description"]) <= 60
    assert {front["colorFrom"], front["colorTo"]} <= {
        "red",
        "yellow",
        "green",
        "blue",
        "indigo",
        "purple",
        "pink",
        "gray",
    }
