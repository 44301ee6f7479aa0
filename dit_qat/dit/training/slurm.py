"""Jobs that a cluster interrupts and starts again by the same command."""

import json
import logging
import os
import signal
import subprocess
from pathlib import Path

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

from dit_qat.export.files import write_json

__all__ = ["goes_on", "requeue", "requeue_signal", "sign"]

_LOG = logging.getLogger(__name__)
_SIGNATURE = ".job"


def requeue_signal(trainer: pl.Trainer) -> signal.Signals | None:
    """The signal by which SLURM announces the end of the job's time; None without requeueing."""
    environment = trainer._accelerator_connector.cluster_environment
    if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
        return None
    return environment.requeue_signal


def requeue() -> None:
    """Put this SLURM job back into the queue; that fails with a warning."""
    job = os.environ.get("SLURM_JOB_ID", "")
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    try:
        subprocess.run(["scontrol", "requeue", job], check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        _LOG.warning("SLURM job %s was not requeued (%s); submit it again", job, error)


def sign(root: Path) -> None:
    """Note in the folder of a run which job began it."""
    if _job() is not None:
        write_json(root / _SIGNATURE, {"job": _job()})


def goes_on(root: Path) -> bool:
    """Whether SLURM or torchrun gave this command again, and its first time began the run there.

    A job that was refused a folder, because of another's results, does not own them when it is
    started again.
    """
    names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    again = any(int(os.environ.get(name) or 0) > 0 for name in names)
    path = root / _SIGNATURE
    if not again or _job() is None or not path.is_file():
        return False
    return bool(json.loads(path.read_text(encoding="utf-8")) == {"job": _job()})


def _job() -> str | None:
    """The job's name, which it keeps when it is started again; None outside of one."""
    for name in ("SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        if os.environ.get(name, "none") != "none":  # torchrun's name for a run without one
            return f"{name}={os.environ[name]}"
    return None
