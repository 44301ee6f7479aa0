from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.weight_code import (
    WEIGHT_CODES,
    Room,
    Setting,
    WeightCode,
    check_rooms,
    check_settings,
    code_named,
)


@dataclass(frozen=True, eq=False)
class HalfCode(WeightCode):
    """Float16 numbers in rows and one factor: the least code that has all parts."""

    name: ClassVar[str] = "test_half"

    values: Tensor
    factor: float
    width: int

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.width

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values}

    def settings(self) -> dict[str, Setting]:
        return {"factor": self.factor, "width": self.width}

    def decode(self) -> Tensor:
        return self.values.float() * self.factor

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "HalfCode":
        given = check_settings(cls.name, settings, {"factor": (float,), "width": (int,)})
        rows = tensors["values"].shape[0] if "values" in tensors else 0
        check_rooms(cls.name, tensors, {"values": Room((rows, given["width"]), torch.float16)})
        return cls(tensors["values"], given["factor"], given["width"])

    @property
    def nominal_bits(self) -> float:
        return 1.5


@pytest.fixture
def linear() -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(6, 4)


@pytest.fixture
def code(linear: nn.Linear) -> HalfCode:
    return HalfCode((linear.weight.detach() * 4).half(), 0.25, 6)


@pytest.fixture
def layer(linear: nn.Linear, code: HalfCode) -> CodedLinear:
    return CodedLinear.build(linear, code)


def test_forward_is_that_of_the_decoded_weight(linear: nn.Linear, layer: CodedLinear) -> None:
    x = torch.randn(2, 3, 6)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.code.decode(), linear.bias))
    assert torch.equal(layer(x), layer.to_float()(x))


def test_bits_count_what_is_stored(layer: CodedLinear) -> None:
    assert layer.effective_weight_bits == layer.code.effective_bits == 16
    assert layer.nominal_weight_bits == 1.5
    assert layer.bytes_stored == 4 * 6 * 2 + 4 * 4


def test_a_cast_leaves_the_code_as_it_is(layer: CodedLinear) -> None:
    before = layer.code.decode()
    layer.to(torch.bfloat16)
    assert torch.equal(layer.code.decode(), before)
    assert layer.bias is not None
    assert layer.bias.dtype == torch.float32
    assert layer(torch.randn(2, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_round_trip_into_room(layer: CodedLinear) -> None:
    rooms = {"values": Room((4, 6), torch.float16)}
    empty = CodedLinear.with_room(HalfCode, layer.settings, (4, 6), rooms, bias=True, device="cpu")
    x = torch.randn(3, 6)
    assert not torch.equal(empty(x), layer(x))
    empty.load_state_dict(layer.state_dict())
    assert torch.equal(empty(x), layer(x))


def test_code_follows_values_that_change_in_place(layer: CodedLinear) -> None:
    _ = layer.code
    state = layer.state_dict() | {"values": torch.ones(4, 6).half()}
    layer.load_state_dict(state)
    assert torch.equal(layer.dequantized(), torch.full((4, 6), 0.25))
    layer.get_buffer("values").mul_(2)
    assert torch.equal(layer.dequantized(), torch.full((4, 6), 0.5))
    layer.get_buffer("values").fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        _ = layer.code


def test_other_settings_or_float_weights_are_refused(layer: CodedLinear, linear: nn.Linear) -> None:
    other = CodedLinear.build(linear, HalfCode(layer.get_buffer("values"), 0.5, 6))
    with pytest.raises(ValueError, match=r"factor: 0.5 saved, 0.25 here"):
        layer.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="is a float weight"):
        layer.load_state_dict(linear.state_dict())


def test_a_code_of_another_shape_is_refused(code: HalfCode) -> None:
    with pytest.raises(ValueError, match=r"\(4, 6\) for a layer of \(4, 8\)"):
        CodedLinear.build(nn.Linear(8, 4), code)
    with pytest.raises(ValueError, match="a bias"):
        CodedLinear(code, torch.zeros(3))


def test_room_that_holds_no_code_is_refused(layer: CodedLinear) -> None:
    layer.values = torch.full((4, 6), float("nan")).half()
    with pytest.raises(ValueError, match="NaN"):
        _ = layer.code


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"factor": 0.5}, "width"),
        ({"factor": 0.5, "width": 6, "odd": 1}, "odd"),
        ({"factor": 0.5, "width": True}, "width"),
        ({"factor": "a", "width": 6}, "'a', not float"),
    ],
)
def test_settings_are_checked(settings: dict[str, Any], match: str, code: HalfCode) -> None:
    with pytest.raises(ValueError, match=match):
        HalfCode.restore(settings, code.tensors())


@pytest.mark.parametrize(
    "tensors",
    [
        {},
        {"values": torch.zeros(4, 5).half()},
        {"values": torch.zeros(4, 6)},
        {"values": torch.zeros(4, 6).half(), "more": torch.zeros(1)},
        {"values": torch.full((4, 6), torch.inf).half()},
    ],
)
def test_tensors_are_checked(tensors: dict[str, Tensor], code: HalfCode) -> None:
    with pytest.raises(ValueError, match="test_half"):
        HalfCode.restore(code.settings(), tensors)


def test_kinds_are_entered_by_name() -> None:
    assert WEIGHT_CODES["test_half"] is code_named("test_half") is HalfCode
    with pytest.raises(ValueError, match="'other', which is unknown here"):
        code_named("other")
    with pytest.raises(ValueError, match="two weight codes are named 'test_half'"):
        type("Other", (WeightCode,), {"name": "test_half"})
