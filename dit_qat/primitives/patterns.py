"""N:M patterns and loose bits, as bytes.

A pattern is which N of M consecutive columns a row keeps. It is stored as its rank among all
patterns of N in M, in the order of their bit masks (column j is bit j): 7 bits for 4:8, 6 for 5:8,
5 for 6:8.
"""

from functools import lru_cache
from math import comb

import torch
from torch import Tensor

from dit_qat.primitives.packing import check_int, pack_int, unpack_int

__all__ = [
    "WIDEST_PATTERN",
    "pack_bits",
    "pack_patterns",
    "pattern_bits",
    "unpack_bits",
    "unpack_patterns",
]

WIDEST_PATTERN = 8
"""Columns of the widest pattern; its ranks fit a byte."""


def pattern_bits(kept: int, of: int) -> int:
    """Bits of a pattern of ``kept`` in ``of``; none if there is only one."""
    return (comb(of, kept) - 1).bit_length()


def pack_patterns(keep: Tensor, kept: int, of: int) -> Tensor:
    """Patterns of a mask (n, k) bool to fields (n, bytes) uint8.

    Raises:
        ValueError: for a mask that does not keep ``kept`` of every ``of`` columns.
    """
    groups = keep.view(len(keep), -1, of).long()
    if not bool((groups.sum(-1) == kept).all()):
        raise ValueError(f"a mask does not keep {kept} of every {of} columns")
    ranks, _ = _patterns(kept, of, keep.device)
    place = 1 << torch.arange(of, device=keep.device)
    return pack_int(ranks[(groups * place).sum(-1)], pattern_bits(kept, of), signed=False)


def unpack_patterns(packed: Tensor, kept: int, of: int, width: int) -> Tensor:
    """Inverse of :func:`pack_patterns`: (n, width) bool.

    Raises:
        ValueError: for ranks beyond the last pattern, or bits beyond the last rank.
    """
    bits = pattern_bits(kept, of)
    check_int(packed, bits, width // of)
    ranks = unpack_int(packed, bits, width // of, signed=False).int()
    _, patterns = _patterns(kept, of, packed.device)
    if bool((ranks >= len(patterns)).any()):
        raise ValueError(
            f"packed patterns hold ranks of {len(patterns)} or more, of which {kept}:{of} has none;"
            " the data are damaged"
        )
    return patterns[ranks].flatten(1)


def pack_bits(bits: Tensor) -> Tensor:
    """Bits (n,) of any number, none too, to bytes (ceil(n / 8),)."""
    return pack_int(bits, 1, signed=False) if bits.numel() else bits.to(torch.uint8)


def unpack_bits(packed: Tensor, count: int) -> Tensor:
    """Inverse of :func:`pack_bits`: (count,) uint8."""
    return unpack_int(packed, 1, count, signed=False) if count else packed


@lru_cache(maxsize=64)
def _patterns(kept: int, of: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Rank by bit mask (2^of,) uint8, and patterns by rank (patterns, of) bool."""
    with torch.inference_mode(False):
        masks = (torch.arange(1 << of, device="cpu")[:, None] >> torch.arange(of, device="cpu")) & 1
        legal = masks.sum(1) == kept
        ranks = (legal.cumsum(0) - 1).to(torch.uint8)
        return ranks.to(device), masks[legal].bool().to(device)
