"""Candidates of a denoising step: maps from layers to bits, by Fisher rank (AdaTSQ).

How AdaTSQ (arXiv:2602.09883) builds its sets is unknown; ours give the highest bits to the top
fraction of layers, the middle ones to the next, the lowest to the rest.
"""

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

__all__ = ["NEAR_FOUR", "NEAR_THREE", "Fractions", "candidates", "capacity", "default_fractions"]


class Fractions(NamedTuple):
    """Shares of the layers that get the highest and the middle bits."""

    high: float
    middle: float


NEAR_THREE = tuple(
    Fractions(*pair) for pair in ((0, 0), (0.05, 0.05), (0.1, 0.1), (0.2, 0.2), (0, 1))
)
"""All lowest; 3.3, 3.6, 4.2 bits with {3, 4, 8}; all middle."""
NEAR_FOUR = tuple(
    Fractions(*pair) for pair in ((0, 0), (0.05, 0.55), (0.1, 0.5), (0, 1), (0.1, 0.9))
)
"""All lowest; 3.8 and 4.0 bits with {3, 4, 8}; all middle; 4.4."""
_ALL_HIGH = Fractions(1, 0)


def default_fractions(bits: Sequence[int], budget: float) -> tuple[Fractions, ...]:
    """At most five for a budget: near the low bits, near the middle ones, or above.

    Args:
        bits: Lowest, middle, highest.
        budget: Largest mean of bits.
    """
    low, middle, high = bits
    if budget > (middle + high) / 2:
        return (*NEAR_FOUR[1:], _ALL_HIGH)
    return NEAR_THREE if budget < (low + middle) / 2 else NEAR_FOUR


def candidates(
    scores: Tensor, bits: Sequence[int], fractions: Sequence[Fractions]
) -> list[tuple[int, ...]]:
    """Maps of one step, each with the bits of all layers; equal ones once.

    Args:
        scores: Of each layer (L,): the highest get the most bits.
        bits: Lowest, middle, highest.
        fractions: One pair per candidate; numbers of layers are rounded, and at least one where the
            share is above zero.
    """
    low, middle, high = bits
    ranked = scores.argsort(descending=True, stable=True).tolist()
    found = []
    for share in fractions:
        first = _count(share.high, len(ranked))
        second = min(_count(share.middle, len(ranked)), len(ranked) - first)
        levels = [high] * first + [middle] * second + [low] * (len(ranked) - first - second)
        by_layer = dict(zip(ranked, levels, strict=True))
        found.append(tuple(by_layer[layer] for layer in range(len(ranked))))
    return list(dict.fromkeys(found))


def capacity(budget: float, bits: Sequence[int], steps: int, layers: int) -> int:
    """Bits that all layers at all steps may have together.

    Raises:
        ValueError: for a budget below the lowest bits, with the feasible range.
    """
    if not budget >= min(bits):
        raise ValueError(
            f"average_bits={budget:g} cannot be met: activation bits {tuple(bits)} allow averages "
            f"from {min(bits)} to {max(bits)}; raise it, or offer lower bits"
        )
    return int(min(budget, max(bits)) * steps * layers + 1e-9)


def _count(share: float, layers: int) -> int:
    return max(1, round(share * layers)) if share > 0 else 0
