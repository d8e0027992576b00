"""The rules of the house: who may import whom, what portable files may hold, documents that agree with the code."""

from __future__ import annotations

import ast
import graphlib
import importlib
import itertools
import json
import re
import statistics
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mini_ddpm
from mini_ddpm.evaluation.evaluate import COLUMNS, check_protocol, markdown_table
from mini_ddpm.plots import sampling_options

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "mini_ddpm"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))

# Portable modules that define a class which travels with the weights; its bundle holds the others that it imports.
PORTABLE = [
    "models.unet_mini",
    "schedulers.scheduling_mini_ddpm",
    "schedulers.scheduling_mini_ddim",
    "pipelines.pipeline_mini_ddpm",
    "pipelines.pipeline_mini_ddpm_class_conditional",
]
PORTABLE_BASES = [
    "models.blocks",
    "schedulers.scheduling_base",
    "pipelines.pipeline_base",
    "pipelines.portable",
    "files",
]
# The rooms from top to bottom. A module imports from rooms below its own, and from its own storey without a circle.
STOREYS = [
    ["mini_ddpm_cli", "__main__"],
    ["__init__", "training", "evaluation", "export"],
    ["hub", "sampling", "plots", "curves", "data", "sources", "folders", "options"],
    ["models", "schedulers", "pipelines", "files"],
]
IMPORT_NAMES = {"pillow": "PIL"}  # where a distribution and its package are called differently


def storey(name: str) -> int:
    """The storey of a module, counted from the top."""
    return next(number for number, rooms in enumerate(STOREYS) if name.partition(".")[0] in rooms)


def module_file(name: str) -> Path:
    folder = SOURCE if name.startswith("mini_ddpm_cli.") else PACKAGE
    return folder.joinpath(*name.split(".")).with_suffix(".py")


def modules() -> list[str]:
    files = [path.relative_to(PACKAGE).with_suffix("") for path in sorted(PACKAGE.rglob("*.py"))]
    files += [path.relative_to(SOURCE).with_suffix("") for path in sorted((SOURCE / "mini_ddpm_cli").rglob("*.py"))]
    return [".".join(file.parts) for file in files]


def imports(name: str, everywhere: bool = True) -> Iterator[str]:
    """Absolute names that a module imports; `everywhere=False` leaves out what functions import and type checking."""
    nodes = [ast.parse(module_file(name).read_text(encoding="utf-8"))]
    package = name.split(".")[:-1]
    package = package if package[:1] == ["mini_ddpm_cli"] else ["mini_ddpm", *package]
    while nodes:
        node = nodes.pop()
        typing_only = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        if not everywhere and (typing_only or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))):
            continue
        nodes.extend(ast.iter_child_nodes(node))
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join([*package[: len(package) + 1 - node.level], *filter(None, [node.module])])
            base = base if node.level else node.module or ""
            for alias in node.names:  # a module, or a name in one
                path = f"{base}.{alias.name}".removeprefix("mini_ddpm.")
                yield f"{base}.{alias.name}" if base.startswith("mini_ddpm") and module_file(path).is_file() else base


def own_imports(name: str) -> set[str]:
    """Modules of ours that a module imports; the package itself is `__init__`."""
    found = set()
    for imported in imports(name):
        first, _, rest = imported.partition(".")
        if first == "mini_ddpm":
            found.add(rest or "__init__")
        elif first == "mini_ddpm_cli":
            found.add(f"{first}.{rest or '__init__'}")
    return found - {name}


def third_party(names: Iterator[str]) -> set[str]:
    first = {name.partition(".")[0] for name in names}
    return first - {"mini_ddpm", "mini_ddpm_cli"} - set(sys.stdlib_module_names)


def distributions(requirements: list[str]) -> set[str]:
    names = (Requirement(text).name for text in requirements)
    return {IMPORT_NAMES.get(name, name.replace("-", "_")) for name in names}


# ---- imports ------------------------------------------------------------------------------------------------------


def test_every_module_has_its_place():
    rooms = {room for rooms in STOREYS for room in rooms}
    assert {name.partition(".")[0] for name in modules()} == rooms, "give the new room a storey"
    portable = {name for name in modules() if storey(name) == 3}
    assert portable - {"models.__init__", "schedulers.__init__", "pipelines.__init__"} == {*PORTABLE, *PORTABLE_BASES}


