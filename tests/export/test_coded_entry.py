"""Layers whose weight is a code, in a folder of a model of ours."""

import json
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from dit_qat import load_quantized
from dit_qat.dit.models import DiT
from dit_qat.export import describe, verify_packed, write_packed
from dit_qat.export.coded_entry import CodedEntry
from dit_qat.export.sizes import measure, packed_disk
from dit_qat.layers import CodedLinear
from dit_qat.layers.weight_code import Room, Setting, WeightCode, check_rooms, check_settings

SIZES = {"input_size": 4, "patch_size": 2, "in_channels": 1, "hidden_size": 32, "depth": 1}
FC1 = "blocks.0.mlp.fc1"


@dataclass(frozen=True, eq=False)
class OrderCode(WeightCode):
    """Halves of the weight in another order of columns: values that only together are right."""

    name: ClassVar[str] = "test_order"

    values: Tensor
    order: Tensor
    tags: tuple[str, ...]

    @property
    def out_features(self) -> int:
        return self.values.shape[0]

    @property
    def in_features(self) -> int:
        return self.values.shape[1]

    def tensors(self) -> dict[str, Tensor]:
        return {"values": self.values, "order": self.order}

    def settings(self) -> dict[str, Setting]:
        return {"tags": list(self.tags), "largest": None}

    def decode(self) -> Tensor:
        return self.values.float()[:, self.order.argsort()]

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "OrderCode":
        kinds: dict[str, tuple[type, ...]] = {"tags": (list,), "largest": (type(None),)}
        given = check_settings(cls.name, settings, kinds)
        rows, width = tensors["values"].shape
        rooms = {"values": Room((rows, width), torch.float16), "order": Room((width,), torch.int32)}
        check_rooms(cls.name, tensors, rooms)
        if not torch.equal(tensors["order"].sort().values.long(), torch.arange(width)):
            raise ValueError("order is no permutation")
        return cls(tensors["values"], tensors["order"], tuple(given["tags"]))

    @property
    def nominal_bits(self) -> float:
        return 12.5


def _coded(linear: nn.Linear) -> CodedLinear:
    order = torch.randperm(linear.in_features).int()
    values = linear.weight.detach()[:, order.long()].half()
    return CodedLinear.build(linear, OrderCode(values, order, ("a", "b")))


@pytest.fixture
def model() -> DiT:
    torch.manual_seed(0)
    network = DiT(**SIZES, num_heads=2, num_classes=3).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2)
    for name in (FC1, "blocks.0.mlp.fc2"):
        network.set_submodule(name, _coded(network.get_submodule(name)))
    return network


@pytest.fixture
def inputs() -> tuple[Tensor, Tensor, Tensor]:
    return torch.randn(2, 1, 4, 4), torch.tensor([3, 500]), torch.tensor([0, 2])


def test_a_model_comes_back_bit_for_bit(
    model: DiT, inputs: tuple[Tensor, ...], tmp_path: Path
) -> None:
    manifest = write_packed(model, tmp_path / "m")
    assert (manifest.version, manifest.embedded) == (4, False)
    packed = load_quantized(tmp_path / "m")
    agreement = verify_packed(model, packed, inputs)
    assert agreement.output == 0
    assert set(agreement.layers.values()) == {0.0}
    assert packed.get_submodule(FC1).code.tags == ("a", "b")
    write_packed(packed, tmp_path / "again")
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (tmp_path / "again" / name).read_bytes()


def test_bits_and_bytes_are_all_that_is_stored(model: DiT, tmp_path: Path) -> None:
    write_packed(model, tmp_path / "m")
    layer = model.get_submodule(FC1)
    stored = 8 * (layer.bytes_stored - layer.bias.nbytes) / layer.dequantized().numel()
    assert layer.effective_weight_bits == stored == 16 + 32 / 128
    found = {row.name: row for row in describe(model).layers}[FC1]
    assert (found.kind, found.weight_bits) == ("test_order", 12.5)
    assert found.effective_weight_bits == pytest.approx(stored)
    sizes = measure(load_quantized(tmp_path / "m"), packed_disk(tmp_path / "m"))
    assert sizes.effective_bits[FC1] == (stored, stored)
    assert sizes.by_part["test_order codes"].numbers == 2 * 32 * 128
    assert sizes.float_numbers == sum(
        p.numel() for p in DiT(**SIZES, num_heads=2, num_classes=3).parameters()
    )


def test_a_bias_may_be_added(model: DiT) -> None:
    linear = nn.Linear(32, 32, bias=False)
    code = _coded(linear).code
    entry = CodedEntry.of(CodedLinear(code, torch.ones(32)))
    assert entry.bias
    assert entry.adds_bias
    assert CodedEntry.from_json(json.loads(json.dumps(entry.as_json()))) == entry


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e.update(code=3), "code=3 is no str"),
        (lambda e: e["settings"].update(tags=[{}]), "is no plain value"),
        (lambda e: e["tensors"].update(order={"dtype": "I32", "shape": [-1]}), r"sizes \[-1\]"),
        (lambda e: e["tensors"].update(order={"dtype": "X", "shape": [1]}), "dtype 'X'"),
        (lambda e: e.update(extra=1), "extra is 1"),
        (lambda e: e.pop("bias"), "bias=None is no bool"),
    ],
)
def test_entries_that_no_writer_writes_are_refused(
    model: DiT, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    entry = json.loads(json.dumps(CodedEntry.of(model.get_submodule(FC1)).as_json()))
    change(entry)
    with pytest.raises(ValueError, match=message):
        CodedEntry.from_json(entry)


def test_values_that_are_no_code_are_not_written(model: DiT, tmp_path: Path) -> None:
    layer = model.get_submodule(FC1)
    layer.order = torch.zeros_like(layer.order)
    with pytest.raises(ValueError, match=rf"layer '{FC1}': order is no permutation"):
        write_packed(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


ODD = st.sampled_from([None, True, -1, 0, 3, 1 << 40, 1 << 63, 0.5, "x", [], [1], {}, "U8", "F16"])


def places(content: Any) -> list[tuple[Any, Any]]:
    """Container and key of every value, however deep."""
    keys = content if isinstance(content, dict) else range(len(content))
    found = [(content, key) for key in keys]
    inner = [content[key] for key in keys if isinstance(content[key], dict | list)]
    return found + [place for value in inner for place in places(value)]


@given(data=st.data())
@settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_damage_and_forgery_are_no_crash_and_no_other_model(
    model: DiT,
    inputs: tuple[Tensor, ...],
    resigned: Callable[[Path, Callable[[dict[str, Any]], None]], None],
    tmp_path: Path,
    data: st.DataObject,
) -> None:
    shutil.rmtree(tmp_path / "m", ignore_errors=True)
    write_packed(model, tmp_path / "m")
    forged = data.draw(st.booleans())

    def forge(content: dict[str, Any]) -> None:
        found = places(content["modules"])
        holder, key = found[data.draw(st.integers(0, len(found) - 1))]
        holder[key] = data.draw(ODD)

    if forged:
        resigned(tmp_path / "m", forge)
    else:
        path = tmp_path / "m" / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
        damaged = bytearray(path.read_bytes())
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= 1 << data.draw(st.integers(0, 7))
        path.write_bytes(damaged)
    try:
        output = load_quantized(tmp_path / "m")(*inputs)
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017
    else:
        assert forged or torch.equal(output, model(*inputs))
