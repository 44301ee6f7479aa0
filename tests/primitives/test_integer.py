"""Integer weights: grids, scales as stored, codes and their bytes."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_qat.primitives.integer import (
    IntegerGrid,
    Scales,
    decode,
    encode,
    fit_scales,
    pack_codes,
    round_to_nearest,
    unpack_codes,
)
from dit_qat.primitives.packing import pack_int, unpack_int

GRIDS = [
    IntegerGrid(bits, symmetric, group)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group in (None, 8)
]
EACH = pytest.mark.parametrize("grid", GRIDS, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@EACH
def test_error_is_half_a_step_at_most_and_codes_stay_on_the_grid(grid: IntegerGrid) -> None:
    weight = normal(10, 48) + 0.5
    codes, scales = round_to_nearest(weight, grid)
    low, high = (-(2 ** (grid.bits - 1) - 1), 2 ** (grid.bits - 1) - 1)
    low, high = (low, high) if grid.symmetric else (0, 2**grid.bits - 1)
    assert low <= int(codes.min())
    assert int(codes.max()) <= high
    scale = scales.scale.repeat_interleave(48 // scales.scale.shape[1], 1)
    # Rounding the scale down to float16 may cut the outermost weights a little, and so may the
    # rounded zero point.
    slack = 2.0**-11 * 2**grid.bits + (0 if grid.symmetric else 0.5)
    assert bool(((decode(codes, grid, scales) - weight).abs() <= (0.5 + slack) * scale).all())


@EACH
def test_scales_are_what_is_stored(grid: IntegerGrid) -> None:
    for search in ("minmax", "mse"):
        scale, zero = fit_scales(normal(6, 32), grid, search)  # type: ignore[arg-type]
        assert scale.dtype == torch.float32
        assert torch.equal(scale, scale.half().float())
        assert scale.shape == (6, 1 if grid.group_size is None else 4)
        assert (zero is None) == grid.symmetric
        if zero is not None:
            assert zero.dtype == torch.uint8
            assert zero.shape == scale.shape


@EACH
def test_quantizing_again_changes_nothing(grid: IntegerGrid) -> None:
    codes, scales = round_to_nearest(normal(6, 32), grid)
    assert torch.equal(encode(decode(codes, grid, scales), grid, scales), codes)


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(GRIDS), st.integers(0, 10**6), st.floats(0.1, 3))
def test_mse_search_is_never_worse_in_any_group(grid: IntegerGrid, seed: int, tail: float) -> None:
    weight = normal(4, 32, seed=seed).sign() * normal(4, 32, seed=seed + 1).abs() ** tail

    def error(search: str) -> Tensor:
        codes, scales = round_to_nearest(weight, grid, search)  # type: ignore[arg-type]
        squares = (decode(codes, grid, scales) - weight).square()
        return squares.view(4, -1, grid.group_size or 32).sum(-1)

    assert bool((error("mse") <= error("minmax") * (1 + 1e-6)).all())


def test_mse_search_gains_at_few_bits() -> None:
    weight, grid = normal(8, 512), IntegerGrid(2)
    errors = []
    for search in ("minmax", "mse"):
        codes, scales = round_to_nearest(weight, grid, search)  # type: ignore[arg-type]
        errors.append(float((decode(codes, grid, scales) - weight).square().mean()))
    assert errors[1] < 0.4 * errors[0]


@EACH
def test_columns_on_their_own_are_those_of_the_whole(grid: IntegerGrid) -> None:
    weight = normal(6, 32)
    scales = fit_scales(weight, grid)
    codes, columns = encode(weight, grid, scales), torch.tensor([30, 2, 9, 8, 3])
    some = encode(weight[:, columns], grid, scales, columns)
    assert torch.equal(some, codes[:, columns])
    assert torch.equal(decode(some, grid, scales, columns), decode(codes, grid, scales)[:, columns])


@EACH
@pytest.mark.parametrize("width", [32, 24, 7, 9])
def test_bytes_round_trip(grid: IntegerGrid, width: int) -> None:
    grid = IntegerGrid(grid.bits, grid.symmetric)
    codes = encode(normal(5, width), grid, fit_scales(normal(5, width), grid))
    packed = pack_codes(codes, grid)
    assert packed.shape == (5, -(-width * grid.bits // 8))
    assert torch.equal(packed, pack_int(codes, grid.bits, grid.symmetric))
    unpacked = unpack_codes(packed, grid, width)
    assert torch.equal(unpacked, codes)
    assert unpacked.dtype == codes.dtype


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
def test_every_byte_is_read_as_the_format_has_it(bits: int, symmetric: bool) -> None:
    packed = torch.arange(1 << 16).to(torch.uint16).view(torch.uint8).view(-1, 2)
    packed = torch.cat([packed, packed.flip(0), packed], 1)
    width, grid = 48 // bits, IntegerGrid(bits, symmetric)
    expected = unpack_int(packed, bits, width, symmetric)
    assert torch.equal(unpack_codes(packed, grid, width), expected)


@EACH
def test_rows_of_zeros_and_of_tiny_numbers(grid: IntegerGrid) -> None:
    weight = torch.zeros(3, 16)
    weight[1] = 1e-9 * normal(16)
    weight[2] = 1e-41
    for search in ("minmax", "mse"):
        codes, scales = round_to_nearest(weight, grid, search)  # type: ignore[arg-type]
        assert float(scales.scale.min()) == torch.finfo(torch.float16).tiny
        assert not decode(codes, grid, scales).any()


def test_a_row_beyond_float16_is_named() -> None:
    weight = normal(4, 16)
    weight[2, 3] = 1e6
    with pytest.raises(ValueError, match=r"row 2 .* scale of 142857, beyond the 65504"):
        fit_scales(weight, IntegerGrid(4))
    assert round_to_nearest(weight, IntegerGrid(8))[1].scale.isfinite().all()


def test_an_asymmetric_range_holds_zero_exactly() -> None:
    grid = IntegerGrid(4, symmetric=False)
    weight = torch.stack([normal(16).abs() + 3, -normal(16).abs() - 3, normal(16)])
    weight[:, 5] = 0
    codes, scales = round_to_nearest(weight, grid)
    assert not decode(codes, grid, scales)[:, 5].any()
    assert scales.zero is not None
    assert scales.zero[:2].flatten().tolist() == [0, 15]


def test_double_and_half_precision() -> None:
    weight = normal(4, 16)
    assert fit_scales(weight.double(), IntegerGrid(4)).scale.dtype == torch.float32
    assert fit_scales(weight.bfloat16(), IntegerGrid(4)).scale.dtype == torch.float32


def test_bad_input_is_refused() -> None:
    for bits in (1, 5, 16):
        with pytest.raises(ValueError, match=f"bits={bits}"):
            IntegerGrid(bits)
    with pytest.raises(ValueError, match="group_size=0"):
        IntegerGrid(4, True, 0)
    with pytest.raises(
        ValueError, match=r"group_size=7 does not divide 48 inputs; use None or .*16"
    ):
        fit_scales(normal(2, 48), IntegerGrid(4, True, 7))
    with pytest.raises(ValueError, match="NaN or infinite"):
        fit_scales(torch.full((2, 4), torch.nan), IntegerGrid(4))
    with pytest.raises(ValueError, match="search='best'"):
        fit_scales(normal(2, 4), IntegerGrid(4), "best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="a weight is"):
        fit_scales(normal(4), IntegerGrid(4))
    with pytest.raises(ValueError, match="8 columns do not fit 2 groups of 8"):
        encode(normal(2, 8), IntegerGrid(4, True, 8), Scales(torch.ones(2, 2), None))
