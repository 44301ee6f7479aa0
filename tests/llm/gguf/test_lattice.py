"""Whole numbers and scales of layers, against what the layers decode."""

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers import CodedLinear
from dit_qat.layers.input_transform import InputTransform, Scale
from dit_qat.layers.mixed_code import MixedCode
from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.rounding import nearest_layer
from dit_qat.layers.ternary_code import TernaryCode
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.llm.gguf.lattice import Lattice, lattice_of
from dit_qat.primitives.integer import IntegerGrid


def weight_of(lattice: Lattice) -> Tensor:
    scale = lattice.scale.float().repeat_interleave(32, 1)
    weight = lattice.codes.float() * scale
    if lattice.offset is None:
        return weight
    return weight + lattice.offset.float().repeat_interleave(32, 1)


def ternary(group: int, order: Tensor | None = None, offset: float = 0.0) -> CodedLinear:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(-1, 2, (6, 128), generator=draw)
    scale = torch.randn(6, 128 // group, generator=draw).half()
    offsets = torch.full_like(scale, offset)
    return CodedLinear(TernaryCode.build(codes, scale, offsets, group, order))


def mixed() -> CodedLinear:
    draw = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 2, (6, 128), generator=draw).to(torch.uint8)
    scale, offset = torch.randn(2, 6, 4, generator=draw).half()
    bits = torch.tensor([1, 2, 3, 2])
    return CodedLinear(MixedCode.build(codes, bits, scale, offset, 32, 2))


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group", [None, 32, 64])
def test_integers(bits: int, symmetric: bool, group: int | None) -> None:
    torch.manual_seed(0)
    linear = nn.Linear(128, 6)
    layer = nearest_layer(linear, IntegerGrid(bits, symmetric, group), None)
    assert torch.equal(weight_of(lattice_of(layer)), layer.to_float().weight)


def one_plane(columns: Tensor | None = None) -> CodedLinear:
    draw = torch.Generator().manual_seed(0)
    signs = 1 - 2 * torch.randint(2, (1, 6, 128), generator=draw)
    return CodedLinear(PlaneCode.build(signs, torch.rand(6, 2, 1, generator=draw), 64, columns))


@pytest.mark.parametrize("layer", [ternary(32), ternary(128), mixed(), one_plane()])
def test_codes(layer: CodedLinear) -> None:
    assert torch.equal(weight_of(lattice_of(layer)), layer.dequantized())


def test_an_order_of_columns_is_undone_where_scales_allow() -> None:
    order = torch.randperm(128, generator=torch.Generator().manual_seed(1))
    layer = ternary(128, order)
    assert torch.equal(weight_of(lattice_of(layer)), layer.dequantized())
    with pytest.raises(ValueError, match="change within 32 neighbouring columns"):
        lattice_of(ternary(32, order))


def test_rows_in_another_order() -> None:
    order = torch.tensor([3, 0, 5, 1, 2, 4])
    for layer in (ternary(32), mixed()):
        taken = weight_of(lattice_of(layer).take_rows(order))
        assert torch.equal(taken, layer.dequantized()[order])


def test_layers_that_are_no_lattice_say_why() -> None:
    linear = nn.Linear(128, 6)
    grid = IntegerGrid(4, True, 32)
    scaled = InputTransform(128, [Scale(torch.linspace(1, 2, 128))])
    signs = torch.ones(2, 6, 128)
    planes = CodedLinear(PlaneCode.build(signs, torch.ones(6, 1, 2), 128))
    cases = {
        "it rounds its inputs": nearest_layer(linear, grid, TokenQuantizer(8)),
        r"inputs pass a transform first \(scale\)": nearest_layer(linear, grid, None, scaled),
        "its ternary code is asymmetric": ternary(32, offset=0.5),
        "its code 'planes' is 2 sign planes": planes,
        "or scales of columns": one_plane(torch.linspace(1, 2, 128)),
        "a Linear has no whole codes": linear,
        "its scales change within 32": nearest_layer(linear, IntegerGrid(4, True, 16), None),
        "its 48 columns are no multiple of 32": nearest_layer(
            nn.Linear(48, 6), IntegerGrid(4), None
        ),
    }
    for message, layer in cases.items():
        with pytest.raises(ValueError, match=message):
            lattice_of(layer)
