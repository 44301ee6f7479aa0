import json
import shutil

import pytest
from huggingface_hub import constants
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError

from dit_qat.dit.models import dit_to_diffusers, load_dit, locate, save_dit
from dit_qat.dit.models.hub import HTTP_ERROR

COMMIT = "0" * 40


class FakeHub:
    """Stands for ``hf_hub_download``: repositories are folders, and the cache is one as well."""

    def __init__(self, root):
        self.repositories, self.cache = root / "hub", root / "snapshots" / COMMIT
        self.asked, self.revisions, self.reachable = [], [], True

    def download(self, repo, name, revision=None, local_files_only=False):
        self.asked.append((name, local_files_only))
        self.revisions.append(revision)
        cached, remote = self.cache / name, self.repositories / repo / name
        if cached.is_file():
            return str(cached)
        if local_files_only or not self.reachable:
            raise LocalEntryNotFoundError("Please check your connection\nand more")
        if not remote.is_file():
            raise EntryNotFoundError("404")
        cached.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(remote, cached)
        return str(cached)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    fake = FakeHub(tmp_path)
    monkeypatch.setattr(locate, "hf_hub_download", fake.download)
    return fake


@pytest.fixture
def saved(tmp_path, make_dit):
    path = tmp_path / "model.safetensors"
    save_dit(make_dit(), path)
    return path


@pytest.mark.parametrize("name", ["model.safetensors", "model.pt", "a/b/c", "model.bin", "o/n.pt"])
def test_missing_files_are_named(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match=rf"{name}: no such file; give an existing file"):
        load_dit(name)


def test_an_embedded_name_is_a_file_of_the_package(monkeypatch, tmp_path, make_dit, same_state):
    monkeypatch.setattr(locate.resources, "files", lambda package: tmp_path / package)
    save_dit(make_dit(), tmp_path / "dit_qat.dit" / "assets" / "digits_dit.safetensors")
    assert same_state(load_dit("digits"), make_dit())


def test_a_folder_is_what_is_in_it(tmp_path, saved, make_dit, same_state):
    assert same_state(load_dit(tmp_path), make_dit())
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(ValueError, match=r"empty: is a folder without float weights.*DiTPipeline"):
        load_dit(empty)
    # A pipeline without its transformer does not pass for a transformer.
    (empty / "model_index.json").write_text("{}")
    (empty / "config.json").write_text("{}")
    with pytest.raises(ValueError, match="without float weights"):
        load_dit(empty)


def test_of_a_repository_of_ours_one_file_is_downloaded(hub, make_dit, same_state):
    save_dit(make_dit(), hub.repositories / "org" / "name" / "model.safetensors")
    assert same_state(load_dit("org/name"), make_dit())
    assert hub.asked == [("model.safetensors", False)]


@pytest.mark.parametrize("prefix", ["", "transformer/"])
@pytest.mark.parametrize("sharded", [False, True])
def test_of_a_repository_of_diffusers_only_the_transformer_is_downloaded(
    hub, make_dit, same_state, prefix, sharded
):
    model, repository = make_dit(timestep_shift=1), hub.repositories / "org" / "name"
    size = "200KB" if sharded else "10GB"
    dit_to_diffusers(model).save_pretrained(repository / prefix, max_shard_size=size)
    (repository / "vae").mkdir()
    (repository / "vae" / "config.json").write_text("{}")
    if prefix:
        (repository / "model_index.json").write_text("{}")
    assert same_state(load_dit("org/name"), model)
    downloaded = {
        str(path.relative_to(hub.cache)) for path in hub.cache.rglob("*") if path.is_file()
    }
    wanted = {str(path.relative_to(repository)) for path in repository.rglob("*") if path.is_file()}
    assert downloaded == wanted - {"vae/config.json"}
    assert len(downloaded) > 3 if sharded else len(downloaded) <= 3
    first = next(i for i, revision in enumerate(hub.revisions) if revision)
    assert set(hub.revisions[first:]) == {COMMIT}


def test_what_is_in_the_cache_needs_no_connection(hub, make_dit, same_state):
    model, repository = make_dit(timestep_shift=1), hub.repositories / "org" / "name"
    dit_to_diffusers(model).save_pretrained(repository / "transformer")
    (repository / "model_index.json").write_text("{}")
    load_dit("org/name")
    hub.reachable, hub.asked = False, []
    assert same_state(load_dit("org/name"), model)
    # A hub that cannot be reached is asked once, for each time takes half a minute.
    assert [local for _, local in hub.asked] == [False] + [True] * (len(hub.asked) - 1)


def test_a_hub_that_cannot_be_reached_is_explained(hub):
    hub.reachable = False
    with pytest.raises(FileNotFoundError) as error:
        load_dit("org/name")
    message = str(error.value)
    for part in ("org/name: no such file", "check your connection)", "tried model.safetensors,"):
        assert part in message
    assert "hf download org/name --local-dir FOLDER" in message
    assert "\n" not in message


def test_an_interrupted_download_is_explained(hub, make_dit):
    repository = hub.repositories / "org" / "name"
    dit_to_diffusers(make_dit(timestep_shift=1)).save_pretrained(repository, max_shard_size="200KB")
    shard = sorted(repository.glob("*.safetensors"))[-1]
    shard.unlink()
    with pytest.raises(FileNotFoundError, match=rf"tried .*{shard.name}"):
        load_dit("org/name")


def test_a_repository_of_something_else_is_explained(hub):
    (hub.repositories / "org" / "name").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"org/name: .*holds no float DiT \(tried model"):
        load_dit("org/name")


def test_a_repository_that_is_not_there_is_explained(monkeypatch):
    def fail(*_, **__):
        raise HFValidationError("Repo id must be")

    monkeypatch.setattr(locate, "hf_hub_download", fail)
    with pytest.raises(FileNotFoundError, match=r"or-/name: .*HFValidationError.*hf auth login"):
        load_dit("or-/name")


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), HTTP_ERROR("timed out")])
def test_a_download_that_breaks_off_is_no_wrong_name(monkeypatch, error):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(locate, "hf_hub_download", fail)
    with pytest.raises(
        OSError, match=r"org/name: model\.safetensors could not .*HF_HOME"
    ) as raised:
        load_dit("org/name")
    assert str(error) in str(raised.value)
    assert "check the name" not in str(raised.value)


def test_the_hubs_own_cache_serves_offline(tmp_path, monkeypatch, make_dit, same_state):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    model, cached = make_dit(timestep_shift=1), tmp_path / "models--org--name"
    folder = cached / "snapshots" / COMMIT
    dit_to_diffusers(model).save_pretrained(folder / "transformer")
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "DiTPipeline"}))
    with pytest.raises(FileNotFoundError, match="the hub cannot be reached"):
        load_dit("org/name")
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(COMMIT)
    assert same_state(load_dit("org/name"), model)
