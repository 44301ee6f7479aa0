import json
import shutil
from collections import namedtuple

import pytest
import torch

from dit_qat import LayerConfig, Rule, load_quantized, quantize_
from dit_qat.dit import exporting
from dit_qat.dit.convert.difference import difference, fixed_inputs, outputs
from dit_qat.dit.exporting import compare_pixels, export_network
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.layers import LowRank, PackedLinear, QuantLinear


@pytest.fixture
def network(make_dit):
    return quantize_(make_dit(), RobuQ(activation_bits=3, rank=2).quant_config())


@pytest.fixture
def tampered(monkeypatch):
    """Have what is loaded differ from what was written, as an error of the format would."""

    def tamper(change):
        def load(folder, device="cpu"):
            model = load_quantized(folder, device)
            change(model)
            return model

        monkeypatch.setattr(exporting, "load_quantized", load)

    return tamper


def test_the_packed_model_computes_what_was_trained(network, tmp_path):
    exported = export_network(network, tmp_path / "packed", provenance={"data": "none"})
    inputs = fixed_inputs(network)
    loaded = load_quantized(tmp_path / "packed")
    found = difference(outputs(network, inputs), outputs(loaded, inputs))
    assert found.overall < 1e-5
    assert exported.agreement.output < 1e-5
    assert exported.agreement.worst_layer[1] < 1e-5
    assert exported.agreement.layers.keys() == exported.manifest.layers.keys()
    assert exported.rounded is None
    assert exported.manifest.provenance == {"data": "none"}


def test_metrics_say_what_the_files_are(network, tmp_path):
    exported = export_network(network, tmp_path / "packed")
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"packed"}
    files = {path.name: path.stat().st_size for path in (tmp_path / "packed").iterdir()}
    assert files.keys() == {"config.json", "metrics.json", "model.safetensors"}
    metrics = json.loads((tmp_path / "packed" / "metrics.json").read_text())
    assert metrics["bytes"] == files["config.json"] + files["model.safetensors"] == exported.bytes
    floats = sum(p.numel() for p in type(network)(**network.config).parameters())
    assert metrics["times_smaller_than_float32"] == pytest.approx(4 * floats / exported.bytes)
    assert metrics["activation_bits"]["blocks.0.mlp.fc1"] == 3
    assert metrics["agreement"]["output"] == exported.agreement.output


def test_exporting_changes_nothing(network, tmp_path):
    network.train()
    before = {name: value.clone() for name, value in network.named_parameters()}
    configs = [m.config for m in network.modules() if isinstance(m, QuantLinear)]
    export_network(network, tmp_path / "a", branch_dtype="bfloat16", float_dtype="float16")
    assert all(torch.equal(before[name], value) for name, value in network.named_parameters())
    assert configs == [m.config for m in network.modules() if isinstance(m, QuantLinear)]
    assert network.training


def test_rounding_that_training_did_not_do_is_measured(network, tmp_path):
    expected = outputs(network.eval(), fixed_inputs(network))
    exported = export_network(network, tmp_path / "a", branch_dtype="bfloat16")
    now = outputs(load_quantized(tmp_path / "a"), fixed_inputs(network))
    assert exported.rounded is not None
    assert exported.rounded > 1e-5
    assert exported.rounded == pytest.approx(difference(expected, now).overall, rel=0.01)
    assert exported.agreement.worst_layer[1] < 1e-5
    floats = export_network(network, tmp_path / "b", float_dtype="float16")
    assert floats.rounded is not None
    assert floats.rounded > 1e-6
    assert floats.agreement.output < 1e-5


def test_a_branch_that_training_rounded_changes_nothing(make_dit, tmp_path):
    config = LayerConfig(low_rank=LowRank(rank=2, dtype="bfloat16"))
    network = quantize_(make_dit(), [Rule("blocks.*.mlp.*", config)])
    for asked in (None, "bfloat16"):
        exported = export_network(network, tmp_path / str(asked), branch_dtype=asked)
        assert exported.rounded is None
        assert exported.agreement.output < 1e-5


def test_a_packed_layer_that_differs_is_refused(network, tmp_path, tampered):
    tampered(lambda model: model.blocks[1].attn.proj.scale.mul_(1.001))
    with pytest.raises(ValueError, match=r"'blocks\.1\.attn\.proj' differs.*nothing was written"):
        export_network(network, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_float_part_that_differs_is_refused(network, tmp_path, tampered):
    tampered(lambda model: model.final_layer.linear.weight.data.mul_(1.01))
    with pytest.raises(ValueError, match=r"output differs.*nothing was written"):
        export_network(network, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_what_was_there_survives_a_refusal(network, tmp_path, tampered):
    export_network(network, tmp_path / "packed")
    before = (tmp_path / "packed" / "model.safetensors").read_bytes()
    tampered(lambda model: model.blocks[0].mlp.fc1.scale.mul_(2))
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.fc1"):
        export_network(network, tmp_path / "packed", overwrite=True)
    assert (tmp_path / "packed" / "model.safetensors").read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["packed"]


def test_codes_that_are_all_the_same_are_refused(network, tmp_path):
    layer = network.blocks[1].mlp.fc2
    with torch.no_grad():
        layer.weight.zero_()
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.fc2.*codes are 0"):
        export_network(network, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_refused(network, tmp_path):
    target = tmp_path / "packed"
    export_network(network, target)
    with pytest.raises(FileExistsError, match=r"config\.json.*--overwrite true"):
        export_network(network, target)
    export_network(network, target, overwrite=True)
    (target / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match=r"other files \(notes\.txt\)"):
        export_network(network, target, overwrite=True)
    assert (target / "notes.txt").read_text() == "mine"
    with pytest.raises(NotADirectoryError, match="is a file"):
        export_network(network, target / "notes.txt")


def test_a_disk_without_room_leaves_nothing(network, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(10**6, 10**6, 1000))
    with pytest.raises(OSError, match="has 0 MB free"):
        export_network(network, tmp_path / "packed")
    assert not list(tmp_path.iterdir())


def test_a_place_that_cannot_be_written_is_found_before_anything_runs(
    network, tmp_path, monkeypatch
):
    monkeypatch.setattr(exporting, "fixed_inputs", lambda network: pytest.fail("it ran"))
    (tmp_path / "file").touch()
    with pytest.raises(OSError, match=r"cannot be written, for nothing can be made in"):
        export_network(network, tmp_path / "file" / "packed")


def test_a_float_network_is_refused(make_dit, tmp_path):
    with pytest.raises(ValueError, match="no quantized layers to pack"):
        export_network(make_dit(), tmp_path / "packed")


def test_an_unsupported_layer_is_named(network, tmp_path):
    network.blocks[0].mlp.act = torch.nn.Sigmoid()
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.act \(Sigmoid\)"):
        export_network(network, tmp_path / "packed")


def test_pixels_of_both_models_are_compared(network, tmp_path, monkeypatch):
    sampler = SamplerConfig(steps=3, batch_size=4)
    [(_, drawn)] = sample_images(network, sampler, range(4))
    images = to_uint8(drawn)
    found = compare_pixels(network, tmp_path / "packed", sampler, images)
    assert found["pixels_equal"] >= 0.999
    assert found["bytes"] == json.loads((tmp_path / "packed" / "metrics.json").read_text())["bytes"]
    images[0] = 255 - images[0]
    spoilt = compare_pixels(network, tmp_path / "packed", sampler, images)
    assert spoilt["pixels_equal"] == pytest.approx(0.75, abs=0.01)
    assert any(isinstance(m, PackedLinear) for m in load_quantized(tmp_path / "packed").modules())
