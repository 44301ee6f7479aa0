import json
from dataclasses import asdict, replace

import pytest
import torch
from diffusers import DiTTransformer2DModel

from dit_qat.dit.convert import checkpoint as conversion
from dit_qat.dit.convert.difference import fixed_inputs, outputs
from dit_qat.dit.models import (
    convert_checkpoint,
    dit_to_diffusers,
    load_dit,
    save_dit,
    save_published,
)
from dit_qat.dit.training.loading import load_checkpoint
from dit_qat.layers.swap import to_float_

NAMES = {"dit_qat": "ours.safetensors", "published": "DiT.pt", "diffusers": "transformer"}
WRITERS = {
    "dit_qat": save_dit,
    "published": save_published,
    "diffusers": lambda model, path: dit_to_diffusers(model).save_pretrained(path),
}
# In which convention each format can be had.
CONVENTIONS = {"published": (0,), "diffusers": (1,), "dit_qat": (0, 1)}


def written(root, format, model):
    path = root / "source" / NAMES[format]
    WRITERS[format](model, path)
    return path


@pytest.mark.parametrize(
    ("source", "target", "shift"),
    [
        (source, target, shift)
        for source in NAMES
        for target in NAMES
        for shift in set(CONVENTIONS[source]) & set(CONVENTIONS[target])
    ],
)
def test_within_a_convention_nothing_changes(tmp_path, make_dit, same_state, source, target, shift):
    model = make_dit(timestep_shift=shift)
    path = tmp_path / "out" / NAMES[target]
    report = convert_checkpoint(written(tmp_path, source, model), path, target)
    back = load_dit(path)
    assert same_state(back, model)
    assert back.config == model.config
    assert report.differences.keys() == {"written"}
    assert report.differences["written"].overall <= 1e-6
    record = path.with_name(f"{path.name}.json") if path.is_file() else path / "conversion.json"
    expected = json.loads(json.dumps(asdict(report)))
    assert json.loads(record.read_text()) == expected
    assert {child.name for child in path.parent.iterdir()} == {path.name, record.name} - (
        {record.name} if path.is_dir() else set()
    )


@pytest.mark.parametrize(
    ("source", "target", "shift", "eps"),
    [
        ("published", "diffusers", 0, 1e-6),
        ("diffusers", "published", 1, 1e-6),
        ("dit_qat", "diffusers", 0, 1e-6),
        ("dit_qat", "published", 1, 1e-6),
        ("dit_qat", "published", 0, 1e-5),
    ],
)
def test_across_conventions_the_difference_is_stated_and_a_flag_needed(
    tmp_path, make_dit, same_state, source, target, shift, eps
):
    model = make_dit(timestep_shift=shift, norm2_eps=eps)
    path, given = tmp_path / "out" / NAMES[target], written(tmp_path, source, model)
    with pytest.raises(ValueError, match="--across_conventions") as error:
        convert_checkpoint(given, path, target)
    assert not path.parent.exists()
    report = convert_checkpoint(given, path, target, across_conventions=True)
    found = report.differences["conventions"]
    assert f"outputs differ by {found.overall:.2%}" in str(error.value)
    assert ("timestep_shift" in str(error.value)) == (eps == 1e-6)
    assert ("norm2_eps" in str(error.value)) == (eps == 1e-5)
    # What is stated is what the two networks do.
    back, inputs = load_dit(path).eval(), fixed_inputs(model)
    assert same_state(back, model)
    before, after = outputs(model, inputs), outputs(back, inputs)
    assert found.overall == pytest.approx(float((after - before).norm() / before.norm()), rel=1e-3)
    assert 1e-3 < found.overall < 0.5 if eps == 1e-6 else found.overall < 1e-3
    assert report.differences["written"].overall <= 1e-6


