"""The command line.

`mini-ddpm sample`, `train`, `sharpen`, `distill`, `plot`, `evaluate`, `export`, `card`, `push`, `verify`.

Importing the package `mini_ddpm` imports torch and diffusers (5 s). This package is beside it, so that
`mini-ddpm --help` does not wait for them.
"""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import inspect
import io
import itertools
import os
import pkgutil
import re
import shlex
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import tyro

from .commands import (
    CardConfig,
    ExportConfig,
    PlotConfig,
    PushConfig,
    VerifyConfig,
    card,
    distill,
    evaluate,
    export,
    plot,
    push,
    sharpen,
    train,
    verify,
)
from .sampling import SampleConfig, pipeline_to_sample, sample

__all__ = [
    "COMMANDS",
    "CardConfig",
    "ExportConfig",
    "PlotConfig",
    "PushConfig",
    "SampleConfig",
    "VerifyConfig",
    "main",
    "parse",
    "pipeline_to_sample",
    "sample",
]

# Help texts show PIPELINE instead of [STR], and INT instead of {None}|INT.
_TYRO = (tyro.conf.PositionalMetavarFromFieldName, tyro.conf.DisallowNone)
_CONFIG_HELP = "--config PATH starts from the settings of a run: its folder or train_config.json. Other flags win."
# The flag that is probably meant by a word without a flag.
_FLAGS_OF_WORDS = dict.fromkeys(("train", "distill", "evaluate"), "--dataset-name") | {"sample": "--class-labels"}

# Each command's function, and the dataclass of its flags, which is imported only when the command runs.
COMMANDS: dict[str, tuple[Callable[[Any], None], str]] = {
    "sample": (sample, "mini_ddpm_cli:SampleConfig"),
    "train": (train, "mini_ddpm.training.config:TrainConfig"),
    "sharpen": (sharpen, "mini_ddpm.training.sharpen:SharpenConfig"),
    "distill": (distill, "mini_ddpm.training.distill:DistillConfig"),
    "plot": (plot, "mini_ddpm_cli:PlotConfig"),
    "evaluate": (evaluate, "mini_ddpm.evaluation.evaluate:EvaluateConfig"),
    "export": (export, "mini_ddpm_cli:ExportConfig"),
    "card": (card, "mini_ddpm_cli:CardConfig"),
    "push": (push, "mini_ddpm_cli:PushConfig"),
    "verify": (verify, "mini_ddpm_cli:VerifyConfig"),
}


class Terminated(KeyboardInterrupt):
    """SIGTERM, which job schedulers and containers send. It ends a command in the same good order as Ctrl-C."""


@contextlib.contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Raise `Terminated` at a SIGTERM in the block; only the main thread can do so."""

    def terminate(*_: object) -> None:
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command. Return the exit code.

    It is 0 after success, 2 after an error, which is one line on stderr, 130 after Ctrl-C, and 143 after SIGTERM.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    for stream in (sys.stdout, sys.stderr):  # print what a terminal cannot show as an escape sequence
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        if not argv or argv[0] in ("-h", "--help"):
            print(_help())
        elif argv[0] == "--version":
            print(importlib.metadata.version("mini-ddpm"))
        else:
            with _sigterm_as_exception():
                config = parse(argv)
                COMMANDS[argv[0]][0](config)
    except BrokenPipeError:  # `mini-ddpm sample --help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt as stop:
        name, code = ("terminated", 143) if isinstance(stop, Terminated) else ("interrupted", 130)
        print(f"\nmini-ddpm: {name}{''.join(f'. {text}' for text in stop.args)}", file=sys.stderr)
        return code
    except (ValueError, TypeError, OSError, RuntimeError, FloatingPointError, ImportError) as error:
        if os.environ.get("MINI_DDPM_DEBUG"):
            raise
        print(f"mini-ddpm: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return 2
    return 0


def _help() -> str:
    commands = "\n".join(f"  {name:10}{(run.__doc__ or '').splitlines()[0]}" for name, (run, _) in COMMANDS.items())
    return f"""usage: mini-ddpm COMMAND [OPTIONS]

A small, fast denoising diffusion model. Commands:

