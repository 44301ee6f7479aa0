"""Images on disk as streams of batches, in memory that does not grow with their number."""

import hashlib
import zipfile
import zlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dit_qat.dit.evaluation.images import image_shape, read_image

__all__ = ["ImageSource", "file_sha256", "open_images"]

_PICTURES = (".png", ".jpg", ".jpeg")
_MEMBER = "arr_0.npy"
_HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)
_DECODERS = 4  # threads; decoding a PNG does not hold the interpreter

Array = npt.NDArray[np.uint8]


class ImageSource(ABC):
    """Images of one size, in a fixed order.

    Attributes:
        path: The file or folder that holds them.
        shape: Channels, height and width of an image.
    """

    path: Path
    shape: tuple[int, int, int]

    @abstractmethod
    def __len__(self) -> int:
        """Return the number of images."""

    @abstractmethod
    def sha256(self) -> str:
        """Return the identity of the files, computed when it is first asked for.

        That of one file is its own hash; that of a folder covers the names and hashes of its files.
        """

    @abstractmethod
    def _pieces(self, start: int, stop: int, size: int) -> Iterator[Array]:
        """Yield arrays (1 to size, H, W, C) of the images from ``start`` to ``stop``."""

    def batches(self, start: int, stop: int, size: int) -> Iterator[Tensor]:
        """Yield images ``start`` to ``stop`` as uint8 (n, C, H, W); n is ``size`` but for the last.

        Raises:
            ValueError: A range that is not within the source, or a file that is damaged.
        """
        if not 0 <= start <= stop <= len(self) or size < 1:
            raise ValueError(
                f"images {start} to {stop} in batches of {size} are not within the {len(self)} of "
                f"{self.path}"
            )
        for array in _regrouped(self._pieces(start, stop, size), size):
            yield torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()


def open_images(path: Path) -> ImageSource:
    """Open a folder of PNGs or JPEGs, an ``.npz``, a folder of shards, or one of dit-qat sample.

    Pictures are sorted as :func:`load_images` does, shards (``.npz`` with ``arr_0``) by name. Of a
    folder of ``dit-qat sample``, samples.npz is read if it is there, else shards/, else images/.

    Raises:
        FileNotFoundError: Nothing has this name.
        ValueError: No images, images of several sizes, files that are damaged or hold something
            else, or shards with gaps.
    """
    if not path.exists():
        raise FileNotFoundError(
            f"{path} does not exist; expected a folder of images or an .npz file"
        )
    if path.is_file():
        if path.suffix != ".npz":
            raise ValueError(f"{path} is neither a folder of images nor an .npz file")
        return _Archive(path)
    if (path / "samples.npz").is_file():
        return _Archive(path / "samples.npz")
    folder = next((path / name for name in ("shards", "images") if (path / name).is_dir()), path)
    pictures = [p for p in folder.iterdir() if p.suffix.lower() in _PICTURES]
    if pictures:
        return _Pictures(folder, pictures)
    shards = sorted(folder.glob("*.npz"))
    if not shards:
        raise ValueError(f"{folder} holds no PNG images, no JPEG images and no .npz files")
    return _Shards(folder, shards)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file's bytes, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class _Pictures(ImageSource):
    """PNG and JPEG files."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.path = folder
        self._files = sorted(files, key=lambda path: (len(path.stem), path.stem))
        with ThreadPoolExecutor(_DECODERS) as pool:
            shapes = list(pool.map(image_shape, self._files))  # the headers only
        self.shape = shapes[0]
        for path, shape in zip(self._files, shapes, strict=True):
            if shape != self.shape:
                raise ValueError(
                    f"{path} is {shape} (channels, height, width) but {self._files[0].name} is "
                    f"{self.shape}; all images of a folder must have one size: crop them first"
                )

    def __len__(self) -> int:
        return len(self._files)

    def sha256(self) -> str:
        return self._identity

    @cached_property
    def _identity(self) -> str:
        return _folder_sha256(self._files)

    def _pieces(self, start: int, stop: int, size: int) -> Iterator[Array]:
        with ThreadPoolExecutor(_DECODERS) as pool:
            for first in range(start, stop, size):
                files = self._files[first : min(first + size, stop)]
                yield np.stack(list(pool.map(read_image, files)))


class _Archive(ImageSource):
    """``arr_0`` of an ``.npz``, uint8 (N, H, W, C), read from the zip file as a stream."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with self._open() as (_, dims):
            self._count, height, width, channels = dims
        self.shape = (channels, height, width)

    def __len__(self) -> int:
        return self._count

    def sha256(self) -> str:
        return self._identity

    @cached_property
    def _identity(self) -> str:
        return file_sha256(self.path)

    def _pieces(self, start: int, stop: int, size: int) -> Iterator[Array]:
        with self._open() as (file, (_, *image)):
            of_one = int(np.prod(image))
            self._read(file, start * of_one, keep=False)
            for first in range(start, stop, size):
                count = min(size, stop - first)
                data = self._read(file, count * of_one)
                yield np.frombuffer(data, np.uint8).reshape(count, *image).copy()

    @contextmanager
    def _open(self) -> Iterator[tuple[IO[bytes], tuple[int, ...]]]:
        """Yield the stream of pixels, and the dimensions (N, H, W, C)."""
        try:
            archive = zipfile.ZipFile(self.path)
        except _BROKEN as error:
            raise self._damaged(error) from error
        with archive:
            if _MEMBER not in archive.namelist():
                names = [name.removesuffix(".npy") for name in archive.namelist()]
                raise ValueError(
                    f"{self.path} has no array arr_0, only {names}; save images as arr_0 in NHWC"
                )
            try:
                file = archive.open(_MEMBER)
                dims, fortran, dtype = _HEADERS[np.lib.format.read_magic(file)](file)
            except (*_BROKEN, KeyError) as error:
                raise self._damaged(error) from error
            if (
                dtype != np.uint8
                or fortran
                or len(dims) != 4
                or dims[3] not in (1, 3)
                or not dims[0]
            ):
                raise ValueError(
                    f"{self.path}: arr_0 is {dtype} of shape {dims}; expected uint8 of shape "
                    "(N, H, W, C) with 1 or 3 channels, in C order"
                )
            with file:
                yield file, dims

    def _read(self, file: IO[bytes], count: int, keep: bool = True) -> bytes:
        """Read exactly ``count`` bytes, or move over them."""
        try:
            if not keep:
                file.seek(count, 1)
                return b""
            data = file.read(count)
            if len(data) < count:
                raise EOFError(f"it ends {count - len(data)} bytes early")
            return data
        except _BROKEN as error:
            raise self._damaged(error) from error

    def _damaged(self, error: Exception) -> ValueError:
        return ValueError(f"{self.path} is damaged or not an .npz archive: {error}")


