"""Bytes of real files and tensors, summed by layer and part."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dit_qat import load_quantized
from dit_qat.dit.models import DiT
from dit_qat.export import describe, write_packed
from dit_qat.export.sizes import Disk, Size, measure, packed_disk
from dit_qat.layers import IntLinear

NOTHING = Disk({}, {})


def test_disk_bytes_are_those_of_the_files(packed_folder: Path) -> None:
    sizes = measure(load_quantized(packed_folder), packed_disk(packed_folder))
    files = sum(path.stat().st_size for path in packed_folder.iterdir())
    assert sizes.disk_bytes == files
    tensors = load_file(packed_folder / "model.safetensors")
    by_layer: dict[str, int] = {}
    for name, tensor in tensors.items():
        layer = name.rpartition(".")[0]
        by_layer[layer] = by_layer.get(layer, 0) + tensor.nbytes
    assert {name: size.disk for name, size in sizes.by_layer.items()} == by_layer
    parts = sum(size.disk for size in sizes.by_part.values())
    assert parts == sum(by_layer.values()) == files - sum(sizes.other.values())


def test_resident_bytes_are_those_of_the_tensors(
    packed_folder: Path, inputs: tuple[torch.Tensor, ...]
) -> None:
    model = load_quantized(packed_folder)
    before = measure(model, NOTHING).resident_bytes
    assert before == sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    model(*inputs)
    sizes = measure(model, NOTHING)
    sums = {name for name in sizes.by_part if name.startswith("sums over rows")}
    assert sums == {"sums over rows of codes", "sums over rows of codes (adaLN)"}
    rows = sum(layer.shape[0] for layer in describe(model).quantized_layers)
    assert sizes.resident_bytes == before + 4 * rows
    assert sizes.disk_bytes == 0


def test_effective_bits_are_measured(packed_folder: Path) -> None:
    sizes = measure(load_quantized(packed_folder), packed_disk(packed_folder))
    # 72 rows of 24 codes: 5 or 6 bytes, a scale and a rank-2 branch in float32.
    side = 32 * (72 + 2 * (72 + 24))
    count = 72 * 24
    expected = ((8 * 72 * 5 + side) / count, (8 * 72 * 6 + side) / count)
    assert sizes.effective_bits["blocks.0.attn.qkv"] == pytest.approx(expected)
    mean = sizes.mean_effective_bits
    assert mean is not None
    values = list(sizes.effective_bits.values())
    for i in range(2):
        assert min(v[i] for v in values) <= mean[i] <= max(v[i] for v in values)


def test_numbers_are_those_of_the_float_model(quantized: DiT, packed_folder: Path) -> None:
    floats = sum(p.numel() for p in DiT(**quantized.config).parameters())
    for model in (quantized, load_quantized(packed_folder)):
        assert measure(model, NOTHING).float_numbers == floats
    float_model = DiT(**quantized.config)
    assert measure(float_model, NOTHING).float_numbers == floats
    assert measure(float_model, NOTHING).mean_effective_bits is None


def test_storage_and_branches_are_seen(quantized: DiT, tmp_path: Path) -> None:
    found = {}
    for storage in ("ternary_1.6", "ternary_2"):
        write_packed(quantized, tmp_path / storage, storage=storage, branch_dtype="float16")
        folder = tmp_path / storage
        found[storage] = measure(load_quantized(folder), packed_disk(folder))
    small, large = found["ternary_1.6"], found["ternary_2"]
    assert small.resident_bytes == large.resident_bytes
    assert small.disk_bytes < large.disk_bytes
    branch = small.by_part["low-rank branches"]
    assert branch == Size(branch.numbers, 2 * branch.numbers, 2 * branch.numbers)
    codes = large.by_part["ternary codes"]
    assert codes.disk == codes.resident == codes.numbers / 4


def test_what_stays_float_beside_quantized_layers_is_told_apart(make_int: Any) -> None:
    model = make_int()
    parts = {name for name in measure(model, NOTHING).by_part if name.startswith("float: ")}
    assert {"float: x_embedder", "float: final_layer", "float: pos_embed"} <= parts
    assert "float: blocks.*.adaLN_modulation" in parts
    assert not any(name.startswith(("float: blocks.0", "float: t_embedder.")) for name in parts)


def test_dictionary_is_plain(packed_folder: Path) -> None:
    sizes = measure(load_quantized(packed_folder), packed_disk(packed_folder))
    content = json.loads(json.dumps(sizes.as_dict()))
    shares = [part["resident_share"] for part in content["parts"].values()]
    assert sum(shares) == pytest.approx(1)
    disk = [part["disk"] for part in content["parts"].values()]
    assert sum(disk) + sum(content["other_on_disk"].values()) == content["disk_bytes"]
    assert disk == sorted(disk, reverse=True)


def test_a_packed_model_is_described_as_the_trained_one(
    quantized: DiT, packed_folder: Path
) -> None:
    trained, packed = describe(quantized), describe(load_quantized(packed_folder))
    assert packed == trained


def test_integer_layers_by_part(int_folder: Path) -> None:
    model = load_quantized(int_folder)
    sizes = measure(model, packed_disk(int_folder))
    assert sizes.disk_bytes == sum(path.stat().st_size for path in int_folder.iterdir())
    held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    assert sizes.resident_bytes == held
    parts = sizes.by_part
    # Two blocks of 96 x 24 codes at 4 bits, 24 x 96 at 8, 24 x 24 at 3 and 72 x 24 at 2.
    assert parts["4-bit codes"] == Size(2 * 96 * 24, 2 * 96 * 12, 2 * 96 * 12)
    assert parts["3-bit codes"] == Size(2 * 24 * 24, 2 * 24 * 9, 2 * 24 * 9)
    assert parts["zero points"].numbers == 2 * (24 + 24 * 4)
    # qkv: scale and permutation; fc1: permutation; fc2: scale.
    assert parts["vectors of input transforms"].disk == 2 * 4 * (24 + 24 + 24 + 96)
    branches = 2 * (2 * 3 * (96 + 24) + 4 * 2 * (96 + 24))
    assert parts["low-rank branches"].resident == branches
    assert sizes.by_layer["blocks.0.mlp.fc1"].disk == (
        96 * 12 + 2 * 96 + 4 * 24 + 2 * 3 * (96 + 24) + 4 * 96
    )
    own = model.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(own, IntLinear)
    effective = own.effective_weight_bits
    assert sizes.effective_bits["blocks.0.mlp.fc1"] == pytest.approx((effective, effective))
    with torch.device("meta"):
        float_numbers = sum(p.numel() for p in DiT(**model.config).parameters())
    assert sizes.float_numbers == float_numbers
