"""An endless shuffled stream of images in which a batch is a function of its step."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Sampler

from dit_qat.dit.randomness import generator_for

__all__ = ["Draw", "SequentialDraws", "StepBatchSampler"]


class Draw(NamedTuple):
    """A batch to load.

    Attributes:
        indices: Images of the data set.
        position: Where the first of them stands in the stream; the others follow. No two images
            drawn in a run have the same position, whatever process draws them.
    """

    indices: list[int]
    position: int


class StepBatchSampler(Sampler[Draw]):
    """Cut an endless chain of shuffled epochs into batches that depend on (seed, step) only.

    Epoch after epoch, each in its own order, the indices form one stream; optimizer step ``k``
    takes the positions ``k * batch_size`` to ``(k + 1) * batch_size - 1`` of it, across epoch
    borders. The step's batch is dealt out in equal parts: accumulated micro-batch after
    micro-batch, and within each of them process after process. A run that resumes at step
    ``start`` therefore sees the images that it would have seen, and so does one with another
    number of processes.

    Args:
        size: Number of images in the data set.
        batch_size: Images per optimizer step, over all processes; may exceed ``size``.
        seed: The run's seed.
        start: First step to draw for.
        stop: Number of steps of the whole run, the ones before ``start`` included.
        rank: Which process this is.
        world_size: Number of processes.
        accumulated: Micro-batches per optimizer step.

    Raises:
        ValueError: A size, a batch size or a number of steps that leaves nothing to draw, or a
            batch size that the processes and micro-batches do not divide.
    """

    def __init__(
        self,
        size: int,
        batch_size: int,
        seed: int,
        start: int,
        stop: int,
        rank: int = 0,
        world_size: int = 1,
        accumulated: int = 1,
    ) -> None:
        if size < 1:
            raise ValueError(f"size={size}: there are no images to draw batches from")
        if batch_size < 1:
            raise ValueError(f"batch_size={batch_size} must be at least 1")
        if start < 0 or stop < 0:
            raise ValueError(f"start={start} and stop={stop} must not be negative")
        parts = world_size * accumulated
        if batch_size % parts:
            raise ValueError(
                f"batch_size={batch_size} images per optimizer step cannot be dealt out evenly to "
                f"{world_size} processes times {accumulated} accumulated micro-batches; set "
                f"data.batch_size to a multiple of {parts}"
            )
        self.size, self.batch_size, self.seed = size, batch_size, seed
        self.start, self.stop = start, stop
        self.rank, self.world_size, self.accumulated = rank, world_size, accumulated
        self._epoch, self._order = -1, torch.empty(0, dtype=torch.int64)

    def __len__(self) -> int:
        # Of the whole run, since Lightning counts a resumed one from its first batch.
        return self.stop * self.accumulated

    def __iter__(self) -> Iterator[Draw]:
        micro = self.batch_size // (self.world_size * self.accumulated)
        for step in range(self.start, self.stop):
            for part in range(self.accumulated):
                offset = (part * self.world_size + self.rank) * micro
                position = step * self.batch_size + offset
                yield Draw(self._indices(position, position + micro), position)

    def _indices(self, position: int, stop: int) -> list[int]:
        """What stands in the stream from ``position`` on."""
        found: list[int] = []
        while position < stop:
            epoch, offset = divmod(position, self.size)
            found += self._order_of(epoch)[offset : offset + stop - position].tolist()
            position = min(stop, (epoch + 1) * self.size)
        return found

    def _order_of(self, epoch: int) -> Tensor:
        if epoch != self._epoch:
            generator = generator_for(self.seed, "order", epoch)
            self._epoch, self._order = epoch, torch.randperm(self.size, generator=generator)
        return self._order


class SequentialDraws(Sampler[Draw]):
    """All images once, in order, in batches that are dealt out to the processes in turn.

    The batches are the same for any number of processes, and no image is drawn twice to fill one
    up. Every process gets as many: those for which nothing is left get empty ones, since a loop
    that one process skips and another runs would leave them waiting for each other.

    Args:
        size: Number of images; may be 0.
        batch_size: Images per batch; the last one may have fewer.
        rank: Which process this is.
        world_size: Number of processes.
    """

    def __init__(self, size: int, batch_size: int, rank: int = 0, world_size: int = 1) -> None:
        self.size, self.batch_size = size, batch_size
        turn = world_size * batch_size
        self._starts = range(rank * batch_size, -(-size // turn) * turn, turn)

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Draw]:
        for start in self._starts:
            stop = min(start + self.batch_size, self.size)
            yield Draw(list(range(start, stop)), start)