@pytest.mark.parametrize("name", modules())
def test_imports_point_one_way(name):
    upwards = {imported for imported in own_imports(name) if storey(imported) < storey(name)}
    assert not upwards
    if storey(name) > 0:
        assert "__init__" not in own_imports(name), "import the module that defines it"


def test_imports_make_no_circle():
    tuple(graphlib.TopologicalSorter({name: own_imports(name) for name in modules()}).static_order())


def test_the_rooms_stay_small():
    for name in modules():
        source = module_file(name).read_text(encoding="utf-8")
        assert len(source.splitlines()) <= 560, name
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                assert (node.end_lineno or 0) - node.lineno < 155, (name, node.name)


@pytest.mark.parametrize("name", modules())
def test_modules_import_base_dependencies_only(name):
    """What an extra installs is imported inside the function that needs it."""
    base = distributions(PYPROJECT["project"]["dependencies"])
    assert third_party(imports(name, everywhere=False)) <= base
    extras = PYPROJECT["project"]["optional-dependencies"]
    runtime = distributions([*extras["train"], *extras["eval"], *extras["export"]])
    assert third_party(imports(name)) <= base | runtime


@pytest.mark.parametrize("name", [*PORTABLE, *PORTABLE_BASES])
def test_portable_modules_import_what_diffusers_brings(name):
    # Pillow and huggingface_hub are dependencies of diffusers itself.
    assert third_party(imports(name)) <= {"torch", "numpy", "diffusers", "PIL", "huggingface_hub"}
    assert own_imports(name) <= {*PORTABLE, *PORTABLE_BASES}
    # the loader looks up the base class of a part's kind in the module that defines it
    if name in PORTABLE:
        module = importlib.import_module(f"mini_ddpm.{name}")
        assert hasattr(module, "ModelMixin" if "unet" in name else "SchedulerMixin")


def test_import_is_quick_and_loads_nothing_but_the_host():
    """`import mini_ddpm` costs next to nothing after what it builds on, and brings in no further package."""
    host = sorted(
        ast.unparse(node)
        for name in modules()
        if storey(name) == 3 or name.startswith("hub.")
        for node in ast.parse(module_file(name).read_text(encoding="utf-8")).body
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not getattr(node, "level", 0)
        if not ast.unparse(node).startswith("from __future__") and "mini_ddpm" not in ast.unparse(node)
    )
    code = "\n".join(
        [
            *dict.fromkeys(host),
            "import sys, time",
            "before, started = set(sys.modules), time.process_time()",
            "import mini_ddpm",
            "print(time.process_time() - started)",
            "print(*{name.partition('.')[0] for name in set(sys.modules) - before})",
        ]
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=SOURCE)
    seconds, new = answer.stdout.splitlines()
    assert third_party(iter(new.split())) == set()
    assert float(seconds) < 0.3


# ---- names --------------------------------------------------------------------------------------------------------