{commands}

  mini-ddpm COMMAND --help   the options of one command
  mini-ddpm --version        the version

Start with:

  mini-ddpm sample                            a grid of digits, samples.png
  mini-ddpm sample --class-labels 3 1 4       these digits
  mini-ddpm sample --out film.webp            how digits emerge from noise

Set MINI_DDPM_DEBUG=1 to see the traceback of an error."""


def parse(argv: Sequence[str]) -> Any:
    """Return the configuration of a command, from its name and its flags.

    Raise `ValueError` if the command, a flag or the type of a value is unknown, and `SystemExit(0)` after `--help`.
    """
    command, *flags = argv
    if command not in COMMANDS:
        raise ValueError(f"unknown command {command!r}; choose one of {', '.join(COMMANDS)}, or --help.")
    config = pkgutil.resolve_name(COMMANDS[command][1])
    options: dict[str, Any] = {"prog": f"mini-ddpm {command}", "config": _TYRO}
    if command == "train":
        options["description"] = f"{inspect.getdoc(config)}\n\n{_CONFIG_HELP}"
        flags = [word for flag in flags for word in re.split(r"(?<=^--config)=", flag)]
        if "--config" in flags:
            from mini_ddpm.options import saved_config

            at = flags.index("--config")
            options["default"] = saved_config(config, "".join(flags[at + 1 : at + 2]))
            del flags[at : at + 2]
    stderr = io.StringIO()
    try:
        with contextlib.redirect_stderr(stderr):
            parsed, unknown = tyro.cli(config, args=flags, return_unknown_args=True, **options)
    except SystemExit as stop:
        if not stop.code:  # --help
            raise
    else:
        if command == "sample" and (parsed.pipeline or "").isdecimal() and not Path(parsed.pipeline).is_dir():
            unknown = [parsed.pipeline, *unknown]  # a class, unless a folder is called so
        if not unknown:
            return parsed
        raise ValueError(f"{_explain_unknown(command, config, unknown)} See mini-ddpm {command} --help.")
    # tyro prints a box with a title and a message, then a horizontal rule and the argument's help. Keep the message.
    lines = [line.strip("│ ") for line in stderr.getvalue().splitlines() if line.startswith("│")]
    rule = next((i for i, line in enumerate(lines) if line.startswith("─")), len(lines))
    message = " ".join(lines[:rule]) or stderr.getvalue()
    raise ValueError(f"{message.rstrip('.')}. See mini-ddpm {command} --help.")


def _explain_unknown(command: str, config: Any, unknown: Sequence[str]) -> str:
    """Return what is wrong with words that no flag takes, and which flag may be meant."""
    word, _, value = unknown[0].partition("=")
    values = [value] if value else list(itertools.takewhile(lambda word: not word.startswith("-"), unknown[1:]))
    if word.startswith("-"):
        found, told = _similar_flags(word, config), f"unknown option {word}."
    else:
        found, told = _FLAGS_OF_WORDS.get(command, "").split(), f"unexpected argument {unknown[0]!r}."
        values = [unknown[0], *values]
    if len(found) == 1:
        return f"{told} Did you mean {shlex.join([*found, *values])}?"
    return f"{told} Did you mean one of {', '.join(found)}?" if found else told


def _similar_flags(word: str, config: Any) -> list[str]:
    """Return the flags of a command that hold the words of `word`, or their beginnings; else the most similar one."""
    flags: dict[str, str] = {}  # the flag of each field, by its name and its aliases
    for field, hint in typing.get_type_hints(config, include_extras=True).items():
        extras, names = getattr(hint, "__metadata__", ()), [field.replace("_", "-")]
        names += [alias.strip("-") for extra in extras for alias in getattr(extra, "aliases", None) or ()]
        if "Positional" not in map(str, extras):
            flags |= dict.fromkeys(names, f"--{names[0]}")
    asked = word.strip("-").replace("_", "-").lower()
    pattern = re.compile("(.*-)?" + ".*-".join(map(re.escape, asked.split("-"))))
    holding = [name for name in flags if len(asked) > 2 and pattern.match(name)]
    return list(dict.fromkeys(flags[name] for name in holding or difflib.get_close_matches(asked, flags, 1, 0.7)))
