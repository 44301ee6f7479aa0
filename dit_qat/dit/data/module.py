"""Data modules whose batches are functions of (seed, step), over any number of processes."""

from abc import abstractmethod
from collections.abc import Sized
from typing import Any, Protocol, runtime_checkable

import pytorch_lightning as pl
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from dit_qat.dit.data.sampler import Draw, SequentialDraws, StepBatchSampler
from dit_qat.dit.models import DiT
from dit_qat.dit.randomness import generator_for

__all__ = ["DrawDataset", "StepData"]

_EVALUATION_BATCH = 256


class DrawDataset(Protocol):
    """Images by batches: a batch is one item, so that a file is read once for all of its images."""

    def __len__(self) -> int:
        """Number of images."""
        ...

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        """Images (n, C, H, W), float32 in model space, and labels (n,), int64."""
        ...


@runtime_checkable
class _Seeded(Protocol):
    seed: int


class StepData(pl.LightningDataModule):
    """Serve ``(images, labels)`` batches whose content depends on the seed and the step alone.

    ``batch_size`` images make one optimizer step, over all processes and accumulated
    micro-batches together: a run on eight GPUs sees, step by step, the images of the same run on
    one. Training starts at the trainer's global step, so that an interrupted run continues with
    the batch it would have seen. Validation and test go through their images once, in order, and
    no process gets an image twice to fill up a batch.

    Args:
        batch_size: Images per optimizer step.
        seed: Seed of the shuffled order; by default the ``seed`` of the module in training.
        num_workers: Loader processes of each training process.

    Raises:
        ValueError: A batch size below 1 or a negative number of workers.
    """

    def __init__(self, batch_size: int, seed: int | None = None, num_workers: int = 0) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must not be negative")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    @abstractmethod
    def train_dataset(self) -> DrawDataset:
        """The images to train on."""

    @abstractmethod
    def validation_dataset(self) -> DrawDataset:
        """The images to validate on; none (length 0) skips validation."""

    def check_network(self, network: DiT) -> None:
        """Raise ValueError if the network cannot be trained on these images."""

    def setup(self, stage: str) -> None:
        """Refuse a network that does not fit, and samplers other than our own, before any work.

        Raises:
            ValueError: as :meth:`check_network`, or if Lightning is to deal out the images.
        """
        trainer = self._attached_trainer()
        if trainer.world_size > 1 and trainer._accelerator_connector.use_distributed_sampler:
            raise ValueError(
                "trainer.use_distributed_sampler=true would replace the order that makes a run "
                "independent of its number of processes; set it to false"
            )
        network = getattr(trainer.lightning_module, "network", None)
        if isinstance(network, DiT):
            self.check_network(network)

    def run_seed(self) -> int:
        """The seed of the order: this module's own, or that of the module in training.

        Raises:
            RuntimeError: No trainer is attached.
            ValueError: Neither has one.
        """
        if self.seed is not None:
            return self.seed
        module = self._attached_trainer().lightning_module
        if not isinstance(module, _Seeded):
            raise ValueError(
                f"{type(module).__name__} has no attribute `seed` to shuffle the images by; "
                f"pass {type(self).__name__}(seed=...)"
            )
        return module.seed

    def train_dataloader(self) -> DataLoader[Any]:
        """Return this process's micro-batches, from the trainer's global step to ``max_steps``.

        Raises:
            RuntimeError: No trainer is attached.
            ValueError: The trainer has no ``max_steps``, or a number of processes and accumulated
                micro-batches that does not divide the batch.
        """
        trainer = self._attached_trainer()
        if trainer.max_steps < 0:
            raise ValueError(
                f"trainer.max_steps={trainer.max_steps}: dit_qat counts steps, not epochs; "
                "set trainer.max_steps to the number of optimizer steps to train for"
            )
        dataset, seed = self.train_dataset(), self.run_seed()
        sampler = StepBatchSampler(
            size=len(dataset),
            batch_size=self.batch_size,
            seed=seed,
            start=trainer.global_step,
            stop=trainer.max_steps,
            rank=trainer.global_rank,
            world_size=trainer.world_size,
            accumulated=trainer.accumulate_grad_batches,
        )
        return self._loader(dataset, sampler, seed)

    def val_dataloader(self) -> DataLoader[Any]:
        """Return this process's share of the validation images, in order."""
        trainer = self.trainer
        rank, world = (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)
        dataset = self.validation_dataset()
        draws = SequentialDraws(len(dataset), _EVALUATION_BATCH, rank, world)
        return self._loader(dataset, draws, seed=0)

    def test_dataloader(self) -> DataLoader[Any]:
        """Return the validation images."""
        return self.val_dataloader()

    def _loader(self, dataset: DrawDataset, draws: Sized, seed: int) -> DataLoader[Any]:
        # With batch_size=None a "sample" is a whole batch, indexed at once: no per-image collation.
        # The loader's own generator keeps it from drawing its workers' seed from the global one.
        items: Dataset[Any] = dataset  # type: ignore[assignment]
        return DataLoader(
            items,
            sampler=draws,  # type: ignore[arg-type]
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=tuple,
            generator=generator_for(seed, "loader"),
        )

    def _attached_trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError(
                f"{type(self).__name__} has no trainer, so its first batch is unknown; pass it to "
                "Trainer.fit"
            )
        return self.trainer
