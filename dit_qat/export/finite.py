"""Floats of a file, checked in pieces."""

from math import isfinite

import torch
from torch import Tensor

__all__ = ["check_finite", "is_finite"]

_SERIAL = 1 << 14  # numbers at a time for which torch starts no threads of its own


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, found without memory for an answer per number."""
    return not tensor.numel() or all(isfinite(float(bound)) for bound in tensor.detach().aminmax())


def check_finite(tensor: Tensor, positive: bool = False) -> None:
    """Refuse NaN and infinities and, on request, what is not above zero.

    Raises:
        ValueError: see above.
    """
    for piece in torch.split(tensor.flatten(), _SERIAL):
        least, most = (float(bound) for bound in piece.aminmax())  # both are NaN if any is
        if not isfinite(least) or not isfinite(most):
            raise ValueError("holds NaN or infinite values; export another checkpoint")
        if positive and least <= 0:
            raise ValueError(f"holds scales down to {least}, which must be above zero")
