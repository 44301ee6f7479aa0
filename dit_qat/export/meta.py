"""Building models whose parameters take no memory, while their constants are computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from threading import get_ident

from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

__all__ = ["parameters_on_meta"]

_MOST_PARAMETERS = 1 << 17  # beyond any model; a damaged number must not take hours


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Have modules that this thread builds hold parameters without memory, and all else for real.

    A constructor computes rotary tables and position embeddings, in buffers or plain attributes, as
    it always does; a parameter moves as soon as it is made, before anything touches its pages.

    Raises:
        ValueError: for more parameters than any model has.
    """
    thread, count = get_ident(), 0

    def move(module: nn.Module, name: str, value: nn.Parameter | None) -> nn.Parameter | None:
        nonlocal count
        if value is None or get_ident() != thread:
            return None  # which leaves it as it is
        count += 1
        if count > _MOST_PARAMETERS:
            raise ValueError(f"more than {_MOST_PARAMETERS} parameters")
        return nn.Parameter(value.detach().to("meta"), value.requires_grad)

    handle = register_module_parameter_registration_hook(move)  # type: ignore[arg-type]
    try:
        yield
    finally:
        handle.remove()
