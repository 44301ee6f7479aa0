"""Integer weights: codes of b bits with a scale per output channel or per group of inputs."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.packing import pack_int, unpack_int
from dit_qat.primitives.scales import min_max, widen

__all__ = [
    "SHRINK",
    "IntegerGrid",
    "Scales",
    "Search",
    "decode",
    "divisors",
    "encode",
    "fit_scales",
    "pack_codes",
    "round_to_nearest",
    "unpack_codes",
]

Search = Literal["minmax", "mse"]

SHRINK = tuple(1 - 0.02 * k for k in range(41))
"""Fractions of the full range that ``mse`` tries: 1 down to 0.2."""

_BITS = (2, 3, 4, 8)
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class IntegerGrid:
    """Which integers, and how many weights share a scale.

    Attributes:
        bits: 2, 3, 4 or 8.
        symmetric: Signed codes around a zero level, ``-(2^(b-1) - 1) .. 2^(b-1) - 1``; otherwise
            codes ``0 .. 2^b - 1`` with an integer zero point.
        group_size: Inputs that share a scale; None: one scale per output channel.

    Raises:
        ValueError: for other bits or a group below 1.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = None

    def __post_init__(self) -> None:
        if self.bits not in _BITS:
            raise ValueError(f"weight bits={self.bits} are not among {_BITS}; choose one of them")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(
                f"group_size={self.group_size} is below 1; use None for a scale per output channel"
            )

    @property
    def format(self) -> UniformGrid:
        """The codes as a number format."""
        return UniformGrid(self.bits, "symmetric" if self.symmetric else "unsigned")

    def groups(self, width: int) -> int:
        """Scales of a row of ``width`` inputs.

        Raises:
            ValueError: if ``group_size`` does not divide the width, with sizes that do.
        """
        size = width if self.group_size is None else self.group_size
        if width % size:
            raise ValueError(
                f"group_size={size} does not divide {width} inputs; use None or one of "
                f"{', '.join(map(str, divisors(width)))}"
            )
        return width // size


class Scales(NamedTuple):
    """What codes are multiplied by: ``(codes - zero) * scale``.

    Attributes:
        scale: (out, groups) float32, each a positive float16.
        zero: (out, groups) uint8, the code of zero; None: 0.
    """

    scale: Tensor
    zero: Tensor | None

    def of_columns(self, columns: Tensor, width: int) -> "Scales":
        """Scales (out, k), or (out, 1) where all share one, of columns (k,) of ``width``."""
        if self.scale.shape[1] == 1:
            return self
        group = columns // (width // self.scale.shape[1])
        return Scales(self.scale[:, group], None if self.zero is None else self.zero[:, group])


@torch.no_grad()
def fit_scales(
    weight: Tensor,
    grid: IntegerGrid,
    search: Search = "minmax",
    shrink: tuple[float, ...] = SHRINK,
) -> Scales:
    """Choose scales and round them to what is stored, before any code is formed.

    Args:
        weight: (out, in).
        grid: Bits and group.
        search: ``minmax`` covers the range of each group, zero included; ``mse`` shrinks the range
            by the factor of least squared error, which never is worse.
        shrink: The factors of ``mse``; 1 is always among them.

    Raises:
        ValueError: for a group that does not divide the width, values that are not finite, or a
            row beyond what a float16 scale reaches.
    """
    if search not in get_args(Search):
        raise ValueError(f"search={search!r} is unknown; use one of {get_args(Search)}")
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; a weight is (out, in)")
    if not weight.isfinite().all():
        raise ValueError("the weight holds NaN or infinite values")
    groups = widen(weight).reshape(weight.shape[0], grid.groups(weight.shape[1]), -1)
    best = _scales(groups, grid, 1.0)
    if search == "mse":
        least = _error(groups, grid, best)
        for factor in shrink:
            trial = _scales(groups, grid, factor)
            error = _error(groups, grid, trial)
            best = _choose(error < least, trial, best)
            least = torch.minimum(error, least)
    return best


def encode(
    weight: Tensor, grid: IntegerGrid, scales: Scales, columns: Tensor | None = None
) -> Tensor:
    """Round weights to codes: (out, in) int8 if symmetric, else uint8.

    Args:
        weight: (out, in), or some columns of it.
        grid: Bits and group.
        scales: Of the whole weight.
        columns: (k,) positions of the columns of ``weight`` in the whole; None: it is whole.

    Raises:
        ValueError: for a width that the scales do not fit.
    """
    groups, (scale, zero) = _by_group(widen(weight), grid, scales, columns)
    codes = _round(groups, grid, scale, zero).view(weight.shape)
    return codes.to(torch.int8 if grid.symmetric else torch.uint8)


def decode(
    codes: Tensor, grid: IntegerGrid, scales: Scales, columns: Tensor | None = None
) -> Tensor:
    """Inverse of :func:`encode` on its codes: (out, in) in the dtype of the scales."""
    levels = codes.to(scales.scale.dtype, copy=True)
    groups, (scale, zero) = _by_group(levels, grid, scales, columns)
    if zero is not None:
        groups.sub_(zero)
    groups.mul_(scale)
    return levels


