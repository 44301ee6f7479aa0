"""PartialBinaryCode: most entries one bit about a mean per row and block, the others eight bits."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from dit_qat.layers.weight_code import Room, Setting, WeightCode, check_rooms, check_settings
from dit_qat.primitives.integer import IntegerGrid, Scales
from dit_qat.primitives.integer import decode as decode_integers
from dit_qat.primitives.packing import check_int, field_bytes, pack_int, unpack_int
from dit_qat.primitives.patterns import pack_bits, unpack_bits

__all__ = ["HIGH_GRID", "PartialBinaryCode", "PartialBlock", "decode_partial_block"]

HIGH_GRID = IntegerGrid(8, symmetric=False)
"""Eight-bit entries: a scale and a zero point per row of the whole weight."""


class PartialBlock(NamedTuple):
    """A block of columns (n, k), unpacked.

    Attributes:
        low: (n, k) bool, binary entries.
        plus: (n, k) bool, which of them are above the mean.
        high: (n, k) uint8, codes of the others.
        rows: (n, 2) float16, mean and scale of the binary ones.
    """

    low: Tensor
    plus: Tensor
    high: Tensor
    rows: Tensor


def decode_partial_block(block: PartialBlock, scales: Scales) -> Tensor:
    """Values (n, k) float32."""
    mean, scale = block.rows.float().unbind(1)
    levels = torch.stack([mean - scale, mean + scale], 1)
    binary = levels.gather(1, block.plus.long())
    return torch.where(block.low, binary, decode_integers(block.high, HIGH_GRID, scales))


@dataclass(frozen=True, eq=False)
class PartialBinaryCode(WeightCode):
    """A weight of PB-LLM.

    Attributes:
        out_features: Rows.
        in_features: Columns.
        block_size: Columns that share a mean and a scale.
        low: (out, in bits), which entries are binary.
        signs: Bits of the binary entries, row after row without gaps.
        codes: Bytes of the others, row after row.
        rows: (out, blocks, 2) float16, mean and scale.
        scale: (out,) float16, of the bytes.
        zero: (out,) uint8, the byte of zero.
    """

    name: ClassVar[str] = "partial_binary"

    out_features: int
    in_features: int
    block_size: int
    low: Tensor
    signs: Tensor
    codes: Tensor
    rows: Tensor
    scale: Tensor
    zero: Tensor

    @classmethod
    def assemble(cls, block_size: int, blocks: Sequence[PartialBlock], scales: Scales) -> Self:
        """Pack blocks from left to right, all but the last of ``block_size`` columns."""
        low = torch.cat([block.low for block in blocks], 1)
        plus = torch.cat([block.plus for block in blocks], 1)
        high = torch.cat([block.high for block in blocks], 1)
        assert scales.zero is not None
        return cls(
            low.shape[0],
            low.shape[1],
            block_size,
            pack_int(low, 1, signed=False),
            pack_bits(plus[low]),
            high[~low],
            torch.stack([block.rows for block in blocks], 1),
            scales.scale[:, 0].half(),
            scales.zero[:, 0],
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of them."""
        names = ("low", "signs", "codes", "rows", "scale", "zero")
        return {name: getattr(self, name) for name in names}

    def settings(self) -> dict[str, Setting]:
        """The sizes."""
        return {
            "out_features": self.out_features,
            "in_features": self.in_features,
            "block_size": self.block_size,
        }

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of :meth:`settings` and :meth:`tensors`.

        Raises:
            ValueError: for settings or tensors that :meth:`assemble` does not make.
        """
        names = ("out_features", "in_features", "block_size")
        plain = check_settings(cls.name, settings, dict.fromkeys(names, (int,)))
        n, width, size = (plain[name] for name in names)
        if min(n, width, size) < 1:
            raise ValueError(f"a {cls.name} code of sizes {n}, {width} in blocks of {size}")
        low = Room((n, field_bytes(width, 1)))
        check_rooms(cls.name, {k: v for k, v in tensors.items() if k == "low"}, {"low": low})
        check_int(tensors["low"], 1, width)
        count = int(unpack_int(tensors["low"], 1, width, signed=False).long().sum())
        rooms = {
            "low": low,
            "signs": Room((field_bytes(count, 1),)),
            "codes": Room((n * width - count,)),
            "rows": Room((n, -(-width // size), 2), torch.float16),
            "scale": Room((n,), torch.float16),
            "zero": Room((n,)),
        }
        check_rooms(cls.name, tensors, rooms)
        check_int(tensors["signs"], 1, count)
        return cls(n, width, size, **tensors)

    @property
    def nominal_bits(self) -> float:
        """One bit for binary entries, eight for the others; the paper counts no more."""
        high = self.codes.numel() / (self.out_features * self.in_features)
        return 1 - high + HIGH_GRID.bits * high

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The weight (out, in) float32."""
        n, width = self.out_features, self.in_features
        low = unpack_int(self.low, 1, width, signed=False).bool()
        count = n * width - self.codes.numel()
        plus = torch.zeros_like(low, dtype=torch.uint8)
        plus = plus.masked_scatter_(low, unpack_bits(self.signs, count))
        high = torch.zeros_like(plus).masked_scatter_(~low, self.codes)
        scales = Scales(self.scale.float()[:, None], self.zero[:, None])
        parts = []
        starts = [*range(0, width, self.block_size), width]
        for index, (start, stop) in enumerate(pairwise(starts)):
            at = slice(start, stop)
            block = PartialBlock(low[:, at], plus[:, at], high[:, at], self.rows[:, index])
            parts.append(decode_partial_block(block, scales))
        return torch.cat(parts, 1)
