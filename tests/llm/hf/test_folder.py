import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from dit_qat import load_quantized
from dit_qat.calibration import Method
from dit_qat.export.digests import digest_of
from dit_qat.export.inspect import describe
from dit_qat.export.manifest import carried_digest, read_manifest
from dit_qat.export.sizes import measure, packed_disk
from dit_qat.layers import CodedLinear, InputTransform, Scale
from dit_qat.layers.rounding import nearest_layer
from dit_qat.llm.hf.attach import attach_fresh
from dit_qat.llm.hf.folder import save_quantized
from dit_qat.llm.quantize import quantize_llm
from dit_qat.primitives.integer import IntegerGrid

MakeModel = Callable[..., PreTrainedModel]
UP = "model.layers.0.mlp.up_proj"


@pytest.fixture
def quantized(make_model: MakeModel, signs: Method, windows: Tensor) -> Callable[..., Any]:
    """A quantized model by name."""

    def make(name: str = "llama") -> Any:
        model = make_model(name)
        quantize_llm(model, signs, windows)
        return model

    return make


def _logits(model: Any, windows: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=windows).logits


def _coded(model: nn.Module) -> int:
    return sum(isinstance(module, CodedLinear) for module in model.modules())


@pytest.mark.parametrize("name", ["llama", "tied", "qwen3", "opt"])
def test_every_way_there_and_back_gives_the_same_bits(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path, name: str
) -> None:
    model = quantized(name)
    expected, count = _logits(model, windows), _coded(model)
    saved = save_quantized(model, tmp_path / "ours", windows)
    assert saved.agreement.output == 0
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        for load in (AutoModelForCausalLM.from_pretrained, load_quantized):
            found = load(tmp_path / folder)
            assert not found.training
            assert _coded(found) == count
            assert torch.equal(_logits(found, windows), expected)
            again = tmp_path / f"{folder}_{load.__name__}"
            found.save_pretrained(again)
            assert torch.equal(
                _logits(AutoModelForCausalLM.from_pretrained(again), windows), expected
            )
            drawn = found.generate(windows[:1, :4], max_new_tokens=4, do_sample=False)
            assert drawn.shape == (1, 8)


