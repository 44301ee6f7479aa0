"""Straight-through estimators: the quantized value forward, a (masked) identity backward."""

from typing import Any

import torch
from torch import Tensor

__all__ = ["clip_gradient", "clip_mask", "straight_through", "trust_mask"]


class _StraightThrough(torch.autograd.Function):
    """An autograd function rather than ``x + (q - x).detach()``, whose forward would round."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, quantized: Tensor, mask: Tensor | None) -> Tensor:
        ctx.save_for_backward(mask)
        return quantized.view_as(quantized)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        return (grad if mask is None else grad * mask), None, None


def straight_through(x: Tensor, quantized: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``quantized``, bit for bit, with the gradient of ``x``; do not write to the result.

    Args:
        x: Float tensor that receives the gradient, any shape.
        quantized: Same shape; its own graph is cut.
        mask: Boolean, same shape: where False the gradient is dropped. None: identity.
    """
    result: Tensor = _StraightThrough.apply(x, quantized.detach(), mask)
    return result


def clip_mask(x: Tensor, low: Tensor | float, high: Tensor | float) -> Tensor:
    """True where ``low < x < high``: values beyond the grid receive no gradient."""
    return (x > low) & (x < high)


def clip_gradient(grad: Tensor, x: Tensor, low: float, high: float) -> Tensor:
    """Return ``grad`` where :func:`clip_mask` of ``x`` is True and zero elsewhere, in one pass.

    Both tensors have the same shape; the result has the finer of their dtypes.
    """
    # The backward of hardtanh is this very function; comparisons and a product take six times as
    # long on a CPU, where neither boolean results nor boolean factors are vectorized.
    result: Tensor = torch.ops.aten.hardtanh_backward(grad, x, low, high)
    return result


def trust_mask(x: Tensor, quantized: Tensor, bound: Tensor | float) -> Tensor:
    """True where the rounding error is at most ``bound`` (QuEST, arXiv:2502.05003).

    On a uniform grid rounding errors inside the outer edge are at most half a step, so a bound of
    half a step is the clip mask at the outer edge, and half a step more moves it out by as much.
    """
    return (x - quantized).abs() <= bound
