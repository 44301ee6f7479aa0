"""Folders of models of integer layers, alone and beside ternary ones."""

import json
import pickle
import shutil
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_qat import load_quantized
from dit_qat.dit.models import DiT
from dit_qat.dit.sampling import SamplerConfig, sample_images
from dit_qat.export import read_manifest, verify_packed, write_packed
from dit_qat.export.digests import digest_of
from dit_qat.layers import IntLinear, PackedLinear, TokenQuantizer, timestep_scope
from dit_qat.primitives.integer import IntegerGrid, Scales, pack_codes

Inputs = tuple[Tensor, Tensor, Tensor]
Resign = Callable[[Path, Callable[[dict[str, Any]], None]], None]
FUZZ = settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
FC1, FC2, QKV = "blocks.0.mlp.fc1", "blocks.0.mlp.fc2", "blocks.0.attn.qkv"


def test_what_is_loaded_is_what_was_written(
    int_model: DiT, int_folder: Path, inputs: Inputs
) -> None:
    model = load_quantized(int_folder)
    assert type(model) is DiT
    assert torch.equal(model(*inputs), int_model(*inputs))
    held = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    assert held.keys() == read_manifest(int_folder).tensors.keys()
    for name, value in int_model.state_dict().items():
        if isinstance(value, Tensor):
            assert torch.equal(held[name], value), name
            assert held[name].dtype == value.dtype
        else:
            assert model.state_dict()[name] == value


def test_it_is_a_dit_by_all_the_names_of_one(
    int_model: DiT, int_folder: Path, inputs: Inputs
) -> None:
    model = DiT.from_pretrained(int_folder)
    assert torch.equal(model(*inputs), int_model(*inputs))
    drawn = [
        next(iter(sample_images(m, SamplerConfig(steps=5, guidance=2.0, batch_size=2), range(2))))[
            1
        ]
        for m in (model, int_model)
    ]
    assert torch.equal(*drawn)


def test_what_is_loaded_gives_the_same_folder_again(int_folder: Path, tmp_path: Path) -> None:
    write_packed(
        load_quantized(int_folder), tmp_path / "m", provenance={"steps": 0, "data": "none"}
    )
    for name in ("config.json", "model.safetensors"):
        assert (tmp_path / "m" / name).read_bytes() == (int_folder / name).read_bytes()


def test_the_timestep_chooses_the_bits(int_model: DiT, int_folder: Path, inputs: Inputs) -> None:
    model = load_quantized(int_folder)
    assert isinstance(model, DiT)
    x, _, y = inputs
    for twin in (model, deepcopy(model), pickle.loads(pickle.dumps(model))):
        for timestep in (0, 510, 999):
            t = torch.full((3,), timestep)
            assert torch.equal(twin(x, t, y), int_model(x, t, y))
    layer, z = model.get_submodule(FC1), torch.randn(4, 24)
    assert isinstance(layer, IntLinear)
    for timestep, bits in ((0.0, 3), (510.0, 8), (999.0, 2)):
        fixed = layer.with_activation(TokenQuantizer(bits))
        with timestep_scope(timestep):
            assert torch.equal(layer(z), fixed(z))
    both = (torch.cat([part[:1]] * 2) for part in inputs)
    assert model.forward_with_cfg(*both, cfg_scale=2.0).isfinite().all()


def test_kinds_mix(quantized: DiT, int_model: DiT, tmp_path: Path, inputs: Inputs) -> None:
    model = deepcopy(int_model)
    for name in ("blocks.1.attn", "blocks.1.mlp.fc1", "blocks.0.adaLN_modulation.1"):
        model.set_submodule(name, deepcopy(quantized.get_submodule(name)))
    manifest = write_packed(model, tmp_path / "m")
    assert manifest.attention_bits == {"blocks.1.attn": 8}
    assert manifest.activation_bits["blocks.1.mlp.fc1"] == 3
    assert manifest.activation_bits[FC1] == 4.2
    loaded = load_quantized(tmp_path / "m")
    kinds = {name: type(loaded.get_submodule(name)) for name in manifest.layers}
    assert kinds["blocks.1.mlp.fc1"] is kinds["blocks.1.attn.qkv"] is PackedLinear
    assert kinds[FC1] is kinds["blocks.1.mlp.fc2"] is IntLinear
    torch.testing.assert_close(loaded(*inputs), model(*inputs), rtol=1e-5, atol=1e-6)
    found = verify_packed(model, loaded, inputs)
    found.check()
    assert found.layers.keys() == manifest.layers.keys()
    assert found.layers[FC1] == 0


