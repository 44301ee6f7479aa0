"""The recorded calls of a model, in memory or on disk."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dit_qat.calibration.trees import (
    load_leaf,
    load_tree,
    map_tensors,
    replacing,
    save_tree,
    tensors_of,
)

__all__ = ["Call", "CallStore", "owned"]

_INDEX = "calls.json"
_FORMAT = 2  # of the files of calls


@dataclass(frozen=True)
class Call:
    """One batched call of a model at one step of a sampler.

    Attributes:
        args: Its positional arguments: nested containers of tensors and plain values, on the CPU.
        kwargs: Those by name.
        step: Index of the sampler's step; 0 where there is no sampler.
        timestep: What the model was told, in its own units; all rows share it.
        rows: Rows of the batch.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    step: int = 0
    timestep: float = 0.0
    rows: int = 1


@dataclass(frozen=True)
class _Entry:
    step: int
    timestep: float
    rows: int
    bytes: int


class _Place(NamedTuple):
    """Where a tensor is kept: the ``leaf``-th of a call."""

    call: int
    leaf: int


@dataclass
class CallStore:
    """Calls in the order in which they were made.

    A tensor that several calls got, such as a text embedding, is kept once.

    Attributes:
        model: :func:`~dit_qat.calibration.state.fingerprint` of the recorded model; empty: unknown.
        limit_bytes: What the calls may take in memory (or on disk, if there is a folder).
        folder: Where the calls go, one file each; None keeps them in memory.
    """

    model: str = ""
    limit_bytes: int | None = None
    folder: Path | None = None
    _entries: list[_Entry] = field(default_factory=list)
    _calls: list[Call] = field(default_factory=list)
    _places: dict[bytes, _Place] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder = Path(self.folder)
            (self.folder / _INDEX).unlink(missing_ok=True)
            for old in self.folder.glob("call_*.safetensors"):
                old.unlink()

    @classmethod
    def open(cls, folder: Path) -> "CallStore":
        """Open the calls that an earlier process recorded.

        Raises:
            FileNotFoundError: if the recording was never finished.
            ValueError: if the index is damaged.
        """
        path = Path(folder) / _INDEX
        if not path.is_file():
            raise FileNotFoundError(f"there is no {path}: no finished recording; record it again")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content["format"] != _FORMAT:
                raise ValueError(f"format {content['format']}, not {_FORMAT}")
            entries = [_Entry(**entry) for entry in content["calls"]]
            store = cls(model=content["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); record the calls again") from error
        store.folder, store._entries = Path(folder), entries
        return store

    def append(self, call: Call) -> None:
        """Keep one more call, and only those tensors of it that no call before brought.

        Raises:
            ValueError: if the limit is passed, or a value cannot be kept on disk.
        """
        tensors = tensors_of((call.args, call.kwargs))
        digests = [_digest(tensor) for tensor in tensors]
        places = [self._places.get(digest) for digest in digests]
        size = sum(t.nbytes for t, place in zip(tensors, places, strict=True) if place is None)
        self._check_limit(size)
        index = len(self)
        if self.folder is None:
            self._calls.append(_mapped(call, tensors, places, self._held))
        else:
            # In a file, an empty tensor stands for one that another file holds.
            bare = _mapped(call, tensors, places, lambda _: torch.empty(0))
            known = [None if place is None else list(place) for place in places]
            save_tree(self._path(index), [bare.args, bare.kwargs, known])
        self._entries.append(_Entry(call.step, call.timestep, call.rows, size))
        for leaf, digest in enumerate(digests):
            self._places.setdefault(digest, _Place(index, leaf))

    def finish(self) -> None:
        """Write the index, without which a folder does not count as recorded."""
        if self.folder is None:
            return
        calls = [vars(entry) for entry in self._entries]
        text = json.dumps({"format": _FORMAT, "model": self.model, "calls": calls}, indent=1)
        replacing(self.folder / _INDEX, lambda path: _write(path, text))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Call:
        if self.folder is None:
            return self._calls[index]
        entry = self._entries[index]
        args, kwargs, known = load_tree(self._path(range(len(self))[index]))
        call = Call(args, kwargs, entry.step, entry.timestep, entry.rows)
        places = [None if place is None else _Place(*place) for place in known]
        return _mapped(call, tensors_of((args, kwargs)), places, self._read)

    def __iter__(self) -> Iterator[Call]:
        return (self[index] for index in range(len(self)))

    @property
    def steps(self) -> list[int]:
        """Sampler step of every call."""
        return [entry.step for entry in self._entries]

    @property
    def steps_and_timesteps(self) -> list[tuple[int, float]]:
        """Sampler step and the model's timestep of every call."""
        return [(entry.step, entry.timestep) for entry in self._entries]

    @property
    def timesteps(self) -> dict[int, float]:
        """The model's timestep by sampler step."""
        return {entry.step: entry.timestep for entry in self._entries}

    @property
    def rows(self) -> int:
        """Rows of all calls."""
        return sum(entry.rows for entry in self._entries)

    @property
    def bytes(self) -> int:
        """Bytes of all tensors."""
        return sum(entry.bytes for entry in self._entries)

    def _held(self, place: _Place) -> Tensor:
        call = self._calls[place.call]
        return tensors_of((call.args, call.kwargs))[place.leaf]

    def _read(self, place: _Place) -> Tensor:
        return load_leaf(self._path(place.call), place.leaf)

    def _path(self, index: int) -> Path:
        assert self.folder is not None
        return self.folder / f"call_{index:06d}.safetensors"

    def _check_limit(self, more: int) -> None:
        if self.limit_bytes is None or self.bytes + more <= self.limit_bytes:
            return
        where = "in memory" if self.folder is None else f"in {self.folder}"
        cure = "; or give a folder, on disk" if self.folder is None else ""
        raise ValueError(
            f"{len(self) + 1} recorded calls take {self.bytes + more:,} bytes {where}, above the "
            f"limit of {self.limit_bytes:,}: keep fewer steps, record fewer images, or raise the "
            f"limit{cure}"
        )


def owned(tensor: Tensor) -> Tensor:
    """A copy on the CPU that no later change reaches and that may enter a gradient."""
    # A sampler runs in inference mode, whose tensors autograd would refuse later on.
    with torch.inference_mode(False):
        return tensor.detach().to("cpu", copy=True)


def _mapped(
    call: Call,
    tensors: Sequence[Tensor],
    places: Sequence[_Place | None],
    found: Callable[[_Place], Tensor],
) -> Call:
    """A call in which ``found(place)`` stands for each tensor that has a place."""
    pairs = zip(tensors, places, strict=True)
    kept = iter([tensor if place is None else found(place) for tensor, place in pairs])
    args, kwargs = map_tensors(lambda _: next(kept), (call.args, call.kwargs))
    return replace(call, args=args, kwargs=kwargs)


def _digest(tensor: Tensor) -> bytes:
    """Of dtype, shape and every byte."""
    digest = hashlib.blake2b(f"{tensor.dtype}{tuple(tensor.shape)}".encode(), digest_size=32)
    # A copy: one number with stride 0 counts as contiguous, but cannot be viewed as bytes.
    flat = tensor.detach().flatten().cpu().clone(memory_format=torch.contiguous_format)
    digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.digest()


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
