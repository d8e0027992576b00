"""The notebook: it runs from top to bottom, and the stored file is whole, small and clean."""

import ast
import base64
import io
import json
import re
from pathlib import Path

import pytest
from PIL import Image, ImageDraw, ImageFont

import mini_ddpm

NOTEBOOK = Path(__file__).parents[1] / "examples" / "ddpm_from_scratch.ipynb"
# A word of the heading of each section, in the tutorial's order.
SECTIONS = ["Data", "schedules", "q(x_t", "embedding", "block", "U-Net", "training", "p_sample"]
SECTIONS += ["DDIM", "distillation", "guidance", "tuning", "share"]


def read():
    return json.loads(NOTEBOOK.read_text(encoding="utf-8"))


def source(cell):
    return "".join(cell["source"])


def kinds(cell):
    """The kinds of a cell's outputs: "stdout", "image/png", "text/html", ... Progress bars do not count."""
    found = set()
    for output in cell.get("outputs", ()):
        if output["output_type"] == "stream":
            found.add(output["name"])
        elif not any("widget" in kind for kind in output["data"]):
            found |= {"image/png", "text/html"} & set(output["data"]) or set(output["data"])
    return found - {"stderr"}


def code_cells(notebook):
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def sections():
    """The Markdown and the code of each numbered section by its heading."""
    text = ""
    for cell in read()["cells"]:
        text += source(cell) + "\n\n"
    parts = re.split(r"^## (.*)\n", text, flags=re.MULTILINE)
    return {heading: body for heading, body in zip(parts[1::2], parts[2::2], strict=True) if heading[0].isdigit()}


@pytest.fixture
def digits(tmp_path):
    """Twenty 28x28 pictures of digits, in a folder for each class."""
    font = ImageFont.load_default(size=24)
    for index in range(20):
        digit, copy = divmod(index, 2)
        picture = Image.new("L", (28, 28))
        ImageDraw.Draw(picture).text((12 + 4 * copy, 14), str(digit), fill=255, font=font, anchor="mm")
        folder = tmp_path / "digits" / str(digit)
        folder.mkdir(parents=True, exist_ok=True)
        picture.save(folder / f"{copy}.png")
    return tmp_path / "digits"


@pytest.mark.skipif(not (mini_ddpm.PRETRAINED / "mnist").exists(), reason="the weights are not in this checkout")
def test_it_runs_from_top_to_bottom(digits, tmp_path, monkeypatch):
    """No cell raises, and each has outputs of the same kinds as those that are stored."""
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    for name, value in {
        "MINI_DDPM_DATASET": digits,
        "MINI_DDPM_QUICK": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": tmp_path / "hf",
        "XDG_CACHE_HOME": tmp_path / "cache",
        "JUPYTER_RUNTIME_DIR": tmp_path / "jupyter",
        "IPYTHONDIR": tmp_path / "ipython",
    }.items():
        monkeypatch.setenv(name, str(value))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    for stored, executed in zip(code_cells(read()), code_cells(notebook), strict=True):
        assert kinds(executed) == kinds(stored), source(stored)


def test_the_stored_file_is_small_and_clean():
    text = NOTEBOOK.read_text(encoding="utf-8")
    assert len(text.encode()) < 1_500_000
    outside_pictures = re.sub(r'"image/png": "[^"]*"|base64,[A-Za-z0-9+/=]*', "", text)
    for place in (
        f"/{NOTEBOOK.resolve().parts[1]}",
        "/root",
        "/home",
        "/tmp",
        "/usr",
        " at 0x",
        "site-packages",
        'execution"',
    ):
        assert place not in outside_pictures, place
    notebook = read()
    assert set(notebook["metadata"]) == {"kernelspec", "language_info"}
    assert notebook["metadata"]["language_info"] == {"name": "python", "pygments_lexer": "ipython3"}
    assert all(cell["metadata"] == {} for cell in notebook["cells"])
    cells = code_cells(notebook)
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell["outputs"]]
    assert {output["output_type"] for output in outputs} == {"stream", "display_data", "execute_result"}
    assert {output["name"] for output in outputs if output["output_type"] == "stream"} == {"stdout"}


def test_every_cell_that_shows_something_has_its_output_stored():
    shows = {"compare", "print", "sample_grid", "noising_strip", "train_by_hand"}
    for cell in code_cells(read()):
        if source(cell).startswith("!"):
            assert kinds(cell) == {"stdout"}
            continue
        nodes = ast.parse(source(cell)).body
        while any(isinstance(node, (ast.For, ast.With)) for node in nodes):
            nodes = [child for node in nodes for child in getattr(node, "body", [node])]
        called = [node.value.func for node in nodes if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)]
        if any(ast.unparse(function) in shows | {"plt.show"} for function in called):
            assert kinds(cell), source(cell)


def test_every_picture_comes_with_what_to_see_in_it():
    pictures, text = 0, ""
    for cell in read()["cells"]:
        text = source(cell) if cell["cell_type"] == "markdown" else text
        for output in cell.get("outputs", ()):
            if picture := output.get("data", {}).get("image/png"):
                with Image.open(io.BytesIO(base64.b64decode(picture))) as image:
                    assert min(image.size) > 50
            if kinds(cell) & {"image/png", "text/html"}:
                assert "**What to see:**" in text, source(cell)
                pictures += 1
    assert pictures >= 12


def test_the_film_is_stored_as_a_film():
    (film,) = (cell for cell in code_cells(read()) if "text/html" in kinds(cell))
    html = "".join(film["outputs"][0]["data"]["text/html"])
    with Image.open(io.BytesIO(base64.b64decode(html.partition("base64,")[2].partition('"')[0]))) as image:
        assert image.format == "WEBP" and image.n_frames > 10


def test_the_sections_are_those_of_the_tutorial():
    headings = list(sections())
    assert [int(heading.partition(".")[0]) for heading in headings] == list(range(1, len(SECTIONS) + 1))
    for word, heading in zip(SECTIONS, headings, strict=True):
        assert word in heading
    for number, body in enumerate(sections().values(), 1):
        assert number == 12 or "**By the package" in body, number
        assert number in (1, 10, 12, 13) or "**Tutorial:**" in body, number


def test_every_section_ends_with_exercises_and_folded_answers():
    numbers = []
    for heading, body in sections().items():
        exercises = re.findall(r"^\*\*Exercise (\d+)\.\*\* ", body, flags=re.MULTILINE)
        answers = re.findall(r"<details><summary>Answer</summary>\n\n(.*?)\n</details>", body, flags=re.DOTALL)
        assert 1 <= len(exercises) == len(answers) == body.count("<details>"), heading
        assert all(len(answer) > 40 for answer in answers)
        numbers += map(int, exercises)
        for code in re.findall(r"^```python\n(.*?)^```", "\n".join(answers), flags=re.DOTALL | re.MULTILINE):
            ast.parse(code)
        tail = body[body.rindex("</details>") :]
        assert "```" not in tail and "**" not in tail, f"{heading}: something follows the exercises"
    assert numbers == list(range(1, len(numbers) + 1))


def test_links_lead_to_files():
    links = re.findall(r"\]\(([^)]+)\)", "\n".join(source(cell) for cell in read()["cells"]))
    files = [link for link in links if not link.startswith("http")]
    assert len(files) >= 4
    assert [link for link in files if not (NOTEBOOK.parent / link).is_file()] == []
