from collections.abc import Callable

import pytest
import torch

from dit_qat.calibration import BlockView
from dit_qat.dit.methods import RTN
from dit_qat.primitives.integer import decode, round_to_nearest


@pytest.mark.parametrize("symmetric", [True, False])
def test_every_weight_goes_to_the_nearest_level(
    view_of: Callable[..., BlockView], symmetric: bool
) -> None:
    method = RTN(weight_bits=3, weight_symmetric=symmetric)
    view = view_of(method.needs)
    grid = method.config.grid
    for name, layer in method.quantize_block(view).items():
        linear = view.linears[name]
        codes, scales = round_to_nearest(linear.weight, grid)
        assert torch.equal(layer.dequantized(), decode(codes, grid, scales))
        assert (layer.dequantized() - linear.weight).abs().max() <= 0.51 * scales.scale.max()
        assert layer.scale.shape == (linear.out_features, 1)
        assert layer.transform is None


def test_activations_have_a_scale_per_token(view_of: Callable[..., BlockView]) -> None:
    method = RTN(activation_bits=4)
    layer = method.quantize_block(view_of(method.needs))["blocks.0.attn.to_q"]
    x = torch.randn(3, 16)
    scaled = x * torch.tensor([[1.0], [64.0], [1 / 64]])
    bias = layer.bias
    expected = (layer(x) - bias) * torch.tensor([[1.0], [64.0], [1 / 64]]) + bias
    torch.testing.assert_close(layer(scaled), expected)
