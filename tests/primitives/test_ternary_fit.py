"""PT2-LLM's fits against least squares and brute force."""

from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_qat.primitives.ternary_fit import (
    TernaryRows,
    align_ternary,
    fit_affine,
    fit_ternary_rows,
    start_ternary,
)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def student(*shape: int, seed: int = 0) -> Tensor:
    chi = normal(3, *shape, seed=seed + 1).square().mean(0)
    return normal(*shape, seed=seed) / chi.sqrt()


def error(W: Tensor, fit: TernaryRows) -> Tensor:
    return (W - fit.values).square().sum(1)


@pytest.mark.parametrize("draw", [normal, student])
@pytest.mark.parametrize("shift", [0.0, 3.0])
def test_no_sweep_raises_the_error_and_they_end(draw, shift: float) -> None:  # type: ignore[no-untyped-def]
    W = draw(64, 128) + shift
    errors = torch.stack([error(W, fit_ternary_rows(W, sweeps)) for sweeps in range(40)])
    assert bool((errors.diff(dim=0) <= 1e-10 * errors[:-1]).all())
    assert bool((errors[0] <= error(W, start_ternary(W))).all())
    assert float(errors[-1].sum()) < 0.99 * float(errors[0].sum())
    assert torch.equal(fit_ternary_rows(W, 40).codes, fit_ternary_rows(W, 1000).codes)


