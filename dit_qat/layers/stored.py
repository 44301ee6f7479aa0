"""Modules whose buffers are what a file holds: casts and float weights do not change them."""

from collections.abc import Callable
from typing import Any, ClassVar, Self

from torch import Tensor, nn

__all__ = ["StoredBuffers", "refuse_float_weight"]


class StoredBuffers(nn.Module):
    """A module whose buffers keep their dtype: a cast of the model is for its activations.

    Attributes:
        cast: Buffers that follow a cast all the same.
    """

    cast: ClassVar[frozenset[str]] = frozenset()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        kept = dict(self._buffers)
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, buffer in self.named_buffers(recurse=False):
            before = kept[name]
            if before is not None and buffer.dtype != before.dtype and name not in self.cast:
                # From the old one: a round trip through fewer bits would lose some.
                setattr(self, name, before.to(buffer.device))
        return self


def refuse_float_weight(module: nn.Module, state: dict[str, Any], prefix: str) -> None:
    """Refuse a state dict that has a float weight for a layer of codes.

    Raises:
        ValueError: naming the layer, and what to do.
    """
    if prefix + "weight" in state:
        raise ValueError(
            f"{prefix}weight is a float weight, but {prefix[:-1] or 'this'} holds codes "
            f"({type(module).__name__}); load the weights into the float model, and quantize that"
        )
