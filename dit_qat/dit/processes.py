"""Several processes for one command: their ranks, their devices, and what they tell each other.

Lightning Fabric starts and connects them: on one machine by running the command again, under
torchrun and SLURM by joining the processes that are there.
"""

import atexit
import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar, cast

import torch
import torch.distributed as dist
from lightning_fabric import Fabric
from lightning_fabric.plugins.environments.lightning import LightningEnvironment
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy

__all__ = ["Processes", "launch", "pick_device"]

T = TypeVar("T")

_LOG = logging.getLogger(__name__)
_PATIENCE = timedelta(days=7)
_STARTER = "DIT_QAT_STARTER"  # environment variable: the process that started this one


@dataclass(frozen=True)
class Processes:
    """This process among its equals.

    Attributes:
        rank: Its number, from 0, over all machines.
        world_size: How many there are.
        device: The one that is this process's own.
        group: What they talk through; None for torch's default.
    """

    rank: int
    world_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None

    @property
    def is_zero(self) -> bool:
        """Whether this one writes what is written once."""
        return self.rank == 0

    def together(self, action: Callable[[], T]) -> list[T]:
        """What an action returns on every process; if it fails on one, it fails on all.

        Nobody then waits for a process that is gone.

        Raises:
            Exception: the action's own, here; a ValueError with its message on the others.
        """
        error: Exception | None = None
        result: T | None = None
        try:
            result = action()
        except Exception as caught:
            error = caught
            if self.world_size > 1:  # the others may have hours to go before they hear of it
                _LOG.error("process %d failed: %s", self.rank, caught)
        outcomes = self.gather((result, None if error is None else str(error)))
        if error is not None:
            raise error
        for rank, (_, message) in enumerate(outcomes):
            if message is not None:
                raise ValueError(f"process {rank} failed: {message}")
        return [cast(T, outcome) for outcome, _ in outcomes]

    def barrier(self) -> None:
        """Wait until every process is here."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Values of every process, in rank order, on every process; anything that pickles."""
        if self.world_size == 1:
            return [value]
        values: list[T] = [value] * self.world_size
        dist.all_gather_object(values, value, group=self.group)
        return values


def launch(device: str = "auto", devices: int = 1, num_nodes: int = 1) -> Processes:
    """Start or join the processes of a command; every one of them returns from this call.

    Args:
        device: auto, cpu, cuda, or cuda:1 for a single process.
        devices: Processes per machine, each with a device of its own; the counts of torchrun and
            of srun go first.
        num_nodes: Machines; each must be told to run the command (torchrun and srun do).

    Raises:
        ValueError: for a device or a number of them that is not there.
        RuntimeError: if the others do not come within half an hour.
    """
    chosen = pick_device(device)
    devices, num_nodes = _started(devices, num_nodes)
    if devices < 1 or num_nodes < 1:
        raise ValueError(f"--devices {devices} and --num_nodes {num_nodes} must be at least 1")
    if devices * num_nodes == 1:
        return Processes(0, 1, chosen)
    _check_count(chosen, devices)
    _end_with_starter()
    fabric = Fabric(
        accelerator=chosen.type,
        devices=devices,
        num_nodes=num_nodes,
        strategy=DDPStrategy(process_group_backend="gloo"),
        plugins=[LightningEnvironment()] if _is_one_of_slurm() else None,
    )
    fabric.launch()
    # The threads behind a group that is still there when Python ends can abort the process.
    atexit.register(_leave)
    # Only small objects go between the processes, and they may be hours apart when they meet.
    group = cast(dist.ProcessGroup, dist.new_group(timeout=_PATIENCE, backend="gloo"))
    return Processes(fabric.global_rank, fabric.world_size, fabric.device, group)


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _started(devices: int, num_nodes: int) -> tuple[int, int]:
    """Processes per machine, and machines: of those that run already, else as asked for."""
    if TorchElasticEnvironment.detect():
        devices = int(os.environ.get("LOCAL_WORLD_SIZE", devices))
        return devices, int(os.environ["WORLD_SIZE"]) // devices
    if SLURMEnvironment.detect() and not _is_one_of_slurm():
        if "SLURM_NTASKS_PER_NODE" not in os.environ:
            raise ValueError(
                f"SLURM started {os.environ['SLURM_NTASKS']} tasks by --ntasks, which it may "
                "spread unevenly; say --ntasks-per-node instead"
            )
        return int(os.environ["SLURM_NTASKS_PER_NODE"]), int(os.environ.get("SLURM_NNODES", 1))
    return devices, num_nodes


def _is_one_of_slurm() -> bool:
    """Whether SLURM runs this process alone: in a batch script without srun, or as one task."""
    alone = "SLURM_STEP_ID" not in os.environ or os.environ.get("SLURM_NTASKS") == "1"
    return SLURMEnvironment.detect() and alone and not TorchElasticEnvironment.detect()


def _end_with_starter() -> None:
    """Let this process end with the one that started it, whose lock on a folder ends then too."""
    starter = int(os.environ.get(_STARTER, "0"))
    os.environ[_STARTER] = str(os.getpid())
    if starter != os.getppid():
        return

    def watch() -> None:
        while os.getppid() == starter:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, name="starter", daemon=True).start()


def pick_device(device: str) -> torch.device:
    """The device of that name; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: for a name that is no device, or a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"--device {device} is no device; use auto, cpu, cuda or cuda:1"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; use --device cpu")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device {device}: torch finds {torch.cuda.device_count()} GPUs here, from cuda:0 on"
        )
    return found


def _check_count(device: torch.device, devices: int) -> None:
    if ":" in str(device):
        raise ValueError(
            f"--device {device} is one device, --devices asks for {devices} of them; name the kind "
            f"only, --device {device.type}, and choose by CUDA_VISIBLE_DEVICES"
        )
    if device.type == "cuda" and devices > torch.cuda.device_count():
        raise ValueError(
            f"--devices {devices}: torch finds {torch.cuda.device_count()} GPUs on this machine "
            "(under SLURM, every task must see all of its node: --gpus-per-node, not -per-task)"
        )
