import shutil

import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError

from dit_qat import quantize_
from dit_qat.dit.convert.difference import fixed_inputs, outputs
from dit_qat.dit.exporting import export_network
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT, load_dit, load_weights_, locate, packed_source, save_dit
from dit_qat.dit.models.packed_source import locate_weights
from dit_qat.layers import PackedLinear

COMMIT = "c" * 40


@pytest.fixture
def network(make_dit):
    return quantize_(make_dit(), RobuQ(activation_bits=3, rank=2).quant_config())


@pytest.fixture
def packed(network, tmp_path):
    export_network(network, tmp_path / "packed")
    return tmp_path / "packed"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder that stands for the repository org/name; what is asked for is remembered."""
    repository, cache = tmp_path / "repository", tmp_path / "snapshots" / COMMIT
    repository.mkdir()
    cache.mkdir(parents=True)
    asked = []

    def download(repo_id, name, revision=None, local_files_only=False):
        asked.append((name, revision))
        if not (repository / name).is_file():
            raise EntryNotFoundError(name)
        return shutil.copy(repository / name, cache / name)

    for module in (locate, packed_source):
        monkeypatch.setattr(module, "hf_hub_download", download)
    return repository, asked


def test_a_packed_folder_stays_packed(network, packed):
    loaded = DiT.from_pretrained(packed)
    assert isinstance(loaded.blocks[0].mlp.fc1, PackedLinear)
    inputs = fixed_inputs(network)
    torch.testing.assert_close(outputs(loaded, inputs), outputs(network.eval(), inputs))
    assert locate_weights(packed) == (packed, True)
    assert locate_weights(packed / "model.safetensors") == (packed, True)


def test_packed_weights_are_no_float_weights(packed, make_dit):
    """Wherever a training run would take them from: nothing is made float behind its back."""
    for source in (packed, packed / "model.safetensors"):
        with pytest.raises(ValueError, match=r"packed: holds packed.* dit_qat\.load_quantized"):
            load_dit(source)
        with pytest.raises(ValueError, match=r"to train \(model\.float_weights\), give the float"):
            load_weights_(make_dit(), source)
    (packed / "config.json").write_text("{")
    with pytest.raises(ValueError, match="holds packed weights"):
        load_dit(packed)


def test_a_packed_folder_without_tensors_is_told_apart(packed):
    (packed / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="holds packed weights"):
        load_dit(packed)


def test_a_packed_repository_is_no_float_one(packed, hub):
    shutil.copytree(packed, hub[0], dirs_exist_ok=True)
    with pytest.raises(ValueError, match="holds packed weights"):
        load_dit("org/name")


def test_float_weights_are_float_weights(make_dit, tmp_path, same_state):
    model = make_dit()
    model.save_pretrained(tmp_path / "float")
    assert locate_weights(tmp_path / "float") == (tmp_path / "float" / "model.safetensors", False)
    assert same_state(DiT.from_pretrained(tmp_path / "float"), model)
    assert not locate_weights("digits").packed


def test_a_packed_repository_is_downloaded_whole_and_of_one_commit(packed, hub):
    repository, asked = hub
    shutil.copytree(packed, repository, dirs_exist_ok=True)
    loaded = DiT.from_pretrained("org/name")
    assert isinstance(loaded.blocks[0].mlp.fc1, PackedLinear)
    assert asked == [("model.safetensors", None), ("config.json", COMMIT)]


def test_a_float_repository_is_asked_for_one_file(make_dit, hub, same_state):
    repository, asked = hub
    model = make_dit()
    save_dit(model, repository / "model.safetensors")
    assert same_state(DiT.from_pretrained("org/name"), model)
    assert asked == [("model.safetensors", None)]


def test_half_a_repository_is_explained(packed, hub):
    repository, _ = hub
    shutil.copy(packed / "model.safetensors", repository)
    with pytest.raises(OSError, match=r"org/name: holds packed weights, whose config\.json"):
        DiT.from_pretrained("org/name")
