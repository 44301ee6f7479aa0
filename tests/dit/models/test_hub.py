import copy
import json
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import constants

from dit_qat import LayerConfig, Rule, quantize_
from dit_qat.dit.models import DiT, hub
from dit_qat.export import write_packed


class FakeApi:
    """Remembers what it is asked to do; uploads are kept as bytes."""

    calls: list[tuple[str, dict]]
    uploaded: dict[str, bytes]

    def __init__(self, token=None):
        type(self).calls, type(self).uploaded = [("token", {"token": token})], {}

    def create_repo(self, repo_id, **options):
        self.calls.append(("create_repo", {"repo_id": repo_id, **options}))

    def create_branch(self, repo_id, **options):
        self.calls.append(("create_branch", {"repo_id": repo_id, **options}))

    def upload_folder(self, *, folder_path, **options):
        self.calls.append(("upload_folder", options))
        self.uploaded.update({path.name: path.read_bytes() for path in folder_path.iterdir()})
        return SimpleNamespace(commit_url="https://hub/commit/1")

    def create_commit(self, *, operations, **options):
        self.calls.append(("create_commit", options))
        for operation in operations:
            with operation.as_file() as file:
                self.uploaded[operation.path_in_repo] = file.read()
        return SimpleNamespace(commit_url="https://hub/commit/2")


def contents_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_folder_holds_the_model(tmp_path, make_dit, same_state):
    model, folder = make_dit(timestep_shift=1), tmp_path / "new" / "my-dit"
    model.save_pretrained(folder, license="mit")
    assert {path.name for path in folder.iterdir()} == {
        "README.md",
        "config.json",
        "model.safetensors",
    }
    loaded = DiT.from_pretrained(folder)
    assert same_state(loaded, model)
    assert loaded.config == model.config
    config = json.loads((folder / "config.json").read_text())
    assert config.pop("model_type") == "dit_qat"
    assert config == model.config
    card = (folder / "README.md").read_text()
    for part in ("\nlicense: mit\n---\n", "# my-dit", "3 classes", 'from_pretrained("my-dit")'):
        assert part in card
    assert str(tmp_path) not in card
    model.save_pretrained(folder)
    assert "license" not in (folder / "README.md").read_text()


def test_what_is_pushed_is_what_is_saved(tmp_path, monkeypatch, make_dit):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    model = make_dit()
    address = model.push_to_hub(
        "org/name", private=True, token="secret", revision="beta", commit_message="Hello"
    )
    assert address == "https://hub/commit/1"
    assert FakeApi.calls == [
        ("token", {"token": "secret"}),
        ("create_repo", {"repo_id": "org/name", "private": True, "exist_ok": True}),
        ("create_branch", {"repo_id": "org/name", "branch": "beta", "exist_ok": True}),
        (
            "upload_folder",
            {"repo_id": "org/name", "revision": "beta", "commit_message": "Hello"},
        ),
    ]
    model.save_pretrained(tmp_path / "name")
    assert FakeApi.uploaded.keys() == {path.name for path in (tmp_path / "name").iterdir()}
    for name in ("model.safetensors", "config.json"):
        assert FakeApi.uploaded[name] == (tmp_path / "name" / name).read_bytes()
    assert b'from_pretrained("org/name")' in FakeApi.uploaded["README.md"]


def test_without_a_revision_no_branch_is_made(monkeypatch, make_dit):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    make_dit().push_to_hub("org/name")
    assert [name for name, _ in FakeApi.calls] == ["token", "create_repo", "upload_folder"]


def test_the_real_client_offline_is_explained(monkeypatch, make_dit):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"org/name: not uploaded \(.*HF_HUB_OFFLINE.*hf upload"):
        make_dit().push_to_hub("org/name", token="x")


def test_errors_of_the_http_library_are_explained(monkeypatch, make_dit):
    def fail(self, repo_id, **options):
        raise hub.HTTP_ERROR("no route")

    monkeypatch.setattr(FakeApi, "create_repo", fail)
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    with pytest.raises(OSError, match=r"org/name: not uploaded \(.*no route.*write permission"):
        make_dit().push_to_hub("org/name")


def test_quantized_models_are_refused_before_anything_is_sent(monkeypatch, tmp_path, make_dit):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    FakeApi.calls = []
    model = quantize_(make_dit(), [Rule("blocks.0.mlp.fc1", LayerConfig())])
    with pytest.raises(ValueError, match="quantized layer"):
        model.push_to_hub("org/name")
    assert FakeApi.calls == []
    with pytest.raises(ValueError, match="quantized layer"):
        model.save_pretrained(tmp_path / "folder")
    assert not any(tmp_path.iterdir())


def test_the_mixin_leaves_the_module_as_it_was(make_dit, same_state):
    model = make_dit()
    twin = copy.deepcopy(model)
    assert same_state(twin, model)
    assert not any("hub" in name for name in model.state_dict())
    assert list(DiT.__mro__)[:2] == [DiT, torch.nn.Module]


@pytest.fixture
def packed(tmp_path, make_dit):
    network = quantize_(make_dit(), [Rule("blocks.*.mlp.*", LayerConfig(low_rank=None))])
    write_packed(network, tmp_path / "packed")
    return tmp_path / "packed"


def test_a_packed_folder_is_pushed_in_one_commit(packed, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    before = contents_of(packed)
    address = hub.push_packed_to_hub(
        packed, "org/name", private=True, revision="beta", commit_message="Hello", license="mit"
    )
    assert address == "https://hub/commit/2"
    assert [name for name, _ in FakeApi.calls] == [
        "token",
        "create_repo",
        "create_branch",
        "create_commit",
    ]
    assert FakeApi.calls[-1][1] == {
        "repo_id": "org/name",
        "revision": "beta",
        "commit_message": "Hello",
    }
    assert FakeApi.uploaded.keys() == {"config.json", "model.safetensors", "README.md"}
    for name in ("config.json", "model.safetensors"):
        assert FakeApi.uploaded[name] == (packed / name).read_bytes()
    card = FakeApi.uploaded["README.md"].decode()
    for part in ("\nlicense: mit\n---\n", 'from_pretrained("org/name")', "4 linear layers"):
        assert part in card
    assert contents_of(packed) == before


def test_a_damaged_folder_is_not_pushed(packed, monkeypatch):
    monkeypatch.setattr(hub, "HfApi", FakeApi)
    FakeApi.calls = []
    content = bytearray((packed / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (packed / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match="are not those that were written"):
        hub.push_packed_to_hub(packed, "org/name")
    assert FakeApi.calls == []


def test_a_hub_that_refuses_a_packed_folder_is_explained(packed, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match=r"org/name: not uploaded \(.*upload the folder"):
        hub.push_packed_to_hub(packed, "org/name", token="x")
