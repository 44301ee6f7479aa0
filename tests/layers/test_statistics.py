"""Layer statistics on normal inputs, where closed forms say what they must be."""

from dataclasses import astuple
from math import erfc, sqrt

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers import (
    ActivationQuantizer,
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    QuantLinear,
    RobustQuantizer,
    TernaryWeight,
)
from dit_qat.layers.statistics import layer_statistics, normalized_error
from dit_qat.primitives.gaussian import gaussian_mse, gaussian_step


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(activation: ActivationQuantizer | None, rank: int = 0, fit: str = "mse") -> QuantLinear:
    linear = nn.Linear(1152, 64, bias=False)
    with torch.no_grad():
        linear.weight.copy_(normal(64, 1152, seed=1))
    low_rank = LowRank(rank) if rank else None
    return QuantLinear.from_float(
        linear,
        LayerConfig(TernaryWeight(fit), activation, low_rank=low_rank),  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("bits", [1, 2, 3])
def test_normal_inputs_give_the_closed_forms(bits: int) -> None:
    found = layer_statistics(layer(RobustQuantizer(bits)), normal(200, 1152))
    mse = gaussian_mse(gaussian_step(bits), bits)
    edge = 2 ** (bits - 1) * gaussian_step(bits)
    assert found.clip_rate == pytest.approx(erfc(edge / sqrt(2)), rel=0.05)
    assert found.zero_fraction == pytest.approx(1 - erfc(0.612003 / sqrt(2)), rel=0.02)
    assert found.activation_error == pytest.approx(mse, rel=0.01)
    assert found.weight_error == pytest.approx(0.19017, rel=0.02)
    # Optimal quantizers shrink: E[q x] = E[q^2], so powers multiply and the rest is error.
    assert found.output_error == pytest.approx(1 - (1 - mse) * (1 - 0.19017), rel=0.03)
    assert found.output_rms == pytest.approx(sqrt(1152 * (1 - mse) * (1 - 0.19017)), rel=0.03)


def test_without_activation_quantizer_only_weights_err() -> None:
    found = layer_statistics(layer(None), normal(50, 1152))
    assert found.clip_rate == found.activation_error == 0
    assert found.output_error == pytest.approx(found.weight_error, rel=0.05)


def test_min_max_clips_nothing() -> None:
    assert layer_statistics(layer(MinMaxQuantizer(2)), normal(50, 1152)).clip_rate == 0


def test_the_output_is_that_of_the_layer() -> None:
    module, x = layer(RobustQuantizer(3), rank=8, fit="absmean"), normal(4, 5, 1152)
    expected = module(x).square().mean().sqrt().item()
    assert layer_statistics(module, x).output_rms == pytest.approx(expected, rel=1e-5)


def test_a_full_branch_leaves_no_error() -> None:
    found = layer_statistics(layer(RobustQuantizer(4), rank=64), normal(50, 1152))
    assert found.output_error < 1e-9


def test_zeros_and_half_precision_give_numbers() -> None:
    module = layer(RobustQuantizer(4), rank=8)
    for x in (torch.zeros(3, 1152), normal(3, 1152).bfloat16()):
        assert all(value == value for value in astuple(layer_statistics(module, x)))


def test_half_precision_layers_are_measured_like_wide_ones() -> None:
    module, x = layer(RobustQuantizer(4), rank=8), normal(20, 1152)
    wide = layer_statistics(module, x)
    half = layer_statistics(module.bfloat16(), x)
    assert astuple(half) == pytest.approx(astuple(wide), rel=0.1)


def test_normalized_error() -> None:
    x = normal(1000)
    assert normalized_error(x, x) == 0
    assert normalized_error(0 * x, x) == 1
    assert normalized_error(1.5 * x, x) == pytest.approx(0.25)
    assert normalized_error(0 * x, 0 * x) == 0
    assert normalized_error(torch.full((4,), 2.0), torch.zeros(4)) == 4
