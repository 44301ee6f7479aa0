"""An endless shuffled stream of indices in which a batch is a function of its number."""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dit_qat.dit.randomness import generator_for

__all__ = ["StepBatchSampler"]


class StepBatchSampler(Sampler[list[int]]):
    """Cut an endless chain of shuffled epochs into batches that depend on (seed, number) only.

    Epoch after epoch, each in its own order, the indices form one stream; batch ``k`` takes the
    positions ``k * batch_size`` to ``(k + 1) * batch_size - 1`` of it, across epoch borders. A run
    that resumes at step ``start`` therefore sees the batches that it would have seen, and nothing
    has to be replayed.

    Args:
        size: Number of samples in the data set.
        batch_size: Samples per batch; may exceed ``size``.
        seed: The run's seed.
        start: Number of the first batch to yield.
        length: Number of batches of the whole run, the ones before ``start`` included; it is what
            ``len`` returns, since Lightning counts a resumed run from its first batch.

    Raises:
        ValueError: A size, a batch size or a number of batches that leaves nothing to draw.
    """

    def __init__(self, size: int, batch_size: int, seed: int, start: int, length: int) -> None:
        if size < 1:
            raise ValueError(f"size={size}: there are no samples to draw batches from")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if start < 0 or length < 0:
            raise ValueError(f"start={start} and length={length} must not be negative")
        self.size = size
        self.batch_size = batch_size
        self.seed = seed
        self.start = start
        self.length = length

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[list[int]]:
        epoch, order = -1, torch.empty(0, dtype=torch.int64)
        for number in range(self.start, self.length):
            position, stop = number * self.batch_size, (number + 1) * self.batch_size
            batch: list[int] = []
            while position < stop:
                wanted, offset = divmod(position, self.size)
                if wanted != epoch:
                    epoch, order = wanted, self._order(wanted)
                batch += order[offset : offset + stop - position].tolist()
                position = min(stop, (wanted + 1) * self.size)
            yield batch

    def _order(self, epoch: int) -> Tensor:
        return torch.randperm(self.size, generator=generator_for(self.seed, "order", epoch))
