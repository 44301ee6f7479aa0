"""Scales: their definitions, broadcasting, and the optimal step against a fine scan."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.formats import GRID_KINDS, GridKind, UniformGrid
from dit_qat.primitives.gaussian import gaussian_step
from dit_qat.primitives.scales import (
    absmax,
    absmean,
    min_max,
    mse_optimal_step,
    rms,
    safe,
    widen,
)
from dit_qat.primitives.uniform import decode, encode

SCALES = [absmax, absmean, rms]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("scale", SCALES)
@pytest.mark.parametrize("dim", [-1, 0, (0, 1), None])
def test_scales_are_homogeneous_and_broadcast(scale, dim) -> None:  # type: ignore[no-untyped-def]
    x = normal(6, 5, 4)
    s = scale(x, dim)
    assert (x / s).shape == x.shape
    torch.testing.assert_close(scale(-3 * x, dim), 3 * s)
    assert torch.equal(scale(torch.full_like(x, -2), dim), torch.full_like(s, 2))


@pytest.mark.parametrize("dim", [-1, (0, 2), None])
def test_root_mean_square(dim) -> None:  # type: ignore[no-untyped-def]
    x = normal(6, 5, 4)
    dims = (0, 1, 2) if dim is None else dim
    torch.testing.assert_close(rms(x, dim), x.square().mean(dims, keepdim=True).sqrt())


def test_scales_order_as_norms_do() -> None:
    x = normal(100, 30)
    assert (absmean(x, -1) <= rms(x, -1)).all()
    assert (rms(x, -1) <= absmax(x, -1)).all()


def test_min_max_are_the_ends() -> None:
    x = normal(7, 9)
    low, high = min_max(x, -1)
    assert ((low <= x) & (x <= high)).all()
    assert low.shape == high.shape == (7, 1)
    assert min_max(x)[0].item() == x.min()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_rows_divide_by_a_safe_scale(dtype: torch.dtype) -> None:
    x = torch.zeros(2, 4, dtype=dtype)
    assert torch.equal(x / safe(absmax(x, -1)), x)


def test_widening_never_narrows() -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert widen(torch.ones(1, dtype=dtype)).dtype == torch.float32
    x = torch.ones(1, dtype=torch.float64)
    assert widen(x) is x


def squared_error(x: Tensor, step: Tensor, grid: UniformGrid) -> Tensor:
    return (decode(encode(x, step, grid), step, grid) - x).square().sum(-1, keepdim=True)


@pytest.mark.parametrize("kind", GRID_KINDS)
@pytest.mark.parametrize("bits", [2, 4])
def test_the_optimal_step_is_no_worse_than_a_fine_scan(kind: GridKind, bits: int) -> None:
    grid = UniformGrid(bits, kind)
    x = normal(12, 40)
    x = x.abs() if kind == "unsigned" else x
    widest = absmax(x, -1) / max(grid.code_max + grid.offset, 0.5)
    scan = torch.stack([squared_error(x, widest * k / 2000, grid) for k in range(1, 2001)])
    best = squared_error(x, mse_optimal_step(x, grid), grid)
    assert (best <= 1.03 * scan.amin(0)).all()
    assert best.sum() <= 1.005 * scan.amin(0).sum()


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_the_optimal_step_of_normal_rows_is_the_gaussian_one(bits: int) -> None:
    step = mse_optimal_step(normal(1, 20_000), UniformGrid(bits, "mid_rise"))
    assert step.item() == pytest.approx(gaussian_step(bits), rel=0.02)


def test_the_optimal_step_of_zeros_is_finite_and_other_dims_work() -> None:
    grid = UniformGrid(3, "symmetric")
    assert mse_optimal_step(torch.zeros(2, 4), grid).isfinite().all()
    x = normal(5, 30)
    assert torch.equal(mse_optimal_step(x.T, grid, dim=0), mse_optimal_step(x, grid).T)
