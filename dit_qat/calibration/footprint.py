"""Bytes that tensors take while something runs, counted operation by operation."""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dit_qat.calibration.trees import tensors_of

__all__ = ["Footprint", "uncounted"]

_UNCOUNTED = ContextVar("uncounted", default=False)


@contextmanager
def uncounted() -> Iterator[None]:
    """What comes to be here is no news to a :class:`Footprint`: weights that a block reads in."""
    token = _UNCOUNTED.set(True)
    try:
        yield
    finally:
        _UNCOUNTED.reset(token)


class Footprint(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the storages that operations make and that are still held, on any device.

    What single kernels take and give back within themselves is not seen.

    Args:
        existing: Tensors that were there before, whose views are no news.

    Attributes:
        live: Bytes held now.
        peak: Most of them so far.
    """

    def __init__(self, existing: Iterable[Tensor] = ()) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in existing}

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation, and count what it makes."""
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(result):
            self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._known:
            size = 0 if _UNCOUNTED.get() else storage.nbytes()
            self._known.add(key)
            weakref.finalize(storage, self._forget, key, size)
            self.live += size
            self.peak = max(self.peak, self.live)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
