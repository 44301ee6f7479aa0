import argparse
import json
from importlib import resources

import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from safetensors import safe_open
from safetensors.torch import save_file

from dit_qat.dit.models import DiT, load_dit, save_dit, weights


def small(**overrides):
    torch.manual_seed(0)
    sizes = {"input_size": 4, "in_channels": 1, "hidden_size": 64, "depth": 2, "num_heads": 4}
    return DiT(**(sizes | {"num_classes": 3} | overrides))


def same(one, other):
    ours, theirs = one.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours)


def rewritten(path, change):
    """Rewrite a safetensors file, as others would: changed by a function, without a sha256."""
    with safe_open(path, framework="pt") as file:
        metadata = {key: value for key, value in file.metadata().items() if key != "sha256"}
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    change(tensors, metadata)
    save_file(tensors, path, metadata)


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "model.safetensors"
    save_dit(small(), path)
    return path


@pytest.mark.parametrize("overrides", [{}, {"num_classes": 0}, {"timestep_shift": 1}])
def test_what_is_saved_is_what_is_loaded(tmp_path, overrides):
    model = small(**overrides)
    path = tmp_path / "new" / "folder" / "model.safetensors"
    save_dit(model, path)
    loaded = load_dit(path)
    assert same(loaded, model)
    assert loaded.config == model.config
    assert [p.requires_grad for p in loaded.parameters()] == [
        p.requires_grad for p in model.parameters()
    ]
    assert [child.name for child in path.parent.iterdir()] == [path.name]


def test_loading_draws_no_random_numbers(saved):
    before = torch.get_rng_state()
    load_dit(saved)
    assert torch.equal(torch.get_rng_state(), before)


def test_metadata_is_kept_beside_the_config(tmp_path):
    path = tmp_path / "model.safetensors"
    save_dit(small(), path, {"trained_on": "digits", "config": "ours wins"})
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    assert metadata["trained_on"] == "digits"
    assert json.loads(metadata["config"]) == small().config


def test_the_same_model_gives_the_same_bytes(tmp_path):
    path = tmp_path / "model.safetensors"
    contents = set()
    for _ in range(8):
        save_dit(small(), path, {"by": 'Zoë\n"quoted" \x01\x7f', "z": "\\", "a": "1"})
        contents.add(path.read_bytes())
    assert len(contents) == 1
    assert same(load_dit(path), small())
    with safe_open(path, framework="pt") as file:
        assert file.metadata()["by"] == 'Zoë\n"quoted" \x01\x7f'


def test_a_failed_write_leaves_the_old_file_and_no_debris(saved, monkeypatch):
    old = saved.read_bytes()

    def fail(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(weights, "save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        save_dit(small(num_classes=4), saved)
    assert saved.read_bytes() == old
    assert list(saved.parent.iterdir()) == [saved]


def test_quantized_layers_are_not_saved_as_float(tmp_path):
    class Marked(torch.nn.Linear):
        def get_extra_state(self):
            return {"format": "ternary"}

    model = small()
    model.blocks[0].attn.proj = Marked(64, 64)
    with pytest.raises(ValueError, match=r"attn\.proj\._extra_state.*to_float"):
        save_dit(model, tmp_path / "model.safetensors")


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": 384, "num_heads": 6, "num_classes": 1000},
        {"hidden_size": 1152, "num_heads": 16, "depth": 1, "patch_size": 4, "input_size": 8},
        {"hidden_size": 64, "num_heads": 1, "num_classes": 0, "learn_sigma": False},
    ],
)
def test_published_checkpoints_tell_their_configuration(tmp_path, overrides):
    model = small(**overrides)
    path = tmp_path / "DiT.pt"
    torch.save(model.state_dict(), path)
    loaded = load_dit(path)
    assert same(loaded, model)
    assert loaded.config == model.config


def test_training_checkpoints_give_their_ema(tmp_path):
    ema, model = small(num_heads=1), small(num_heads=1, num_classes=4)
    path = tmp_path / "0100000.pt"
    content = {
        "model": model.state_dict(),
        "args": argparse.Namespace(lr=1e-4),
        "opt": {"state": {}},
    }
    torch.save(content, path)
    assert same(load_dit(path), model)
    torch.save({**content, "ema": ema.state_dict()}, path)
    assert same(load_dit(path), ema)


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "a/b/c", "model.bin", "o/n.pt"])
def test_missing_files_are_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file; give an existing file"):
        load_dit(name)


@pytest.mark.parametrize("size", [0, 5, 200, -100])
@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_truncated_files_are_named(tmp_path, kind, size):
    path = tmp_path / f"model{kind}"
    if kind == ".pt":
        torch.save(small().state_dict(), path)
    else:
        save_dit(small(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"model{kind}: truncated or not a"):
        load_dit(path)


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_files_of_another_format_are_named(tmp_path, kind):
    path = tmp_path / f"model{kind}"
    path.write_text("<html>Not Found</html>\n" * 100)
    with pytest.raises(ValueError, match=rf"model{kind}: truncated or not a"):
        load_dit(path)


def test_folders_and_unknown_suffixes_are_refused(tmp_path, saved):
    with pytest.raises(ValueError, match=r"is a folder.*load_quantized"):
        load_dit(tmp_path)
    other = saved.rename(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=r"unknown format '\.onnx'"):
        load_dit(other)


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


def test_files_without_a_sha256_are_accepted(saved):
    rewritten(saved, lambda tensors, metadata: None)
    assert same(load_dit(saved), small())


@pytest.mark.parametrize("change", ["value", "name", "type", "shape"])
def test_tensors_that_were_changed_are_refused(saved, change):
    with safe_open(saved, framework="pt") as file:
        metadata = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    save_file(tensors, saved, metadata)
    assert same(load_dit(saved), small())
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


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": [1, 2]}, "holds no state dict"),
        ({"conv.weight": torch.ones(1)}, "not a DiT checkpoint"),
        (torch.ones(3), "holds no state dict"),
    ],
)
def test_foreign_checkpoints_are_refused(tmp_path, content, message):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(ValueError, match=rf"other\.pt: {message}"):
        load_dit(path)


def test_widths_whose_heads_cannot_be_told_are_refused(tmp_path):
    path = tmp_path / "odd.pt"
    torch.save(small(hidden_size=32).state_dict(), path)
    with pytest.raises(ValueError, match=r"number of heads.*hidden_size=32"):
        load_dit(path)


def test_a_hub_id_is_downloaded(saved, monkeypatch):
    monkeypatch.setattr(weights, "hf_hub_download", lambda repo, name: str(saved))
    assert same(load_dit("org/name"), small())


def test_a_hub_that_cannot_be_reached_is_explained(monkeypatch):
    def fail(repo, name):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(weights, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=r"org/name: .*model\.safetensors.*connection"):
        load_dit("org/name")


def test_an_embedded_name_is_a_file_of_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(weights.resources, "files", lambda package: tmp_path / package)
    save_dit(small(), tmp_path / "dit_qat.dit" / "assets" / "digits_dit.safetensors")
    assert same(load_dit("digits"), small())
