"""Floats of a file, checked without a temporary, and by numpy, which starts no threads."""

from functools import cache
from math import inf, isfinite

import torch
from torch import Tensor

__all__ = ["check_finite", "is_finite"]

_INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}  # as wide as a float of so many bytes


def is_finite(tensor: Tensor) -> bool:
    """Whether there is neither NaN nor infinity, found without memory for an answer per number."""
    return not tensor.numel() or all(isfinite(float(bound)) for bound in tensor.detach().aminmax())


def check_finite(tensor: Tensor, positive: bool = False) -> None:
    """Refuse NaN and infinities and, on request, what is not above zero.

    Read as integers, floats of one sign are in the order of their magnitude, with infinity and then
    NaN on top; those with a sign come before all others, or behind them if its bit counts.

    Args:
        tensor: Floats of 2, 4 or 8 bytes, on the CPU.
        positive: Whether zero and numbers below it are refused as well.

    Raises:
        ValueError: see above.
    """
    if not tensor.numel():
        return
    integers = _INTEGERS[tensor.dtype.itemsize]
    signed = tensor.contiguous().view(integers).numpy()
    infinity, sign = _bits_of_infinity(tensor.dtype), 1 << 8 * tensor.dtype.itemsize - 1
    unsigned = signed.view(signed.dtype.str.replace("i", "u"))
    if int(signed.max()) >= infinity or int(unsigned.max()) >= sign + infinity:
        raise ValueError("holds NaN or infinite values; export another checkpoint")
    if positive and int(signed.min()) <= 0:
        least = float(tensor.min())
        raise ValueError(f"holds scales down to {least}, which must be above zero")


@cache
def _bits_of_infinity(dtype: torch.dtype) -> int:
    return int(torch.tensor(inf, dtype=dtype, device="cpu").view(_INTEGERS[dtype.itemsize]))
