from collections.abc import Callable

import pytest
import torch
from scipy.stats import spearmanr

from dit_qat.calibration import BlockView
from dit_qat.dit.methods import PTQ4DiT
from dit_qat.dit.methods.ptq4dit import spearman, temporal_salience
from dit_qat.dit.methods.reconstruction import Reconstruction
from dit_qat.dit.methods.smoothing import stacked_weight, weight_maxima
from dit_qat.layers.rounding import ClipSearch

QKV = tuple(f"blocks.0.attn.to_{x}" for x in "qkv")


def test_spearman_is_that_of_scipy_ties_included() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 10, (50,), generator=generator).float()
    y = x + torch.randint(0, 20, (50,), generator=generator)
    assert float(spearman(x, y)) == pytest.approx(spearmanr(x, y).statistic, abs=1e-6)
    assert float(spearman(x, x.exp())) == pytest.approx(1)
    assert float(spearman(x, -x)) == pytest.approx(-1)
    assert float(spearman(x, torch.ones(50))) == 0


def test_the_least_aligned_call_counts_most() -> None:
    w_max = torch.arange(1.0, 9)
    calls = torch.stack([w_max, w_max.flip(0)])
    s_x = temporal_salience(calls, w_max)
    weights = torch.softmax(torch.tensor([-1.0, 1.0]), 0)
    torch.testing.assert_close(s_x, weights[0] * calls[0] + weights[1] * calls[1])
    assert weights[1] > 0.8
    torch.testing.assert_close(temporal_salience(calls[:1], w_max), w_max)


def test_after_balancing_the_maxima_coincide(view_of: Callable[..., BlockView]) -> None:
    method = PTQ4DiT(reconstruction=None, clip=ClipSearch(4))
    view = view_of(method.needs)
    B = method.quantize_block(view)[QKV[0]].transform.vector0
    w_max = weight_maxima(stacked_weight([view.linears[name] for name in QKV]))
    s_x = temporal_salience(view.statistics[QKV[0]].call_absmax, w_max)
    torch.testing.assert_close(s_x / B, w_max * B)
    torch.testing.assert_close(s_x / B, (s_x * w_max).sqrt())


def test_the_static_range_holds_every_balanced_input(view_of: Callable[..., BlockView]) -> None:
    method = PTQ4DiT(reconstruction=None, clip=ClipSearch(4))
    view = view_of(method.needs)
    for name, layer in method.quantize_block(view).items():
        low, high = layer.config.activation.fixed_range
        B, statistics = layer.transform.vector0, view.statistics[name]
        assert low <= float((statistics.low / B).min())
        assert high == pytest.approx(float((statistics.high / B).max()))
        assert low <= 0 < high


def test_learned_rounding_lowers_the_error_of_the_block(view_of: Callable[..., BlockView]) -> None:
    errors = []
    for reconstruction in (None, Reconstruction(steps=60)):
        method = PTQ4DiT(
            weight_bits=3, activation_bits=8, clip=ClipSearch(10), reconstruction=reconstruction
        )
        view = view_of(method.needs)
        errors.append(view.error(method.quantize_block(view)))
    assert errors[1] < 0.8 * errors[0]
