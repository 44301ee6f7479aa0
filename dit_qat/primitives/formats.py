"""Number formats: which numbers can be stored."""

from dataclasses import dataclass
from math import log2
from typing import Literal

__all__ = ["GRID_KINDS", "GridKind", "Ternary", "UniformGrid"]

GridKind = Literal["mid_rise", "twos_complement", "symmetric", "unsigned"]
GRID_KINDS: tuple[GridKind, ...] = ("mid_rise", "twos_complement", "symmetric", "unsigned")


@dataclass(frozen=True)
class UniformGrid:
    """Integer codes whose levels are ``(code + offset) * step``.

    * ``mid_rise``: 2^b levels, symmetric, no zero level: codes -2^(b-1) .. 2^(b-1)-1, offset 1/2
    * ``twos_complement``: the same codes with offset 0, so one level more below zero than above
    * ``symmetric``: 2^b - 1 levels around a zero level (two levels are ternary)
    * ``unsigned``: codes 0 .. 2^b - 1, for affine grids and for values that are never negative

    Raises:
        ValueError: for bits outside 1..16 or a kind that cannot hold that few bits.

    Example:
        >>> UniformGrid(2, "mid_rise").levels
        (-1.5, -0.5, 0.5, 1.5)
    """

    bits: int
    kind: GridKind = "mid_rise"

    def __post_init__(self) -> None:
        if self.kind not in GRID_KINDS:
            raise ValueError(f"grid kind {self.kind!r} is unknown; use one of {GRID_KINDS}")
        least = 2 if self.kind in ("twos_complement", "symmetric") else 1
        if not least <= self.bits <= 16:
            raise ValueError(
                f"bits={self.bits} is outside {least}..16 for a {self.kind} grid; choose bits in it"
            )

    @property
    def code_min(self) -> int:
        """Lowest code."""
        if self.kind == "unsigned":
            return 0
        return -(1 << (self.bits - 1)) + (self.kind == "symmetric")

    @property
    def code_max(self) -> int:
        """Highest code."""
        return (1 << (self.bits - (self.kind != "unsigned"))) - 1

    @property
    def offset(self) -> float:
        """What is added to a code, in steps: 1/2 for mid-rise, else 0."""
        return 0.5 if self.kind == "mid_rise" else 0.0

    @property
    def num_levels(self) -> int:
        """Number of levels."""
        return self.code_max - self.code_min + 1

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels in steps, ascending."""
        return tuple(code + self.offset for code in range(self.code_min, self.code_max + 1))


@dataclass(frozen=True)
class Ternary:
    """The codes -1, 0, +1 times a scale: log2(3) = 1.58 bits."""

    @property
    def bits(self) -> float:
        """Nominal bits, log2(3)."""
        return log2(3)

    @property
    def levels(self) -> tuple[float, ...]:
        """All levels in scales, ascending."""
        return (-1.0, 0.0, 1.0)