def test_a_shared_transform_is_written_for_each_layer(make_int: Any, tmp_path: Path) -> None:
    model = make_int()
    first, second = (model.get_submodule(f"blocks.{i}.mlp.fc1") for i in range(2))
    second.transform = first.transform
    expected = second.dequantized()
    write_packed(model, tmp_path / "m")
    loaded = load_quantized(tmp_path / "m")
    pair = [loaded.get_buffer(f"blocks.{i}.mlp.fc1.transform.vector1") for i in range(2)]
    assert torch.equal(pair[0], pair[1])
    layer = loaded.get_submodule("blocks.1.mlp.fc1")
    assert isinstance(layer, IntLinear)
    assert torch.equal(layer.dequantized(), expected)


def test_a_branch_in_another_dtype(int_model: DiT, tmp_path: Path) -> None:
    write_packed(int_model, tmp_path / "m", branch_dtype="bfloat16")
    layer = load_quantized(tmp_path / "m").get_submodule(FC2)
    assert isinstance(layer, IntLinear)
    assert layer.config.branch_dtype == "bfloat16"
    assert layer.low_rank_up is not None
    assert torch.equal(layer.low_rank_up, int_model.get_buffer(f"{FC2}.low_rank_up").bfloat16())


def test_floats_keep_their_dtype(make_int: Any, tmp_path: Path) -> None:
    model = make_int()
    model.y_embedder.bfloat16()
    manifest = write_packed(model, tmp_path / "m")
    assert manifest.tensors["y_embedder.embedding_table.weight"].dtype == "BF16"
    assert manifest.tensors["pos_embed"].dtype == "F32"
    loaded = load_quantized(tmp_path / "m").get_parameter("y_embedder.embedding_table.weight")
    assert loaded.dtype == torch.float32
    assert torch.equal(loaded, model.y_embedder.embedding_table.weight.float())


@pytest.mark.parametrize(
    ("leaf", "value", "message"),
    [
        ("codes", 0, r"layer 'blocks.0.mlp.fc1': all 2304 codes are 0: calibration"),
        ("codes", 0x77, r"all 2304 codes are 7"),
        ("scale", 0.0, r"layer 'blocks.0.mlp.fc1': scale holds scales down to 0.0"),
        ("scale", torch.inf, "scale holds NaN or infinite"),
        ("bias", torch.nan, "bias holds NaN or infinite"),
        ("low_rank_down", torch.nan, "low_rank_down holds NaN"),
        ("transform.vector1", 3, "transform.vector1 holds no permutation"),
    ],
)
def test_layers_without_content_are_errors(
    make_int: Any, tmp_path: Path, leaf: str, value: float, message: str
) -> None:
    model = make_int()
    model.get_buffer(f"{FC1}.{leaf}").fill_(value)
    with pytest.raises(ValueError, match=message):
        write_packed(model, tmp_path / "m")
    assert not list(tmp_path.iterdir())


