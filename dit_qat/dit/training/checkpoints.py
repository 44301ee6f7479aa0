"""Checkpoints that survive: written whole or not at all, at step boundaries, and on signals."""

import logging
import os
import signal
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Checkpoint
from pytorch_lightning.plugins.io import TorchCheckpointIO

from dit_qat.dit.training.slurm import requeue, requeue_signal
from dit_qat.export.files import written_whole

__all__ = ["AtomicCheckpointIO", "Checkpoints", "last_checkpoint"]

_LOG = logging.getLogger(__name__)


def last_checkpoint(root: Path) -> Path:
    """Where a run in ``root`` keeps its latest checkpoint."""
    return root / "checkpoints" / "last.ckpt"


class AtomicCheckpointIO(TorchCheckpointIO):
    """Write to a temporary name, flush to disk, rename; load tensors and plain types only."""

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Replace ``path`` by the new checkpoint in one step.

        Raises:
            OSError: if the file cannot be written; the previous checkpoint is untouched.
        """
        target = Path(path)
        try:
            with written_whole(target) as temporary, temporary.open("wb") as file:
                torch.save(checkpoint, file)
        except (OSError, RuntimeError) as error:
            raise OSError(
                f"could not write {target} ({error}); free space or choose another "
                "trainer.default_root_dir; the previous checkpoint, if any, is untouched"
            ) from error

    def load_checkpoint(
        self,
        path: str | os.PathLike[str],
        map_location: Any = None,
        weights_only: bool | None = True,
    ) -> dict[str, Any]:
        """Load with ``weights_only=True``, whatever the caller asks for."""
        place = map_location or "cpu"
        # Mapped, the processes of a machine share one copy of what may be 10 GB or more.
        loaded: dict[str, Any] = torch.load(
            path, map_location=place, weights_only=True, mmap=place == "cpu"
        )
        return loaded


class Checkpoints(Checkpoint):
    """Keep ``<root>/checkpoints/last.ckpt`` (and numbered ones if asked) at step boundaries.

    SIGINT and SIGTERM end the run after the step in flight and leave a checkpoint of it; a second
    SIGINT stops at once. Under SLURM, so does the signal that announces the end of the job's time
    (SIGUSR1), after which the job is put back into the queue.

    Args:
        every_n_steps: Optimizer steps between checkpoints.
        keep_every_n_steps: Steps between checkpoints kept under their own name; 0 for none.

    Attributes:
        also_after: Further steps after which to write one, for what must not be lost.

    Raises:
        ValueError: for an interval below 1.
    """

    def __init__(self, every_n_steps: int = 1000, keep_every_n_steps: int = 0) -> None:
        super().__init__()
        if every_n_steps < 1 or keep_every_n_steps < 0:
            raise ValueError(
                f"checkpoints.every_n_steps={every_n_steps} must be at least 1, and "
                f"keep_every_n_steps={keep_every_n_steps} must not be negative"
            )
        self.every_n_steps = every_n_steps
        self.keep_every_n_steps = keep_every_n_steps
        self.also_after: set[int] = set()
        self.stopped_by: signal.Signals | None = None
        self._received: signal.Signals | None = None
        self._previous: dict[signal.Signals, Any] = {}
        self._requeue_signal: signal.Signals | None = None

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Put the atomic writer in place."""
        trainer.strategy.checkpoint_io = AtomicCheckpointIO()

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Count batches as this run does, if it cuts a step into another number of them."""
        steps = checkpoint["global_step"]
        progress = checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"]
        before, rest = divmod(progress["total"]["ready"], max(steps, 1))
        if not before or rest:  # data of another module, which count otherwise
            return
        for counted in (progress["total"], progress["current"]):
            unfinished = counted["ready"] - counted["completed"]
            batches = counted["ready"] // before * trainer.accumulate_grad_batches
            counted.update(dict.fromkeys(("ready", "started", "processed"), batches))
            counted["completed"] = batches - unfinished

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take over the signals."""
        self._requeue_signal = requeue_signal(trainer)
        for number in (signal.SIGINT, signal.SIGTERM, self._requeue_signal):
            if number is not None:
                self._previous[number] = signal.signal(number, self._on_signal)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """At a step boundary: save when due, and stop when a signal asked for it."""
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return  # in the middle of an accumulated step, which a resumed run could not finish
        self._agree(trainer)
        step, kept = trainer.global_step, self.keep_every_n_steps
        ending = self.stopped_by is not None or step == trainer.max_steps
        path = last_checkpoint(Path(trainer.default_root_dir))
        if ending or step % self.every_n_steps == 0 or step in self.also_after:
            trainer.save_checkpoint(path)
        if kept and step % kept == 0:
            trainer.save_checkpoint(path.with_name(f"step_{step:07d}.ckpt"))
        if self.stopped_by is not None:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # who stops a run does not wait for a validation
            if self.stopped_by == self._requeue_signal and trainer.is_global_zero:
                requeue()

    def _agree(self, trainer: pl.Trainer) -> None:
        """Stop all processes after the same step, by the same signal, whichever of them got it.

        What comes in while they talk, or while a checkpoint is written, counts for the next step.
        """
        received = self._received
        if trainer.world_size > 1:
            number = torch.tensor(received or 0, device=trainer.strategy.root_device)
            largest = int(trainer.strategy.reduce(number, reduce_op="max"))
            received = signal.Signals(largest) if largest else None
        self.stopped_by = received

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the signals back; later would be after Lightning has put back what it replaced."""
        self._restore_signals()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Give the signals back; what is on disk stays as it is."""
        self._restore_signals()

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._received = signal.Signals(number)
        _LOG.warning("%s: stopping after this step", self._received.name)

    def _restore_signals(self) -> None:
        handlers: dict[signal.Signals, Callable[..., Any] | int] = self._previous
        for number, handler in handlers.items():
            signal.signal(number, handler)
        self._previous = {}
