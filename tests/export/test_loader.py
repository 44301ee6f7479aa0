"""Loading packed folders: the same model, strictly, whatever was done to the bytes."""

import gc
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dit_qat import LayerConfig, Rule, load_quantized, quantize_
from dit_qat.dit.models import DiT
from dit_qat.export import is_packed_folder, read_manifest, register_architecture, write_packed
from dit_qat.export.digests import digest_of
from dit_qat.export.registry import _BY_NAME
from dit_qat.layers import PackedLinear, QuantLinear

Inputs = tuple[Tensor, Tensor, Tensor]
Resign = Callable[[Path, Callable[[dict[str, Any]], None]], None]
FUZZ = settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@pytest.mark.parametrize("storage", ["ternary_1.6", "ternary_2"])
def test_it_computes_what_was_trained(
    quantized: DiT, tmp_path: Path, inputs: Inputs, storage: Any
) -> None:
    write_packed(quantized, tmp_path / "m", storage=storage)
    model = load_quantized(tmp_path / "m")
    assert type(model) is DiT
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs), quantized(*inputs), rtol=1e-5, atol=1e-6)
        both = (torch.cat([part[:1]] * 2) for part in inputs)
        assert model.forward_with_cfg(*both, cfg_scale=2.0).isfinite().all()


def test_codes_stay_codes(quantized: DiT, packed_folder: Path) -> None:
    model = load_quantized(packed_folder)
    for name, module in quantized.named_modules():
        if isinstance(module, QuantLinear):
            packed = model.get_submodule(name)
            assert isinstance(packed, PackedLinear)
            twin = PackedLinear.from_quantized(module)
            held = packed.state_dict()
            assert all(torch.equal(held[k], v) for k, v in twin.named_buffers())
    bound = sum(
        tensor.nbytes for tensor in quantized.state_dict().values() if hasattr(tensor, "nbytes")
    )
    assert sum(t.nbytes for t in (*model.parameters(), *model.buffers())) < bound / 1.5


def test_the_state_dict_is_that_of_the_file(packed_folder: Path) -> None:
    model = load_quantized(packed_folder)
    own = {name for name in model.state_dict() if not name.endswith("_extra_state")}
    assert own == read_manifest(packed_folder).tensors.keys()
    model.load_state_dict(load_quantized(packed_folder).state_dict())


def test_files_that_are_missing(packed_folder: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors"):
        folder = shutil.copytree(packed_folder, tmp_path / name)
        (folder / name).unlink()
        with pytest.raises(FileNotFoundError, match=name):
            load_quantized(folder)
    with pytest.raises(FileNotFoundError, match="give a folder that dit-qat export wrote"):
        load_quantized(tmp_path / "nowhere")
    assert not is_packed_folder(tmp_path)
    assert is_packed_folder(packed_folder)


def test_a_config_of_something_else(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": "DiTTransformer2DModel"}')
    with pytest.raises(ValueError, match="is not of a packed folder"):
        load_quantized(tmp_path)


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert text.count(old)
    path.write_text(text.replace(old, new, 1))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 4', '"version": 5', "version is 5, and this dit_qat reads 1, 2, 3 and 4"),
        ('"version": 4', '"version": 3', "tensor 'blocks.* has no dtype, shape and sha256"),
        ('"version": 4', '"version": true', "version is True"),
        ('"bits":3', '"bits":2', "config.json is not the one that was written"),
        ('"steps": 0', '"steps": 1', "config.json is not the one that was written"),
        ('"kind":"ternary_linear"', '"kind":"nvfp4"', "module 'blocks.*nvfp4.* is of none"),
        ('"ternary_1.6"', '"ternary_2"', "config.json is not the one"),
        ("{", "[", "is no JSON"),
    ],
)
def test_a_changed_config_is_refused(
    packed_folder: Path, tmp_path: Path, old: str, new: str, message: str
) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    change(folder / "config.json", old, new)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def of_module(name: str, **values: Any) -> Callable[[dict[str, Any]], None]:
    return lambda content: content["modules"][name].update(values)


FC1, ATTN = "blocks.0.mlp.fc1", "blocks.0.attn"


