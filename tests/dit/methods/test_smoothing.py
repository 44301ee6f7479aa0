from collections.abc import Callable

import torch

from dit_qat.calibration import BlockView, Needs
from dit_qat.dit.methods.smoothing import balance, shared_inputs, stacked_weight, weight_maxima
from dit_qat.layers import InputTransform, Scale


def test_equal_powers_of_one_half_make_the_maxima_coincide() -> None:
    x_max, w_max = torch.rand(64) * 50 + 0.1, torch.rand(64) + 0.01
    s = balance(x_max, w_max, 0.5, 0.5)
    torch.testing.assert_close(x_max / s, w_max * s)
    torch.testing.assert_close(x_max / s, (x_max * w_max).sqrt())


def test_powers_of_zero_smooth_nothing_and_all_to_the_input_flattens_it() -> None:
    x_max, w_max = torch.rand(8) + 0.1, torch.rand(8) + 0.1
    assert torch.equal(balance(x_max, w_max, 0, 0), torch.ones(8))
    torch.testing.assert_close(x_max / balance(x_max, w_max, 1, 0), torch.ones(8))


def test_silent_channels_stay_finite_and_positive() -> None:
    s = balance(torch.tensor([0.0, 1, 0]), torch.tensor([1.0, 0, 0]), 0.5, 0.5)
    assert s.isfinite().all()
    assert (s > 0).all()


def test_smoothing_alone_leaves_the_product_unchanged() -> None:
    torch.manual_seed(0)
    X, W = torch.randn(20, 32, dtype=torch.float64), torch.randn(8, 32, dtype=torch.float64)
    s = balance(X.abs().amax(0), weight_maxima(W), 0.7, 0.3)
    transform = InputTransform(32, [Scale(s)])
    torch.testing.assert_close(
        transform(X) @ transform.weight(W).T, X @ W.T, rtol=1e-12, atol=1e-12
    )


def test_linears_of_one_input_come_together_and_every_linear_once(
    view_of: Callable[..., BlockView],
) -> None:
    view = view_of(Needs())
    groups = shared_inputs(view)
    assert tuple(f"blocks.0.attn.to_{x}" for x in "qkv") in groups
    assert [name for group in groups for name in group] == list(view.linears)
    weight = stacked_weight([view.linears[name] for name in groups[0]])
    parts = torch.stack([view.linears[name].weight.abs().amax(0) for name in groups[0]])
    assert torch.equal(weight_maxima(weight), parts.amax(0))
