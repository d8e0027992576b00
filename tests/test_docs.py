"""The documentation: its code runs, its commands parse, its pictures are those of its code, nothing is left out."""

import dataclasses
import importlib.util
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import mini_ddpm
import mini_ddpm_cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = {path.stem: path.read_text(encoding="utf-8") for path in sorted(DOCS.glob("*.md")) if path.name != "index.md"}
DOCUMENTS = (
    PAGES
    | {name: (ROOT / f"{name}.md").read_text(encoding="utf-8") for name in ("README", "README.zh-CN", "CONTRIBUTING")}
    | {"index": (DOCS / "index.md").read_text(encoding="utf-8")}
)
TOPICS = (
    "quickstart how-it-works sampling training distillation evaluation weights hub export serve speed tutorial"
    " compatibility contributing api cli"
)  # fmt: skip

# A block of code, and the comment before one that a test cannot run.
BLOCK = re.compile(r"^(<!-- not run: \S[^\n]* -->\n)?```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document, *languages):
    """The code blocks of a document that run: the line of the first, and the text of each."""
    for match in BLOCK.finditer(DOCUMENTS[document]):
        if match[2] in languages and not match[1]:
            yield DOCUMENTS[document].count("\n", 0, match.start(3)), match[3]


def commands(document):
    """The words of each `mini-ddpm` and `make` command in the shell blocks of a document."""
    for _, text in blocks(document, "bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words and words[0] in ("mini-ddpm", "make"):
                yield words


WITH_CODE = [name for name in DOCUMENTS if any(blocks(name, "python"))]
WITH_COMMANDS = [name for name in DOCUMENTS if any(commands(name))]


def test_each_topic_has_a_page_and_each_page_is_in_the_contents():
    assert set(PAGES) == set(TOPICS.split())
    contents = re.findall(r"^```\{toctree\}\n(.*?)^```", DOCUMENTS["index"], re.MULTILINE | re.DOTALL)
    listed = [line for tree in contents for line in tree.split() if re.fullmatch(r"[a-z-]+", line)]
    assert sorted(listed) == sorted([*PAGES, "notebook"])


def test_the_reference_has_each_public_name():
    described = re.findall(r"^\.\. (?:auto\w+|py:data):: (?:mini_ddpm\.)?(\w+)", PAGES["api"], re.MULTILINE)
    assert sorted(described) == sorted(mini_ddpm.__all__)


def test_the_reference_has_each_command():
    assert re.findall(r"\{command-help\} (\w+)", PAGES["cli"]) == list(mini_ddpm_cli.COMMANDS)


@pytest.mark.parametrize("name", WITH_CODE)
def test_the_code_runs_and_makes_the_pictures(name, tmp_path, monkeypatch):
    """The blocks of a page run from top to bottom in an empty folder, without a network."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("MINI_DDPM_CACHE", str(tmp_path / "cache"))
    namespace = {"__name__": f"docs_{name}"}
    for line, text in blocks(name, "python"):
        exec(compile("\n" * line + text, f"{name}.md", "exec"), namespace)
    # A picture that a command made has a sentence in brackets below it.
    for shown in re.findall(r"\(images/([\w-]+\.png)\)\n\n(?!\()", DOCUMENTS[name]):
        made, kept = (
            np.asarray(Image.open(folder / shown).convert("RGB"), float) for folder in (tmp_path, DOCS / "images")
        )
        assert made.shape == kept.shape, shown
        assert np.abs(made - kept).mean() < 1, f"docs/images/{shown} is not {tmp_path / shown}"


def test_no_picture_is_left_over():
    shown = set(re.findall(r"\(images/([\w.-]+)\)", "".join(DOCUMENTS.values())))
    assert {path.name for path in (DOCS / "images").iterdir()} == shown


@pytest.mark.parametrize("name", WITH_COMMANDS)
def test_the_commands_parse(name):
    targets = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    for program, *words in commands(name):
        if program == "make":
            assert {word for word in words if "=" not in word} <= set(targets), words
        elif words[-1:] not in (["--help"], ["--version"]):
            mini_ddpm_cli.parse(words)


def test_the_samplers_of_the_first_pages_draw(tmp_path, monkeypatch):
    """One command for each kind of output, with fewer images in fewer steps."""
    monkeypatch.chdir(tmp_path)
    drawn = set()
    for words in (words[1:] for name in ("README", "quickstart") for words in commands(name) if "sample" in words):
        config = mini_ddpm_cli.parse(words)
        shipped = (mini_ddpm.PRETRAINED / mini_ddpm_cli.pipeline_to_sample(config)).is_dir()
        if shipped and config.out.suffix not in drawn:
            drawn.add(config.out.suffix)
            steps = min(config.num_inference_steps or 3, 3)
            mini_ddpm_cli.sample(dataclasses.replace(config, num_images=2, num_inference_steps=steps))
            assert config.out.exists()
    assert drawn >= {".png", ".webp"}


@pytest.mark.parametrize("name", DOCUMENTS)
def test_the_code_of_other_languages_is_well_formed(name):
    for _, text in blocks(name, "json"):
        json.loads(text)
    for fence in re.findall(r"^```(.*)$", DOCUMENTS[name], re.MULTILINE)[::2]:
        assert fence, "a code block needs the name of its language"


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("furo") is None, reason="Sphinx is not installed: `make docs` does it")
def test_the_site_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "sphinx", "--fail-on-warning", "--keep-going", "--quiet", DOCS, tmp_path]
    result = subprocess.run(command, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    assert (tmp_path / "api.html").read_text(encoding="utf-8").count('class="sig ') > len(mini_ddpm.__all__)