@pytest.mark.parametrize(
    ("forge", "message"),
    [
        (lambda c: c["architecture"].update(name="unet"), "architecture 'unet' is unknown here"),
        (lambda c: c["architecture"]["arguments"].update(depth=1), "no module blocks.1"),
        (lambda c: c["architecture"]["arguments"].update(depth=10**9), "build no 'dit'"),
        (lambda c: c["architecture"]["arguments"].update(hidden_size="24"), "build no 'dit'"),
        (lambda c: c["architecture"]["arguments"].update(width=24), "build no 'dit'"),
        (lambda c: c["architecture"]["arguments"].update(num_classes=4), "embedding_table"),
        (lambda c: c["modules"].pop(FC1), "lacks blocks.0.mlp.fc1.weight"),
        (lambda c: c["modules"].update(x=c["modules"][FC1]), "no module x; the bit map belongs"),
        (lambda c: c["modules"].update({ATTN: c["modules"][FC1]}), "not a linear layer"),
        (lambda c: c["modules"].update({FC1: c["modules"][ATTN]}), "without quantized form"),
        (of_module(ATTN, bits=9), "attention bits=9 is outside"),
        (of_module(FC1, in_features=48), "factors|inputs, outputs and bias"),
        (of_module(FC1, out_features=95), "inputs, outputs and bias"),
        (of_module(FC1, bias=False), "inputs, outputs and bias"),
        (of_module(FC1, seed=1), "rotation is .* which this version makes"),
        (of_module(FC1, seed=-1), "seed=-1 is outside"),
        (of_module(FC1, codes="ternary_2"), r"codes is U8 of shape \(96, 5\), but the model needs"),
        (of_module(FC1, low_rank=None), "low_rank_"),
        (of_module(FC1, activation={"kind": "Best"}), "activation kind 'Best' is unknown"),
        (of_module(FC1, color="red"), "color is 'red'"),
        (lambda c: c["tensors"].pop("pos_embed"), "the file holds pos_embed"),
        (lambda c: c["tensors"]["pos_embed"].update(shape=[2]), "different exports"),
        (lambda c: c["tensors"]["pos_embed"].update(xxh3_128="0"), "the bytes of pos_embed"),
        (lambda c: c.pop("provenance"), "it has the keys"),
        (lambda c: c.update(tensors=[]), "tensors is no JSON object"),
    ],
)
def test_a_forged_config_builds_no_other_model(
    packed_folder: Path,
    tmp_path: Path,
    resigned: Resign,
    forge: Callable[[dict[str, Any]], None],
    message: str,
) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    resigned(folder, forge)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def rewrite(folder: Path, edit: Callable[[dict[str, Tensor]], None]) -> None:
    """Another valid safetensors file with the old metadata."""
    path = folder / "model.safetensors"
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=header["__metadata__"])


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda t: t.pop("pos_embed"), "the file lacks pos_embed"),
        (lambda t: t.update(more=torch.ones(2)), "the file holds more"),
        (lambda t: t.update(pose=t.pop("pos_embed")), "the file lacks pos_embed"),
        (lambda t: t.update(pos_embed=t["pos_embed"].half()), "pos_embed is F16"),
        (lambda t: t.update(pos_embed=t["pos_embed"][0]), "pos_embed is F32 of shape"),
        (lambda t: t["pos_embed"].mul_(2), "the bytes of pos_embed are not those"),
        (lambda t: t[f"{FC1}.codes"].add_(1), "the bytes of blocks.0.mlp.fc1.codes"),
    ],
)
def test_changed_tensors_are_refused(
    packed_folder: Path, tmp_path: Path, edit: Callable[[dict[str, Tensor]], None], message: str
) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    rewrite(folder, edit)
    with pytest.raises(ValueError, match=message):
        load_quantized(folder)


