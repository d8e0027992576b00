"""Plant random faults in the package, one at a time, and count those that the tests notice.

    python benchmarks/mutation.py --count 40 schedulers models

Each fault changes one operator, comparison or constant of one module. The tests of that module run on a copy of the
package until one fails. A survivor is printed as a diff: it is a test that is missing, or a change that makes no
difference. This is not part of the tests: 200 faults take about an hour on one core.
"""

from __future__ import annotations

import ast
import copy
import json
import os
import random
import shutil
import sys
import tempfile
import time
from pathlib import Path

import tyro

ROOT = Path(__file__).parents[1]
# Arguments for pytest: the tests of each module or room. Those of training are a quick choice of many.
TESTS = {
    "schedulers": ["test_scheduling.py"],
    "models": ["test_unet_mini.py"],
    "pipelines": ["test_pipelines.py", "test_remote_code.py", "test_hub.py"],
    "training/loss": [
        "test_training.py", "test_distillation.py", "-k",
        "snr or without_weights or variance or pixels or ends_are or nearly or loss",
    ],
    "training/batches": [
        "test_training.py", "-k",
        "epoch_shows or share_the_batch or seed_and or strat or reading_images or draws_are or batches_are",
    ],
    "training/distill": [
        "test_distillation.py", "-k",
        "optimum or targets_are or cannot_teach or without_options or estimate or cannot_be_distilled",
    ],
    "training/adversarial": ["test_adversarial.py"],
    "options": ["test_cli.py"],
    "data": ["test_data.py"],
    "folders": ["test_data.py"],
    "plots": ["test_plots.py"],
}  # fmt: skip
_PAIRS = "Add Sub, Mult Div, FloorDiv Mult, Mod Mult, Pow Mult, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or"
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {ast.USub: ast.UAdd}
for _pair in _PAIRS.split(", "):
    _one, _other = (getattr(ast, name) for name in _pair.split())
    OPERATORS = {_other: _one, **OPERATORS, _one: _other}


def places(tree: ast.Module) -> list[tuple[ast.AST, str, int | None]]:
    """The fields of nodes that can be changed: no docstrings, annotations or error messages."""
    found: list[tuple[ast.AST, str, int | None]] = []
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, (ast.Raise, ast.JoinedStr)) or (
            isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        ):
            continue
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list"):
                continue
            for index, item in enumerate(value) if isinstance(value, list) else [(None, value)]:
                is_number = isinstance(item, ast.Constant) and isinstance(item.value, (bool, int, float))
                if type(item) in OPERATORS or is_number:
                    found.append((node, name, index))
                elif isinstance(item, ast.AST):
                    pending.append(item)
    return found


def change(tree: ast.Module, place: int) -> tuple[ast.Module, int]:
    """A copy of the tree in which one of its `places` is changed, and the number of the line."""
    tree = copy.deepcopy(tree)
    parent, name, index = places(tree)[place]
    value = getattr(parent, name)
    node = value if index is None else value[index]
    new: ast.AST
    if isinstance(node, ast.Constant):
        new = ast.Constant(not node.value if isinstance(node.value, bool) else node.value + 1)  # type: ignore[operator]
    else:
        new = OPERATORS[type(node)]()
    if index is None:
        setattr(parent, name, new)
    else:
        value[index] = new
    return ast.fix_missing_locations(tree), getattr(node, "lineno", getattr(parent, "lineno", 0))


def survives(package: Path, tests: list[str], seconds: int) -> bool:
    """Whether the tests pass on the package. They run in a fork, which has torch and diffusers loaded already."""
    child = os.fork()
    if child == 0:
        try:
            os.setsid()
            output = os.open(os.devnull, os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            os.environ["PYTHONPATH"] = str(package)
            sys.path.insert(0, str(package))
            os.chdir(package.parent)
            import pytest

            options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore::pytest.PytestAssertRewriteWarning"]
            os._exit(
                int(pytest.main([*options, *(f"tests/{test}" if test.endswith(".py") else test for test in tests)]))
            )
        finally:
            os._exit(1)
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status) == 0
        time.sleep(0.05)
    os.killpg(child, 9)  # a fault that makes an endless loop
    os.waitpid(child, 0)
    return False


def main(
    rooms: tyro.conf.Positional[tuple[str, ...]] = (), count: int = 200, seed: int = 0, seconds: int = 300
) -> None:
    """Plant faults and report how many the tests notice.

    Args:
        rooms: Which of the rooms with a list of tests; all by default.
        count: Number of faults, shared among the rooms by the number of places that can be changed.
        seed: Seed of the choice.
        seconds: Limit of one run of the tests.
    """
    import diffusers
    import torch

    del diffusers
    torch.set_num_threads(1)
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    killed: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        for name in ("src", "tests", "benchmarks", "examples", "model_card", "docs"):
            shutil.copytree(ROOT / name, work / name, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ROOT.iterdir():
            if file.is_file():
                shutil.copy(file, work)
        source = work / "src" / "mini_ddpm"
        candidates = []
        for room in rooms or tuple(TESTS):
            for file in sorted(source.glob(f"{room}/*.py")) or [source / f"{room}.py"]:
                tree = ast.parse(file.read_text(encoding="utf-8"))
                candidates += [(room, file.relative_to(source), index) for index in range(len(places(tree)))]
        chosen = sorted(
            random.Random(seed).sample(candidates, min(count, len(candidates))), key=lambda x: (x[0], str(x[1]))
        )
        for room in {room for room, _, _ in chosen}:
            if not survives(work / "src", TESTS[room], seconds):
                raise SystemExit(f"The tests of {room} fail without any fault: {', '.join(TESTS[room])}.")
        for room, file, index in chosen:
            target = source / file
            before = target.read_text(encoding="utf-8")
            tree = ast.parse(before)
            changed, line = change(tree, index)
            target.write_text(ast.unparse(changed), encoding="utf-8")
            tally = killed.setdefault(room, [0, 0])
            tally[1] += 1
            if survives(work / "src", TESTS[room], seconds):
                old, new = ast.unparse(tree).splitlines(), ast.unparse(changed).splitlines()
                print(f"SURVIVED {file}:{line}")
                print(
                    *(f"  - {a.strip()}\n  + {b.strip()}" for a, b in zip(old, new, strict=True) if a != b), flush=True
                )
            else:
                tally[0] += 1
            target.write_text(before, encoding="utf-8")
    print(json.dumps({room: f"{done} of {total}" for room, (done, total) in killed.items()}, indent=2))


if __name__ == "__main__":
    tyro.cli(main)
