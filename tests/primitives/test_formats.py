"""Number formats: how many levels, where they lie, and what cannot exist."""

from itertools import pairwise
from math import log2

import pytest

from dit_qat.primitives.formats import GRID_KINDS, GridKind, Ternary, UniformGrid

GRIDS = [
    UniformGrid(bits, kind)
    for kind in GRID_KINDS
    for bits in (1, 2, 3, 4, 8, 16)
    if bits > 1 or kind in ("mid_rise", "unsigned")
]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_are_one_step_apart_and_counted(grid: UniformGrid) -> None:
    assert len(grid.levels) == grid.num_levels == 2**grid.bits - (grid.kind == "symmetric")
    assert all(b - a == 1 for a, b in pairwise(grid.levels))
    assert grid.levels[0] == grid.code_min + grid.offset
    assert grid.levels[-1] == grid.code_max + grid.offset


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_which_grids_hold_zero_and_which_are_symmetric(grid: UniformGrid) -> None:
    assert (0 in grid.levels) == (grid.kind != "mid_rise")
    mirrored = tuple(-level for level in reversed(grid.levels))
    assert (grid.levels == mirrored) == (grid.kind in ("mid_rise", "symmetric"))


def test_two_symmetric_bits_are_ternary() -> None:
    assert UniformGrid(2, "symmetric").levels == Ternary().levels
    assert Ternary().bits == log2(3)


@pytest.mark.parametrize(
    ("bits", "kind", "least"),
    [(0, "mid_rise", 1), (17, "unsigned", 1), (1, "symmetric", 2), (1, "twos_complement", 2)],
)
def test_impossible_bits_are_refused(bits: int, kind: GridKind, least: int) -> None:
    with pytest.raises(ValueError, match=rf"bits={bits} is outside {least}\.\.16 for a {kind}"):
        UniformGrid(bits, kind)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'midrise' is unknown; use one of \('mid_rise'"):
        UniformGrid(4, "midrise")  # type: ignore[arg-type]
