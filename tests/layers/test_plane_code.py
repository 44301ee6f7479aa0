"""Sign planes: the same weight out as in, and nothing else gets in."""

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.weight_code import WEIGHT_CODES


def parts(planes: int, rows: int, width: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    signs = 2 * torch.randint(0, 2, (planes, rows, width), generator=generator) - 1
    scale = torch.rand(rows, -(-width // group), planes, generator=generator).half().float()
    columns = torch.rand(width, generator=generator).half().float()
    return signs, scale, columns


@pytest.mark.parametrize("planes", [1, 2, 3])
@pytest.mark.parametrize(("rows", "width", "group"), [(3, 20, 8), (4, 256, 128)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_code_is_the_weight_it_was_made_of(
    planes: int, rows: int, width: int, group: int, scaled: bool
) -> None:
    signs, scale, columns = parts(planes, rows, width, group)
    code = PlaneCode.build(signs, scale, group, columns if scaled else None)
    groups = torch.arange(width) // group
    expected = sum(scale[:, groups, p] * signs[p] for p in range(planes))
    expected = expected * columns if scaled else expected
    assert torch.equal(code.decode(), torch.as_tensor(expected))
    again = WEIGHT_CODES["planes"].restore(code.settings(), code.tensors())
    assert torch.equal(again.decode(), code.decode())
    assert (code.out_features, code.in_features) == (rows, width)
    assert code.nominal_bits == planes


def test_bits_are_those_of_the_specification() -> None:
    for planes, bits in ((2, 2.25), (3, 3.375)):
        signs, scale, columns = parts(planes, 32, 256, 128)
        assert PlaneCode.build(signs, scale, 128).effective_bits == bits
        scaled = PlaneCode.build(signs, scale, 128, columns)
        assert scaled.effective_bits == bits + 16 / 32
        assert scaled.without_column_scale().effective_bits == bits


def test_it_serves_a_layer() -> None:
    signs, scale, columns = parts(2, 6, 20, 8)
    code = PlaneCode.build(signs, scale, 8, columns)
    layer = CodedLinear.build(nn.Linear(20, 6), code)
    x = torch.randn(3, 20)
    assert torch.equal(layer(x), nn.functional.linear(x, code.decode(), layer.bias))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("planes", torch.full((2, 3, 3), 255, dtype=torch.uint8), "ends that are not zero"),
        ("planes", torch.zeros(2, 3, 5, dtype=torch.uint8), "planes of a planes code"),
        ("row_scale", torch.full((3, 3, 2), torch.nan).half(), "NaN or infinite"),
        ("column_scale", torch.zeros(20), "torch.float32"),
        ("more", torch.zeros(1), "missing or unknown: more"),
    ],
)
def test_damaged_tensors_are_refused(name: str, value: Tensor, message: str) -> None:
    signs, scale, columns = parts(2, 3, 20, 8)
    code = PlaneCode.build(signs, scale, 8, columns)
    with pytest.raises(ValueError, match=message):
        PlaneCode.restore(code.settings(), code.tensors() | {name: value})


def test_damaged_settings_are_refused() -> None:
    signs, scale, _ = parts(2, 3, 20, 8)
    code = PlaneCode.build(signs, scale, 8)
    for changed in ({"group_size": 0}, {"planes": 3}, {"planes": 9}, {"scaled": True}):
        with pytest.raises(ValueError, match="planes code"):
            PlaneCode.restore(code.settings() | changed, code.tensors())
    with pytest.raises(ValueError, match="zeros"):
        PlaneCode.build(0 * signs, scale, 8)
