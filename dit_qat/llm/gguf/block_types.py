"""GGUF's types of quantized blocks that can hold whole numbers times a scale, and their bytes.

Layouts are those of ggml-common.h in https://github.com/ggml-org/llama.cpp. K-quants and ternary
types have blocks of 256 weights with one float16 scale d; sub-blocks have small whole factors of
it, which are 1 here: other scales within a block cannot be written exactly.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from dit_qat.llm.gguf.lattice import BLOCK, Lattice

__all__ = ["BlockType", "Ternary", "type_for"]

Ternary = Literal["tq2_0", "tq1_0"]
"""The two ternary types: 2.06 bits and quick, or 1.69 bits."""

_SUPER = 256
_POWERS = (81, 27, 9, 3, 1)


@dataclass(frozen=True)
class BlockType:
    """A type that holds ``scale (q - shift)`` or ``scale q + offset`` for small q.

    Attributes:
        name: As GGUF has it.
        size: Weights of a block, which share a scale.
        levels: q is 0 to this, less one.
        shift: The q that stands for zero; None: every block has its own, up to 15.
        affine: There is a float16 offset instead.
        pack: From q (n, size), scale (n, 1) and the offset or the shift (n, 1) to bytes (n, k).
    """

    name: str
    size: int
    levels: int
    shift: int | None
    pack: Callable[[Tensor, Tensor, Tensor], Tensor]
    affine: bool = False

    def holds(self, lattice: Lattice) -> bool:
        """Whether it holds a weight bit for bit."""
        if (lattice.offset is not None) != self.affine or lattice.codes.shape[1] % self.size:
            return False
        if not _constant(lattice.scale, self.size):
            return False
        codes = _blocks(lattice.codes, self.size)
        low, high = (codes + self._shift(codes)).aminmax()
        return int(low) >= 0 and int(high) < self.levels

    def packed(self, lattice: Lattice) -> Tensor:
        """The bytes (out, k) of a weight that it holds."""
        codes = _blocks(lattice.codes, self.size)
        every = self.size // BLOCK
        second = shift = self._shift(codes)
        if lattice.offset is not None:
            second = lattice.offset[:, ::every].reshape(-1, 1)
        scale = lattice.scale[:, ::every].reshape(-1, 1)
        return self.pack((codes + shift).to(torch.uint8), scale, second).view(
            len(lattice.codes), -1
        )

    def _shift(self, codes: Tensor) -> Tensor:
        """What makes the codes of each block q, (n, 1)."""
        if self.shift is not None:
            return torch.full_like(codes[:, :1], self.shift)
        return (-codes.amin(1, keepdim=True)).clamp(0, 15)


def type_for(lattice: Lattice, ternary: Ternary = "tq2_0") -> BlockType:
    """The smallest type that holds a weight bit for bit.

    Args:
        lattice: The weight.
        ternary: Which of the two ternary types is tried.

    Raises:
        ValueError: with the reason, if there is none.
    """
    kinds = [_TERNARY[ternary], *_OTHERS]
    found = next((kind for kind in kinds if kind.holds(lattice)), None)
    if found is None:
        low, high = (int(edge) for edge in lattice.codes.aminmax())
        offsets = "" if lattice.offset is None else " and offsets"
        raise ValueError(
            f"none of {', '.join(kind.name for kind in kinds)} holds its codes from {low} to "
            f"{high} with their scales{offsets}"
        )
    return found


def _constant(scale: Tensor, size: int) -> bool:
    blocks = scale.view(len(scale), -1, size // BLOCK)
    return bool((blocks == blocks[..., :1]).all())


def _blocks(codes: Tensor, size: int) -> Tensor:
    return codes.reshape(-1, size)


def _bytes(values: Tensor) -> Tensor:
    """Float16 numbers (n, 1) as bytes (n, 2)."""
    return values.half().contiguous().view(torch.uint8)


def _fields(q: Tensor, shape: Sequence[int], bits: int) -> Tensor:
    """Fields of ``bits`` from the third dimension of ``shape`` (n, parts, fields, bytes)."""
    parts = q.view(len(q), *shape).unbind(2)
    packed = torch.zeros_like(parts[0])
    for place, part in enumerate(parts):
        packed |= part << bits * place
    return packed.flatten(1)


def _base3(q: Tensor, fields: int, size: int) -> Tensor:
    """Digits to the base 3, ``fields`` to a byte, scaled up so that a product gives them back."""
    parts = q.reshape(len(q), -1, fields, size).int()
    number = (parts * torch.tensor(_POWERS[:fields])[:, None]).sum(2).flatten(1)
    return ((number * 256 + 242) // 243).to(torch.uint8)


def _tq1_0(q: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    parts = _base3(q[:, :160], 5, 32), _base3(q[:, 160:240], 5, 16), _base3(q[:, 240:], 4, 4)
    return torch.cat([*parts, _bytes(scale)], 1)


def _tq2_0(q: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    return torch.cat([_fields(q, (2, 4, 32), 2), _bytes(scale)], 1)


def _q2_k(q: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    factors = (1 | shift << 4).to(torch.uint8).expand(-1, 16)
    return torch.cat([factors, _fields(q, (2, 4, 32), 2), _bytes(scale), _bytes(scale)], 1)


def _q3_k(q: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    high, low = _fields(q >> 2, (1, 8, 32), 1), _fields(q & 3, (2, 4, 32), 2)
    # Sixteen factors of 33 - 32 = 1: lower four bits, then upper two.
    factors = torch.tensor([0x11] * 8 + [0xAA] * 4, dtype=torch.uint8).expand(len(q), -1)
    return torch.cat([high, low, factors, _bytes(scale)], 1)


def _q4_k(q: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    shifts = shift.to(torch.uint8).expand(-1, 4)
    factors = torch.cat([torch.ones_like(shifts), shifts, 1 | shifts << 4], 1)
    return torch.cat([_bytes(scale), _bytes(scale), factors, _fields(q, (4, 2, 32), 4)], 1)


def _q4_0(q: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    return torch.cat([_bytes(scale), _fields(q, (1, 2, 16), 4)], 1)


def _q4_1(q: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    return torch.cat([_bytes(scale), _bytes(offset), _fields(q, (1, 2, 16), 4)], 1)


def _q5_0(q: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    high = _fields((q >> 4).view(-1, 4, 8).mT.contiguous().view(-1, 32), (1, 8, 4), 1)
    return torch.cat([_bytes(scale), high, _fields(q & 15, (1, 2, 16), 4)], 1)


def _q8_0(q: Tensor, scale: Tensor, _: Tensor) -> Tensor:
    return torch.cat([_bytes(scale), q ^ 0x80], 1)


_TERNARY = {
    "tq1_0": BlockType("TQ1_0", _SUPER, 3, 1, _tq1_0),
    "tq2_0": BlockType("TQ2_0", _SUPER, 3, 1, _tq2_0),
}
_OTHERS = (  # by bits per weight: 2.63, 3.44, 4.5, 4.5, 5, 5.5, 8.5
    BlockType("Q2_K", _SUPER, 4, None, _q2_k),
    BlockType("Q3_K", _SUPER, 8, 4, _q3_k),
    BlockType("Q4_0", BLOCK, 16, 8, _q4_0),
    BlockType("Q4_K", _SUPER, 16, None, _q4_k),
    BlockType("Q4_1", BLOCK, 16, 0, _q4_1, affine=True),
    BlockType("Q5_0", BLOCK, 32, 16, _q5_0),
    BlockType("Q8_0", BLOCK, 256, 128, _q8_0),
)
