"""Jobs that a cluster interrupts and starts again by the same command."""

import logging
import os
import signal
import subprocess

import pytorch_lightning as pl
from lightning_fabric.plugins.environments.slurm import SLURMEnvironment

__all__ = ["is_restarted", "requeue", "requeue_signal"]

_LOG = logging.getLogger(__name__)


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


def is_restarted() -> bool:
    """Whether SLURM or torchrun started this command again after it was interrupted."""
    names = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in names)
