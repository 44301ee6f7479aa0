"""Mixed bits: the same weight out as in, and nothing else gets in."""

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.mixed_code import MixedCode
from dit_qat.layers.weight_code import WEIGHT_CODES


def parts(bits: list[int], rows: int, width: int, group: int) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    counts = torch.tensor(bits)
    top = (1 << counts)[torch.arange(width) // group]
    codes = (torch.rand(rows, width, generator=generator) * top).to(torch.uint8)
    scale, offset = torch.randn(2, rows, len(bits), generator=generator).half().float()
    return codes, counts, scale, offset


@pytest.mark.parametrize(
    ("bits", "width", "group"),
    [([2, 1, 3, 2], 512, 128), ([2, 2], 20, 16), ([3, 2, 1], 45, 16), ([2], 7, 128)],
)
def test_a_code_is_the_weight_it_was_made_of(bits: list[int], width: int, group: int) -> None:
    codes, counts, scale, offset = parts(bits, 5, width, group)
    code = MixedCode.build(codes, counts, scale, offset, group, 2)
    groups = torch.arange(width) // group
    assert torch.equal(code.decode(), codes * scale[:, groups] + offset[:, groups])
    again = WEIGHT_CODES["mixed"].restore(code.settings(), code.tensors())
    assert torch.equal(again.decode(), code.decode())
    sizes = torch.bincount(groups)
    assert code.nominal_bits == pytest.approx(float((counts * sizes).sum()) / width)


def test_bits_are_those_of_the_specification() -> None:
    code = MixedCode.build(*parts([2, 1, 3, 2], 32, 512, 128), 128, 2)  # type: ignore[call-arg]
    assert code.nominal_bits == 2
    assert code.effective_bits == 2 + 0.25 + 2 / (128 * 32)
    code = MixedCode.build(*parts([2, 4, 3, 3], 32, 512, 128), 128, 3)  # type: ignore[call-arg]
    assert code.effective_bits == 3 + 0.25 + 2 / (128 * 32)


def test_it_serves_a_layer() -> None:
    code = MixedCode.build(*parts([3, 2, 1], 5, 45, 16), 16, 2)  # type: ignore[call-arg]
    layer = CodedLinear.build(nn.Linear(45, 5), code)
    x = torch.randn(3, 45)
    assert torch.equal(layer(x), nn.functional.linear(x, code.decode(), layer.bias))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("tags", torch.tensor([255], dtype=torch.uint8), "not zero|hold a 3"),
        ("tags", torch.tensor([3], dtype=torch.uint8), "hold a 3"),
        ("tags", torch.zeros(2, dtype=torch.uint8), "tags of a mixed code"),
        ("codes", torch.zeros(5, 3, dtype=torch.uint8), "codes of a mixed code"),
        ("codes", torch.full((5, 12), 255, dtype=torch.uint8), "not zero"),
        ("scale", torch.full((5, 3), torch.inf).half(), "NaN or infinite"),
        ("more", torch.zeros(1), "missing or unknown: more"),
    ],
)
def test_damaged_tensors_are_refused(name: str, value: Tensor, message: str) -> None:
    code = MixedCode.build(*parts([3, 2, 1], 5, 45, 16), 16, 2)  # type: ignore[call-arg]
    with pytest.raises(ValueError, match=message):
        MixedCode.restore(code.settings(), code.tensors() | {name: value})
    without = {key: tensor for key, tensor in code.tensors().items() if key != "tags"}
    with pytest.raises(ValueError, match="missing or unknown: tags"):
        MixedCode.restore(code.settings(), without)


def test_what_groups_cannot_hold_is_refused() -> None:
    codes, counts, scale, offset = parts([3, 2, 1], 5, 45, 16)
    with pytest.raises(ValueError, match="only whole numbers"):
        MixedCode.build(codes + 4, counts, scale, offset, 16, 2)
    with pytest.raises(ValueError, match="not within 1 of 3"):
        MixedCode.build(codes, counts, scale, offset, 16, 3)
