"""What torch.compile should evaluate once instead of tracing."""

from collections.abc import Callable
from typing import TypeVar

__all__ = ["compile_time_constant"]

_Function = TypeVar("_Function", bound=Callable[..., object])


def compile_time_constant(function: _Function) -> _Function:
    """Let torch.compile call ``function`` once and keep its result; the arguments must be plain.

    A width or a bit count that differs between layers reaches traced code as a symbol; pass it
    through ``operator.index`` first.
    """
    # This is all that torch.compiler.assume_constant_result does, but that imports torch._dynamo,
    # which takes two seconds.
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function