def test_where_it_ends_codes_are_nearest_and_the_line_is_least_squares() -> None:
    W = student(16, 40) + 1
    fit = fit_ternary_rows(W)
    for row in range(16):
        A = torch.stack([fit.codes[row], torch.ones(40).double()], 1)
        line = torch.linalg.lstsq(A, W[row, :, None]).solution.flatten()
        torch.testing.assert_close(line[:1], fit.scale[row], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(line[1:], fit.offset[row], rtol=1e-12, atol=1e-12)
    levels = torch.stack([t * fit.scale + fit.offset for t in (-1, 0, 1)])
    assert torch.equal((W - levels).abs().argmin(0) - 1.0, fit.codes.float())


def test_a_single_row_never_beats_all_codes_and_often_reaches_them() -> None:
    W = student(30, 6)
    every = torch.tensor([*product((-1.0, 0.0, 1.0), repeat=6)]).double()
    best = torch.stack([error(row.expand(len(every), -1), _of(row, every)).min() for row in W])
    found = error(W, fit_ternary_rows(W))
    assert bool((found >= best - 1e-12).all())
    assert int((found <= best + 1e-12).sum()) >= 10


def _of(row: Tensor, codes: Tensor) -> TernaryRows:
    return TernaryRows(codes, *fit_affine(row.expand_as(codes), codes))


@pytest.mark.parametrize(
    ("draw", "start", "end"), [(normal, 0.187, 0.182), (student, 0.424, 0.318)]
)
def test_errors_are_those_of_the_specification(draw, start: float, end: float) -> None:  # type: ignore[no-untyped-def]
    """Relative errors of 512 x 128; heavy tails vary, so they are compared loosely."""
    W = draw(512, 128)
    whole = float(W.square().sum())
    wide = 0.01 if draw is normal else 0.1
    assert float(error(W, start_ternary(W)).sum()) / whole == pytest.approx(start, abs=wide)
    assert float(error(W, fit_ternary_rows(W)).sum()) / whole == pytest.approx(end, abs=wide)


@given(st.integers(0, 2**20), st.integers(1, 9), st.floats(-1e3, 1e3))
@settings(max_examples=30, deadline=None)
def test_degenerate_rows_are_safe(seed: int, width: int, level: float) -> None:
    W = torch.stack(
        [
            torch.zeros(width),
            torch.full((width,), level),
            torch.eye(1, width).flatten() * level,
            normal(width, seed=seed).float().round(),
        ]
    )
    S = torch.zeros(width, width)
    for fit in (fit_ternary_rows(W), align_ternary(W, fit_ternary_rows(W), S)):
        assert fit.values.isfinite().all()
        assert bool(torch.isin(fit.codes, torch.tensor([-1.0, 0.0, 1.0])).all())
        torch.testing.assert_close(fit.values[:3], W[:3], rtol=1e-5, atol=1e-3)


def test_rows_far_from_zero_keep_their_digits() -> None:
    W = student(32, 128)
    near, far = fit_ternary_rows(W.float()), fit_ternary_rows((W + 1e3).float())
    torch.testing.assert_close(
        error(W.float(), near), error((W + 1e3).float(), far), rtol=0.02, atol=0
    )


def inputs(tokens: int, width: int, seed: int = 7) -> Tensor:
    """Correlated, and with much in common, as the inputs of language models have."""
    mixed = normal(tokens, width, seed=seed) @ normal(width, width, seed=seed + 1)
    return mixed + 8 * normal(1, width, seed=seed + 2).abs()


def test_alignment_is_least_squares_on_the_inputs_themselves() -> None:
    W, X = student(12, 24), inputs(200, 24)
    itf = fit_ternary_rows(W)
    aga = align_ternary(W, itf, X.T @ X)
    for row in range(12):
        A = torch.stack([X @ itf.codes[row], X.sum(1)], 1)
        line = torch.linalg.lstsq(A, (X @ W[row])[:, None]).solution.flatten()
        torch.testing.assert_close(line[:1], aga.scale[row], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(line[1:], aga.offset[row], rtol=1e-9, atol=1e-12)
    before, after = ((X @ (W - fit.values).T).square().sum(0) for fit in (itf, aga))
    assert bool((after <= before).all())
    assert float(after.sum()) < 0.9 * float(before.sum())
    assert bool((error(W, aga) >= error(W, itf)).all())
    assert torch.equal(aga.codes, itf.codes)


def test_equation_13_as_printed_is_worse_and_right_for_diagonal_moments() -> None:
    W, X = student(64, 24), inputs(200, 24)

    def printed(S: Tensor) -> TernaryRows:
        T, ones = itf.codes, S.sum(1)
        a, b, d = T.square() @ ones, T @ ones, ones.sum()
        p, q = (W * T) @ ones, W @ ones
        det = a * d - b.square()
        scale, offset = (d * p - b * q) / det, (a * q - b * p) / det
        return TernaryRows(T, scale[:, None], offset[:, None])

    itf, S = fit_ternary_rows(W), X.T @ X
    wrong, right = (
        float((X @ (W - fit.values).T).square().sum())
        for fit in (printed(S), align_ternary(W, itf, S))
    )
    assert right < 0.95 * wrong
    S = S.diagonal().diag()
    torch.testing.assert_close(printed(S).values, align_ternary(W, itf, S).values)


@pytest.mark.parametrize("scale", [1e-9, 1e6])
def test_the_scale_of_the_second_moment_does_not_matter(scale: float) -> None:
    W, X = student(12, 24), inputs(200, 24)
    itf = fit_ternary_rows(W)
    torch.testing.assert_close(
        align_ternary(W, itf, X.T @ X * scale).values, align_ternary(W, itf, X.T @ X).values
    )


def test_singular_rows_fall_back_alone() -> None:
    W, X = student(3, 8), inputs(100, 8)
    codes = torch.ones(3, 8).double()
    codes[2, :4] = -1  # the others look like the offset
    fit = TernaryRows(codes, torch.full((3, 1), 0.25).double(), torch.full((3, 1), 0.5).double())
    aligned = align_ternary(W, fit, X.T @ X)
    assert torch.equal(aligned.scale[:2], fit.scale[:2])
    assert torch.equal(aligned.offset[:2], fit.offset[:2])
    assert not torch.equal(aligned.scale[2], fit.scale[2])


@pytest.mark.parametrize("others", [0, 200])
def test_one_token_alone_aligns_nothing(others: int) -> None:
    """Scale and offset are one number to it; that float32 rounds it must not hide that."""
    W, X = student(64, 128).float(), normal(1 + others, 128).float()
    X[0] *= 1e5
    itf = fit_ternary_rows(W)
    assert torch.equal(align_ternary(W, itf, X.T @ X).values, itf.values)
    fine = align_ternary(W, itf, X.double().T @ X.double())
    assert torch.equal(fine.values, itf.values) == (others == 0)
