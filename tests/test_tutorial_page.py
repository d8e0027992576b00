"""The page on the tutorial: its code prints what it shows, its figures were measured, each section has its row."""

import contextlib
import io
import json
import math
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8")
    for name in ("tutorial", "training", "distillation")
}
PAGE = PAGES["tutorial"]
# Of runs whose results are not kept as a file; the pages give the commands.
NOT_KEPT = {
    "tutorial": {"1.49", "119.08", "139.42", "15.36", "2.18", "98.88"},  # 1.49: real digits, features in bf16
    "training": {"0.46", "2.18", "2.21", "99.18"},  # before the weights were sharpened, and with another weight
    "distillation": {
        "0.76", "11.02", "2.18", "5.68", "5.79", "6.00", "6.24", "6.25", "6.83", "9.67",
        "99.02", "99.05", "99.12", "99.25", "99.54",
    },
}  # fmt: skip
NUMBER = re.compile(r"(?<![\w.])(?:\d+\.?\d*(?:e-\d+)?|nan)(?![\w.]\d)")


def same(printed, shown):
    """Whether two outputs differ in the last digits of their numbers only: processors do."""
    numbers = [[float(number) for number in NUMBER.findall(text)] for text in (printed, shown)]
    return (
        NUMBER.sub("#", printed) == NUMBER.sub("#", shown)
        and len(numbers[0]) == len(numbers[1])
        and all(
            math.isclose(a, b, rel_tol=0.2, abs_tol=1e-6) or (math.isnan(a) and math.isnan(b))
            for a, b in zip(*numbers, strict=True)
        )
    )


def test_two_outputs_are_compared_by_their_numbers():
    assert same("t = 3: 0.50 nan\n", "t = 3: 0.51 nan\n")
    assert not any(same("t = 3: 0.50\n", other) for other in ("t = 3: 0.80\n", "t = 3 0.50\n", "t = 3: nan\n", ""))


def test_the_code_prints_what_the_page_shows(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?", PAGE, re.MULTILINE | re.DOTALL)
    assert sum(bool(shown) for _, shown in blocks) >= 10
    namespace = {"__name__": "tutorial_page"}
    for code, shown in blocks:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(code, "tutorial.md", "exec"), namespace)
        assert same(printed.getvalue(), shown), printed.getvalue()


def test_each_section_of_the_tutorial_has_a_row_that_leads_to_its_measurement():
    rows = re.findall(r"^\| \[([^\]]+)\]\(#([\w-]+)\) \|", PAGE, re.MULTILINE)
    assert [title for title, _ in rows] == [
        "Data", "Cosine schedule", "q_sample", "Time embedding", "Residual block", "U-Net", "Training",
        "Mixed precision", "p_sample", "FID table", "DDIM", "Distillation", "Class labels", "Tuning advice",
    ]  # fmt: skip
    headings = re.findall(r"^#+ (.+)$", re.sub(r"^```.*?^```", "", PAGE, flags=re.MULTILINE | re.DOTALL), re.MULTILINE)
    anchors = [re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings]
    assert {anchor for _, anchor in rows} <= set(anchors)


@pytest.mark.parametrize("name", PAGES)
def test_figures_are_those_of_the_results(name):
    """A figure of two decimals in the text is in a table of the results, but for the few that are listed above."""
    figures = re.compile(r"(?<![\d.])\d+\.\d\d(?![\d.])")
    text = re.sub(r"^```.*?^```", "", PAGES[name], flags=re.MULTILINE | re.DOTALL)
    measured = [*RESULTS.glob("*.md"), *(ROOT / "model_card").glob("*/evaluation.md")]
    known = {figure for file in measured for figure in figures.findall(file.read_text(encoding="utf-8"))}
    assert set(figures.findall(text)) - known == NOT_KEPT[name]


def test_what_the_cosine_schedule_gains():
    """The shares on the page are those of the tutorial's training, by seed and epochs, and of the ablation."""
    rows = json.loads((RESULTS / "tutorial.json").read_text(encoding="utf-8"))
    fid = {(row["variant"], row["training_seed"], row["epochs"]): row["fid"] for row in rows}
    gains = [
        1 - value / fid["tutorial, linear, T = 1000", seed, epochs]
        for (variant, seed, epochs), value in fid.items()
        if variant == "tutorial, cosine, T = 1000"
    ]
    assert f"{100 * min(gains):.1f} to {100 * max(gains):.1f} %" in PAGE
    ablation = {row["variant"]: row["fid"] for row in json.loads((RESULTS / "ablation.json").read_text())}
    assert f"{100 * (1 - ablation['the recipe'] / ablation['linear schedule']):.0f} % for our recipe" in PAGE
