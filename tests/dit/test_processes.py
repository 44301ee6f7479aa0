import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from datetime import timedelta

import pytest
import torch

from dit_qat.dit import processes
from dit_qat.dit.processes import Processes, launch, pick_device

SCRIPT = """
import sys
from dit_qat.dit.processes import launch
if __name__ == "__main__":
    found = launch("cpu", {devices})
    ranks = found.gather((found.rank, "x" * (found.rank + 1)))
    found.barrier()
    # One write, so that the lines of the two do not mix.
    line = f"rank {{found.rank}} of {{found.world_size}} on {{found.device}}: {{ranks}}\\n"
    sys.stdout.write(line)
"""

SLEEPER = """
import pathlib, os, time
from dit_qat.dit.processes import launch
if __name__ == "__main__":
    found = launch("cpu", 2)
    pathlib.Path(f"{found.rank}.pid").write_text(str(os.getpid()))
    time.sleep(600)
"""

SLURM = {
    "SLURM_JOB_ID": "12345",
    "SLURM_JOB_NAME": "sample",
    "SLURM_NODELIST": "127.0.0.1",
    "SLURM_NNODES": "1",
    "SLURM_NTASKS": "2",
    "SLURM_NTASKS_PER_NODE": "2",
    "SLURM_NODEID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
"""What a batch script with two tasks sees; srun adds SLURM_STEP_ID."""


def output_of(command: list[str]) -> list[str]:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return sorted(line for line in done.stdout.splitlines() if line.startswith("rank"))


def test_one_process_needs_nobody():
    found = launch("cpu")
    assert found == Processes(0, 1, torch.device("cpu"))
    assert found.is_zero
    assert found.gather("value") == ["value"]
    found.barrier()
    assert not torch.distributed.is_initialized()


@pytest.mark.parametrize("torchrun", [False, True])
def test_two_processes_know_each_other(tmp_path, torchrun):
    script = tmp_path / "script.py"
    # Under torchrun, its number of processes goes before the command's own.
    script.write_text(SCRIPT.format(devices=1 if torchrun else 2))
    command = [sys.executable, str(script)]
    if torchrun:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
        command = [sys.executable, *launcher, str(script)]
    everyone = [(0, "x"), (1, "xx")]
    assert output_of(command) == [f"rank {r} of 2 on cpu: {everyone}" for r in (0, 1)]


def test_tasks_of_slurm_are_the_processes(tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(devices=1))  # the number of tasks goes before it
    environment = os.environ | SLURM | {"OMP_NUM_THREADS": "1", "SLURM_STEP_ID": "0"}
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    tasks = [
        subprocess.Popen(
            [sys.executable, str(script)],
            env=environment | {"SLURM_PROCID": rank, "SLURM_LOCALID": rank},
            **quiet,
        )
        for rank in "01"
    ]
    for rank, task in enumerate(tasks):
        output, errors = task.communicate(timeout=600)
        assert task.returncode == 0, errors
        assert f"rank {rank} of 2 on cpu" in output


def test_a_batch_script_of_slurm_without_srun_starts_processes_itself(tmp_path, monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(devices=2))
    found = output_of([sys.executable, str(script)])
    assert [line.partition(":")[0] for line in found] == [f"rank {r} of 2 on cpu" for r in (0, 1)]


@pytest.mark.parametrize("step", [{}, {"SLURM_STEP_ID": "0", "SLURM_NTASKS": "1"}])
def test_a_lonely_task_of_slurm_waits_for_nobody(monkeypatch, step):
    for name, value in (SLURM | step).items():
        monkeypatch.setenv(name, value)
    assert launch("cpu").world_size == 1


def test_tasks_of_slurm_must_be_counted_per_node(monkeypatch):
    for name, value in (SLURM | {"SLURM_STEP_ID": "0"}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SLURM_NTASKS_PER_NODE")
    with pytest.raises(ValueError, match=r"2 tasks by --ntasks,.*say --ntasks-per-node"):
        launch("cpu")


def is_running(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.skipif(os.name != "posix", reason="asks for processes by signal 0")
def test_who_was_started_ends_with_its_starter(tmp_path):
    (tmp_path / "script.py").write_text(SLEEPER)
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    files, deadline = [tmp_path / "0.pid", tmp_path / "1.pid"], time.monotonic() + 600
    with subprocess.Popen(
        [sys.executable, "script.py"], cwd=tmp_path, env=environment, start_new_session=True
    ) as running:
        try:
            while not all(file.exists() and file.read_text() for file in files):
                assert running.poll() is None
                assert time.monotonic() < deadline
                time.sleep(0.05)
            other = int(files[1].read_text())
            running.kill()
            running.wait()
            while is_running(other):
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            with suppress(ProcessLookupError):
                os.killpg(running.pid, signal.SIGKILL)


def test_the_long_patience_is_not_for_those_who_never_come(monkeypatch):
    groups, waits = [], []
    monkeypatch.setattr(processes.Fabric, "launch", lambda self: waits.append(self.strategy))
    monkeypatch.setattr(processes.dist, "new_group", lambda **options: groups.append(options))
    launch("cpu", 2)
    assert waits[0]._timeout < timedelta(hours=1)
    assert groups[0]["timeout"] > timedelta(days=1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("nonsense",), "--device nonsense is no device"),
        (("cpu", 0), "--devices 0"),
        (("cpu", 1, 0), "--num_nodes 0"),
        (("cpu:0", 2), "cpu:0 is one device, --devices asks for 2"),
    ],
)
def test_what_cannot_be_launched_is_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        launch(*arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_missing_gpu_is_named():
    with pytest.raises(ValueError, match="no GPU here"):
        pick_device("cuda")
    assert pick_device("auto") == torch.device("cpu")


def test_a_gpu_that_is_not_among_those_here_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert pick_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(ValueError, match=r"--device cuda:2: torch finds 2 GPUs"):
        pick_device("cuda:2")
    with pytest.raises(ValueError, match=r"--devices 4: torch finds 2 GPUs"):
        launch("cuda", 4)
