"""What a run's folder goes through: kills, signals, damage, other people's files, a second run, other settings."""

import contextlib
import dataclasses
import hashlib
import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from conftest import SHORT_RUN, WEIGHTS, assert_equal_weights, weights
from PIL import Image

from mini_ddpm import load_pipeline
from mini_ddpm.data import ImageDataset
from mini_ddpm.files import atomic_write, is_running
from mini_ddpm.training.train import TrainConfig, train


@pytest.fixture
def config(pictures, tmp_path):
    """Eight steps of a tiny network."""
    return TrainConfig(
        dataset_name=str(pictures),
        output_dir=tmp_path / "run",
        block_out_channels=(32,),
        layers_per_block=1,
        max_train_steps=8,
        lr_warmup_steps=0,
        lr_scheduler="constant",
        checkpointing_steps=2,
        checkpoints_total_limit=3,
        **SHORT_RUN,
    )


@pytest.fixture
def whole(config):
    """The folder of the same run, never interrupted."""
    return train(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))


def names(folder):
    return {path.name for path in folder.iterdir()}


def command(config, *arguments):
    """The command line of this run."""
    flags = ["--dataset-name", config.dataset_name, "--output-dir", str(config.output_dir), "--device", "cpu"]
    flags += ["--block-out-channels", "32", "--layers-per-block", "1", "--train-batch-size", "4"]
    flags += [
        "--lr-warmup-steps",
        "0",
        "--lr-scheduler",
        "constant",
        "--checkpointing-steps",
        "2",
        "--save-images-epochs",
        "0",
    ]
    flags += ["--checkpoints-total-limit", "3", "--log-with", "none", "--mixed-precision", "no"]
    return [sys.executable, "-m", "mini_ddpm", "train", *flags, *arguments]


