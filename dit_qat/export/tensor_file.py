"""safetensors files, written tensor by tensor in any order and read with every byte accounted for.

The safetensors package writes from tensors that all exist, and in memory; here a header of known
sizes comes first and every tensor goes to its place as soon as it is computed.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from io import FileIO
from itertools import accumulate
from math import prod
from pathlib import Path
from threading import Event, Lock
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

__all__ = ["DTYPES", "Place", "TensorFile", "TensorWriter", "dtype_name", "open_tensors"]

DTYPES: dict[str, torch.dtype] = {
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
    "I32": torch.int32,
    "I64": torch.int64,
    "U8": torch.uint8,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_LONGEST_HEADER = 100_000_000  # the limit of the safetensors package
_MOST_DIMENSIONS = 64  # of a torch tensor
_ALIGNMENT = 64  # of torch's own memory on the CPU
_MOST_VIEWS = 512  # of one request; systems take 1,024 or more
_AHEAD = 2 << 20  # of one hint; Linux cuts long ones to what it reads ahead anyway
_METADATA = "__metadata__"


class Place(NamedTuple):
    """What a tensor is and which bytes behind the header are its own."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def dtype_name(dtype: torch.dtype) -> str:
    """The name that safetensors has for a dtype.

    Raises:
        ValueError: for one that no model here has.
    """
    if dtype not in _NAMES:
        raise ValueError(f"{dtype} has no place in a packed folder; there are {sorted(DTYPES)}")
    return _NAMES[dtype]


