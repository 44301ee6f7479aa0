"""The recorded calls of a model, in memory or on disk."""

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_qat.calibration.trees import load_tree, map_tensors, replacing, save_tree, tensors_of

__all__ = ["Call", "CallStore", "owned"]

_INDEX = "calls.json"


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


@dataclass
class CallStore:
    """Calls in the order in which they were made.

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

    def __post_init__(self) -> None:
        if self.folder is not None:
            self.folder = Path(self.folder)
            (self.folder / _INDEX).unlink(missing_ok=True)

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
            entries = [_Entry(**entry) for entry in content["calls"]]
            store = cls(model=content["model"])
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is damaged ({error!r}); record the calls again") from error
        store.folder, store._entries = Path(folder), entries
        return store

    def append(self, call: Call) -> None:
        """Keep one more call; tensors that equal those of the call before are kept once.

        Raises:
            ValueError: if the limit is passed, or a value cannot be kept on disk.
        """
        if self._calls:
            call = _shared(call, self._calls[-1])
        known = {id(tensor) for tensor in tensors_of(self._last())}
        fresh = [t for t in tensors_of((call.args, call.kwargs)) if id(t) not in known]
        size = sum(tensor.nbytes for tensor in fresh)
        self._check_limit(size)
        self._entries.append(_Entry(call.step, call.timestep, call.rows, size))
        if self.folder is None:
            self._calls.append(call)
        else:
            save_tree(self._path(len(self._entries) - 1), [call.args, call.kwargs])

    def finish(self) -> None:
        """Write the index, without which a folder does not count as recorded."""
        if self.folder is None:
            return
        calls = [vars(entry) for entry in self._entries]
        text = json.dumps({"model": self.model, "calls": calls}, indent=1)
        replacing(self.folder / _INDEX, lambda path: _write(path, text))

    def __len__(self) -> int:
        return len(self._entries)

    def __getitem__(self, index: int) -> Call:
        if self.folder is None:
            return self._calls[index]
        entry = self._entries[index]
        args, kwargs = load_tree(self._path(range(len(self))[index]))
        return Call(args, kwargs, entry.step, entry.timestep, entry.rows)

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

    def _last(self) -> tuple[Any, ...]:
        return (self._calls[-1].args, self._calls[-1].kwargs) if self._calls else ()

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


def _shared(call: Call, previous: Call) -> Call:
    """Take equal tensors from the call before: a text embedding is the same at every step."""
    before = tensors_of((previous.args, previous.kwargs))
    after = tensors_of((call.args, call.kwargs))
    if len(before) != len(after):
        return call
    pairs = zip(before, after, strict=True)
    kept = iter([b if b.dtype == a.dtype and torch.equal(b, a) else a for b, a in pairs])
    args, kwargs = map_tensors(lambda _: next(kept), (call.args, call.kwargs))
    return Call(args, kwargs, call.step, call.timestep, call.rows)


def _write(path: Path, text: str) -> None:
    path.write_text(text + "\n", encoding="utf-8")