def start(config, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.Popen(
        command(config, *arguments), env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # which a job of `&` ignores
    )  # fmt: skip


def wait_for(path, running):
    deadline = time.monotonic() + 120
    while not path.exists():
        assert running.poll() is None and time.monotonic() < deadline, running.communicate()
        time.sleep(0.01)


# ---- kills and signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "every"),
    [
        ("train", 40),
        ("sample", 12),
        pytest.param("train", 1, marks=pytest.mark.slow),
        pytest.param("distill", 4, marks=pytest.mark.slow),  # of more than a thousand
        pytest.param("sample", 1, marks=pytest.mark.slow),
        pytest.param("evaluate", 1, marks=pytest.mark.slow),
    ],
)
def test_killed_at_an_operation_on_files_the_same_command_completes_the_work(tmp_path, name, every):
    program = Path(__file__).with_name("crash_points.py")
    answer = subprocess.run(
        [sys.executable, program, name, tmp_path / "walk", "--every", str(every)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True,
        check=True,
    )  # fmt: skip
    result = json.loads(answer.stdout.splitlines()[-1])
    assert result["wrong"] == {}, answer.stderr[-2000:]
    assert result["points"] >= 3


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_stops_after_the_step_with_a_checkpoint(config, number, code):
    running = start(config, "--max-train-steps", "400", "--checkpointing-steps", "1000", "--logging-steps", "1")
    wait_for(config.output_dir / "train_log.jsonl", running)
    running.send_signal(number)
    output, errors = running.communicate(timeout=60)
    assert running.returncode == code, errors
    assert "Traceback" not in errors and "Give the same command again to go on." in output
    (checkpoint,) = config.output_dir.glob("checkpoint-*")
    step = json.loads((checkpoint / "progress.json").read_text())["step"]
    assert 0 < step < 400 and checkpoint.name == f"checkpoint-{step}"
    assert load_pipeline(config.output_dir)
    # Resumed, it is the run that was never stopped.
    config = dataclasses.replace(config, max_train_steps=step + 2, checkpointing_steps=1000)
    train(config)
    assert_equal_weights(
        config.output_dir, train(dataclasses.replace(config, output_dir=config.output_dir.with_name("whole")))
    )


def test_a_signal_in_a_script_acts_as_it_did_before(config, monkeypatch):
    received = []
    monkeypatch.setattr("mini_ddpm.training.train.compute_loss", interrupting(os.getpid(), signal.SIGTERM))
    previous = signal.signal(signal.SIGTERM, lambda *_: received.append(sorted(names(config.output_dir))))
    try:
        train(config)
        assert signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL
    finally:
        signal.signal(signal.SIGTERM, previous)
    assert len(received) == 1 and "checkpoint-1" in received[0] and "model_index.json" in received[0]


def interrupting(pid, number):
    from mini_ddpm.training.loss import compute_loss

    def loss(*args, **options):
        os.kill(pid, number)
        return compute_loss(*args, **options)

    return loss


def test_sample_keeps_its_batches_at_a_sigterm(tmp_path):
    arguments = ["sample", "mnist-distilled", "--num-images", "2000", "--batch-size", "20", "--device", "cpu"]
    running = subprocess.Popen(
        [sys.executable, "-m", "mini_ddpm", *arguments, "--out", str(tmp_path / "x.npz")],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for(tmp_path / ".x.npz.parts", running)
    running.send_signal(signal.SIGTERM)
    _, errors = running.communicate(timeout=60)
    assert running.returncode == 143
    assert errors.splitlines()[-1].startswith("mini-ddpm: terminated. Finished batches are saved in")
    assert names(tmp_path) == {".x.npz.parts"}


def test_what_a_killed_process_left_is_removed_by_the_next_write(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    assert is_running(os.getpid()) and not is_running(dead.pid)
    with atomic_write(tmp_path / "x.png") as temporary:
        temporary.write_bytes(b"new")
        host = temporary.name.split(".")[2].split("-")[0]
        (tmp_path / f".x.{host}-1.png").touch()  # of a process that runs
        (tmp_path / f".y.{host}-{dead.pid}.png").touch()  # of another file
        (tmp_path / f".x.{host}-{dead.pid}.png").touch()
        (tmp_path / f".x.{host}-{dead.pid}").mkdir()
        (tmp_path / ".x.0000-7.png").touch()  # of another machine
        (tmp_path / ".x.0000-8.png").touch()
        os.utime(tmp_path / ".x.0000-8.png", (0, 0))  # and left there long ago
    with atomic_write(tmp_path / "x.png") as temporary:
        temporary.write_bytes(b"new")
    assert names(tmp_path) == {"x.png", f".x.{host}-1.png", f".y.{host}-{dead.pid}.png", ".x.0000-7.png"}


def test_a_start_that_failed_can_be_repeated(config):
    config.output_dir.mkdir()
    for name in (".train_config.0a1b-4711.json", ".train_config.4711.json", "train_config.json.tmp", ".lock"):
        (config.output_dir / name).touch()
    train(config)
    assert {name for name in names(config.output_dir) if name[0] == "."} == {".lock"}


# ---- what is in the folder ---------------------------------------------------------------------------------


def cut(file):
    file.write_bytes(file.read_bytes()[:-1])


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize("damage", [cut, flip, Path.unlink])
@pytest.mark.parametrize(
    "name", ["model.safetensors", "averaged_weights.safetensors", "optimizer.bin", "random_states_0.pkl"]
)
def test_a_damaged_checkpoint_is_named_and_an_older_one_taken(config, whole, capsys, damage, name):
    shutil.copytree(whole, config.output_dir)
    newest = config.output_dir / "checkpoint-8"
    damage(newest / name)
    (config.output_dir / WEIGHTS).unlink()
    train(config)
    assert f"{newest / name} is damaged. Going on from {config.output_dir / 'checkpoint-6'}" in capsys.readouterr().err
    assert_equal_weights(config.output_dir, whole)
    assert "checkpoint-8.old" not in names(config.output_dir)


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": 8}', '{"step": 7, "seconds": 1, "files": {}}', "[" * 10**5])
def test_a_damaged_progress_is_no_checkpoint(config, whole, capsys, text):
    shutil.copytree(whole, config.output_dir)
    (config.output_dir / "checkpoint-8" / "progress.json").write_text(text)
    train(config)
    assert "checkpoint-8/progress.json is damaged" in capsys.readouterr().err
    assert_equal_weights(config.output_dir, whole)
    assert "checkpoint-8.old" in names(config.output_dir)  # it is not ours to delete


def test_a_damaged_checkpoint_does_not_count_among_those_that_are_kept(config, whole):
    cut(whole / "checkpoint-8" / "model.safetensors")
    config = dataclasses.replace(config, output_dir=whole, checkpointing_steps=1, checkpoints_total_limit=1)
    train(dataclasses.replace(config, max_train_steps=7))
    kept = {name for name in names(whole) if name.startswith("checkpoint")}
    assert kept == {"checkpoint-7", "checkpoint-8"}  # the damaged one is left for a person to look at
    train(dataclasses.replace(config, max_train_steps=7))  # goes on from the whole one


def test_without_a_whole_checkpoint_the_run_does_not_start_again(config, whole):
    for checkpoint in whole.glob("checkpoint-*"):
        cut(checkpoint / "model.safetensors")
    before = (whole / WEIGHTS).read_bytes()
    with pytest.raises(ValueError, match=r"checkpoint-8/model.safetensors is damaged, and there is no whole"):
        train(dataclasses.replace(config, output_dir=whole))
    assert (whole / WEIGHTS).read_bytes() == before


def test_files_of_other_people_are_left_alone(config, whole):
    shutil.copytree(whole, config.output_dir)
    theirs = ["checkpoint-best", "checkpoint-4-before-lr-change", "checkpoint-9", "checkpoint-1.5", "checkpoint-²"]
    for name in theirs:
        (config.output_dir / name).mkdir()
        (config.output_dir / name / "thesis.tex").write_text("years of work")
    (config.output_dir / "checkpoint-2.zip").write_text("zip")
    (config.output_dir / "checkpoint-3").symlink_to(whole / "checkpoint-8")
    train(dataclasses.replace(config, max_train_steps=14, checkpoints_total_limit=1))
    kept = {*theirs, "checkpoint-2.zip", "checkpoint-3", "checkpoint-14"}
    assert {name for name in names(config.output_dir) if name.startswith("checkpoint")} == kept
    assert (whole / "checkpoint-8" / "model.safetensors").exists()


def test_a_folder_in_the_way_of_a_checkpoint_is_set_aside(config, capsys):
    train(dataclasses.replace(config, max_train_steps=2))
    (config.output_dir / "checkpoint-4").mkdir()
    (config.output_dir / "checkpoint-4" / "thesis.tex").write_text("years of work")
    train(config)
    assert (config.output_dir / "checkpoint-4.old" / "thesis.tex").read_text() == "years of work"
    assert "checkpoint-4 was no whole checkpoint of this run" in capsys.readouterr().err


def test_nothing_that_is_read_can_execute_code(config, whole, tmp_path):
    """A shared run's folder may hold pickles of anybody; their hashes are as easily made."""

    class Planted:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "executed",))

    for name in ("optimizer.bin", "random_states_0.pkl", "model.safetensors", "custom_checkpoint_0.pkl",
                 "scheduler.bin", "scaler.pt", "sampler.bin", "pytorch_model.bin", "train_config.json"):  # fmt: skip
        for how in ("pickle", "torch"):
            shutil.rmtree(config.output_dir, ignore_errors=True)
            shutil.copytree(whole, config.output_dir)
            checkpoint = config.output_dir / "checkpoint-8"
            file = (config.output_dir if name.endswith(".json") else checkpoint) / name
            if how == "pickle":
                file.write_bytes(pickle.dumps(Planted()))
            else:
                torch.save({"state": Planted()}, file)
            progress = json.loads((checkpoint / "progress.json").read_text())
            progress["files"] = {
                path.name: hashlib.sha256(path.read_bytes()).hexdigest()
                for path in checkpoint.iterdir()
                if path.name != "progress.json"
            }
            (checkpoint / "progress.json").write_text(json.dumps(progress))
            with contextlib.suppress(Exception):
                train(dataclasses.replace(config, max_train_steps=10))
            assert not (tmp_path / "executed").exists(), (name, how)


def test_a_checkpoint_of_an_earlier_version_is_refused(config, whole):
    checkpoint = whole / "checkpoint-8"
    (checkpoint / "progress.json").write_text('{"step": 8, "seconds": 1.0}')
    (checkpoint / "custom_checkpoint_0.pkl").touch()
    with pytest.raises(ValueError, match=r"earlier version.*pretrained_model_name_or_path="):
        train(dataclasses.replace(config, output_dir=whole))


def test_a_finished_run_returns_before_it_decodes_an_image(config, whole, monkeypatch, capsys):
    def stack(*args, **kwargs):
        raise AssertionError

    monkeypatch.setattr(ImageDataset, "stack", stack)
    before = {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")}
    train(dataclasses.replace(config, output_dir=whole))
    assert "is already trained (8 steps)" in capsys.readouterr().out
    assert {path: path.stat().st_mtime_ns for path in whole.rglob("*.safetensors")} == before
    # A pipeline that is damaged, gone, or of another step is written again.
    for damage in (cut, flip, Path.unlink):
        damaged = config.output_dir.with_name(damage.__name__)
        shutil.copytree(whole, damaged)
        damage(damaged / WEIGHTS)
        (damaged / "model_index.json").unlink()
        train(dataclasses.replace(config, output_dir=damaged))
        assert_equal_weights(damaged, whole)
        assert load_pipeline(damaged)


def test_two_runs_in_one_folder_are_refused(config):
    running = start(config, "--max-train-steps", "4000")
    wait_for(config.output_dir / "checkpoint-2", running)
    with pytest.raises(ValueError, match=rf"is in use by process {running.pid} on "):
        train(dataclasses.replace(config, max_train_steps=4000))
    running.kill()
    running.communicate()
    train(dataclasses.replace(config, max_train_steps=100))  # the lock died with its process


# ---- what a run is -----------------------------------------------------------------------------------------


def test_other_images_are_another_run(config, pictures, tmp_path):
    images = shutil.copytree(pictures, tmp_path / "images")
    config = dataclasses.replace(config, dataset_name=str(images), class_conditional=True)
    train(dataclasses.replace(config, max_train_steps=4))
    (images / "left").rename(images / "z")  # class 0 is another one now
    with pytest.raises(ValueError, match=r"holds a run on other images: their classes was \['left', 'right'\]"):
        train(config)
    (images / "z").rename(images / "left")
    Image.new("L", (8, 8)).save(images / "left" / "new.png")
    with pytest.raises(ValueError, match="holds a run on other images: their num_images was 16 and is 17"):
        train(config)
    (images / "left" / "new.png").unlink()
    train(config)


def test_another_number_of_processes_goes_on_with_the_same_batch(config, whole, two_processes):
    train(dataclasses.replace(config, max_train_steps=4))
    with pytest.raises(ValueError, match="global_batch_size=4, not 2"):
        train(dataclasses.replace(config, train_batch_size=2))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    arguments = ["-m", *command(config)[2:], "--max-train-steps", "8", "--train-batch-size", "2"]
    answer = subprocess.run([sys.executable, *two_processes, *arguments], env=environment, capture_output=True,
                            text=True, check=False)  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert "2 processes, precision no: 16 images, 4 steps of 4" in answer.stdout
    sample, timesteps = torch.randn(4, 1, 8, 8), torch.tensor([0, 300, 600, 999])
    predictions = [load_pipeline(folder).unet(sample, timesteps).sample for folder in (config.output_dir, whole)]
    torch.testing.assert_close(*predictions, atol=1e-4, rtol=0)


def test_the_environment_of_accelerate_changes_no_setting(config, whole, monkeypatch):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "2")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert_equal_weights(train(config), whole)  # which says mixed_precision=no


def test_auto_is_the_precision_of_the_launcher(config, monkeypatch, capsys):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    train(dataclasses.replace(config, mixed_precision="auto", max_train_steps=1))
    assert "Training on cpu, 1 process, precision bf16: 16 images, 1 step of 4." in capsys.readouterr().out


def test_the_accelerator_of_a_notebook_keeps_its_state(config):
    own = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=3)
    try:
        state = dict(AcceleratorState._shared_state)
        with pytest.raises(ValueError, match="has an Accelerator already, with mixed_precision='bf16'"):
            train(config)
        train(dataclasses.replace(config, mixed_precision="bf16"))
        assert AcceleratorState._shared_state == state and PartialState._shared_state
        assert own.gradient_accumulation_steps == 3 and own.mixed_precision == "bf16"
        assert own.device.type == "cpu"
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def test_warm_up_is_at_most_a_tenth_of_the_run(config):
    config = dataclasses.replace(
        config, max_train_steps=20, lr_warmup_steps=200, lr_scheduler="cosine", logging_steps=1
    )
    log = [json.loads(line) for line in (train(config) / "train_log.jsonl").read_text().splitlines()]
    rates = [entry["lr"] for entry in log]
    assert max(rates) == rates[1] == config.learning_rate and rates[-1] == 0


def test_a_tracker_that_is_not_installed_is_refused_before_the_start(config, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"log_with='wandb' needs the package wandb: pip install wandb"):
        train(dataclasses.replace(config, log_with="wandb"))
    assert not config.output_dir.exists()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_another_default_dtype_changes_no_weight(config, whole, dtype):
    torch.set_default_dtype(dtype)
    try:
        train(config)
    finally:
        torch.set_default_dtype(torch.float32)
    found, expected = weights(config.output_dir), weights(whole)
    assert {tensor.dtype for tensor in found.values()} == {torch.float32}
    if dtype == torch.float64:  # the initial weights are rounded to bfloat16
        assert all(torch.allclose(tensor, expected[key], atol=1) for key, tensor in found.items())


def test_a_full_disk_stops_the_run_and_loses_nothing(config, whole):
    """Every file of the run is written under a limit of its size, and the same command completes the run."""
    script = (
        "import resource, sys\n"
        "limit = int(sys.argv.pop(1))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "from mini_ddpm_cli import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    arguments = [*command(config)[3:], "--max-train-steps", "8"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    for limit in (500, 100_000):
        shutil.rmtree(config.output_dir, ignore_errors=True)
        answer = subprocess.run([sys.executable, "-c", script, str(limit), *arguments], env=environment,
                                capture_output=True, text=True, check=False)  # fmt: skip
        assert answer.returncode == 2, answer.stderr
        assert "Free some space" in answer.stderr and "Traceback" not in answer.stderr
        train(config)
        assert_equal_weights(config.output_dir, whole)
        assert {name for name in names(config.output_dir) if name[0] == "."} == {".lock"}
