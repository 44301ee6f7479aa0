"""Writing packed folders: what is in them, how much memory it takes, and what is refused."""

import json
import shutil
import weakref
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from dit_qat import load_quantized
from dit_qat.dit.models import DiT
from dit_qat.export import read_manifest, write_packed
from dit_qat.export.tensor_file import TensorWriter
from dit_qat.layers import LayerConfig, QuantLinear

MakeModel = Callable[..., DiT]


def test_the_same_model_gives_the_same_bytes(
    make_quantized: MakeModel, packed_folder: Path, tmp_path: Path
) -> None:
    write_packed(make_quantized(), tmp_path / "b", provenance={"steps": 0, "data": "none"})
    names = {path.name for path in packed_folder.iterdir()}
    assert names == {"config.json", "model.safetensors"}
    for name in names:
        assert (tmp_path / "b" / name).read_bytes() == (packed_folder / name).read_bytes()


@pytest.mark.parametrize("storage", ["ternary_1.6", "ternary_2"])
def test_the_safetensors_package_reads_the_file(
    quantized: DiT, tmp_path: Path, storage: Any
) -> None:
    manifest = write_packed(quantized, tmp_path / "m", storage=storage)
    with safe_open(tmp_path / "m" / "model.safetensors", framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    assert {n: tuple(t.shape) for n, t in tensors.items()} == {
        name: entry.shape for name, entry in manifest.tensors.items()
    }
    layer = quantized.get_submodule("blocks.0.mlp.fc2")
    assert isinstance(layer, QuantLinear)
    _, scale = layer.config.weight.quantize(layer.weight.detach())
    assert torch.equal(tensors["blocks.0.mlp.fc2.scale"], scale)
    assert tensors["blocks.0.mlp.fc2.codes"].shape[1] == (24 if storage == "ternary_2" else 20)
    assert torch.equal(tensors["pos_embed"], quantized.pos_embed)


def test_tensors_are_aligned(packed_folder: Path) -> None:
    data = (packed_folder / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    assert length % 8 == 0
    for name, entry in header.items():
        if name != "__metadata__":
            size = {"F32": 4, "U8": 1}[entry["dtype"]]
            assert (8 + length + entry["data_offsets"][0]) % size == 0


def test_the_manifest_says_what_the_model_is(quantized: DiT, packed_folder: Path) -> None:
    manifest = read_manifest(packed_folder)
    assert manifest.architecture == "dit"
    assert manifest.arguments == quantized.config
    assert manifest.attention_bits == {"blocks.0.attn": 8, "blocks.1.attn": 8}
    assert manifest.activation_bits["blocks.1.mlp.fc1"] == 3
    assert manifest.activation_bits["blocks.0.adaLN_modulation.1"] == 4
    assert len(manifest.layers) == 10
    assert manifest.provenance == {"data": "none", "steps": 0}
    assert manifest.written_by.keys() == {"dit_qat", "torch"}


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_16_bit_branches_and_floats_take_half(quantized: DiT, tmp_path: Path, dtype: Any) -> None:
    manifest = write_packed(quantized, tmp_path / "m", branch_dtype=dtype, float_dtype=dtype)
    name = {"float16": "F16", "bfloat16": "BF16"}[dtype]
    assert manifest.tensors["blocks.0.attn.qkv.low_rank_up"].dtype == name
    assert manifest.tensors["pos_embed"].dtype == name
    assert manifest.tensors["blocks.0.attn.qkv.scale"].dtype == "F32"
    low_rank = manifest.layers["blocks.0.attn.qkv"].config.low_rank
    assert low_rank is not None
    assert low_rank.dtype == dtype
    loaded = load_quantized(tmp_path / "m")
    assert loaded.get_parameter("pos_embed").dtype == torch.float32
    assert loaded.get_buffer("blocks.0.attn.qkv.low_rank_up").dtype == getattr(torch, dtype)


def test_no_more_than_a_layer_is_held(
    quantized: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[tuple[str, weakref.ref[Tensor]]] = []
    held: list[set[str]] = []
    write = TensorWriter.write

    def watching(self: TensorWriter, name: str, tensor: Tensor) -> None:
        written.append((name.rpartition(".")[0], weakref.ref(tensor)))
        held.append({owner for owner, ref in written if ref() is not None})
        write(self, name, tensor)

    monkeypatch.setattr(TensorWriter, "write", watching)
    manifest = write_packed(quantized, tmp_path / "m")
    assert manifest.layers.keys() <= {owner for owner, _ in written}
    assert max(len(owners) for owners in held) == 1


def test_an_interrupted_write_leaves_nothing(
    quantized: DiT, packed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(packed_folder, tmp_path / "old")
    before = (tmp_path / "old" / "config.json").read_bytes()

    def full(self: TensorWriter, name: str, tensor: Tensor) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(TensorWriter, "write", full)
    for name in ("new", "old"):
        with pytest.raises(OSError, match="No space left"):
            write_packed(quantized, tmp_path / name, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert (tmp_path / "old" / "config.json").read_bytes() == before


def test_a_disk_without_room_is_found_first(
    quantized: DiT, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match=r"has 0 MB free, and m takes 1 MB"):
        write_packed(quantized, tmp_path / "a" / "m")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(quantized: DiT, packed_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "m"
    target.mkdir()
    write_packed(quantized, target)  # an empty one may be used
    with pytest.raises(FileExistsError, match=r"already holds a packed model.*--overwrite"):
        write_packed(quantized, target)
    write_packed(quantized, target, overwrite=True)
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("meow")
    with pytest.raises(FileExistsError, match="holds other files"):
        write_packed(quantized, tmp_path / "photos", overwrite=True)
    with pytest.raises(NotADirectoryError, match="is a file"):
        write_packed(quantized, tmp_path / "photos" / "cat.png", overwrite=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: setattr(m.blocks[0].mlp, "fc1", nn.Bilinear(2, 2, 2)), r"fc1 \(Bilinear\)"),
        (lambda m: setattr(m.blocks[1], "norm1", nn.Identity()), r"norm1 \(Identity\)"),
        (lambda m: setattr(m, "extra", nn.Linear(2, 2)), r"extra \(Linear\)"),
        (lambda m: setattr(m, "blocks", m.blocks[:1]), "depth|blocks.1"),
        (lambda m: setattr(m, "pos_embed", nn.Parameter(torch.ones(1, 5, 24))), "other shapes"),
    ],
)
def test_what_the_format_cannot_hold_is_named(
    make_quantized: MakeModel, tmp_path: Path, change: Callable[[DiT], None], message: str
) -> None:
    model = make_quantized()
    change(model)
    with pytest.raises(ValueError, match=message):
        write_packed(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_models_without_an_entry_or_without_quantized_layers(tmp_path: Path) -> None:
    with pytest.raises(
        ValueError, match=r"a Linear has no entry in the registry.*there are: .*diffusers, dit"
    ):
        write_packed(nn.Linear(2, 2), tmp_path / "m")
    with pytest.raises(ValueError, match=r"no quantized layers to pack.*dit-qat convert"):
        write_packed(DiT(4, 2, 1, 24, 1, 2), tmp_path / "m")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, r"layer 'blocks.0.mlp.fc1': all 2304 codes are 0"),
        (1.0, r"layer 'blocks.0.mlp.fc1': all 2304 codes are 1"),
        (float("inf"), r"layer 'blocks.0.mlp.fc1': weight holds NaN or infinite"),
    ],
)
def test_weights_without_content_are_errors(
    make_quantized: MakeModel, tmp_path: Path, value: float, message: str
) -> None:
    model = make_quantized()
    nn.init.constant_(model.blocks[0].mlp.fc1.weight, value)
    with pytest.raises(ValueError, match=message):
        write_packed(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_floats_that_do_not_fit_are_errors(make_quantized: MakeModel, tmp_path: Path) -> None:
    model = make_quantized()
    nn.init.constant_(model.final_layer.linear.bias, 1e6)
    with pytest.raises(ValueError, match=r"final_layer.linear.bias holds .* torch.float16 has"):
        write_packed(model, tmp_path / "m", float_dtype="float16")


@pytest.mark.parametrize("bad", [{"a": object()}, {"loss": float("nan")}, {"a": {1: 2, "b": 3}}])
def test_provenance_is_plain(quantized: DiT, tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="provenance holds what JSON does not"):
        write_packed(quantized, tmp_path / "m", provenance=bad)
    assert not list(tmp_path.iterdir())


def test_layers_of_other_configurations(tmp_path: Path, make_quantized: MakeModel) -> None:
    model = make_quantized(rank=0, signs=False, center=True, fit="mse", per_channel=False)
    write_packed(model, tmp_path / "m")
    layer = load_quantized(tmp_path / "m").get_submodule("blocks.0.mlp.fc2")
    source = model.get_submodule("blocks.0.mlp.fc2")
    assert isinstance(source, QuantLinear)
    assert layer.config == source.config != LayerConfig()
