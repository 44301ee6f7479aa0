import json

import pytest
import torch
from safetensors.torch import load_file

from dit_qat.dit.models import dit_to_diffusers, load_dit

WHOLE, INDEX = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
)


@pytest.fixture
def model(make_dit):
    return make_dit(timestep_shift=1, norm2_eps=1e-5)


@pytest.fixture
def folder(tmp_path, model):
    dit_to_diffusers(model).save_pretrained(tmp_path / "transformer")
    return tmp_path / "transformer"


@pytest.fixture
def sharded(tmp_path, model):
    dit_to_diffusers(model).save_pretrained(tmp_path / "sharded", max_shard_size="200KB")
    return tmp_path / "sharded"


def edited(path, **changes):
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


def test_whole_and_sharded_folders_give_the_same(folder, sharded, model, same_state):
    assert len(list(sharded.glob("*.safetensors"))) > 1
    for source in (folder, sharded):
        loaded = load_dit(source)
        assert loaded.config == model.config
        assert same_state(loaded, model)


def test_the_folder_of_a_pipeline_is_its_transformer(folder, model, same_state):
    (folder.parent / "model_index.json").write_text("{}")
    assert same_state(load_dit(folder.parent), model)


def test_folders_as_first_published_load(folder, model, same_state):
    """A .bin, the older class's name and arguments, and a stored table of positions."""
    state = load_file(folder / WHOLE) | {"pos_embed.pos_embed": torch.zeros(1, 4, 64)}
    (folder / WHOLE).unlink()
    torch.save(state, folder / "diffusion_pytorch_model.bin")
    edited(folder / "config.json", _class_name="Transformer2DModel", use_linear_projection=False)
    assert same_state(load_dit(folder), model)


def test_weights_in_half_precision_become_float(tmp_path, model):
    dit_to_diffusers(model).half().save_pretrained(tmp_path)
    loaded = load_dit(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    weight = model.blocks[1].mlp.fc1.weight
    assert torch.equal(loaded.blocks[1].mlp.fc1.weight, weight.half().float())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "UNet2DModel"}, "names UNet2DModel, not a DiTTransformer2DModel"),
        ({"_class_name": None}, "names no class.*load_quantized"),
        ({"num_layers": 3}, r"lack 'transformer_blocks\.2.*num_layers=3"),
        ({"num_layers": "two"}, "transformer: "),
        ({"sample_size": None}, "lacks sample_size"),
        ({"num_embeds_ada_norm": 5}, r"embedding_table\.weight has shape \(4, 64\).*\(6, 64\)"),
    ],
)
def test_configurations_that_do_not_fit_are_named(folder, changes, message):
    edited(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=rf"transformer: .*{message}|{message}"):
        load_dit(folder)


@pytest.mark.parametrize("name", ["config.json", WHOLE])
def test_damaged_files_are_named(folder, name):
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"transformer/{name}: "):
        load_dit(folder)


def test_a_missing_shard_is_named(sharded):
    shard = sorted(sharded.glob("*.safetensors"))[0]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{shard.name}: no such file, but .* lists it"):
        load_dit(sharded)


def test_an_index_that_leaves_the_folder_is_refused(sharded):
    edited(sharded / INDEX, weight_map={"a": "../elsewhere.safetensors"})
    with pytest.raises(ValueError, match="lists no weight files of its folder"):
        load_dit(sharded)


def test_a_folder_without_weights_is_named(folder):
    (folder / WHOLE).unlink()
    with pytest.raises(FileNotFoundError, match=r"transformer: no weights beside its config\.json"):
        load_dit(folder)