def test_another_dtype_is_for_float_parts_alone(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    model = quantized()
    save_quantized(model, tmp_path / "m", windows)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    layer, own = found.get_submodule(UP), model.get_submodule(UP)
    assert found.lm_head.weight.dtype == torch.bfloat16
    assert torch.equal(layer.dequantized(), own.dequantized())
    assert layer.bias is not None
    assert torch.equal(layer.bias, own.bias)
    found.save_pretrained(tmp_path / "half")
    again = load_quantized(tmp_path / "half")  # its digests are those of the new floats
    assert torch.equal(again.get_submodule(UP).dequantized(), own.dequantized())


def test_shards_are_for_transformers(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    model = quantized("tied")
    model.save_pretrained(tmp_path / "m", max_shard_size="2KB")
    shards = sorted((tmp_path / "m").glob("*.safetensors"))
    assert len(shards) > 2
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert torch.equal(_logits(found, windows), _logits(model, windows))
    with pytest.raises(ValueError, match="cut into shards"):
        load_quantized(tmp_path / "m")
    _edit(tmp_path / "m", _quantization(lambda q: q["modules"][UP]["settings"].update(limit=9.0)))
    with pytest.raises(ValueError, match=r"shards|of-.*not the one that was written"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def test_a_model_of_16_bits_comes_back_as_it_was(
    make_model: MakeModel, signs: Method, windows: Tensor, tmp_path: Path
) -> None:
    make_model("qwen3").save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    quantize_llm(model, signs, windows)
    save_quantized(model, tmp_path / "m", windows)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m")
    assert found.dtype == torch.bfloat16
    assert torch.equal(_logits(found, windows), _logits(model, windows))
    found.save_pretrained(tmp_path / "again")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("m", "again"))
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for key in ("dtype", "tie_word_embeddings"):
        pair = [json.loads((tmp_path / n / "config.json").read_text())[key] for n in ("m", "again")]
        assert pair[0] == pair[1]


@pytest.mark.parametrize("name", ["llama", "tied"])
def test_a_bias_that_the_architecture_lacks_is_stored(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path, name: str
) -> None:
    """As a correction behind the last norm is, and a head that was untied for a rotation."""
    model = quantized(name)
    model.lm_head.bias = nn.Parameter(torch.randn(64))
    if name == "tied":
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach() * 1.5)
        model.config.tie_word_embeddings = False
    save_quantized(model, tmp_path / "m", windows)
    for load in (AutoModelForCausalLM.from_pretrained, load_quantized):
        found = load(tmp_path / "m")
        assert torch.equal(_logits(found, windows), _logits(model, windows))
        found.save_pretrained(tmp_path / load.__name__)
        again = load_quantized(tmp_path / load.__name__)
        assert torch.equal(_logits(again, windows), _logits(model, windows))
    model.model.norm.bias = nn.Parameter(torch.randn(32))
    with pytest.raises(ValueError, match=r"model\.norm\.bias: the architecture has no such"):
        save_quantized(model, tmp_path / "lost", windows)


def test_tied_weights_are_counted_once(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    save_quantized(quantized("tied"), tmp_path / "m", windows)
    found = load_quantized(tmp_path / "m")
    sizes, told = measure(found, packed_disk(tmp_path / "m")), describe(found)
    stored = load_file(tmp_path / "m/model.safetensors")
    held = [tensor for tensor in sizes.tensors if "rotary" not in tensor.layer]
    assert sum(tensor.resident for tensor in held) == sum(t.nbytes for t in stored.values())
    assert sum(tensor.disk for tensor in held) == sum(t.nbytes for t in stored.values())
    assert told.packed_bytes == sum(t.nbytes for t in stored.values())
    assert "lm_head" not in {layer.name for layer in told.layers}


def test_integer_layers_behind_a_transform_are_layers_too(
    make_model: MakeModel, windows: Tensor, tmp_path: Path
) -> None:
    """What the diffusion side quantizes with: the vectors stay float32 in a model of 16 bits."""
    make_model().save_pretrained(tmp_path / "float")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "float", dtype=torch.bfloat16)
    linear = model.get_submodule(UP)
    transform = InputTransform(linear.in_features, [Scale(torch.rand(linear.in_features) + 0.5)])
    layer = nearest_layer(linear, IntegerGrid(4), None, transform)
    model.set_submodule(UP, layer)
    attach_fresh(model)
    save_quantized(model, tmp_path / "m", windows)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", dtype=torch.bfloat16)
    assert torch.equal(_logits(found, windows), _logits(model, windows))
    assert torch.equal(found.get_submodule(UP).to_float().weight, layer.to_float().weight)


def test_a_model_can_be_made_float_again(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    model = quantized()
    model.save_pretrained(tmp_path / "m")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m").dequantize()
    assert _coded(found) == 0
    torch.testing.assert_close(_logits(found, windows), _logits(model, windows))
    found.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in json.loads((tmp_path / "plain/config.json").read_text())
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    assert torch.equal(plain.get_submodule(UP).weight, found.get_submodule(UP).weight)


def test_the_manifest_tells_what_is_there(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    saved = save_quantized(quantized(), tmp_path / "m", windows, provenance={"text": "random"})
    found = read_manifest(tmp_path / "m")
    assert found == saved.manifest
    assert (found.architecture, found.version, found.embedded) == ("causal_lm", 4, True)
    assert found.provenance["method"] == "signs"
    assert found.provenance["text"] == "random"
    assert found.arguments["model_type"] == "llama"
    assert {entry.weights for entry in found.layers.values()} == {"test_signs"}
    assert (
        saved.bytes
        == sum(path.stat().st_size for path in (tmp_path / "m").glob("m*"))
        + (tmp_path / "m/config.json").stat().st_size
    )


def _edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "config.json"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def _as_version_3(folder: Path, manifest: dict[str, Any]) -> None:
    tensors = load_file(folder / "model.safetensors")
    manifest["version"] = 3
    del manifest["arguments_sha256"]
    for name, entry in manifest["tensors"].items():
        del entry["xxh3_128"]
        entry["sha256"] = digest_of(tensors[name], "sha256")


def _sign(folder: Path) -> None:
    """Enter the digests of what config.json says now, as a forger would."""
    path = folder / "config.json"
    content = json.loads(path.read_text())
    carried = content.pop("quantization_config")
    if carried["version"] == 4:
        rest = {k: v for k, v in content.items() if k != "transformers_version"}
        carried["arguments_sha256"] = carried_digest(rest)
    path.write_text(json.dumps({**content, "quantization_config": carried}))
    file = folder / "model.safetensors"
    with safe_open(file, framework="pt") as opened:
        metadata = opened.metadata()
    metadata |= {"manifest_sha256": carried_digest(carried), "version": str(carried["version"])}
    save_file(load_file(file), file, metadata=metadata)


def _retensor(folder: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    path = folder / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata=metadata)


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda t: t[f"{UP}.signs"].bitwise_not_(), r"up_proj'.*signs is not what was written"),
        (lambda t: t.pop(f"{UP}.scale"), r"up_proj'.*scale is not what was written"),
        (lambda t: t[f"{UP}.bias"].mul_(2), r"up_proj'.*bias is not what was written"),
    ],
)
def test_transformers_does_not_load_damaged_codes(
    quantized: Callable[..., Any],
    windows: Tensor,
    tmp_path: Path,
    damage: Callable[[dict[str, Tensor]], object],
    match: str,
) -> None:
    save_quantized(quantized(), tmp_path / "m", windows)
    _retensor(tmp_path / "m", damage)
    with pytest.raises(ValueError, match=match):
        AutoModelForCausalLM.from_pretrained(tmp_path / "m")


