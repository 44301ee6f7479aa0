"""Ternary fits against closed forms on Gaussian rows and brute force on small ones."""

from math import pi, sqrt

import pytest
import torch
from scipy.stats import norm
from torch import Tensor

from dit_qat.primitives.gaussian import gaussian_mse, gaussian_step
from dit_qat.primitives.ternary import (
    GAUSSIAN_THRESHOLD,
    TERNARY_FITS,
    TernaryFit,
    fit_ternary,
    ternarize,
    ternary_codes,
)


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gaussian_nmse(threshold: float, scale: float | None = None) -> float:
    """Error of codes at a threshold on N(0, 1); scale None: the least-squares one."""
    kept, correlation = 2 * norm.sf(threshold), 2 * norm.pdf(threshold)
    scale = correlation / kept if scale is None else scale
    return 1 - 2 * scale * correlation + scale**2 * kept


MEAN = sqrt(2 / pi)
CLOSED_FORMS = [
    ("absmean", gaussian_nmse(MEAN / 2, MEAN), 0.263),
    ("least_squares", gaussian_nmse(MEAN / 2), 0.213),
    ("gaussian", gaussian_nmse(GAUSSIAN_THRESHOLD), 0.190),
    ("mse", gaussian_nmse(GAUSSIAN_THRESHOLD), 0.190),
]


@pytest.mark.parametrize(("fit", "closed_form", "published"), CLOSED_FORMS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_errors_on_gaussian_rows(
    fit: TernaryFit, closed_form: float, published: float, per_channel: bool
) -> None:
    weight = normal(16, 32768)
    codes, scale = ternarize(weight, fit, per_channel)
    nmse = (codes * scale - weight).square().mean() / weight.square().mean()
    assert closed_form == pytest.approx(published, abs=6e-4)
    assert nmse.item() == pytest.approx(closed_form, rel=0.01)


def test_the_gaussian_threshold_is_half_the_optimal_level() -> None:
    assert pytest.approx(gaussian_step(2, "symmetric") / 2, abs=1e-6) == GAUSSIAN_THRESHOLD
    assert gaussian_nmse(GAUSSIAN_THRESHOLD) == pytest.approx(
        gaussian_mse(gaussian_step(2, "symmetric"), 2, "symmetric"), abs=1e-9
    )


def brute_force(row: Tensor) -> float:
    """Least error of keeping the k largest magnitudes, over all k."""
    ordered = row.abs().sort(descending=True).values
    errors = [
        (ordered[:k] - ordered[:k].mean()).square().sum() + ordered[k:].square().sum()
        for k in range(1, len(row) + 1)
    ]
    return float(torch.stack(errors).min())


@pytest.mark.parametrize("width", [1, 2, 3, 7, 20])
def test_the_mse_fit_is_the_optimum(width: int) -> None:
    weight = normal(40, width)
    codes, scale = ternarize(weight, "mse")
    errors = (codes * scale - weight).square().sum(1)
    assert errors.tolist() == pytest.approx([brute_force(row) for row in weight], abs=1e-12)


def test_the_mse_fit_of_a_tensor_is_that_of_one_long_row() -> None:
    weight = normal(6, 10)
    codes, scale = ternarize(weight, "mse", per_channel=False)
    assert scale.shape == (1, 1)
    assert (codes * scale - weight).square().sum().item() == pytest.approx(
        brute_force(weight.flatten())
    )


@pytest.mark.parametrize("fit", TERNARY_FITS)
@pytest.mark.parametrize("per_channel", [True, False])
def test_codes_scales_and_threshold(fit: TernaryFit, per_channel: bool) -> None:
    weight = normal(8, 50, dtype=torch.float32)
    before = weight.clone()
    codes, scale, threshold = fit_ternary(weight, fit, per_channel)
    assert torch.equal(weight, before)
    assert set(codes.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert scale.shape == ((8, 1) if per_channel else (1, 1))
    assert torch.equal(codes, weight.sign() * (weight.abs() > threshold))
    assert torch.equal(ternary_codes(weight, threshold), codes)
    assert all(map(torch.equal, ternarize(weight, fit, per_channel), (codes, scale)))


@pytest.mark.parametrize("fit", TERNARY_FITS)
@pytest.mark.parametrize("per_channel", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_weights_are_fitted_in_float32(
    fit: TernaryFit, per_channel: bool, dtype: torch.dtype
) -> None:
    weight = normal(4, 4096, dtype=dtype)
    codes, scale, threshold = fit_ternary(weight, fit, per_channel)
    wide_codes, wide_scale, wide_threshold = fit_ternary(weight.float(), fit, per_channel)
    assert codes.dtype == dtype
    assert torch.equal(codes.float(), wide_codes)
    assert torch.equal(ternary_codes(weight, threshold), wide_codes)
    for got, wide in ((scale, wide_scale), (threshold, wide_threshold)):
        assert got.dtype == torch.float32
        assert torch.equal(got, wide)


@pytest.mark.parametrize("fit", ["least_squares", "gaussian", "mse"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_fitted_scales_leave_an_orthogonal_residual(fit: TernaryFit, per_channel: bool) -> None:
    weight = normal(8, 50)
    codes, scale = ternarize(weight, fit, per_channel)
    products = ((weight - codes * scale) * codes).sum(-1)
    assert (products if per_channel else products.sum()).abs().max() < 1e-12


@pytest.mark.parametrize("fit", TERNARY_FITS)
def test_scaling_the_weight_scales_the_scale(fit: TernaryFit) -> None:
    weight = normal(8, 50)
    codes, scale = ternarize(weight, fit)
    scaled_codes, scaled = ternarize(4 * weight, fit)
    assert torch.equal(codes, scaled_codes)
    torch.testing.assert_close(scaled, 4 * scale)


@pytest.mark.parametrize("fit", TERNARY_FITS)
@pytest.mark.parametrize("flush", [False, True])
def test_zero_rows_stay_zero(fit: TernaryFit, flush: bool) -> None:
    weight = torch.cat([torch.zeros(1, 8), normal(1, 8, dtype=torch.float32)])
    torch.set_flush_denormal(flush)
    try:
        codes, scale = ternarize(weight, fit)
        assert torch.equal((codes * scale)[0], torch.zeros(8))
        assert scale.isfinite().all()
    finally:
        torch.set_flush_denormal(False)


def test_unknown_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="'best' is unknown; use one of"):
        ternarize(normal(2, 2), "best")  # type: ignore[arg-type]