def round_to_nearest(
    weight: Tensor, grid: IntegerGrid, search: Search = "minmax"
) -> tuple[Tensor, Scales]:
    """Codes and scales of a weight (out, in); see :func:`fit_scales` and :func:`encode`."""
    scales = fit_scales(weight, grid, search)
    return encode(weight, grid, scales), scales


def divisors(width: int) -> list[int]:
    """Group sizes that divide a width, 8 and above, the width itself included."""
    return [size for size in range(min(8, width), width + 1) if width % size == 0]


def pack_codes(codes: Tensor, grid: IntegerGrid) -> Tensor:
    """Codes (out, in) to bytes (out, ceil(in bits / 8)), as ``pack_int`` has it.

    Raises:
        ValueError: for codes that the bits cannot hold.
    """
    return pack_int(codes, grid.bits, signed=grid.symmetric)


def unpack_codes(packed: Tensor, grid: IntegerGrid, width: int) -> Tensor:
    """Inverse of :func:`pack_codes`: (out, width) int8 if symmetric, else uint8.

    It runs in every forward: where codes fill bytes, a table does in one pass what takes
    :func:`~dit_qat.primitives.packing.unpack_int` ten.
    """
    dtype = torch.int8 if grid.symmetric else torch.uint8
    if grid.bits == 8:
        return packed.view(dtype)
    if packed.shape[1] % (3 if grid.bits == 3 else 2):
        return unpack_int(packed, grid.bits, width, signed=grid.symmetric)
    if grid.bits == 3:
        first, second, third = packed.view(packed.shape[0], -1, 3).int().unbind(-1)
        index = torch.stack([first | (second & 15) << 8, second >> 4 | third << 4], -1)
    else:
        index = packed.contiguous().view(torch.int16).int() & 0xFFFF
    codes = _code_table(grid, packed.device).index_select(0, index.flatten()).view(dtype)
    return codes.view(packed.shape[0], -1)[:, :width]


@lru_cache(maxsize=16)
def _code_table(grid: IntegerGrid, device: torch.device) -> Tensor:
    """Codes, a byte each, of all pairs of bytes (12 bits of them at 3 bits), as one integer."""
    codes, entries = (4, 1 << 12) if grid.bits == 3 else (16 // grid.bits, 1 << 16)
    with torch.inference_mode(False):
        pairs = (
            torch.arange(entries, dtype=torch.int32, device="cpu")
            .view(torch.uint8)
            .view(-1, 4)[:, :2]
        )
        table = unpack_int(pairs.contiguous(), grid.bits, codes, signed=grid.symmetric)
        return (
            table.contiguous().view(torch.int64 if codes == 8 else torch.int32).flatten().to(device)
        )


def _by_group(
    x: Tensor, grid: IntegerGrid, scales: Scales, columns: Tensor | None
) -> tuple[Tensor, Scales]:
    """Views of x and the scales that broadcast: (out, groups, size) and (out, groups, 1)."""
    count, size = scales.scale.shape[1], grid.group_size
    if columns is not None:
        return x, scales.of_columns(columns, count * (size or 1))
    if size is not None and x.shape[1] != count * size:
        raise ValueError(
            f"{x.shape[1]} columns do not fit {count} groups of {size}; say which columns they are"
        )
    zero = None if scales.zero is None else scales.zero[..., None]
    return x.view(x.shape[0], count, -1), Scales(scales.scale[..., None], zero)


def _round(x: Tensor, grid: IntegerGrid, scale: Tensor, zero: Tensor | None) -> Tensor:
    levels = (x / scale).round_()
    if zero is not None:
        levels.add_(zero)
    return levels.clamp_(grid.format.code_min, grid.format.code_max)


def _scales(groups: Tensor, grid: IntegerGrid, factor: float) -> Scales:
    """Scales (out, groups) of ``factor`` times the range of weights (out, groups, size)."""
    low, high = (edge.squeeze(-1) * factor for edge in min_max(groups, -1))
    if grid.symmetric:
        return Scales(_stored(torch.maximum(-low, high) / grid.format.code_max), None)
    low, high = low.clamp_max(0), high.clamp_min(0)
    scale = _stored((high - low) / grid.format.code_max)
    zero = (-low / scale).round_().clamp_(0, grid.format.code_max)
    return Scales(scale, zero.to(torch.uint8))


def _stored(scale: Tensor) -> Tensor:
    """Round scales to float16, from its smallest normal number on."""
    stored = scale.clamp_min(_HALF.tiny).to(torch.float16)
    if stored.isinf().any():
        row = int(stored.isinf().any(1).nonzero()[0])
        raise ValueError(
            f"row {row} of the weight needs a scale of {float(scale[row].max()):g}, beyond the "
            f"{_HALF.max:g} of float16; scale the layer down"
        )
    return stored.float()


def _error(groups: Tensor, grid: IntegerGrid, scales: Scales) -> Tensor:
    """Squared error (out, groups)."""
    scale = scales.scale[..., None]
    zero = None if scales.zero is None else scales.zero[..., None]
    levels = _round(groups, grid, scale, zero)
    values = (levels if zero is None else levels.sub_(zero)).mul_(scale)
    return values.sub_(groups).square_().sum(-1)


def _choose(first: Tensor, a: Scales, b: Scales) -> Scales:
    zero = None if a.zero is None or b.zero is None else torch.where(first, a.zero, b.zero)
    return Scales(torch.where(first, a.scale, b.scale), zero)
