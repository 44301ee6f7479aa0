"""ARB-RC: no step raises the error, the top singular triple where that is the answer."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.binary import signs
from dit_qat.primitives.binary_rank_one import (
    RankOne,
    normalized,
    rank_one,
    rank_one_start,
    rank_one_steps,
    terms,
)

N, K = 60, 32


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed() -> Tensor:
    """Heavy tails on rows and columns of unequal size."""
    return normal(N, K) ** 3 * (0.2 + normal(K, seed=1).abs()) * (0.2 + normal(N, 1, seed=2).abs())


def masks(W: Tensor) -> dict[str, Tensor]:
    large = (W.abs() > W.abs().quantile(0.7)).to(W.dtype)
    some = torch.zeros_like(W)
    some[:, ::4] = 1
    return {"none": torch.ones_like(W), "large": large, "small": 1 - large, "columns": some}


def loss(W: Tensor, mask: Tensor, fit: RankOne) -> float:
    return float((mask * (W - terms(fit).sum(0))).square().sum())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["none", "large", "small", "columns"])
def test_no_step_raises_the_error(kind: str, order: int) -> None:
    W = skewed()
    mask = masks(W)[kind]
    start = rank_one_start(W, mask, order)
    trace = [loss(W, mask, start)]
    for fit in rank_one_steps(W, mask, start, 15):
        trace.append(loss(W, mask, fit))
        assert trace[-1] <= trace[-2] * (1 + 1e-10)
    assert trace[-1] < trace[0] * (0.999 if order == 1 else 0.9)
    assert loss(W, mask, rank_one(W, mask, order)) == pytest.approx(trace[-1], rel=1e-10)


def test_without_mask_one_plane_is_the_top_singular_triple() -> None:
    W = skewed()
    fit = rank_one(W, torch.ones_like(W), 1, iterations=200)
    U, s, V = torch.linalg.svd(W.abs())
    torch.testing.assert_close(terms(fit)[0], s[0] * U[:, :1] * V[:1] * signs(W))


@pytest.mark.parametrize("order", [1, 2])
def test_row_and_column_steps_are_weighted_least_squares(order: int) -> None:
    W = skewed()
    mask = masks(W)["large"]
    before = rank_one_start(W, mask, order)
    steps = rank_one_steps(W, mask, before, 1)
    for t in range(order):
        rest = W - (terms(before).sum(0) - terms(before)[t])
        by_row, by_column = next(steps), next(steps)
        for row in (7, 30):
            kept = mask[row] > 0
            design = (before.columns[t] * before.planes[t, row])[kept, None]
            best = torch.linalg.lstsq(design, rest[row][kept, None]).solution
            torch.testing.assert_close(by_row.rows[t, row], best[0, 0])
        for column in (2, 31):
            kept = mask[:, column] > 0
            design = (by_row.rows[t] * before.planes[t, :, column])[kept, None]
            best = torch.linalg.lstsq(design, rest[:, column][kept, None]).solution
            torch.testing.assert_close(by_column.columns[t, column], best[0, 0])
        before = by_column


def test_the_start_is_equation_12() -> None:
    W = skewed()
    mask = masks(W)["small"]
    start = rank_one_start(W, mask, 1)
    row, column = W.abs()[3][mask[3] > 0].mean(), mask[:, 5] > 0
    torch.testing.assert_close(start.rows[0, 3], row)
    relative = W.abs()[column, 5] / start.rows[0, column]
    torch.testing.assert_close(start.columns[0, 5], relative.mean())


@pytest.mark.parametrize("order", [1, 2])
def test_gauge_and_empty_rows_and_columns(order: int) -> None:
    W = skewed()
    mask = masks(W)["large"]
    mask[4], mask[:, 6] = 0, 0
    W[8], W[:, 9] = 0, 0
    fit = rank_one(W, mask, order)
    assert all(bool(part.isfinite().all()) for part in fit)
    assert bool((fit.rows[:, 4] == 0).all())
    assert bool((fit.columns[:, 6] == 0).all())
    reached = (mask.sum(0) > 0).sum()
    torch.testing.assert_close(fit.columns.abs().sum(1) / reached, torch.ones(order).double())
    torch.testing.assert_close(terms(normalized(fit, mask)), terms(fit))
    nothing = rank_one(0 * W, mask, order)
    assert bool((terms(nothing) == 0).all())