@torch.no_grad()
def test_diffusers_itself_gives_the_outputs(tmp_path, make_dit):
    model = make_dit(timestep_shift=1, norm2_eps=1e-6)
    convert_checkpoint(written(tmp_path, "dit_qat", model), tmp_path / "out", "diffusers")
    theirs = DiTTransformer2DModel.from_pretrained(tmp_path / "out", low_cpu_mem_usage=False)
    inputs = fixed_inputs(model)
    predicted = theirs(inputs.x, timestep=inputs.t, class_labels=inputs.y).sample
    torch.testing.assert_close(predicted, model(*inputs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("target", NAMES)
@pytest.mark.parametrize("broken", ["blocks.1.mlp.fc2.bias", "pos_embed"])
def test_what_reads_back_otherwise_is_not_kept(tmp_path, make_dit, monkeypatch, target, broken):
    """A writer that damages one tensor is caught, and an earlier target stays as it is."""
    shift = CONVENTIONS[target][0]
    given = written(tmp_path, "dit_qat", make_dit(timestep_shift=shift))
    path = tmp_path / "out" / NAMES[target]
    convert_checkpoint(given, path, target)
    before = {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()}
    chosen = conversion.FORMATS[target]

    def damage(place, content):
        with torch.no_grad():
            content.network.get_parameter(broken)[..., 3] += 1e-2
        chosen.write(place, content)

    monkeypatch.setitem(conversion.FORMATS, target, replace(chosen, write=damage))
    with pytest.raises(ValueError, match=r"outputs that differ by .* \(limit 1e-05\)|pos_embed"):
        convert_checkpoint(given, path, target, overwrite=True)
    assert {p: p.read_bytes() for p in (tmp_path / "out").rglob("*") if p.is_file()} == before


def test_a_full_disk_leaves_nothing(tmp_path, make_dit, monkeypatch):
    given = written(tmp_path, "dit_qat", make_dit(timestep_shift=1))

    def full(place, content):
        (place / "half").write_text("half")
        raise RuntimeError("no space left")

    chosen = conversion.FORMATS["diffusers"]
    monkeypatch.setitem(conversion.FORMATS, "diffusers", replace(chosen, write=full))
    with pytest.raises(OSError, match=r"out \(no space left\); free space"):
        convert_checkpoint(given, tmp_path / "out", "diffusers")
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


@pytest.mark.parametrize(("weights", "seed"), [("ema", 0), ("model", 1)])
def test_a_float_training_checkpoint(tmp_path, checkpoint, make_dit, same_state, weights, seed):
    out = tmp_path / "out.safetensors"
    report = convert_checkpoint(checkpoint(), out, "dit_qat", weights=weights)
    assert report.weights == weights
    assert same_state(load_dit(out), make_dit(seed=seed))


def test_a_training_checkpoint_without_ema_says_so(tmp_path, checkpoint, make_dit, same_state):
    out = tmp_path / "out.safetensors"
    assert convert_checkpoint(checkpoint(averaged=False), out, "dit_qat").weights == "model"
    assert same_state(load_dit(out), make_dit())


def test_a_published_training_checkpoint_says_what_was_taken(tmp_path, make_dit, same_state):
    path, out = tmp_path / "0100000.pt", tmp_path / "out.safetensors"
    torch.save({"ema": make_dit().state_dict(), "model": make_dit(seed=1).state_dict()}, path)
    report = convert_checkpoint(path, out, "dit_qat", weights="model")
    assert report.weights == "model"
    assert same_state(load_dit(out), make_dit(seed=1))


def test_a_quantized_checkpoint_becomes_float_only_on_request(tmp_path, checkpoint, same_state):
    path, out = checkpoint(quantized=True), tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"is quantized \(\d+ layers.*--dequantize"):
        convert_checkpoint(path, out, "dit_qat")
    assert not out.exists()
    report = convert_checkpoint(path, out, "dit_qat", dequantize=True)
    network = load_checkpoint(path).network
    inputs = fixed_inputs(network)
    fake = outputs(network, inputs)
    expected, back = to_float_(network, quantized=True), load_dit(out).eval()
    assert same_state(back, expected)
    change = float((outputs(back, inputs) - fake).norm() / fake.norm())
    assert report.differences["dequantized"].overall == pytest.approx(change, rel=1e-3)
    assert change > 1e-2  # activations at 3 bits are gone


def test_dequantizing_and_changing_the_convention_are_stated_apart(tmp_path, checkpoint):
    report = convert_checkpoint(
        checkpoint(quantized=True),
        tmp_path / "out",
        "diffusers",
        dequantize=True,
        across_conventions=True,
    )
    assert list(report.differences) == ["dequantized", "conventions", "written"]
    assert report.differences["written"].overall <= 1e-6


@pytest.mark.parametrize(
    ("overrides", "target", "message"),
    [
        ({"num_classes": 0}, "diffusers", "num_classes=0: diffusers' DiT has no unconditional"),
        ({"num_heads": 4}, "published", "num_heads=4 as 1"),
    ],
)
def test_what_a_format_cannot_hold_is_named(tmp_path, make_dit, overrides, target, message):
    given = written(tmp_path, "dit_qat", make_dit(**overrides))
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(given, tmp_path / NAMES[target], target)


@pytest.mark.parametrize(
    ("format", "vae", "message"),
    [
        ("gguf", None, "'gguf' is none of dit_qat, published, diffusers, pipeline"),
        ("pipeline", None, "a pipeline needs an autoencoder"),
        ("diffusers", "somewhere", "vae='somewhere': the format diffusers holds no autoencoder"),
    ],
)
def test_options_that_do_not_fit_are_named(tmp_path, format, vae, message):
    with pytest.raises(ValueError, match=message):
        convert_checkpoint("digits", tmp_path / "out", format, vae)
