import json
from importlib import resources

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from dit_qat.dit.models import load_dit, native, save_dit


def rewritten(path, change):
    """Rewrite a safetensors file, as others would: changed by a function, without a sha256."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.fixture
def saved(tmp_path, make_dit):
    path = tmp_path / "model.safetensors"
    save_dit(make_dit(), path)
    return path


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 0}, {"timestep_shift": 1}])
def test_what_is_saved_is_what_is_loaded(tmp_path, overrides, make_dit, same_state):
    model = make_dit(**overrides)
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_dit(model, path)
    loaded = load_dit(path)
    assert same_state(loaded, model)
    assert loaded.config == model.config
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load_dit(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_metadata_is_kept_beside_the_config(tmp_path, make_dit):
    path = tmp_path / "model.safetensors"
    save_dit(make_dit(), path, {"trained_on": "digits", "config": "ours wins"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["trained_on"] == "digits"
    assert json.loads(metadata["config"]) == make_dit().config


def test_the_same_model_gives_the_same_bytes(tmp_path, make_dit, same_state):
    path = tmp_path / "model.safetensors"
    contents = set()
    for _ in range(8):
        save_dit(make_dit(), path, {"by": 'Zoë\n"quoted" \x01\x7f', "z": "\\", "a": "1"})
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert same_state(load_dit(path), make_dit())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["by"] == 'Zoë\n"quoted" \x01\x7f'


def test_a_failed_write_leaves_the_old_file_and_no_debris(saved, monkeypatch, make_dit):
    old = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(native, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_dit(make_dit(num_classes=4), saved)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_quantized_layers_are_not_saved_as_float(tmp_path, make_dit):
    class Marked(torch.nn.Linear):
        def get_extra_state(self):
            return {"format": "ternary"}

    model = make_dit()
    model.blocks[0].attn.proj = Marked(64, 64)
    with pytest.raises(ValueError, match=r"attn\.proj\._extra_state.*to_float"):
        save_dit(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t, m: m.pop("config"), "no 'config' in the header.*save_dit"),
        (lambda t, m: m.update(config="{"), "is not a JSON object"),
        (lambda t, m: m.update(config='{"colour": 1}'), "does not build a DiT.*colour"),
        (lambda t, m: t.pop("pos_embed"), "lacks 1 tensors, such as pos_embed"),
        (lambda t, m: t.update(extra=torch.ones(1)), "also holds 1 tensors, such as extra"),
        (
            lambda t, m: t.update(pos_embed=torch.ones(1, 9, 64)),
            r"pos_embed has shape \(1, 9, 64\).*asks for \(1, 4, 64\)",
        ),
        (
            lambda t, m: t["blocks.1.mlp.fc1.bias"].fill_(torch.nan),
            r"blocks\.1\.mlp\.fc1\.bias holds",
        ),
    ],
)
def test_contents_that_do_not_fit_are_named(saved, change, message):
    rewritten(saved, change)
    with pytest.raises(ValueError, match=rf"model\.safetensors: .*{message}"):
        load_dit(saved)


def test_files_without_a_sha256_are_accepted(saved, make_dit, same_state):
    rewritten(saved, lambda tensors, metadata: None)
    assert same_state(load_dit(saved), make_dit())


@pytest.mark.parametrize("change", ["value", "name", "type", "shape"])
def test_tensors_that_were_changed_are_refused(saved, change, make_dit, same_state):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, saved, metadata)
    assert same_state(load_dit(saved), make_dit())
    one, other = (f"blocks.{i}.mlp.fc1.bias" for i in range(2))
    if change == "value":
        tensors["pos_embed"].view(torch.int32)[0, 0, 0] += 1
    elif change == "name":
        tensors[one] = torch.ones_like(tensors[other])
        tensors[one], tensors[other] = tensors[other], tensors[one]
    elif change == "type":
        tensors[one] = tensors[one].view(torch.int32)
    else:
        tensors[one] = tensors[one][None]
    save_file(tensors, saved, metadata)
    with pytest.raises(ValueError, match=r"model\.safetensors: the tensors are not those.*sha256"):
        load_dit(saved)


@pytest.mark.parametrize("name", ["digits_dit", "digits_classifier"])
def test_shipped_weights_are_readable_by_all(name):
    path = resources.files("dit_qat.dit") / "assets" / f"{name}.safetensors"
    assert path.stat().st_mode & 0o777 == 0o644


def test_the_shipped_dit_tells_its_sha256():
    path = resources.files("dit_qat.dit") / "assets" / "digits_dit.safetensors"
    with safe_open(path, framework="pt") as file:
        assert len(file.metadata()["sha256"]) == 64
