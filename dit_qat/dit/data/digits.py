"""The embedded data set: scikit-learn's 1,797 handwritten digits of 8x8 pixels."""

from typing import Protocol, runtime_checkable

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Sampler, SequentialSampler, TensorDataset

from dit_qat.dit.data.sampler import StepBatchSampler
from dit_qat.dit.randomness import generator_for

__all__ = ["Digits", "digit_images"]

_EVALUATION_BATCH = 256


def digit_images() -> tuple[Tensor, Tensor]:
    """Return all images (1797, 1, 8, 8) in [-1, 1], float32, and their labels (1797,), int64.

    The 17 grey levels 0..16 become ``level / 8 - 1``, which float32 holds exactly.
    """
    digits = load_digits()
    images = torch.from_numpy(digits.images).to(torch.float32).div(8).sub(1)
    return images.unsqueeze(1), torch.from_numpy(digits.target).to(torch.int64)


@runtime_checkable
class _Seeded(Protocol):
    seed: int


class Digits(pl.LightningDataModule):
    """Serve the digits as ``(images, labels)`` batches whose content depends on the step alone.

    Training batches follow :class:`~dit_qat.dit.data.sampler.StepBatchSampler` from the trainer's
    global step on, so that an interrupted run continues with the batch it would have seen.
    Validation and test go through all images once, in order.

    Args:
        batch_size: Images per training batch.
        seed: Seed of the shuffled order; by default the ``seed`` of the module in training.
        num_workers: Loader processes; 0 is fastest for images this small.

    Raises:
        ValueError: A batch size below 1 or a negative number of workers.
    """

    num_classes = 10
    image_shape = (1, 8, 8)

    def __init__(
        self, batch_size: int = 128, seed: int | None = None, num_workers: int = 0
    ) -> None:
        super().__init__()
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if num_workers < 0:
            raise ValueError(f"num_workers={num_workers} must not be negative")
        self.batch_size = batch_size
        self.seed = seed
        self.num_workers = num_workers

    def train_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return the batches from the trainer's global step to its ``max_steps``.

        Raises:
            RuntimeError: No trainer is attached.
            ValueError: The trainer has no ``max_steps`` or runs several processes.
        """
        trainer = self._attached_trainer()
        if trainer.max_steps < 0:
            raise ValueError(
                f"trainer.max_steps={trainer.max_steps}: dit_qat counts steps, not epochs; "
                "set trainer.max_steps to the number of optimizer steps to train for"
            )
        if trainer.world_size > 1:
            raise ValueError(
                f"the digits are served to one process, the trainer runs {trainer.world_size}; "
                "set trainer.devices=1 and trainer.num_nodes=1"
            )
        seed = self._run_seed(trainer)
        dataset = TensorDataset(*digit_images())
        sampler = StepBatchSampler(
            size=len(dataset),
            batch_size=self.batch_size,
            seed=seed,
            start=trainer.global_step * trainer.accumulate_grad_batches,
            length=trainer.max_steps * trainer.accumulate_grad_batches,
        )
        return self._loader(dataset, sampler, seed)

    def val_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all images once, in order."""
        dataset = TensorDataset(*digit_images())
        batches = BatchSampler(SequentialSampler(dataset), _EVALUATION_BATCH, drop_last=False)
        return self._loader(dataset, batches, seed=0)

    def test_dataloader(self) -> DataLoader[tuple[Tensor, ...]]:
        """Return all images once, in order."""
        return self.val_dataloader()

    def _loader(
        self, dataset: TensorDataset, batches: Sampler[list[int]], seed: int
    ) -> DataLoader[tuple[Tensor, ...]]:
        # With batch_size=None a "sample" is a whole batch, indexed at once: no per-image collation.
        # The loader's own generator keeps it from drawing its workers' seed from the global one.
        return DataLoader(
            dataset,
            sampler=batches,
            batch_size=None,
            num_workers=self.num_workers,
            collate_fn=tuple,
            generator=generator_for(seed, "loader"),
        )

    def _attached_trainer(self) -> pl.Trainer:
        if self.trainer is None:
            raise RuntimeError(
                "Digits has no trainer, so its first batch is unknown; pass it to Trainer.fit, "
                "or call digit_images() for the plain tensors"
            )
        return self.trainer

    def _run_seed(self, trainer: pl.Trainer) -> int:
        if self.seed is not None:
            return self.seed
        module = trainer.lightning_module
        if not isinstance(module, _Seeded):
            raise ValueError(
                f"{type(module).__name__} has no attribute `seed` to shuffle the digits by; "
                "pass Digits(seed=...)"
            )
        return module.seed