class TensorWriter:
    """A file being written; :meth:`write` every tensor once, then :meth:`finish`.

    Tensors lie in the order of falling item size, then of their names, so that each is aligned.

    Args:
        file: Open for writing, empty.
        tensors: Dtype and shape by name.
        metadata: Text for the header; values may be exchanged for others as long in the end.
    """

    def __init__(
        self,
        file: BinaryIO,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        metadata: Mapping[str, str],
    ) -> None:
        self._file = file
        self._places = dict(_laid_out(tensors))
        self.written: set[str] = set()
        header = self._header(metadata)
        self._start = len(header)
        self.total_bytes = self._start + max((p.end for p in self._places.values()), default=0)
        file.write(header)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where it belongs."""
        place = self._places[name]
        assert (dtype_name(tensor.dtype), tuple(tensor.shape)) == (place.dtype, place.shape), name
        data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
        self._file.seek(self._start + place.begin)
        self._file.write(data)
        self.written.add(name)

    def finish(self, metadata: Mapping[str, str]) -> None:
        """Write the header again, with the final metadata."""
        missing = self._places.keys() - self.written
        assert not missing, missing
        header = self._header(metadata)
        assert len(header) == self._start
        self._file.seek(0)
        self._file.write(header)

    def _header(self, metadata: Mapping[str, str]) -> bytes:
        content: dict[str, Any] = {_METADATA: dict(sorted(metadata.items()))}
        for name, place in self._places.items():
            offsets = [place.begin, place.end]
            content[name] = {"dtype": place.dtype, "shape": place.shape, "data_offsets": offsets}
        text = json.dumps(content, ensure_ascii=False, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def _laid_out(
    tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
) -> Iterator[tuple[str, Place]]:
    begin = 0
    for name in sorted(tensors, key=lambda name: (-tensors[name][0].itemsize, name)):
        dtype, shape = tensors[name]
        end = begin + prod(shape) * dtype.itemsize
        yield name, Place(dtype_name(dtype), shape, begin, end)
        begin = end


class TensorFile:
    """An open file whose header has been read and fits the file's size.

    Attributes:
        metadata: Text of the header.
        places: By name, in the order of the bytes.
    """

    def __init__(self, path: Path, file: FileIO) -> None:
        self._path, self._file, self._lock = path, file, Lock()
        header, self._start = _read_header(path, file)
        self.metadata = _metadata(path, header.pop(_METADATA, {}))
        places = {name: _place(path, name, entry) for name, entry in header.items()}
        self.places = dict(sorted(places.items(), key=lambda item: item[1][2:]))
        _check_coverage(path, self.places, path.stat().st_size - self._start)

    def read(self, name: str, room: Tensor) -> Tensor:
        """A tensor on the CPU; safe to call from several threads.

        Args:
            name: Which one.
            room: Bytes to read into, at least as many as the tensor has, which then shares their
                memory.

        Raises:
            ValueError: if the file ends before the tensor does.
        """
        place = self.places[name]
        data = room[: place.end - place.begin]
        self._read_into([data.numpy().data], place.begin)
        return data.view(DTYPES[place.dtype]).view(place.shape)

    def read_run(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Tensors that follow one another, on the CPU; safe to call from several threads.

        Reading one by one takes longer than their bytes do where they are small. Together they take
        one piece of memory, which is free again when all of them are.

        Raises:
            ValueError: if the file ends before they do.
        """
        places = [self.places[name] for name in names]
        begins = [0, *accumulate(_aligned(place.end - place.begin) for place in places)]
        memory = np.empty(begins[-1] + _ALIGNMENT, np.uint8)
        memory = memory[-memory.ctypes.data % _ALIGNMENT :]
        parts = [memory[b : b + p.end - p.begin] for b, p in zip(begins, places, strict=False)]
        self._read_into([part.data for part in parts], places[0].begin)
        return {
            name: torch.from_numpy(part).view(DTYPES[place.dtype]).view(place.shape)
            for name, part, place in zip(names, parts, places, strict=True)
        }

    def _read_into(self, views: list[memoryview], begin: int) -> None:
        """Fill ``views`` with the bytes from ``begin`` on, counted behind the header."""
        position, views = self._start + begin, [view for view in views if len(view)]
        while views:
            count = self._read_some(views[:_MOST_VIEWS], position)
            if not count:
                raise ValueError(f"{self._path}: ends within its tensors; copy or export it again")
            position += count
            while views and count >= len(views[0]):
                count -= len(views.pop(0))
            if count:
                views[0] = views[0][count:]

    def _read_some(self, views: list[memoryview], position: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(self._file.fileno(), views, position)
        with self._lock:  # where reading moves a position that all threads share
            self._file.seek(position)
            return self._file.readinto(views[0])

    @contextmanager
    def fetched_meanwhile(self) -> Iterator[None]:
        """Have the system bring the file into its cache during the block, where it knows how to."""
        stop = Event()
        with ThreadPoolExecutor(1) as disk:
            fetching = disk.submit(self._fetch, stop)
            try:
                yield
            finally:
                stop.set()
        fetching.result()

    def _fetch(self, stop: Event) -> None:
        if hasattr(os, "posix_fadvise"):
            size = os.fstat(self._file.fileno()).st_size
            with suppress(OSError):  # a hint, which some file systems do not take
                for begin in range(0, size, _AHEAD):
                    if stop.is_set():
                        return
                    os.posix_fadvise(self._file.fileno(), begin, _AHEAD, os.POSIX_FADV_WILLNEED)


@contextmanager
def open_tensors(path: Path) -> Iterator[TensorFile]:
    """Open a safetensors file for reading.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is truncated, too long, or no safetensors file.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}; copy the whole folder, or export it again")
    with path.open("rb", buffering=0) as file:
        yield TensorFile(path, file)


def _aligned(count: int) -> int:
    return -(-count // _ALIGNMENT) * _ALIGNMENT


def _read_header(path: Path, file: FileIO) -> tuple[dict[str, Any], int]:
    size = path.stat().st_size
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(size - 8, _LONGEST_HEADER):
        raise ValueError(
            f"{path}: its header would take {length} bytes of {size}; it is truncated or no "
            "safetensors file, so copy or export it again"
        )
    try:
        header = json.loads(file.read(length).decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{path}: its header is no JSON ({error}); copy or export it again"
        ) from error
    if not isinstance(header, dict):
        raise ValueError(f"{path}: its header is no JSON object; copy or export it again")
    return header, 8 + length


def _metadata(path: Path, content: object) -> dict[str, str]:
    if not isinstance(content, dict) or not all(isinstance(v, str) for v in content.values()):
        raise ValueError(f"{path}: the metadata in its header is no text; export it again")
    return content


def _place(path: Path, name: str, entry: object) -> Place:
    what = f"{path}: the header's entry for {name!r}"
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{what} has no dtype, shape and data_offsets; copy or export it again")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPES:
        raise ValueError(f"{what} has dtype {dtype!r}, not one of {sorted(DTYPES)}")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise ValueError(f"{what} has a damaged shape or offsets; copy or export it again")
    begin, end = offsets
    if end - begin != prod(shape) * DTYPES[dtype].itemsize:
        raise ValueError(
            f"{what} gives it {end - begin} bytes, but {dtype} of shape {shape} takes "
            f"{prod(shape) * DTYPES[dtype].itemsize}; copy or export it again"
        )
    return Place(dtype, tuple(shape), begin, end)


def _are_sizes(values: object) -> bool:
    if not isinstance(values, list) or len(values) > _MOST_DIMENSIONS:
        return False
    return all(type(v) is int and 0 <= v < 1 << 62 for v in values)


def _check_coverage(path: Path, places: Mapping[str, Place], size: int) -> None:
    """Make sure that tensors follow one another and end where the file ends."""
    at = 0
    for name, place in places.items():
        if place.begin != at:
            raise ValueError(f"{path}: {name} overlaps or leaves a gap; copy or export it again")
        at = place.end
    if at != size:
        raise ValueError(
            f"{path}: holds {size} bytes of tensors where its header has {at}; it is truncated or "
            "something was appended, so copy or export it again"
        )