def test_another_tool_may_write_the_same_tensors(
    packed_folder: Path, tmp_path: Path, inputs: Inputs
) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    rewrite(folder, lambda tensors: None)
    assert torch.equal(load_quantized(folder)(*inputs), load_quantized(packed_folder)(*inputs))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (f"{FC1}.codes", 243, "bytes of 243 or more"),
        (f"{FC1}.scale", 0.0, "scales down to 0.0"),
        (f"{FC1}.scale", float("nan"), "NaN"),
        (f"{FC1}.low_rank_up", float("inf"), "NaN or infinite"),
        ("pos_embed", float("nan"), "pos_embed: holds NaN"),
    ],
)
def test_wrong_values_with_right_hashes_are_refused(
    quantized: DiT, tmp_path: Path, resigned: Resign, name: str, value: float, message: str
) -> None:
    """A writer with a defect: what it wrote is what it hashed."""
    write_packed(quantized, tmp_path / "m")
    tensors = load_file(tmp_path / "m" / "model.safetensors")
    tensors[name].view(-1)[5] = value
    rewrite(tmp_path / "m", lambda own: own.update(tensors))
    digest = digest_of(tensors[name], "xxh3_128")
    resigned(tmp_path / "m", lambda c: c["tensors"][name].update(xxh3_128=digest))
    with pytest.raises(ValueError, match=message):
        load_quantized(tmp_path / "m")


@pytest.mark.parametrize("version", [1, 2, 3])
def test_folders_of_earlier_versions_are_read_as_strictly(
    packed_folder: Path,
    tmp_path: Path,
    inputs: Inputs,
    as_version: Callable[[Path, int], None],
    version: int,
) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    as_version(folder, version)
    assert torch.equal(load_quantized(folder)(*inputs), load_quantized(packed_folder)(*inputs))
    rewrite(folder, lambda own: own["pos_embed"].mul_(2))
    with pytest.raises(ValueError, match=r"the bytes of pos_embed .*their sha256 differs"):
        load_quantized(folder)


def test_header_and_config_have_one_version(
    packed_folder: Path,
    tmp_path: Path,
    as_version: Callable[[Path, int], None],
    resigned: Resign,
) -> None:
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    as_version(folder, 1)
    resigned(folder, lambda content: content.update(version=2))
    with pytest.raises(ValueError, match=r"has version '1', and config\.json 2"):
        load_quantized(folder)


def test_garbage_is_collected_again_after_loading(packed_folder: Path, tmp_path: Path) -> None:
    assert gc.isenabled()
    load_quantized(packed_folder)
    assert gc.isenabled()
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    rewrite(folder, lambda own: own["pos_embed"].mul_(2))
    with pytest.raises(ValueError, match="the bytes of pos_embed"):
        load_quantized(folder)
    assert gc.isenabled()


def must_fail_or_agree(folder: Path, reference: Tensor, inputs: Inputs) -> None:
    try:
        model = load_quantized(folder)
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017
    else:
        assert torch.equal(model(*inputs), reference)


@pytest.fixture(scope="module")
def reference(packed_folder: Path, inputs: Inputs) -> Tensor:
    """What the undamaged model computes."""
    result: Tensor = load_quantized(packed_folder)(*inputs)
    return result


@given(data=st.data())
@FUZZ
def test_damaged_bytes_never_give_another_model(
    packed_folder: Path, tmp_path: Path, reference: Tensor, inputs: Inputs, data: st.DataObject
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(packed_folder, folder, dirs_exist_ok=True)
    name = data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray((folder / name).read_bytes())
    header = st.integers(0, min(9000, len(content) - 1))
    at = data.draw(st.one_of(header, st.integers(0, len(content) - 1)))
    kind = data.draw(st.sampled_from(["flip", "set", "cut", "insert", "append", "swap"]))
    if kind == "flip":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    elif kind == "set":
        content[at] = data.draw(st.integers(0, 255))
    elif kind == "cut":
        del content[at:]
    elif kind == "insert":
        content[at:at] = data.draw(st.binary(min_size=1, max_size=9))
    elif kind == "append":
        content += data.draw(st.binary(min_size=1, max_size=9))
    else:
        other = data.draw(st.integers(0, len(content) - 1))
        content[at], content[other] = content[other], content[at]
    (folder / name).write_bytes(content)
    must_fail_or_agree(folder, reference, inputs)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)


def slots(content: Any) -> list[tuple[Any, Any]]:
    """Every place of a JSON value: container and key."""
    keys = (
        list(content)
        if isinstance(content, dict)
        else range(len(content))
        if isinstance(content, list)
        else []
    )
    found = [(content, key) for key in keys]
    return found + [slot for key in keys for slot in slots(content[key])]