def _quantization(change: Callable[[dict[str, Any]], object]) -> Callable[[Any], object]:
    return lambda content: change(content["quantization_config"])


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (_quantization(lambda q: q.update(version=9)), "version is 9, and this dit_qat reads"),
        (_quantization(lambda q: q.pop("modules")), "it has the keys"),
        (_quantization(lambda q: q["modules"][UP].update(code="other")), "'other', which is unkn"),
        (_quantization(lambda q: q["modules"][UP].update(bits=1)), "bits is 1, which this version"),
        (
            _quantization(lambda q: q["modules"][UP]["settings"].update(limit=1e-9)),
            "scales are above their limit",
        ),
        (_quantization(lambda q: q["modules"].update({"a.b": q["modules"][UP]})), "no module"),
    ],
)
def test_a_changed_manifest_is_refused_by_both_loaders(
    quantized: Callable[..., Any],
    windows: Tensor,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    match: str,
) -> None:
    save_quantized(quantized(), tmp_path / "m", windows)
    _edit(tmp_path / "m", change)
    for load in (AutoModelForCausalLM.from_pretrained, load_quantized):
        with pytest.raises(ValueError, match=rf"{match}|not the one that was written"):
            load(tmp_path / "m")


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.update(auto_map={"AutoModel": "x.py"}), "code from the folder"),
        (lambda c: c.update(hidden_size=1 << 40), "beyond what a language model has"),
        (lambda c: c.update(model_type="bert"), "build no 'causal_lm'"),
        (lambda c: c.update(num_hidden_layers=1), "no module"),
    ],
)
def test_our_loader_refuses_other_arguments(
    quantized: Callable[..., Any],
    windows: Tensor,
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    match: str,
) -> None:
    save_quantized(quantized(), tmp_path / "m", windows)
    _edit(tmp_path / "m", change)
    with pytest.raises(ValueError, match="outside quantization_config was damaged or changed"):
        load_quantized(tmp_path / "m")
    _sign(tmp_path / "m")
    with pytest.raises(ValueError, match=match):
        load_quantized(tmp_path / "m")


def test_a_changed_setting_of_the_model_is_refused_by_both_loaders(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    """It changes no shape, and every logit."""
    model = quantized()
    save_quantized(model, tmp_path / "ours", windows)
    model.save_pretrained(tmp_path / "theirs")
    for folder in (tmp_path / "ours", tmp_path / "theirs"):
        _edit(folder, lambda content: content.update(transformers_version="0.0.0"))
        assert torch.equal(_logits(load_quantized(folder), windows), _logits(model, windows))
        _edit(folder, lambda content: content.update(rms_norm_eps=0.1))
        for load in (AutoModelForCausalLM.from_pretrained, load_quantized):
            with pytest.raises(ValueError, match="outside quantization_config was damaged"):
                load(folder)


def test_a_setting_given_to_transformers_is_another_matter(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    save_quantized(quantized(), tmp_path / "m", windows)
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "m", rms_norm_eps=0.1)
    assert found.config.rms_norm_eps == 0.1
    found.save_pretrained(tmp_path / "again")
    again = load_quantized(tmp_path / "again")
    assert torch.equal(_logits(again, windows), _logits(found, windows))


def test_version_3_did_not_cover_the_rest(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    model = quantized()
    save_quantized(model, tmp_path / "m", windows)
    _edit(tmp_path / "m", _quantization(lambda q: _as_version_3(tmp_path / "m", q)))
    _sign(tmp_path / "m")
    assert read_manifest(tmp_path / "m").version == 3
    for load in (AutoModelForCausalLM.from_pretrained, load_quantized):
        assert torch.equal(_logits(load(tmp_path / "m"), windows), _logits(model, windows))


def test_a_folder_in_use_is_left_alone(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    model, folder = quantized(), tmp_path / "m"
    save_quantized(model, folder, windows)
    with pytest.raises(FileExistsError, match="already holds a packed model"):
        save_quantized(model, folder, windows)
    before = (folder / "model.safetensors").read_bytes()
    save_quantized(model, folder, windows, overwrite=True)
    assert (folder / "model.safetensors").read_bytes() == before
    shutil.rmtree(folder)
    folder.mkdir()
    (folder / "mine.txt").write_text("keep")
    with pytest.raises(FileExistsError, match="holds other files"):
        save_quantized(model, folder, windows, overwrite=True)


def test_what_cannot_be_checked_is_not_written(
    quantized: Callable[..., Any], windows: Tensor, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="at most 64"):
        save_quantized(quantized(), tmp_path / "m", windows.repeat(1, 9))
    assert not (tmp_path / "m").exists()
