"""ARB and ARB-X against least squares and brute force; no sub-step may raise its objective."""

from itertools import product

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.binary import (
    Fit,
    arb,
    arb_steps,
    basis_of,
    binarize,
    coordinate_step,
    moment_error,
    moment_fit,
    nearest_planes,
    normal_equations,
    plain_error,
    reconstruct,
    signs,
    solve,
    sweep,
)

N, K = 40, 24


def heavy(n: int = N, k: int = K, seed: int = 0) -> Tensor:
    """Student-t weights with columns of unequal size and an offset per row."""
    make = torch.Generator().manual_seed(seed)
    normal = torch.randn(n, k, generator=make, dtype=torch.float64)
    chi = torch.randn(n, k, 4, generator=make, dtype=torch.float64).square().mean(-1).sqrt()
    columns = torch.rand(k, generator=make, dtype=torch.float64) + 0.5
    return normal / chi * columns + 0.3 * torch.randn(n, 1, generator=make, dtype=torch.float64)


def tokens(k: int = K, seed: int = 1) -> Tensor:
    make = torch.Generator().manual_seed(seed)
    mix = torch.randn(k, k, generator=make, dtype=torch.float64) / k**0.5 + torch.eye(k)
    return torch.randn(500, k, generator=make, dtype=torch.float64) @ mix + 0.4


def masks(W: Tensor) -> dict[str, Tensor]:
    large = (W.abs() > W.abs().quantile(0.7)).to(W.dtype)
    some = torch.zeros_like(W)
    some[:, ::5] = 1
    return {"none": torch.ones_like(W), "large": large, "small": 1 - large, "columns": some}


def loss(W: Tensor, mask: Tensor, fit: Fit, S: Tensor | None = None) -> float:
    return float(moment_error(mask * (W - reconstruct(fit)), S).sum())


def test_sign_of_zero_is_plus_one() -> None:
    assert signs(torch.tensor([-1.0, 0.0, -0.0, 2.0])).tolist() == [-1, 1, 1, 1]


@pytest.mark.parametrize("order", [1, 2])
def test_plain_binarisation_is_means_and_residuals(order: int) -> None:
    W = heavy()
    mask = masks(W)["large"]
    fit = binarize(W, mask, order)
    for row in range(3):
        rest, level = W[row][mask[row] > 0], 0 * W[row][mask[row] > 0]
        for _ in range(order):
            centred = rest - rest.mean()
            part = rest.mean() + centred.abs().mean() * torch.where(centred >= 0, 1.0, -1.0)
            level, rest = level + part, rest - part
        torch.testing.assert_close(reconstruct(fit)[row][mask[row] > 0], level)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["none", "large", "small", "columns"])
def test_plain_error_is_that_of_the_plain_fit(order: int, kind: str) -> None:
    W = heavy()
    mask = masks(W)[kind]
    expected = moment_error(mask * (W - reconstruct(binarize(W, mask, order))))
    torch.testing.assert_close(plain_error(W, order, mask), expected)
    if kind == "none":
        torch.testing.assert_close(plain_error(W, order), expected)


