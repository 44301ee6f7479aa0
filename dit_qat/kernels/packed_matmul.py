"""Small integers times packed ternary codes, as the operator ``dit_qat::packed_matmul``.

The operator is the seam for compiled kernels: registering one for a device (``torch.library.impl``
with "CPU" or "CUDA") replaces what is here. What is here runs wherever torch does, and is exact.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from dit_qat.primitives.packing import field_bytes, unpack_ternary

__all__ = [
    "exact_matmul",
    "float_matmul",
    "int8_fits",
    "int8_matmul",
    "packed_matmul",
]

_CHUNK = 1 << 20  # codes that exist unpacked at a time
_EXACT_FLOAT32 = 1 << 24  # whole numbers up to here are float32
_ROWS = 8  # chunks of output channels are multiples of this, which torch._int_mm asks for
_LEAST_TOKENS = 17  # of torch._int_mm on CUDA

_LIBRARY = torch.library.Library("dit_qat", "FRAGMENT")  # type: ignore[no-untyped-call]
_LIBRARY.define("packed_matmul(Tensor x, Tensor codes) -> Tensor")  # type: ignore[no-untyped-call]


def packed_matmul(x: Tensor, codes: Tensor) -> Tensor:
    """Multiply integers by ternary codes, exactly: ``x T^T``.

    Args:
        x: (tokens, in) int8.
        codes: T, packed at 2 bits (:func:`~dit_qat.primitives.packing.pack_ternary`): (out,
            ceil(in/4)) uint8.

    Returns:
        (tokens, out) int32.

    Raises:
        ValueError: for other types or shapes.
    """
    _check(x, codes)
    if x.dtype != torch.int8:
        raise ValueError(f"x has dtype {x.dtype}; packed_matmul multiplies torch.int8")
    result: Tensor = torch.ops.dit_qat.packed_matmul(x, codes)
    return result


def float_matmul(x: Tensor, codes: Tensor) -> Tensor:
    """Multiply floats by packed ternary codes: (tokens, in) to (tokens, out) in the dtype of x.

    A few rows of codes at a time become floats; the weight as a whole never does.
    """
    _check(x, codes)
    out = x.new_empty(x.shape[0], codes.shape[0])
    for rows, part in _unpacked(codes, x.shape[1]):
        out[:, rows] = x @ part.to(x.dtype).T
    return out


def exact_matmul(x: Tensor, codes: Tensor) -> Tensor:
    """Twin of :func:`packed_matmul` in plain torch: floats hold these integers and their sums."""
    wide = x.shape[1] * 128 >= _EXACT_FLOAT32
    carrier = x.to(torch.float64 if wide else torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return float_matmul(carrier, codes).to(torch.int32)


def int8_matmul(x: Tensor, codes: Tensor) -> Tensor:
    """Twin of :func:`packed_matmul` through torch's int8 product; see :func:`int8_fits`."""
    out = x.new_empty(x.shape[0], codes.shape[0], dtype=torch.int32)
    for rows, part in _unpacked(codes, x.shape[1]):
        out[:, rows] = torch._int_mm(x, part.t())
    return out


def int8_fits(x: Tensor, codes: Tensor) -> bool:
    """Whether torch's int8 product takes these shapes, and is faster than float32, where x is."""
    if x.is_cuda:
        aligned = x.shape[1] % 8 == 0 and codes.shape[0] % _ROWS == 0
        return aligned and x.shape[0] >= _LEAST_TOKENS
    # Without these instructions, torch runs a plain loop, thirty times as slow as float32.
    vnni = x.device.type == "cpu" and torch.cpu._is_vnni_supported() and torch._C._has_mkldnn
    return vnni and x.shape[0] >= _LEAST_TOKENS


def _anywhere(x: Tensor, codes: Tensor) -> Tensor:
    return int8_matmul(x, codes) if int8_fits(x, codes) else exact_matmul(x, codes)


def _shape_only(x: Tensor, codes: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], codes.shape[0], dtype=torch.int32)


_LIBRARY.impl("packed_matmul", _anywhere, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("dit_qat::packed_matmul", _shape_only, lib=_LIBRARY)


def _unpacked(codes: Tensor, count: int) -> Iterator[tuple[slice, Tensor]]:
    """Rows of the weight and their codes (rows, count) int8, a chunk at a time."""
    rows = codes.shape[0]
    step = max(_ROWS, _CHUNK // max(count, 1) // _ROWS * _ROWS)
    for start, stop in pairwise([*range(0, rows, step), rows]):
        yield slice(start, stop), unpack_ternary(codes[start:stop], count)


def _check(x: Tensor, codes: Tensor) -> None:
    if x.ndim != 2 or codes.ndim != 2 or codes.shape[1] != field_bytes(x.shape[1], 2):
        raise ValueError(
            f"x {tuple(x.shape)} and packed codes {tuple(codes.shape)} do not fit; (tokens, in) "
            "and (out, ceil(in / 4)) do"
        )
