"""Uniform quantization against brute force over all levels."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.formats import GRID_KINDS, UniformGrid
from dit_qat.primitives.scales import min_max
from dit_qat.primitives.uniform import (
    affine_step,
    decode,
    encode,
    outer_edges,
    round_codes_,
    standardize,
)

GRIDS = [UniformGrid(bits, kind) for kind in GRID_KINDS for bits in (2, 3, 4, 8)]
GRIDS += [UniformGrid(1, "mid_rise"), UniformGrid(1, "unsigned")]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
@pytest.mark.parametrize("affine", [False, True])
def test_values_go_to_their_nearest_level(grid: UniformGrid, affine: bool) -> None:
    x, step = normal(30, 20), torch.tensor(0.3, dtype=torch.float64)
    low = normal(30, 1) if affine else None
    levels = torch.tensor(grid.levels, dtype=torch.float64) * step
    offset = 0 if low is None else low.unsqueeze(-1)
    nearest = (x.unsqueeze(-1) - levels - offset).abs().amin(-1)
    quantized = decode(encode(x, step, grid, low), step, grid, low)
    torch.testing.assert_close((x - quantized).abs(), nearest)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_levels_are_fixed_points_with_all_codes(grid: UniformGrid) -> None:
    step = torch.tensor(0.25)
    codes = torch.arange(grid.code_min, grid.code_max + 1, dtype=torch.float32)
    assert torch.equal(decode(codes, step, grid), torch.tensor(grid.levels) * step)
    assert torch.equal(encode(decode(codes, step, grid), step, grid), codes)


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_far_values_are_clamped_to_the_ends(grid: UniformGrid) -> None:
    codes = encode(torch.tensor([-1e9, 1e9]), torch.tensor(1.0), grid)
    assert codes.tolist() == [grid.code_min, grid.code_max]


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_errors_reach_half_a_step_at_the_outer_edges(grid: UniformGrid) -> None:
    edges = torch.tensor(outer_edges(grid), dtype=torch.float64)
    one = torch.tensor(1.0, dtype=torch.float64)
    errors = (decode(encode(edges, one, grid), one, grid) - edges).abs()
    assert errors.tolist() == [0.5, 0.5]


@pytest.mark.parametrize("bits", [1, 2, 4, 8])
def test_min_max_maps_the_ends_of_a_row_to_the_end_codes(bits: int) -> None:
    x, grid = normal(50, 40), UniformGrid(bits, "unsigned")
    low, high = min_max(x, -1)
    step = affine_step(low, high, bits)
    codes = encode(x, step, grid, low)
    assert torch.equal(codes.gather(1, x.argmin(1, keepdim=True)), torch.zeros_like(low))
    assert torch.equal(
        codes.gather(1, x.argmax(1, keepdim=True)), torch.full_like(low, grid.code_max)
    )
    ends = torch.cat(min_max(decode(codes, step, grid, low), -1), 1)
    torch.testing.assert_close(ends, torch.cat([low, high], 1))


def test_standardizing_leaves_its_input_and_rounding_does_not() -> None:
    x, before = normal(4, 4), normal(4, 4)
    one, zero = torch.ones((), dtype=torch.float64), torch.zeros(4, 1, dtype=torch.float64)
    for scaled in (standardize(x, one), standardize(x, one, zero)):
        assert torch.equal(scaled, before)
        assert round_codes_(scaled, UniformGrid(2, "symmetric")) is scaled
    assert torch.equal(x, before)


@pytest.mark.parametrize("kind", GRID_KINDS)
def test_eight_bit_levels_are_exact_in_bfloat16(kind: str) -> None:
    levels = torch.tensor(UniformGrid(8, kind).levels)  # type: ignore[arg-type]
    assert torch.equal(levels.bfloat16().float(), levels)
