import os
import subprocess
import sys

import pytest
import torch

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
