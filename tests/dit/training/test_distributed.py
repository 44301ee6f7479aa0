"""Training on two processes is training on one."""

import csv
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dit_qat.dit.training import last_checkpoint
from dit_qat.dit.training.loading import read_checkpoint

ROBUQ = {
    "class_path": "dit_qat.dit.methods.RobuQ",
    "init_args": {"preset": "paper", "activation_bits": 4, "rank": 2},
}
CONFIG = {
    "seed_everything": 1,
    "model": {
        "network": {
            "class_path": "dit_qat.dit.models.DiT",
            "init_args": {
                "input_size": 8,
                "patch_size": 4,
                "in_channels": 1,
                "hidden_size": 32,
                "depth": 2,
                "num_heads": 2,
                "num_classes": 10,
            },
        },
        "optimizer": {
            "lr_ternary": 1e-2,
            "lr_low_rank": 1e-2,
            "lr_float": 1e-2,
            "warmup_steps": 2,
        },
    },
    "data": {"class_path": "dit_qat.dit.data.Digits", "init_args": {"batch_size": 16}},
    "ema": {"decay": 0.9},
    "checkpoints": {"every_n_steps": 100},
    "trainer": {
        "max_steps": 6,
        "val_check_interval": 6,
        "log_every_n_steps": 1,
        "accelerator": "cpu",
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "logger": {"class_path": "pytorch_lightning.loggers.CSVLogger", "init_args": {}},
    },
}


TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")
FAILURES = """
import os
import time
from pathlib import Path

import pytorch_lightning as pl
import torch


class NanOnTheSecond(pl.Callback):
    def on_train_batch_start(self, trainer, module, batch, index):
        if trainer.global_step == 3 and trainer.global_rank == 1:
            batch[0].fill_(torch.nan)


class OnlyTheFirstFails(pl.Callback):
    def on_train_start(self, trainer, module):
        if trainer.global_rank:
            Path(os.environ["PID_FILE"]).write_text(str(os.getpid()))
            time.sleep(3600)
        while not Path(os.environ["PID_FILE"]).exists():
            time.sleep(0.1)
        raise ValueError("the first process failed")
"""


def start(root: Path, *options: str, **variables: str | Path) -> "subprocess.Popen[str]":
    root.mkdir(exist_ok=True)
    config = root / "given.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    command = [sys.executable, "-m", "dit_qat", "fit", "--config", str(config)]
    logs = f"--trainer.logger.init_args.save_dir={root / 'logs'}"
    command += [f"--trainer.default_root_dir={root}", logs, *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    environment |= {name: str(value) for name, value in variables.items()}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for_checkpoint(root: Path, process: "subprocess.Popen[str]") -> None:
    deadline = time.monotonic() + 600
    while not last_checkpoint(root).exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.1)


def run(root: Path, *options: str) -> dict[str, list[float]]:
    process = start(root, *options)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    return logged(root)


def logged(root: Path) -> dict[str, list[float]]:
    (path,) = root.glob("logs/*/*/metrics.csv")
    with path.open() as file:
        rows = list(csv.DictReader(file))
    return {name: [float(row[name]) for row in rows if row[name]] for name in rows[0]}


@pytest.mark.parametrize(
    ("method", "tolerance"),
    [
        # Gradients are summed in another order: a float network differs in the last digits, a
        # quantized one as well wherever those digits carry a value over a rounding threshold.
        ("null", 1e-5),
        (json.dumps(ROBUQ), 1e-3),
    ],
    ids=["float", "robuq"],
)
def test_two_processes_follow_the_curve_of_one(
    tmp_path: Path, method: str, tolerance: float
) -> None:
    quantized = f"--model.method={method}"
    alone = run(tmp_path / "one", quantized)
    together = run(tmp_path / "two", quantized, "--trainer.devices=2", "--trainer.strategy=ddp")
    assert len(alone["train/loss"]) == 6
    assert len(alone["val/loss"]) == 1
    assert set(alone) == set(together)
    for name in alone:
        assert together[name] == pytest.approx(alone[name], rel=tolerance, abs=1e-7), name
    one, two = (read_checkpoint(last_checkpoint(tmp_path / r)) for r in ("one", "two"))
    assert one["state_dict"].keys() == two["state_dict"].keys()


@pytest.fixture
def failing(tmp_path: Path) -> Path:
    """Where a module of callbacks that fail can be imported from."""
    (tmp_path / "failures.py").write_text(FAILURES)
    return tmp_path


def test_a_loss_that_is_nan_in_one_process_ends_both(tmp_path: Path, failing: Path) -> None:
    callback = "--trainer.callbacks=failures.NanOnTheSecond"
    process = start(tmp_path / "run", callback, *TWO, PYTHONPATH=failing)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert output.count("error: the loss is nan at step 3; lower the learning rates") == 2


def test_no_process_outlives_the_first_one(tmp_path: Path, failing: Path) -> None:
    callback, pid_file = "--trainer.callbacks=failures.OnlyTheFirstFails", tmp_path / "pid"
    process = start(tmp_path / "run", callback, *TWO, PYTHONPATH=failing, PID_FILE=pid_file)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 2, output
    assert "error: the first process failed" in output
    with pytest.raises(ProcessLookupError):
        os.kill(int(pid_file.read_text()), 0)


def test_slurm_gets_a_job_back_and_it_goes_on_by_the_same_command(tmp_path: Path) -> None:
    root, scontrol = tmp_path / "run", tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text(f"#!/bin/sh\necho $@ > {tmp_path}/requeued\n")
    scontrol.chmod(0o755)
    slurm = {"PATH": f"{scontrol.parent}:{os.environ['PATH']}"}
    slurm |= {"SLURM_NTASKS": "1", "SLURM_JOB_NAME": "train", "SLURM_JOB_ID": "123"}
    slurm |= dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")
    options = ("--trainer.max_steps=100000", "--trainer.val_check_interval=100000")
    every = ("--checkpoints.every_n_steps=1",)
    process = start(root, *options, *every, **slurm)
    wait_for_checkpoint(root, process)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGUSR1, output
    assert (tmp_path / "requeued").read_text() == "requeue 123\n"
    step = read_checkpoint(last_checkpoint(root))["global_step"]
    assert f"stopped by SIGUSR1 at step {step}" in output
    options = (f"--trainer.max_steps={step + 2}", *options[1:])
    process = start(root, *options, *every, **slurm, SLURM_RESTART_COUNT="1")
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output
    assert read_checkpoint(last_checkpoint(root))["global_step"] == step + 2


def test_a_signal_to_one_process_ends_both_after_the_same_step(tmp_path: Path) -> None:
    root = tmp_path / "run"
    process = start(
        root,
        "--trainer.devices=2",
        "--trainer.strategy=ddp",
        "--trainer.max_steps=100000",
        "--trainer.val_check_interval=100000",
        "--checkpoints.every_n_steps=1",
    )
    wait_for_checkpoint(root, process)
    process.send_signal(signal.SIGTERM)  # to the first process only
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 128 + signal.SIGTERM, output
    assert "stopped by SIGTERM at step" in output
    assert output.count("stopped by") == 1
    assert read_checkpoint(last_checkpoint(root))["global_step"] >= 1
