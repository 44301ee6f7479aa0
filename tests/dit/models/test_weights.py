import pytest
import torch

from dit_qat.dit.models import dit_to_diffusers, load_dit, load_weights_, save_dit


@pytest.mark.parametrize("size", [0, 5, 200, -100])
@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_truncated_files_are_named(tmp_path, kind, size, make_dit):
    path = tmp_path / f"model{kind}"
    if kind == ".pt":
        torch.save(make_dit().state_dict(), path)
    else:
        save_dit(make_dit(), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=rf"model{kind}: truncated or not a"):
        load_dit(path)


@pytest.mark.parametrize("kind", [".safetensors", ".pt"])
def test_files_of_another_format_are_named(tmp_path, kind):
    path = tmp_path / f"model{kind}"
    path.write_text("<html>Not Found</html>\n" * 100)
    with pytest.raises(ValueError, match=rf"model{kind}: truncated or not a"):
        load_dit(path)


def test_unknown_suffixes_are_refused(tmp_path):
    for name, message in (("m.onnx", r"unknown format '\.onnx'"), ("m.ckpt", "dit-qat convert")):
        (tmp_path / name).write_text("")
        with pytest.raises(ValueError, match=message):
            load_dit(tmp_path / name)


def test_weights_of_every_kind_go_into_a_model(tmp_path, make_dit, same_state):
    source = make_dit(timestep_shift=1, norm2_eps=1e-5)
    dit_to_diffusers(source).save_pretrained(tmp_path / "theirs")
    save_dit(source, tmp_path / "ours.safetensors")
    for name in ("theirs", "ours.safetensors"):
        target = make_dit(seed=1, timestep_shift=1, norm2_eps=1e-5)
        assert not same_state(target, source)
        load_weights_(target, tmp_path / name)
        assert same_state(target, source)
        assert not target.pos_embed.requires_grad
        assert target.x_embedder.proj.weight.requires_grad
    with pytest.raises(ValueError, match="timestep_shift=1 in the file, 0 here"):
        load_weights_(make_dit(norm2_eps=1e-5), tmp_path / "theirs")


@pytest.mark.parametrize("name", ["theirs", "ours.safetensors"])
def test_loading_draws_no_random_numbers(tmp_path, make_dit, name):
    source = make_dit(timestep_shift=1)
    dit_to_diffusers(source).save_pretrained(tmp_path / "theirs")
    save_dit(source, tmp_path / "ours.safetensors")
    before = torch.get_rng_state()
    load_dit(tmp_path / name)
    assert torch.equal(torch.get_rng_state(), before)
