"""Feature vectors that several processes write to one file, and that are read in parts."""

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

__all__ = ["FeatureFile", "Rows"]

_FLOAT = np.dtype("<f4")


class Rows(Protocol):
    """Vectors (N, D) that can be read by slices and by indices: a tensor, or a file."""

    @property
    def shape(self) -> tuple[int, ...]:
        """N and D."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor: ...


class FeatureFile:
    """Float32 vectors (count, dimension) in a plain file; none of them stay in memory.

    Args:
        path: The file.
        count: Number of vectors.
        dimension: Their length.
    """

    def __init__(self, path: Path, count: int, dimension: int) -> None:
        self.path = path
        self.shape = (count, dimension)

    def __len__(self) -> int:
        return self.shape[0]

    def create(self) -> None:
        """Make the file, for ``write`` to fill.

        Raises:
            OSError: The disk is too full.
        """
        needed = self.shape[0] * self.shape[1] * _FLOAT.itemsize
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise OSError(
                f"{self.path.parent} has {free / 1e9:.1f} GB left, the features of "
                f"{self.shape[0]} images need {needed / 1e9:.1f} GB; name a folder on another disk "
                "with --out, or leave out kid, precision and recall"
            )
        with self.path.open("wb") as file:
            file.truncate(needed)

    def write(self, first: int, features: Tensor) -> None:
        """Write vectors (n, dimension) from number ``first`` on."""
        with self.path.open("rb+") as file:
            file.seek(first * self.shape[1] * _FLOAT.itemsize)
            file.write(features.detach().cpu().numpy().astype(_FLOAT, copy=False).tobytes())

    def __getitem__(self, rows: slice | Tensor, /) -> Tensor:
        # Read, not mapped: the kernel maps more around each page, and keeps it in our memory.
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(len(self))
            return self._read([start], max(stop - start, 0))
        return self._read(rows.tolist(), 1)

    def _read(self, starts: Sequence[int], count: int) -> Tensor:
        """Return ``count`` vectors from each of some numbers on."""
        values = np.empty((len(starts), count, self.shape[1]), _FLOAT)
        with self.path.open("rb", buffering=0) as file:
            for start, part in zip(starts, values, strict=True):
                file.seek(start * self.shape[1] * _FLOAT.itemsize)
                if file.readinto(part.data.cast("B")) != part.nbytes:
                    raise OSError(
                        f"{self.path} ends before vector {start + count}: another program changed "
                        "it; run the command again"
                    )
        return torch.from_numpy(values).flatten(0, 1)
