"""D2Quant's dual-scale fit: every half-step minimises, and the error is the specification's."""

from itertools import pairwise, product

import pytest
import torch
from torch import Tensor

from dit_qat.llm.methods.d2quant.dual_scale import (
    DualScale,
    fit_dual_scale,
    fit_row_scales,
    nearest_planes,
    steps_of_dual_scale,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(rows: int = 64, width: int = 32) -> Tensor:
    return normal(rows, width) * (0.8 * normal(width, seed=1)).exp()


def error(W: Tensor, fit: DualScale) -> float:
    return float((W - fit.values).square().sum())


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_no_half_step_raises_the_error(planes: int) -> None:
    W = weight()
    start = fit_dual_scale(W, planes, 0)
    errors = [error(W, start), *(error(W, f) for f in steps_of_dual_scale(W, start, 15))]
    assert all(b <= a * (1 + 1e-10) for a, b in pairwise(errors))
    assert errors[-1] < (0.9 if planes > 1 else 1) * errors[0]


@pytest.mark.parametrize("planes", [2, 3])
def test_row_scales_are_weighted_least_squares(planes: int) -> None:
    W = weight(8)
    fit = fit_row_scales(W, fit_dual_scale(W, planes, 2))
    for row in range(8):
        A = (fit.planes[:, row] * fit.columns).T
        best = torch.linalg.lstsq(A, W[row, :, None]).solution.flatten()
        torch.testing.assert_close(fit.rows[row], best, rtol=1e-9, atol=1e-12)
    assert bool((fit.rows >= 0).all())


@pytest.mark.parametrize("planes", [1, 2, 3])
def test_codes_are_the_nearest_of_all_levels(planes: int) -> None:
    W, rows, columns = weight(8), normal(8, planes).abs(), normal(32).abs()
    values = DualScale(nearest_planes(W, rows, columns), rows, columns).values
    signs = torch.tensor([*product((-1.0, 1.0), repeat=planes)]).double()
    levels = torch.einsum("op,lp,k->lok", rows, signs, columns)
    nearest = (levels - W).abs().amin(0)
    torch.testing.assert_close((values - W).abs(), nearest)


@pytest.mark.parametrize(
    ("spread", "errors"), [(0.0, (0.119, 0.114, 0.1135)), (0.8, (0.105, 0.099, 0.099))]
)
def test_errors_are_those_of_the_specification(spread: float, errors: tuple[float, ...]) -> None:
    """Gaussian weights, flat or with log-normal columns."""
    W = normal(512, 128) * (spread * normal(128, seed=1)).exp()
    for iterations, expected in zip((1, 5, 15), errors, strict=True):
        found = error(W, fit_dual_scale(W, 2, iterations)) / float(W.square().sum())
        assert found == pytest.approx(expected, abs=0.012)


def test_degenerate_groups_are_safe() -> None:
    W = weight(6, 16).float()
    W[0], W[:, 3], W[1] = 0, 0, 1
    for planes in (1, 2, 3):
        for flawed in (W, 0 * W, W[:, :1]):
            fit = fit_dual_scale(flawed, planes)
            assert fit.values.isfinite().all()
            assert error(flawed, fit) <= float(flawed.square().sum())
            assert not fit.values[:, flawed.abs().sum(0) == 0].any()