def test_all_is_complete():
    assert all(hasattr(mini_ddpm, name) for name in mini_ddpm.__all__)
    public = {name for name in vars(mini_ddpm) if name.startswith("Mini")}
    for name in PORTABLE:
        for node in ast.parse(module_file(name).read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name.endswith(("Model", "Scheduler", "Pipeline")):
                public.add(node.name)
    assert public <= set(mini_ddpm.__all__)


# ---- documents ----------------------------------------------------------------------------------------------------


def test_versions_agree():
    version = re.escape(mini_ddpm.__version__)
    versions = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert next(v for v in versions if v != "Unreleased") == mini_ddpm.__version__
    assert re.search(rf"^version: {version}$", (ROOT / "CITATION.cff").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_constraints_pin_what_pyproject_asks_for():
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if not line.startswith("#"):
            name, version = line.split("==")
            pins[canonicalize_name(name)] = version
    assert "+" not in pins["torch"], "a local suffix would tie the pin to one build"
    project = PYPROJECT["project"]
    for text in [*project["dependencies"], *itertools.chain(*project["optional-dependencies"].values())]:
        requirement = Requirement(text)
        if requirement.name != project["name"]:
            assert requirement.specifier.contains(pins[canonicalize_name(requirement.name)]), text


def page(name: str) -> str:
    """The text of a document."""
    return (ROOT / name).read_text(encoding="utf-8")


def table_after(text: str, head: str) -> list[dict[str, str]]:
    """The rows of the Markdown table whose head line starts with `head`, as cells by column."""
    lines = text[text.index(head) :].partition("\n\n")[0].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def test_figures_of_the_weights_are_those_measured():
    """One source, `model_card/NAME/evaluation.json`, which `make evaluation` writes: all other places say the same."""
    measured = {}
    for folder in mini_ddpm.PRETRAINED.iterdir():
        name, card = folder.name, ROOT / "model_card" / folder.name
        rows = json.loads((card / "evaluation.json").read_text(encoding="utf-8"))
        assert rows == json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
        assert (card / "evaluation.md").read_text(encoding="utf-8") == markdown_table(rows)
        for row in rows[1:]:
            steps = row["num_inference_steps"]
            sampling = f"{steps} step{'s' * (steps != 1)}{sampling_options(row)}"
            measured[f"`{name}`", sampling] = row, rows[0]
    check_protocol([row for pair in measured.values() for row in pair])  # they share one table
    weights = table_after(page("docs/weights.md"), "| Weights | Sampling |")
    assert {(row["Weights"], row["Sampling"]) for row in weights[:-1]} == set(measured)
    assert weights[-1]["Weights"] == "real digits"
    for shown in weights:
        row, floor = measured.get((shown["Weights"], shown["Sampling"]), (None, None))
        row = row or next(floor for row, floor in measured.values() if "class_accuracy" in row)
        for key in ("fid", "kid", "precision", "recall", "coverage", "class_accuracy", "memorization"):
            title, reading = COLUMNS[key]
            assert shown[title].replace(" %", "%") == (reading.format(row[key]) if key in row else ""), (shown, title)
    for name in ("README.md", "README.zh-CN.md"):
        text = page(name)
        head = re.search(r"^\| (Weights|权重) \|.*$", text, flags=re.MULTILINE)
        assert head is not None
        shown_rows = [list(row.values()) for row in table_after(text, head[0])]
        assert len(shown_rows) == 4
        for weights_name, steps, fid, floor_fid, accuracy, seconds in shown_rows:
            row, floor = measured[weights_name, steps.replace("步", "step" if steps.startswith("1 ") else "steps")]
            assert (fid, floor_fid) == (f"{row['fid']:.2f}", f"{floor['fid']:.2f}")
            assert accuracy.replace(" %", "%") == (f"{row['class_accuracy']:.2%}" if "class_accuracy" in row else "")
            assert seconds == (f"{row['seconds_per_image']:.2g}" if "seconds_per_image" in row else "–")


def test_the_table_of_distillation_is_that_of_its_run(benchmark):
    """`python benchmarks/quality.py distillation` writes the table that the page shows."""
    file = ROOT / "benchmarks" / "results" / "distillation.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    check_protocol(rows)
    table = benchmark("quality").table(rows)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == table
    lines, _, _ = table.partition("\n\n")
    assert f"\n\n{lines}\n\n" in page("docs/distillation.md")
    shown = {(row["Steps"], row["Sampler"]): row for row in table_after(table, lines.splitlines()[0])}
    assert len(shown) == len([row for row in rows if row["images"] == "generated"]) > 4
    # What ships, and its teacher, have the figures of their cards.
    for name, title in (("mnist-distilled", "**student**"), ("mnist-class-conditional", "teacher")):
        measured = json.loads((mini_ddpm.PRETRAINED / name / "evaluation.json").read_text(encoding="utf-8"))[1]
        title += f", eta {measured['eta']:g}" if measured["eta"] else ""
        row = shown[str(measured["num_inference_steps"]), title]
        assert row["U-Net calls"] == str(measured["unet_evaluations"])
        for key in ("fid", "kid", "recall", "coverage", "class_accuracy"):
            text, reading = COLUMNS[key]
            assert row[text].replace(" %", "%") == reading.format(measured[key])


def test_the_table_of_samplers_is_that_of_its_run():
    rows = json.loads((ROOT / "benchmarks" / "results" / "samplers.json").read_text(encoding="utf-8"))
    check_protocol(rows)
    text = page("docs/evaluation.md")
    shown = text[text.index("| FID of 1,000 |") :].split("\n\n")[0].splitlines()
    steps = [int(cell.split()[0].replace(",", "")) for cell in shown[0].strip("|").split("|")[1:]]
    measured = {}
    for row in rows:
        if "scheduler" in row:
            _, _, spacing = row["variant"].partition(", ")
            measured[row["scheduler"], spacing, row["num_inference_steps"]] = row["fid"]
    names = {"DDIM": "MiniDDIM", "DDPM": "MiniDDPM", "DPM-Solver++": "DPMSolverMultistep", "UniPC": "UniPCMultistep"}
    for line in shown[2:]:
        name, *cells = (cell.strip() for cell in line.strip("|").split("|"))
        name, _, spacing = name.partition(", ")
        for count, cell in zip(steps, cells, strict=True):
            fid = measured.pop((f"{names[name]}Scheduler", spacing, count), None)
            assert cell == ("" if fid is None else f"{fid:.2f}")
    assert not measured


@pytest.mark.parametrize(("name", "document"), [("ablation", "training"), ("tutorial", "tutorial")])
def test_the_tables_of_trainings_are_those_of_their_runs(benchmark, name, document):
    quality = benchmark("quality")
    file = ROOT / "benchmarks" / "results" / f"{name}.json"
    rows = json.loads(file.read_text(encoding="utf-8"))
    table = quality.table(rows)
    assert file.with_suffix(".md").read_text(encoding="utf-8") == table
    assert {row["variant"] for row in rows} <= set(getattr(quality, name.upper()))
    assert table.split("\n\n")[0] in page(f"docs/{document}.md")


def test_the_table_of_clothes_is_that_of_its_run():
    """`mini-ddpm evaluate` wrote it for another dataset than the digits."""
    file = ROOT / "benchmarks" / "results" / "fashion.json"
    table = markdown_table(json.loads(file.read_text(encoding="utf-8")))
    assert file.with_suffix(".md").read_text(encoding="utf-8") == table
    assert table in page("docs/training.md")


def test_the_table_of_speed_is_that_of_its_run(benchmark):
    """`python benchmarks/speed.py` writes the JSON; the page shows its summary and some of its ratios."""
    speed = benchmark("speed")
    results = ROOT / "benchmarks" / "results"
    result = json.loads((results / "speed.json").read_text(encoding="utf-8"))
    assert (results / "speed.md").read_text(encoding="utf-8") == speed.table(result)
    assert speed.summary(result["rows"]) in page("docs/speed.md")
    rows = {row["row"]: row["values"] for row in result["rows"]}
    text = " ".join(page("docs/speed.md").split())
    for row, name, base in (
        ("draw, 50 steps, 64 images", "diffusers", "mini-ddpm"),
        ("draw, 50 steps, 64 images", "diffusers", "mini-ddpm, bf16"),
        ("draw, 50 steps, 64 images", "diffusers, bf16", "mini-ddpm, bf16"),
        ("draw, 50 steps, 64 images", "denoising-diffusion-pytorch", "mini-ddpm"),
        ("a training step, batch 128", "diffusers", "mini-ddpm"),
        ("a training step, batch 128", "denoising-diffusion-pytorch", "mini-ddpm"),
        ("a DDIM step of the scheduler", "diffusers", "mini-ddpm"),
        ("a DDPM step of the scheduler", "diffusers", "mini-ddpm"),
        ("a whole process", "mini-ddpm sample, 1 image", "import torch, diffusers' base classes"),
    ):
        assert speed.ratio(rows[row], name, base) in text, (row, name)

    result = json.loads((results / "speed-xeon.json").read_text(encoding="utf-8"))
    assert (results / "speed-xeon.md").read_text(encoding="utf-8") == speed.table(result)
    rows = {row["row"]: row["values"] for row in result["rows"]}
    for count in (1, 16, 64):
        ratio = speed.ratio(rows[f"draw, 50 steps, {count} images"], "diffusers", "mini-ddpm")
        assert ratio in text
        for name in ("README.md", "README.zh-CN.md"):
            assert count == 16 or ratio.split()[0] in page(name)
    student, cold = rows["draw, 4 steps of the student, 1 image"], rows["from a cold process to a saved digit"]
    for values, told in ((student, "{:.0f} ms"), (cold, "{:.2f} s of CPU")):
        name = next(name for name in values if "onnxruntime" in name)
        median = statistics.median(values[name])
        assert told.format(median * 1000 if "ms" in told else median) in text
