import argparse

import pytest
import torch

from dit_qat.dit.models import load_dit, save_published
from dit_qat.dit.models.published import read_published


@pytest.mark.parametrize(
    "overrides",
    [
        {"hidden_size": 384, "num_heads": 6, "num_classes": 1000},
        {"hidden_size": 1152, "num_heads": 16, "depth": 1, "patch_size": 4, "input_size": 8},
        {"hidden_size": 64, "num_heads": 1, "num_classes": 0, "learn_sigma": False},
    ],
)
def test_published_checkpoints_tell_their_configuration(tmp_path, overrides, make_dit, same_state):
    model = make_dit(**overrides)
    path = tmp_path / "DiT.pt"
    torch.save(model.state_dict(), path)
    loaded = load_dit(path)
    assert same_state(loaded, model)
    assert loaded.config == model.config


def test_training_checkpoints_give_their_ema(tmp_path, make_dit, same_state):
    ema, model = make_dit(num_heads=1), make_dit(num_heads=1, num_classes=4)
    path = tmp_path / "0100000.pt"
    content = {
        "model": model.state_dict(),
        "args": argparse.Namespace(lr=1e-4),
        "opt": {"state": {}},
    }
    torch.save(content, path)
    assert same_state(load_dit(path), model)
    torch.save({**content, "ema": ema.state_dict()}, path)
    assert same_state(load_dit(path), ema)


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


def test_widths_whose_heads_cannot_be_told_are_refused(tmp_path, make_dit):
    path = tmp_path / "odd.pt"
    torch.save(make_dit(hidden_size=32).state_dict(), path)
    with pytest.raises(ValueError, match=r"number of heads.*hidden_size=32"):
        load_dit(path)


def test_the_caller_chooses_the_weights(tmp_path, make_dit, same_state):
    ema, model = make_dit(), make_dit(seed=1)
    both = {"ema": ema.state_dict(), "model": model.state_dict()}
    path = tmp_path / "0100000.pt"
    torch.save(both, path)
    assert same_state(load_dit(path), ema)
    assert same_state(load_dit(path, weights="model"), model)
    torch.save({"ema": both["ema"]}, path)
    with pytest.raises(ValueError, match="holds no 'model' weights, only 'ema'"):
        load_dit(path, weights="model")
    torch.save(both["model"], path)
    assert read_published(path, "ema")[0] == read_published(path, "model")[0] == "raw"


@pytest.mark.parametrize(
    "overrides",
    [{}, {"num_classes": 0}, {"hidden_size": 128, "num_heads": 2}, {"learn_sigma": False}],
)
def test_what_is_saved_is_what_is_loaded(tmp_path, make_dit, same_state, overrides):
    model = make_dit(**overrides)
    save_published(model, tmp_path / "new" / "DiT.pt")
    loaded = load_dit(tmp_path / "new" / "DiT.pt")
    assert same_state(loaded, model)
    assert loaded.config == model.config
    state = torch.load(tmp_path / "new" / "DiT.pt", weights_only=True)
    assert {"pos_embed", "blocks.0.attn.qkv.weight", "blocks.0.adaLN_modulation.1.weight"} <= set(
        state
    )


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_heads": 4}, "num_heads=4 as 1"),
        ({"hidden_size": 32}, "hidden_size=32"),
        ({"timestep_shift": 1}, "timestep_shift=1 as 0"),
        ({"norm2_eps": 1e-5}, "norm2_eps=1e-05 as 1e-06"),
        ({"class_dropout_prob": 0.0}, "num_classes=3 as 2"),
    ],
)
def test_what_would_be_read_back_as_another_model_is_refused(
    tmp_path, make_dit, overrides, message
):
    with pytest.raises(ValueError, match=message):
        save_published(make_dit(**overrides), tmp_path / "DiT.pt")
    assert not any(tmp_path.iterdir())


def test_a_full_disk_leaves_the_old_file(tmp_path, make_dit, monkeypatch):
    path = tmp_path / "DiT.pt"
    path.write_text("old")

    def fail(state, place):
        place.write_bytes(b"half")
        raise RuntimeError("write failed")

    monkeypatch.setattr(torch, "save", fail)
    with pytest.raises(OSError, match=r"DiT\.pt \(write failed\); free space"):
        save_published(make_dit(), path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