def test_codes_beyond_the_grid_are_errors(make_int: Any, tmp_path: Path) -> None:
    model, linear = make_int(), nn.Linear(24, 24)
    codes = torch.randint(-7, 8, (24, 24))
    grid, scales = IntegerGrid(4), Scales(torch.ones(24, 1), None)
    layer = IntLinear.build(linear, grid=grid, scales=scales, codes=codes, activation=None)
    codes[3, 4] = -8
    layer.codes = pack_codes(codes, grid)
    model.blocks[0].attn.proj = layer
    with pytest.raises(ValueError, match=r"attn.proj': codes holds the code -8"):
        write_packed(model, tmp_path / "m")


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> dict[str, Tensor]:
    """Another valid safetensors file with the old metadata."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=header["__metadata__"])
    return tensors


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{FC1}.codes", 8, "fc1.codes: holds the code -8"),
        (f"{QKV}.codes", 2, "qkv.codes: holds the code -2"),
        (f"{FC1}.scale", 0.0, "fc1.scale: holds scales down to 0.0"),
        (f"{QKV}.transform.vector0", -1.0, "vector0: holds scales down to -1.0"),
        (f"{QKV}.transform.vector0", torch.nan, "vector0: holds NaN"),
        (f"{QKV}.transform.vector1", 24, "vector1: holds no permutation of 24"),
        ("blocks.0.attn.proj.zero", 8, "zero: holds zero points up to 8, beyond 3-bit"),
        (f"{FC2}.low_rank_up", torch.inf, "low_rank_up: holds NaN or infinite"),
    ],
)
def test_wrong_values_with_right_hashes_are_refused(
    int_folder: Path, tmp_path: Path, resigned: Resign, name: str, value: float, message: str
) -> None:
    """A writer with a defect: what it wrote is what it hashed."""
    folder = shutil.copytree(int_folder, tmp_path / "m")
    tensors = rewrite(folder, lambda own: own[name].view(-1)[5].fill_(value))
    digest = digest_of(tensors[name], "xxh3_128")
    resigned(folder, lambda c: c["tensors"][name].update(xxh3_128=digest))
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def of_module(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["modules"][name].update(values)


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (of_module(FC1, kind="ternary_linear"), "weight is None"),
        (of_module(FC1, grid={"bits": 8, "symmetric": True, "group_size": None}), "codes is U8 of"),
        (of_module(FC1, grid={"bits": 4, "symmetric": False, "group_size": None}), "lacks .*zero"),
        (of_module(FC1, grid={"bits": 4, "symmetric": True, "group_size": 8}), "scale is F16 of"),
        (of_module(FC1, low_rank=None), "low_rank_"),
        (of_module(FC1, transform=[]), r"holds blocks.0.mlp.fc1.transform.vector1"),
        (of_module(FC1, out_features=95), "inputs, outputs and bias"),
        (lambda c: c["modules"].update({"pos_embed": c["modules"][FC1]}), "no module pos_embed"),
        (lambda c: c["modules"].pop(FC1), "lacks blocks.0.mlp.fc1.weight"),
    ],
)
def test_a_forged_config_builds_no_other_model(
    int_folder: Path,
    tmp_path: Path,
    resigned: Resign,
    forge: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    folder = shutil.copytree(int_folder, tmp_path / "m")
    resigned(folder, forge)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def test_version_1_has_no_such_layers(
    int_folder: Path, tmp_path: Path, as_version: Callable[[Path, int], None]
) -> None:
    folder = shutil.copytree(int_folder, tmp_path / "m")
    as_version(folder, 1)
    with pytest.raises(ValueError, match="version 1 has no modules of version 2"):
        load_quantized(folder)


@pytest.fixture(scope="module")
def reference(int_folder: Path, inputs: Inputs) -> Tensor:
    """What the undamaged model computes."""
    result: Tensor = load_quantized(int_folder)(*inputs)
    return result


@given(data=st.data())
@FUZZ
def test_damaged_bytes_never_give_another_model(
    int_folder: Path, tmp_path: Path, reference: Tensor, inputs: Inputs, data: st.DataObject
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(int_folder, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    at = data.draw(st.integers(0, len(content) - 1))
    kind = data.draw(st.sampled_from(["flip", "cut", "insert"]))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "cut":
        del content[at:]
    else:
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    (folder / name).write_bytes(content)
    try:
        model = load_quantized(folder)
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017
    else:
        assert torch.equal(model(*inputs), reference)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def slots(content: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value: container and key."""
    keys: list[Any] = []
    if isinstance(content, dict | list):
        keys = list(content) if isinstance(content, dict) else list(range(len(content)))
    found = [(content, key) for key in keys]
    return found + [slot for key in keys for slot in slots(content[key])]


@given(data=st.data())
@FUZZ
def test_forged_values_are_no_crash(
    int_folder: Path, tmp_path: Path, inputs: Inputs, resigned: Resign, data: st.DataObject
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(int_folder, folder, dirs_exist_ok=True)

    def forge(content: dict[str, Any]) -> None:
        name = data.draw(st.sampled_from(sorted(content["modules"])))
        found = slots(content["modules"][name])
        holder, key = found[data.draw(st.integers(0, len(found) - 1))]
        if data.draw(st.booleans()) and isinstance(holder, dict):
            holder[data.draw(st.text(max_size=4))] = holder.pop(key)
        else:
            holder[key] = data.draw(JSON)

    resigned(folder, forge)
    try:
        load_quantized(folder)(*inputs)
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017
