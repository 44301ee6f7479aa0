from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dit_qat.calibration import BlockView, LinearStatistics, Needs
from dit_qat.dit.methods import RTN, QuaRot
from dit_qat.layers import TransformStep
from dit_qat.layers.rounding import ClipSearch


def layer_of(width: int, **options: Any) -> nn.Module:
    method = QuaRot(rounding="nearest", clip=None, **options)
    statistics = LinearStatistics(width, 1, method.needs)
    return method.quantize_linear("blocks.0.fc1", nn.Linear(width, 8), statistics)


@pytest.mark.parametrize(("width", "block"), [(64, None), (72, None), (1100, 4)])
def test_the_whole_width_is_rotated_where_it_has_an_order(width: int, block: int | None) -> None:
    layer = layer_of(width, seed=7)
    assert layer.transform.steps == (TransformStep("rotate", 7, block),)


def test_a_width_without_any_rotation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks.0.fc1 has 102 inputs.*skip"):
        layer_of(102)


def test_rotation_without_quantization_changes_nothing() -> None:
    method = QuaRot(weight_bits=8, activation_bits=None, rounding="nearest", clip=None)
    linear = nn.Linear(64, 8)
    layer = method.quantize_linear("fc1", linear, LinearStatistics(64, 1, method.needs))
    x = torch.randn(10, 64)
    torch.testing.assert_close(layer(x), linear(x), rtol=0, atol=0.03)


def test_rotation_helps_where_channels_stand_out(view_of: Callable[..., BlockView]) -> None:
    errors = {}
    for method in (RTN(), QuaRot(rounding="nearest", clip=None), QuaRot(clip=ClipSearch(20))):
        view = view_of(method.needs)
        errors[str(method.config)] = view.error(method.quantize_block(view), "blocks.0.attn")
    rtn, nearest, gptq = errors.values()
    assert nearest < rtn / 2
    assert gptq < nearest


def test_clipped_activations_reach_less_far() -> None:
    method = QuaRot(activation_clip=0.5)
    assert method.config.activation is not None
    x = torch.tensor([[1.0, 0.1, -0.2, 0.4]])
    assert method.config.activation.fake_quantize(x).max() == pytest.approx(0.5)


def test_only_gptq_asks_for_second_moments() -> None:
    assert QuaRot().needs == Needs(second_moment=True, ranges=False)
    assert QuaRot(rounding="nearest").needs == Needs(ranges=False)
