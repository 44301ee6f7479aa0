"""Who gets how many bits, under a budget."""

from dit_qat.allocation.bit_map import BitMap, make_bit_map
from dit_qat.allocation.bounds import BoundRule, bit_bounds
from dit_qat.allocation.budget import average_bits
from dit_qat.allocation.knapsack import allocate_bits

__all__ = [
    "BitMap",
    "BoundRule",
    "allocate_bits",
    "average_bits",
    "bit_bounds",
    "make_bit_map",
]
