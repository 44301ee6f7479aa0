from collections.abc import Callable

import torch
from torch import nn

from dit_qat.calibration import BlockView
from dit_qat.dit.methods import RTN
from dit_qat.dit.methods.reconstruction import LearnedRounding, Reconstruction, reconstruct_block
from dit_qat.layers import IntLinear
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest


def rounded(linear: nn.Linear, grid: IntegerGrid) -> IntLinear:
    codes, scales = round_to_nearest(linear.weight, grid)
    return IntLinear.build(linear, grid=grid, scales=scales, codes=codes, activation=None)


def test_it_starts_at_the_float_weight_and_decides_for_the_nearest_level() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 8)
    for grid in (IntegerGrid(4), IntegerGrid(4, symmetric=False), IntegerGrid(3, group_size=8)):
        layer = rounded(linear, grid)
        learned = LearnedRounding(layer, linear.weight.detach())
        distance = (learned(torch.eye(32)) - linear(torch.eye(32))).detach().abs()
        step = float(layer.scale.max())
        assert distance.max() <= 0.51 * step  # where the range ends
        assert distance.mean() <= 0.02 * step
        same = learned.decided(linear).dequantized() == layer.dequantized()
        assert same.float().mean() > 0.99


def test_the_pull_vanishes_where_all_have_decided() -> None:
    linear = nn.Linear(8, 4)
    learned = LearnedRounding(rounded(linear, IntegerGrid(4)), linear.weight.detach())
    for value, power, pull in ((0, 2.0, 1), (9, 2.0, 0), (-9, 20.0, 0)):
        learned.V.data.fill_(value)
        assert learned.pull(power).item() == pull


def test_the_float_block_is_left_as_it_was(view_of: Callable[..., BlockView]) -> None:
    method = RTN(weight_bits=3)
    view = view_of(method.needs)
    before = {name: value.clone() for name, value in view.block.state_dict().items()}
    layers = method.quantize_block(view)
    found = reconstruct_block(view, layers, Reconstruction(steps=5))
    after = view.block.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(parameter.grad is None for parameter in view.block.parameters())
    assert view.error(found) <= view.error(layers)


def test_a_16_bit_block_is_reconstructed() -> None:
    torch.manual_seed(0)
    linear = nn.Linear(32, 8).bfloat16()
    layer = rounded(linear, IntegerGrid(4))
    learned = LearnedRounding(layer, linear.weight.detach().float())
    x = torch.randn(3, 32, dtype=torch.bfloat16)
    found = learned(x)
    assert found.dtype == torch.bfloat16
    found.float().square().sum().backward()
    assert learned.V.grad is not None
    assert bool((learned.V.grad != 0).any())
