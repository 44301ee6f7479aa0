"""Shards of drawn images, one per compute batch, and one ``.npz`` of them all."""

import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from dit_qat.export.files import written_whole

__all__ = ["Column", "ShardStore", "write_npz"]

Array = npt.NDArray[Any]

# What reading a damaged file raises; a member that is no array at all comes back as bytes.
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, KeyError, ValueError)


@dataclass(frozen=True)
class Column:
    """One array of an ``.npz``, given piece by piece along its first dimension."""

    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    pieces: Iterable[Array]


def write_npz(path: Path, columns: Mapping[str, Column]) -> None:
    """Write arrays as ``np.savez`` does, at once or not at all, holding one piece at a time.

    Equal arrays give equal files: the date in them is a constant.
    """
    with written_whole(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        for name, column in columns.items():
            # numpy reads a member of any size only from a record of the large kind.
            with archive.open(zipfile.ZipInfo(f"{name}.npy"), "w", force_zip64=True) as file:
                header = {
                    "descr": np.lib.format.dtype_to_descr(np.dtype(column.dtype)),
                    "fortran_order": False,
                    "shape": column.shape,
                }
                np.lib.format.write_array_header_1_0(file, header)
                rows = 0
                for piece in column.pieces:
                    file.write(np.ascontiguousarray(piece, dtype=column.dtype).data)
                    rows += len(piece)
                assert rows == column.shape[0]


@dataclass(frozen=True)
class ShardStore:
    """A folder of shards ``{first index:08d}.npz``: ``arr_0`` the rows, ``arr_1`` their labels.

    Attributes:
        folder: Where the shards are.
        num: Rows in all.
        size: Rows of a shard; the last one may have fewer.
        shape: Of a row: (H, W, C) of an image, (C, H, W) of a latent.
        dtype: Of the rows: uint8 for images, float32 for latents.
        label_of: The label of any index; None without labels.
    """

    folder: Path
    num: int
    size: int
    shape: tuple[int, ...]
    dtype: npt.DTypeLike
    label_of: Callable[[int], int] | None = None

    @property
    def firsts(self) -> range:
        """The first index of every shard."""
        return range(0, self.num, self.size)

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize

    def rows(self, first: int) -> range:
        """The indices in a shard."""
        return range(first, min(first + self.size, self.num))

    def path(self, first: int) -> Path:
        """Where a shard is."""
        return self.folder / f"{first:08d}.npz"

    def write(self, first: int, array: Array) -> None:
        """Write the rows of a shard, whole or not at all."""
        write_npz(self.path(first), self._columns(self.rows(first), [array]))

    def read(self, first: int) -> Array:
        """Rows of a shard.

        Raises:
            ValueError: if it is missing, damaged or of another shape.
        """
        rows, path = self.rows(first), self.path(first)
        try:
            with np.load(path, allow_pickle=False) as archive:
                array = archive["arr_0"]
        except _BROKEN as error:
            raise ValueError(f"{path} is missing or damaged ({error}); draw it again") from error
        expected = (len(rows), *self.shape)
        if not isinstance(array, np.ndarray) or (array.shape, array.dtype) != (
            expected,
            np.dtype(self.dtype),
        ):
            raise ValueError(f"{path} does not hold {self.dtype} rows of shape {expected}")
        return array

    def find(self, first: int) -> Array | None:
        """Rows of a shard, or None if it is missing or damaged."""
        if not self.path(first).is_file():
            return None
        try:
            return self.read(first)
        except ValueError:
            return None

    def head(self, count: int) -> Array:
        """The first rows, at most ``count``; errors as in :meth:`read`."""
        firsts = [first for first in self.firsts if first < count]
        return np.concatenate([self.read(first) for first in firsts])[:count]

    def assemble(self, path: Path) -> None:
        """Write all rows, and their labels, to one ``.npz``, in the memory of one shard.

        Raises:
            ValueError: if a shard is missing or damaged.
        """
        write_npz(path, self._columns(range(self.num), map(self.read, self.firsts)))

    def _columns(self, rows: range, pieces: Iterable[Array]) -> dict[str, Column]:
        columns = {"arr_0": Column((len(rows), *self.shape), self.dtype, pieces)}
        if self.label_of is not None:
            columns["arr_1"] = Column((len(rows),), np.int64, self._labels(rows))
        return columns

    def _labels(self, rows: range) -> Iterator[Array]:
        assert self.label_of is not None
        yield np.fromiter(map(self.label_of, rows), dtype=np.int64, count=len(rows))