@given(data=st.data())
@FUZZ
def test_forged_values_are_no_crash(
    packed_folder: Path, tmp_path: Path, inputs: Inputs, resigned: Resign, data: st.DataObject
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(packed_folder, folder, dirs_exist_ok=True)

    def forge(content: dict[str, Any]) -> None:
        section = data.draw(st.sampled_from(["modules", "architecture", "tensors", "version"]))
        found = slots({section: content[section]})
        holder, key = found[data.draw(st.integers(0, len(found) - 1))]
        if holder == {section: content[section]}:
            holder = content
        if data.draw(st.booleans()) and isinstance(holder, dict):
            holder[data.draw(st.text(max_size=4))] = holder.pop(key)
        else:
            holder[key] = data.draw(JSON)

    resigned(folder, forge)
    try:
        load_quantized(folder)(*inputs)
    except (ValueError, OSError) as error:
        assert str(error)  # noqa: PT017


@given(data=st.data())
@FUZZ
def test_forged_headers_are_no_crash(
    packed_folder: Path, tmp_path: Path, reference: Tensor, inputs: Inputs, data: st.DataObject
) -> None:
    folder = tmp_path / "m"
    shutil.copytree(packed_folder, folder, dirs_exist_ok=True)
    path = folder / "model.safetensors"
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    found = slots({"": header})
    holder, key = found[data.draw(st.integers(1, len(found) - 1))]
    holder[key] = data.draw(JSON)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + content[8 + length :])
    must_fail_or_agree(folder, reference, inputs)


class _Rotary(nn.Module):
    """Something with a buffer that no state dict holds."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)
        angles = torch.empty(3, device=device).fill_(2.0)
        self.register_buffer("angles", angles, persistent=False)


@pytest.fixture
def register() -> Iterator[Callable[[str | None], None]]:
    """Enter that as an architecture, with its buffer made on some device."""

    def enter(device: str | None) -> None:
        register_architecture("rotary", _Rotary, lambda _: _Rotary(device), lambda _: {})

    yield enter
    del _BY_NAME["rotary"]


def test_buffers_that_no_file_holds_are_the_builders(
    tmp_path: Path, register: Callable[[str | None], None]
) -> None:
    register("cpu")
    write_packed(quantize_(_Rotary(), [Rule("linear", LayerConfig(low_rank=None))]), tmp_path / "m")
    assert load_quantized(tmp_path / "m").get_buffer("angles").tolist() == [2.0] * 3
    register(None)
    with pytest.raises(ValueError, match="builder of 'rotary' leaves angles without values"):
        load_quantized(tmp_path / "m")


def test_without_architectures_the_message_says_where_they_are(
    packed_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dit_qat.export.registry._BY_NAME", {})
    with pytest.raises(ValueError, match=r"take load_quantized from dit_qat, or import"):
        load_quantized(packed_folder)


def test_a_manifest_is_hashed_as_it_was_read(
    packed_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another export finishes between two reads of config.json."""
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    original = (folder / "config.json").read_bytes()
    answers = [original.replace(b'"bits":3', b'"bits":2', 1)]
    real = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda path: answers.pop() if answers else real(path))
    with pytest.raises(ValueError, match=r"config\.json is not the one that was written"):
        load_quantized(folder)


def test_errors_of_the_build_come_before_those_of_tensors(
    packed_folder: Path, tmp_path: Path, resigned: Resign
) -> None:
    """Tensors are read while the model is built; nothing of them counts unless they fit it."""
    folder = shutil.copytree(packed_folder, tmp_path / "m")
    rewrite(folder, lambda tensors: tensors.update({f"{FC1}.codes": torch.ones(())}))
    with pytest.raises(ValueError, match=r"codes is F32 of shape \(\)"):
        load_quantized(folder)
    resigned(folder, lambda c: c["architecture"]["arguments"].update(depth=10**9))
    with pytest.raises(ValueError, match="build no 'dit'"):
        load_quantized(folder)


def test_loading_draws_no_random_numbers(packed_folder: Path) -> None:
    before = torch.get_rng_state()
    load_quantized(packed_folder)
    assert torch.equal(torch.get_rng_state(), before)
