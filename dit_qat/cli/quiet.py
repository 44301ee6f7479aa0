"""Leave out, message by message, what the libraries below say and what is not so here."""

import logging
import warnings

__all__ = ["silence_known_noise", "silence_worker_advice"]

_WARNINGS = (
    # Our loaders start at the trainer's step (StepBatchSampler), which Lightning cannot know.
    r".*your dataloader is\s+not resumable.*",
    # Said by validate and test, where the checkpoint's EMA weights are all that is wanted.
    r".*WeightAveraging callback, but loading a checkpoint outside the 'fit' stage.*",
    # Our values are those of all processes already.
    r".*recommended to use `self.log\('(val|test)/.*sync_dist=True.*",
    # Between Lightning and torch, out of the user's hands.
    r".*isinstance\(treespec, LeafSpec\)` is deprecated.*",
)
_WORKER_ADVICE = r".*does not have many workers which may be a bottleneck.*"
_LOGGED = (
    # Advertisements.
    "try installing [litlogger]",
    "try installing [litmodels]",
    # AtomicCheckpointIO loads with weights_only=True whatever it is told.
    "`weights_only` was not set, defaulting to `False`",
    # A banner per process; the commands say themselves what several of them do.
    "Initializing distributed: GLOBAL_RANK",
    "distributed_backend=",
)
_LOGGERS = (
    "lightning_fabric.utilities.distributed",
    "pytorch_lightning.utilities.rank_zero",
    "lightning_fabric.utilities.rank_zero",
    "pytorch_lightning.trainer.connectors.checkpoint_connector",
)


def silence_known_noise() -> None:
    """Ignore Lightning's messages that would mislead here, and its advertisements."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message=message)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_keeps)


def silence_worker_advice() -> None:
    """Ignore the advice to start loader processes, for data that lie in memory."""
    warnings.filterwarnings("ignore", message=_WORKER_ADVICE)


def _keeps(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    return not any(text in message for text in _LOGGED)