@pytest.mark.parametrize("closed", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["none", "large", "small", "columns"])
def test_no_step_of_arb_raises_the_error(kind: str, order: int, closed: bool) -> None:
    W = heavy()
    mask = masks(W)[kind]
    fit = binarize(W, mask, order)
    trace = [moment_error(mask * (W - reconstruct(fit)))]
    for step in arb_steps(W, mask, fit, 15, closed):
        trace.append(moment_error(mask * (W - reconstruct(step))))
        assert bool((trace[-1] <= trace[-2] * (1 + 1e-10) + 1e-12).all())
    assert float(trace[-1].sum()) < 0.99 * float(trace[0].sum())


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["none", "large", "small", "columns"])
def test_no_sweep_of_arb_x_raises_its_error_and_the_solution_is_below(
    kind: str, order: int
) -> None:
    W, X = heavy(), tokens()
    S, mask = X.T @ X, masks(W)[kind]
    fit = arb(W, mask, order)
    G, h = normal_equations(basis_of(mask, fit.planes), W * mask, S)
    values, before = fit.values, moment_error(mask * (W - reconstruct(fit)), S)
    start = before
    for _ in range(15):
        for at in range(1 + order):
            values = coordinate_step(G, h, values, at)
            after = moment_error(mask * (W - reconstruct(Fit(values, fit.planes))), S)
            assert bool((after <= before * (1 + 1e-10) + 1e-9).all())
            before = after
    assert float(before.sum()) < float(start.sum())
    torch.testing.assert_close(moment_fit(W, mask, fit, S, rounds=15).values, values)
    best = loss(W, mask, moment_fit(W, mask, fit, S), S)
    assert best <= float(before.sum()) * (1 + 1e-10)
    limit = loss(W, mask, Fit(sweep(G, h, values, 300), fit.planes), S)
    assert best <= limit * (1 + 1e-10)
    assert limit <= best * (1 + 1e-3)


@pytest.mark.parametrize("order", [1, 2])
def test_solution_is_least_squares_on_the_tokens(order: int) -> None:
    W, X = heavy(), tokens()
    mask = masks(W)["large"]
    fit = arb(W, mask, order)
    values = moment_fit(W, mask, fit, X.T @ X).values
    for row in range(0, N, 7):
        design = torch.stack([b[row] for b in basis_of(mask, fit.planes)], 1)
        best = torch.linalg.lstsq(X @ design, X @ (mask * W)[row], driver="gelsd").solution
        torch.testing.assert_close(values[row], best, rtol=1e-6, atol=1e-6)


def test_solution_over_all_zones_is_least_squares_and_below_each_alone() -> None:
    W, X = heavy(), tokens()
    S, large = X.T @ X, masks(W)["large"]
    zones = [large, 1 - large]
    fits = [arb(W, mask, 1) for mask in zones]
    alone = [moment_fit(W, mask, fit, S) for mask, fit in zip(zones, fits, strict=True)]
    basis = [b for mask, fit in zip(zones, fits, strict=True) for b in basis_of(mask, fit.planes)]
    together = solve(*normal_equations(basis, W, S))
    design = torch.stack([b[5] for b in basis], 1)
    torch.testing.assert_close(together[5], torch.linalg.lstsq(X @ design, X @ W[5]).solution)

    def whole(values: Tensor) -> float:
        made = sum(values[:, a, None] * b for a, b in enumerate(basis))
        return float(moment_error(W - made, S).sum())

    separate = torch.cat([fit.values for fit in alone], 1)
    plain = torch.cat([fit.values for fit in fits], 1)
    assert whole(together) < whole(separate) < whole(plain)


def test_sums_are_those_of_the_dense_form() -> None:
    W, X = heavy(6, 8), tokens(8)
    S, mask = X.T @ X, masks(W)["large"]
    basis = basis_of(mask, binarize(W, mask, 2).planes)
    G, h = normal_equations(basis, W, S)
    for row in range(6):
        for a in range(3):
            parts = [basis[a][row, i] * S[i, j] * W[row, j] for i in range(8) for j in range(8)]
            torch.testing.assert_close(h[row, a], torch.stack(parts).sum())
            for b in range(3):
                pairs = product(range(8), repeat=2)
                parts = [basis[a][row, i] * S[i, j] * basis[b][row, j] for i, j in pairs]
                torch.testing.assert_close(G[row, a, b], torch.stack(parts).sum())