class _Shards(ImageSource):
    """Archives one after the other."""

    def __init__(self, folder: Path, files: Sequence[Path]) -> None:
        self.path = folder
        self._shards = [_Archive(path) for path in files]
        self.shape = self._shards[0].shape
        self._starts = [0]
        for shard in self._shards:
            self._check(shard)
            self._starts.append(self._starts[-1] + len(shard))

    def _check(self, shard: _Archive) -> None:
        if shard.shape != self.shape:
            raise ValueError(
                f"{shard.path} holds images of {shard.shape} (channels, height, width) but "
                f"{self._shards[0].path.name} of {self.shape}; all must have one size"
            )
        name = shard.path.stem
        if name.isdecimal() and int(name) != self._starts[-1]:
            raise ValueError(
                f"{shard.path} begins with image {int(name)}, but {self._starts[-1]} images come "
                "before it: a shard is missing or there is one too many; sample again to fill gaps"
            )

    def __len__(self) -> int:
        return self._starts[-1]

    def sha256(self) -> str:
        return self._identity

    @cached_property
    def _identity(self) -> str:
        return _folder_sha256([shard.path for shard in self._shards])

    def _pieces(self, start: int, stop: int, size: int) -> Iterator[Array]:
        for shard, (first, end) in zip(self._shards, pairwise(self._starts), strict=True):
            inner = max(start, first) - first, min(stop, end) - first
            if inner[0] < inner[1]:
                yield from shard._pieces(*inner, size)


def _folder_sha256(files: Iterable[Path]) -> str:
    digest = hashlib.sha256()
    for path in files:
        digest.update(f"{path.name} {file_sha256(path)}\n".encode())
    return digest.hexdigest()


def _regrouped(pieces: Iterable[Array], size: int) -> Iterator[Array]:
    """Yield arrays of exactly ``size`` rows, and a last one of the rest."""
    held: list[Array] = []
    for piece in pieces:
        held.append(piece)
        if sum(map(len, held)) >= size:  # below twice the size, for a piece has at most that
            rows = np.concatenate(held) if len(held) > 1 else piece
            yield rows[:size]
            held = [rows[size:]] if len(rows) > size else []
    if held:
        yield np.concatenate(held)
