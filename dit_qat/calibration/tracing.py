"""Following tensors through one call of a model, by their identity."""

import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from dit_qat.calibration.chain import Link, Source
from dit_qat.calibration.trees import map_tensors, tensors_of

__all__ = ["Tracer", "Watcher"]


class Tracer:
    """Follows tensors through one call, and holds none of them."""

    def __init__(self, blocks: int) -> None:
        self.links: list[Link | None] = [None] * blocks
        self.sizes: dict[Source, int] = {}
        self._known: list[tuple[weakref.ref[Tensor], int, Source]] = []
        self._entered: list[tuple[weakref.ref[Tensor], int]] = []

    def before(self, at: int, args: Any, kwargs: Any) -> None:
        """Listen to the inputs of a block."""
        tensors = tensors_of((args, kwargs))
        sources = [self._find(tensor) for tensor in tensors]
        starts = None in sources
        if starts:
            sources = [Source("in", at, leaf) for leaf in range(len(tensors))]
            for source, tensor in zip(sources, tensors, strict=True):
                assert source is not None
                self._learn(source, tensor)
        in_turn = iter(sources)
        args, kwargs = map_tensors(lambda _: next(in_turn), (args, kwargs))
        self.links[at] = Link(args, kwargs, starts, mutates=False)
        self._entered = [(weakref.ref(tensor), tensor._version) for tensor in tensors]

    def after(self, at: int, output: Any) -> None:
        """Listen to its output."""
        link = self.links[at]
        assert link is not None
        changed = [ref() for ref, version in self._entered if _changed(ref, version)]
        self.links[at] = Link(link.args, link.kwargs, link.starts, mutates=bool(changed))
        for leaf, tensor in enumerate(tensors_of(output)):
            if self._find(tensor) is None:  # an input that is passed on stays that input
                self._learn(Source("out", at, leaf), tensor)

    def _find(self, tensor: Tensor) -> Source | None:
        for ref, version, source in reversed(self._known):
            if ref() is tensor:
                # What was changed in place in between is another value.
                return source if tensor._version == version else None
        return None

    def _learn(self, source: Source, tensor: Tensor) -> None:
        self._known.append((weakref.ref(tensor), tensor._version, source))
        self.sizes[source] = tensor.nbytes


class Watcher:
    """Counts the rows that linears receive, and which of a block's receive the same tensor."""

    def __init__(self) -> None:
        self.rows: Counter[str] = Counter()
        self._runs: Counter[str] = Counter()
        self._groups: list[tuple[weakref.ref[Tensor], list[str]]] = []
        self._closed: list[list[str]] = []

    def hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        """A forward-pre-hook for a linear."""

        def count(_: nn.Module, args: Any, kwargs: Any) -> None:
            (x,) = tensors_of((args, kwargs))
            self.rows[name] += x.numel() // max(x.shape[-1], 1)
            self._runs[name] += 1
            for ref, names in self._groups:
                if ref() is x:
                    names.append(name)
                    return
            self._groups.append((weakref.ref(x), [name]))

        return count

    def end_block(self) -> None:
        """Start new groups: a text embedding reaches every block."""
        self._closed += [names for _, names in self._groups]
        self._groups = []

    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Groups of two and more whose members ran once."""
        groups = [[n for n in names if self._runs[n] == 1] for names in self._closed]
        return tuple(tuple(names) for names in groups if len(names) > 1)


def _changed(ref: weakref.ref[Tensor], version: int) -> bool:
    tensor = ref()
    return tensor is not None and tensor._version != version