def test_one_round_of_arb_x_is_equation_11() -> None:
    """``mu = 1 S (w - alpha b) / 1 S 1``, then ``alpha = b S (w - mu 1) / b S b``."""
    W, X = heavy(), tokens()
    S, mask = X.T @ X, torch.ones_like(W)
    start = arb(W, mask, 1)
    found = moment_fit(W, mask, start, S, rounds=1).values
    for row in (0, 11, 39):
        b, w, one = start.planes[0, row], W[row], mask[row]
        mean = one @ S @ (w - start.values[row, 1] * b) / (one @ S @ one)
        scale = b @ S @ (w - mean * one) / (b @ S @ b)
        torch.testing.assert_close(found[row], torch.stack([mean, scale]))


def test_mean_and_scale_of_given_signs_have_a_closed_form() -> None:
    W = heavy()
    mask = masks(W)["large"]
    start = binarize(W, mask, 1)
    found = next(arb_steps(W, mask, start, 0, closed=True)).values
    for row in range(0, N, 7):
        w, b = W[row][mask[row] > 0], start.planes[0, row][mask[row] > 0]
        skew = b.mean()
        scale = ((b * w).mean() - skew * w.mean()) / (1 - skew**2)
        expected = torch.stack([w.mean() - scale * skew, scale])
        torch.testing.assert_close(found[row], expected, rtol=1e-6, atol=1e-9)


def test_values_do_not_depend_on_the_scale_of_the_moment() -> None:
    W, X = heavy(), tokens()
    mask = masks(W)["small"]
    S, fit = X.T @ X, arb(W, mask, 2)
    for rounds in (None, 15):
        a, b = moment_fit(W, mask, fit, S, rounds), moment_fit(W, mask, fit, 37.5 * S, rounds)
        torch.testing.assert_close(a.values, b.values)


def test_moment_error_is_the_error_of_outputs() -> None:
    W, X = heavy(), tokens()
    R = W - reconstruct(binarize(W, torch.ones_like(W), 1))
    torch.testing.assert_close(moment_error(R, X.T @ X), (X @ R.T).square().sum(0))


def test_theorem_one_holds_until_signs_are_refreshed() -> None:
    W = heavy()
    mask = masks(W)["large"]
    count = mask.sum(1)
    start = binarize(W, mask, 1)
    G, h = normal_equations(basis_of(mask, start.planes), W * mask)
    values = sweep(G, h, start.values, 9)
    mean, scale = (values - start.values).T
    squares = values[:, 1].square() - start.values[:, 1].square()
    first = moment_error(mask * (W - reconstruct(start)))
    last = moment_error(mask * (W - reconstruct(Fit(values, start.planes))))
    assert float((scale).abs().max()) > 0
    torch.testing.assert_close(last, first - count * (squares - mean.square()))


@pytest.mark.parametrize("sizes", [(0.7, 0.2), (0.2, 0.7), (-0.7, 0.2), (0.3, -0.3), (0.0, 0.5)])
def test_planes_are_the_nearest_of_four_levels(sizes: tuple[float, float]) -> None:
    target = heavy(6, 30)
    scales = [torch.full((6, 1), size, dtype=torch.float64) for size in sizes]
    planes = nearest_planes(target, scales)
    found = (target - sum(s * b for s, b in zip(scales, planes, strict=True))).abs()
    levels = [a * sizes[0] + b * sizes[1] for a, b in product((-1, 1), repeat=2)]
    best = torch.stack([(target - level).abs() for level in levels]).amin(0)
    torch.testing.assert_close(found, best)


@pytest.mark.parametrize("order", [1, 2])
def test_empty_and_constant_rows_are_defined(order: int) -> None:
    W, X = heavy(), tokens()
    mask = masks(W)["large"]
    mask[0], W[1], W[2] = 0, 0, 0.5
    mask[1:3] = 1
    for fit in (arb(W, mask, order), arb(W, mask, order, closed=True)):
        for made in (fit, moment_fit(W, mask, fit, X.T @ X), moment_fit(W, mask, fit, 0 * X.T @ X)):
            assert bool(made.values.isfinite().all())
            assert bool((made.values[:2] == 0).all())
        torch.testing.assert_close(reconstruct(fit)[2], W[2])
