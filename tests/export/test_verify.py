"""Fake-quant against packed: agreement measured, disagreement refused with the layer's name."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_qat import load_quantized
from dit_qat.dit.models import DiT
from dit_qat.export import verify_packed, write_packed
from dit_qat.layers import LowRank, PackedLinear

Inputs = tuple[Tensor, Tensor, Tensor]


def test_a_packed_model_agrees(quantized: DiT, packed_folder: Path, inputs: Inputs) -> None:
    found = verify_packed(quantized, load_quantized(packed_folder), inputs)
    assert len(found.layers) == 10
    assert found.worst_layer[1] <= 1e-6
    assert found.output <= 1e-6
    found.check()
    assert not any(module._forward_hooks for module in quantized.modules())


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_branch_trained_in_16_bits_agrees(
    make_quantized: Callable[..., DiT], tmp_path: Path, inputs: Inputs, dtype: Any
) -> None:
    model = make_quantized()
    for module in model.modules():
        low_rank = getattr(getattr(module, "config", None), "low_rank", None)
        if isinstance(low_rank, LowRank):
            module.config = replace(module.config, low_rank=replace(low_rank, dtype=dtype))
    write_packed(model, tmp_path / "m")
    verify_packed(model, load_quantized(tmp_path / "m"), inputs).check()


def test_a_branch_of_other_precision_is_refused(
    quantized: DiT, tmp_path: Path, inputs: Inputs
) -> None:
    write_packed(quantized, tmp_path / "m", branch_dtype="bfloat16")
    found = verify_packed(quantized, load_quantized(tmp_path / "m"), inputs)
    with pytest.raises(ValueError, match=r"differs from the trained one by .*precision"):
        found.check()


@pytest.mark.parametrize("leaf", ["codes", "scale", "bias", "low_rank_up"])
def test_a_changed_layer_is_named(
    quantized: DiT, packed_folder: Path, inputs: Inputs, leaf: str
) -> None:
    packed = load_quantized(packed_folder)
    layer = packed.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, PackedLinear)
    tensor = layer.get_buffer(leaf)
    tensor.copy_(tensor.flip(0))
    with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.fc1' differs"):
        verify_packed(quantized, packed, inputs).check()


def test_nan_is_a_difference(quantized: DiT, packed_folder: Path, inputs: Inputs) -> None:
    packed = load_quantized(packed_folder)
    packed.get_parameter("pos_embed").fill_(torch.nan)
    with pytest.raises(ValueError, match="output differs by inf"):
        verify_packed(quantized, packed, inputs).check()


def test_nan_in_a_layer_is_not_lost_among_numbers(
    quantized: DiT, packed_folder: Path, inputs: Inputs
) -> None:
    packed = load_quantized(packed_folder)
    packed.get_buffer("blocks.1.mlp.fc1.bias").fill_(torch.nan)
    found = verify_packed(quantized, packed, inputs)
    assert found.layers["blocks.1.mlp.fc1"] == max(0.0, found.output) == float("inf")
    with pytest.raises(ValueError, match=r"'blocks\.1\.mlp\.fc1' differs"):
        found.check()


def test_integer_layers_agree_bit_for_bit(int_model: DiT, int_folder: Path, inputs: Inputs) -> None:
    found = verify_packed(int_model, load_quantized(int_folder), inputs[:2], {"y": inputs[2]})
    assert len(found.layers) == 8
    assert found.worst_layer[1] == found.output == 0


@pytest.mark.parametrize(
    "leaf", ["codes", "scale", "bias", "low_rank_up", "transform.vector0", "transform.vector1"]
)
def test_a_changed_integer_layer_is_named(
    int_model: DiT, int_folder: Path, inputs: Inputs, leaf: str
) -> None:
    packed = load_quantized(int_folder)
    name = "attn.qkv" if leaf.startswith("transform") else "mlp.fc1"
    tensor = packed.get_buffer(f"blocks.1.{name}.{leaf}")
    tensor.copy_(tensor.flip(0))
    with pytest.raises(ValueError, match=rf"'blocks\.1\.{name}' differs"):
        verify_packed(int_model, packed, inputs).check()


def test_a_layer_of_another_kind_is_no_twin(
    int_model: DiT, int_folder: Path, packed_folder: Path, inputs: Inputs
) -> None:
    packed = load_quantized(int_folder)
    other = load_quantized(packed_folder).get_submodule("blocks.0.mlp.fc1")
    packed.set_submodule("blocks.0.mlp.fc1", other)
    with pytest.raises(ValueError, match=r"the models differ in blocks\.0\.mlp\.fc1"):
        verify_packed(int_model, packed, inputs)


def test_other_models_are_refused(
    quantized: DiT, make_quantized: Callable[..., DiT], inputs: Inputs
) -> None:
    with pytest.raises(ValueError, match=r"the models differ in blocks\.0"):
        verify_packed(quantized, make_quantized(), inputs)
