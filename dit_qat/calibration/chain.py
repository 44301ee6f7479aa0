"""How the inputs of blocks derive from what came before, and what is known between two blocks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dit_qat.calibration.trees import map_leaves, tensors_of

__all__ = ["Chain", "Link", "Source", "State", "map_sources"]


class Source(NamedTuple):
    """A tensor of a call: the ``leaf``-th of a block's inputs or of its outputs."""

    kind: Literal["in", "out"]
    block: int
    leaf: int


State = dict[Source, Tensor]
"""What is known of one call between two blocks."""


@dataclass(frozen=True)
class Link:
    """How a block is called: containers of sources and plain values.

    Attributes:
        args: Positional arguments.
        kwargs: Those by name.
        starts: Something between the blocks computes an input (or it is the first block), so that
            its inputs are captured by running the model up to it.
        mutates: The block changes an input in place.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    starts: bool
    mutates: bool

    @property
    def plain(self) -> list[Any]:
        """Values beside tensors, in order."""
        found: list[Any] = []
        map_leaves(found.append, map_sources(lambda _: (), (self.args, self.kwargs)))
        return found

    @property
    def sources(self) -> list[Source]:
        """All that the block reads."""
        found: list[Source] = []
        map_sources(found.append, (self.args, self.kwargs))
        return found

    def inputs(self, state: State, device: torch.device) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of the block."""

        def fill(source: Source) -> Tensor:
            tensor = state[source].to(device)
            return tensor.clone() if self.mutates else tensor

        args, kwargs = map_sources(fill, (self.args, self.kwargs))
        return args, kwargs


@dataclass(frozen=True, eq=False)
class Chain:
    """What one traced call told; calls of equal shapes share it.

    Attributes:
        links: By block, in the order of execution.
        rows: Rows that each watched linear received.
        shared: Groups of watched linears of one block that received the very same tensor.
        sizes: Bytes of every source.
        work: Bytes that the call took beside the model and its own arguments, at most.
    """

    links: tuple[Link, ...]
    rows: Mapping[str, int]
    shared: tuple[tuple[str, ...], ...]
    sizes: Mapping[Source, int]
    work: int

    @cached_property
    def _live(self) -> list[frozenset[Source]]:
        found = []
        for block, link in enumerate(self.links):
            later = (source for after in self.links[block:] for source in after.sources)
            own = {source for source in link.sources if source.kind == "in"}
            found.append(frozenset(own | {source for source in later if source.block < block}))
        return found

    def live(self, block: int) -> frozenset[Source]:
        """What block ``block`` and those behind it read and no later capture brings."""
        return self._live[block]

    def bytes_at(self, block: int) -> int:
        """What is held of a call before a block."""
        return sum(self.sizes[source] for source in self.live(block))

    def advance(self, block: int, state: State, output: Any) -> State:
        """What is known behind a block, given its output."""
        if block + 1 == len(self.links):
            return {}
        fresh = {Source("out", block, i): t for i, t in enumerate(tensors_of(output))}
        known = {**state, **fresh}
        return {source: known[source] for source in self.live(block + 1) if source in known}


def map_sources(function: Callable[[Source], Any], tree: Any) -> Any:
    """As :func:`map_tensors`, of a tree with sources (tuples, too) in place of tensors."""
    if isinstance(tree, Source):
        return function(tree)
    if isinstance(tree, dict):
        return {key: map_sources(function, value) for key, value in tree.items()}
    if isinstance(tree, tuple | list):
        items = [map_sources(function, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree
