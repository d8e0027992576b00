"""Damaged and hostile folders: random changes of the pipelines that ship, each opened by `load_pipeline`.

A change is either refused, by an `OSError` or `ValueError` of one line that names the file or its folder, or it is a
legal setting, and the pipeline has it. Nothing hangs, and nothing else is raised.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import time

import pytest
from conftest import WEIGHTS

from mini_ddpm import PRETRAINED, load_pipeline
from mini_ddpm.pipelines.portable import CHECKSUMS

JSON_FILES = ("model_index.json", "unet/config.json", "scheduler/scheduler_config.json")
SECONDS = 10

# What may change without a word: keys that no class reads, and settings with a legal value, which the user sees in
# the configuration of the pipeline. Each key with a test of the new value; a deleted one is `None`.
IGNORED = ("_diffusers_version", CHECKSUMS, "_class_name", "auto_map")


def is_number(low, high, kind=(int, float)):
    return lambda value: isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high


def is_bool(value):
    return isinstance(value, bool)


def is_interval(value):
    return isinstance(value, list) and len(value) == 2 and all(map(is_number(0, 1), value)) and value[0] < value[1]


LEGAL = {
    "unet/config.json": {
        "sample_size": lambda v: v is None or all(map(is_number(1, 8_192, int), v if isinstance(v, list) else [v])),
        "attention_head_dim": lambda v: type(v) is int and v > 0 and 96 % v == 0,
        "norm_num_groups": lambda v: type(v) is int and v > 0 and 32 % v == 0,
        "norm_eps": is_number(1e-12, 1),
        "dropout": is_number(0, 0.99),
        "head_channels": lambda v: v == 0,
    },
    "scheduler/scheduler_config.json": {
        "beta_schedule": lambda v: v in ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"),
        "prediction_type": lambda v: v in ("epsilon", "sample", "v_prediction"),
        "timestep_spacing": lambda v: v in ("leading", "linspace", "trailing"),
        "num_train_timesteps": is_number(1, 100_000, int),
        "steps_offset": is_number(0, 100_000, int),
        "beta_start": is_number(1e-9, 1),
        "beta_end": is_number(1e-9, 1),
        "clip_sample_range": is_number(1e-3, 1e3),
        "sample_max_value": is_number(1e-3, 1e3),
        "dynamic_thresholding_ratio": is_number(0, 1),
        **dict.fromkeys(("clip_sample", "set_alpha_to_one", "thresholding", "rescale_betas_zero_snr"), is_bool),
    },
    "model_index.json": {
        "default_num_inference_steps": lambda v: v is None or is_number(1, 1000, int)(v),
        "default_guidance_scale": lambda v: v is None or is_number(1e-6, 1e3)(v),
        "default_eta": lambda v: v is None or is_number(0, 1)(v),
        "default_guidance_interval": lambda v: v is None or is_interval(v),
        "black_level": lambda v: v is None or is_number(0, 254, int)(v),
        "white_level": lambda v: v is None or is_number(1, 255, int)(v),
        "id2label": lambda v: v is None or all(k.isdigit() and isinstance(n, str) for k, n in v.items()),
    },
}

VALUES = (
    None, True, False, 0, 1, -1, 2, 3, 7, 10**6, 10**7, 10**12, 10**30, -(10**30), 0.0, 0.5, 1.5, -0.001, 1e-300,
    1e300, float("nan"), float("inf"), -float("inf"),
    "", "NaN", "true", "1", "linear", "../../x", "\ud800", "a\nb", "x" * 10_000,
    [], [[]], [1], [1, 2], [64, 96], ["64", "96"], [None], [1] * 5000, {}, {"a": {}}, {"0": 1},
    ["diffusers", "UNet2DModel"], ["diffusers", "DDPMScheduler"], ["diffusers", "StableDiffusionPipeline"],
    [None, None], [1, 2, 3],
)  # fmt: skip


def nested(depth):
    value = 1
    for _ in range(depth):
        value = [value]
    return value


def changed_value(rng, value):
    """Another value: a random one, or one near the old one."""
    if rng.random() < 0.6:
        return rng.choice((*VALUES, nested(50)))
    if isinstance(value, bool):
        return rng.choice((not value, int(value), str(value)))
    if isinstance(value, (int, float)):
        return rng.choice((value + 1, value - 1, value * 10, -value, float(value), str(value), value * 1e6, [value]))
    if isinstance(value, str):
        return rng.choice((value + "x", value[:-1], value.upper(), [value], {value: value}))
    if isinstance(value, list) and value:
        return rng.choice(
            (value[:-1], value[::-1], value * 2, value * 1000, [changed_value(rng, value[0]), *value[1:]])
        )
    if isinstance(value, dict) and value:
        key = rng.choice(sorted(value))
        return (
            {**value, key: changed_value(rng, value[key])} if rng.random() < 0.7 else {**value, key + "0": value[key]}
        )
    return rng.choice(VALUES)


def change_json(rng, folder):
    """Change a key or a value of a configuration. Return the file, the key and its new value."""
    name = rng.choice(JSON_FILES)
    file = folder / name
    content = json.loads(file.read_text())
    key = rng.choice(sorted(content))
    how = rng.choice(("value", "value", "value", "value", "delete", "rename", "add", "text", "duplicate"))
    if how == "value":
        content[key] = changed_value(rng, content[key])
    elif how == "delete":
        del content[key]
    elif how == "rename":
        content[rng.choice((key + "_", key.upper(), "_" + key, ""))] = content.pop(key)
    elif how == "add":
        key = rng.choice(("unknown", "auto_map", "black_level", "default_num_inference_steps", "head_channels", "vae"))
        content[key] = rng.choice(VALUES)
    if how == "text":
        key, text = None, file.read_bytes()
        at = rng.randrange(len(text))
        other = text[:at] + bytes([rng.randrange(256)]) + text[at + 1 :]
        whole = (b"[" * 100_000, b"9" * 10_000, b"\xff\xfe", b"null", b"[]", b" " * 20_000_000)
        text = rng.choice((text[:at], other, other, text + text, *whole))
        file.write_bytes(text)
        with contextlib.suppress(ValueError, RecursionError):
            content = json.loads(text)
    else:
        text = json.dumps(content)
        if how == "duplicate":  # the last one counts
            content[key] = changed_value(rng, content[key])
            text = text[:-1] + f", {json.dumps(key)}: {json.dumps(content[key])}" + "}"
        file.write_text(text)
    return name, content, f"{how} {key!r}"


def change_weights(rng, folder):
    """Flip bits of the weights, cut them, or change their header."""
    file = folder / WEIGHTS
    content = bytearray(file.read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    how = rng.choice(("flip", "flip", "flip in header", "size", "cut", "extend", "dtype", "shape", "swap", "zeros"))
    if how == "flip":
        content[rng.randrange(header, len(content))] ^= 1 << rng.randrange(8)
    elif how == "flip in header":
        content[rng.randrange(8, header)] ^= 1 << rng.randrange(8)
    elif how == "size":
        content[rng.randrange(8)] ^= 1 << rng.randrange(8)
    elif how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "extend":
        content += bytes(rng.randrange(1, 100))
    elif how == "zeros":
        at = rng.randrange(header, len(content) - 4096)
        content[at : at + 4096] = bytes(4096)
    else:
        old, new = {"dtype": (b'"F16"', b'"I16"'), "shape": (b"[64,", b"[46,"), "swap": (b"conv1", b"conv2")}[how]
        content[:header] = content[:header].replace(old, new, rng.choice((1, -1)))
    file.write_bytes(content)
    return WEIGHTS, None, how


def change_files(rng, folder):
    """Replace a file or a folder of the pipeline by something else."""
    name = rng.choice((*JSON_FILES, WEIGHTS, WEIGHTS, "unet", "scheduler"))
    path = folder / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    how = rng.choice(("gone", "folder", "link to nowhere", "link to itself", "fifo", "empty", "device", "index"))
    if how == "folder":
        path.mkdir()
    elif how == "link to nowhere":
        path.symlink_to("nowhere")
    elif how == "link to itself":
        path.symlink_to(path.name)
    elif how == "fifo":
        os.mkfifo(path)
    elif how == "empty":
        path.touch()
    elif how == "device":
        path.symlink_to("/dev/zero")
    elif how == "index":  # shards that are elsewhere
        (folder / "unet").mkdir(exist_ok=True)
        text = rng.choice(('{"metadata": {}, "weight_map": {"a": "../../x"}}', "{}", '{"weight_map": 1}', "["))
        (folder / f"{WEIGHTS}.index.json").write_text(text)
    return name, None, how


class TooLongError(BaseException):
    """Not an `Exception`, so that nothing but the test catches it."""


@contextlib.contextmanager
def time_limit():
    def stop(*_):
        raise TooLongError

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def is_legal(name, before, after):
    """Whether each difference between two configurations is a legal setting."""
    if not isinstance(after, dict):
        return False
    for key in before.keys() | after.keys():
        if key in IGNORED or (key.startswith("_") and key not in before):
            continue
        old, new = before.get(key), after.get(key)
        if (old == new and type(old) is type(new)) or (key not in after and name.startswith("unet") and old == 0):
            continue
        if key not in LEGAL[name] or not LEGAL[name][key](new):
            return False
    return True


def has_setting(pipe, name, key, value):
    part = {"model_index.json": pipe, "unet/config.json": pipe.unet}.get(name, pipe.scheduler)
    held = part.config.get(key)
    return json.loads(json.dumps(held)) == value


def run(shipped, count, seed, folder):
    """Return the legal changes, and fail for any other that is not refused as it must be."""
    rng = random.Random(f"{shipped.name} {seed}")
    legal, slowest = {}, 0.0
    for number in range(count):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(shipped, folder, ignore=shutil.ignore_patterns("*.png", "*.safetensors"))
        change = (change_json, change_json, change_weights, change_files)[number % 4]
        if change is change_weights:
            shutil.copyfile(shipped / WEIGHTS, folder / WEIGHTS)
        else:
            (folder / WEIGHTS).symlink_to(shipped / WEIGHTS)
        name, content, how = change(rng, folder)
        label = f"{shipped.name} {number}: {name}, {how}"
        start = time.perf_counter()
        try:
            with time_limit():
                pipe = load_pipeline(folder)
        except TooLongError:
            pytest.fail(f"{label}: took more than {SECONDS} seconds")
        except (OSError, ValueError) as error:
            assert "\n" not in str(error) and str(folder) in str(error) and len(str(error)) < 1200, (label, error)
        except BaseException as error:
            pytest.fail(f"{label}: {type(error).__name__}: {error}")
        else:
            before = json.loads((shipped / name).read_text()) if content is not None else None
            assert content is not None and is_legal(name, before, content), f"{label}: opened without a word"
            for key, value in content.items():
                if key in LEGAL[name]:
                    assert has_setting(pipe, name, key, value), (label, key)
            legal[label] = {
                k: content.get(k) for k in before.keys() | content.keys() if content.get(k) != before.get(k)
            }
        slowest = max(slowest, time.perf_counter() - start)
    print(f"\n{shipped.name}: {count} changes, {len(legal)} legal, the slowest {slowest:.2f} s")
    for label, changes in legal.items():
        print(f"  {label}: {str(changes)[:150]}")
    return legal


SHIPPED = sorted(path.parent for path in PRETRAINED.glob("*/model_index.json"))


@pytest.fixture(autouse=True)
def quiet():
    from diffusers.utils import logging

    logging.disable_progress_bar()
    level = logging.get_verbosity()
    logging.set_verbosity(100)
    yield
    logging.set_verbosity(level)
    logging.enable_progress_bar()


@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_random_changes_are_refused_or_legal(shipped, tmp_path):
    run(shipped, 100, "short", tmp_path / "x")


@pytest.mark.slow
@pytest.mark.parametrize("shipped", SHIPPED, ids=lambda path: path.name)
def test_a_thousand_random_changes_are_refused_or_legal(shipped, tmp_path):
    run(shipped, 1000, "long", tmp_path / "x")
