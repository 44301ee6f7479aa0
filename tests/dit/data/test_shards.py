import dataclasses
import errno
import hashlib
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from dit_qat.dit.data import shards as module
from dit_qat.dit.data.shards import (
    DamagedShardError,
    Index,
    Settings,
    ShardFile,
    file_sha256,
    read_index,
    shard_name,
    write_index,
    write_shard,
)
from dit_qat.dit.models.autoencoder import LatentSpace

SPACE = LatentSpace("somewhere", "ab" * 32, 0.18215, 0.0, 3, 2)


def make_settings(**overrides):
    source = {"kind": "Folder", "root": "/here", "num_images": 5, "num_classes": 0, "sha256": "cd"}
    values = {"latent_space": SPACE, "image_size": 8, "crop": "adm-center", "dtype": "float16"}
    return Settings(**(values | {"shard_images": 5, "source": source} | overrides))


def make_content(settings, count=5):
    generator = torch.Generator().manual_seed(0)
    moments = torch.randn(count, *settings.image_shape, generator=generator)
    return moments.to(getattr(torch, settings.dtype)), torch.arange(count) * 10


@pytest.fixture
def settings():
    return make_settings()


@pytest.fixture
def written(tmp_path, settings):
    path = tmp_path / shard_name(0)
    return path, write_shard(path, *make_content(settings), settings, ["a.png: broken"])


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_shard_gives_back_what_was_written(tmp_path, dtype):
    settings = make_settings(dtype=dtype)
    moments, labels = make_content(settings)
    path = tmp_path / "shard"
    listed = write_shard(path, moments, labels, settings, ["a.png: broken"])
    shard = ShardFile(path)
    assert shard.settings == settings
    assert shard.skipped == listed.skipped == ("a.png: broken",)
    assert shard.count == listed.count == 5
    assert (shard.moments == moments.numpy()).all()
    assert torch.equal(shard.labels, labels)
    assert listed.bytes == path.stat().st_size
    assert listed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() == file_sha256(path)
    shard.check(listed, settings, checksum=True)


def test_shards_are_ordinary_safetensors_files(written, settings):
    with safe_open(written[0], framework="np") as file:
        moments, labels = make_content(settings)
        assert (file.get_tensor("moments") == moments.numpy()).all()
        assert (file.get_tensor("labels") == labels.numpy()).all()
        record = json.loads(file.metadata()["dit_qat"])
    assert record["latent_space"] == dataclasses.asdict(SPACE)


def test_the_format_is_read_as_its_page_describes(written, settings):
    path, _ = written
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, body = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    start, stop = header["moments"]["data_offsets"]
    found = np.frombuffer(body[start:stop], "<f2").reshape(header["moments"]["shape"])
    assert (found == make_content(settings)[0].numpy()).all()


def test_equal_shards_are_equal_files(tmp_path, settings):
    hashes = {
        write_shard(tmp_path / str(i), *make_content(settings), settings, ["x"]).sha256
        for i in range(5)
    }
    assert len(hashes) == 1


def test_a_shard_of_broken_pictures_only_is_empty(tmp_path, settings):
    listed = write_shard(tmp_path / "s", *make_content(settings, 0), settings, ["x"] * 5)
    shard = ShardFile(tmp_path / "s")
    shard.check(listed, settings, checksum=True)
    assert shard.count == 0


OPEN_FILES = Path("/proc/self/fd")


@pytest.mark.skipif(not OPEN_FILES.is_dir(), reason="open files are listed on Linux only")
def test_a_mapped_shard_keeps_no_file_open(written):
    before = len(list(OPEN_FILES.iterdir()))
    shard = ShardFile(written[0])
    assert shard.moments.shape[0] == 5
    assert len(list(OPEN_FILES.iterdir())) == before


def test_a_mapped_shard_travels_to_other_processes_without_its_moments(written):
    shard = ShardFile(written[0])
    travelled = pickle.dumps((shard, shard.moments.sum())[0])
    assert len(travelled) < written[1].bytes
    assert (pickle.loads(travelled).moments == shard.moments).all()


@pytest.mark.parametrize("kept", [0, 5, 200, -1])
def test_a_shard_that_is_cut_short_is_named(written, kept):
    path, _ = written
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(DamagedShardError, match=r"moments-00000\.safetensors: damaged"):
        ShardFile(path)


def test_a_shard_that_is_not_there_is_named(tmp_path):
    with pytest.raises(
        DamagedShardError, match=r"moments-00003\.safetensors: missing; run dit-qat"
    ):
        ShardFile(tmp_path / shard_name(3))


def test_a_flipped_bit_is_found_by_the_checksum_only(written, settings):
    path, listed = written
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw)
    shard = ShardFile(path)
    shard.check(listed, settings, checksum=False)
    with pytest.raises(DamagedShardError, match="its sha256 is not that in the index"):
        shard.check(listed, settings, checksum=True)


def test_a_shard_of_another_cache_is_named(written, settings):
    path, listed = written
    other = dataclasses.replace(settings, crop="none")
    with pytest.raises(DamagedShardError, match="crop 'adm-center' instead of 'none'"):
        ShardFile(path).check(listed, other, checksum=False)
    shorter = dataclasses.replace(listed, count=4)
    with pytest.raises(DamagedShardError, match=r"5 images in .* but the index says 4"):
        ShardFile(path).check(shorter, settings, checksum=False)


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_no_space_left_names_the_file_and_the_cure(tmp_path, settings, monkeypatch, code):
    def full(path, content):
        with path.open("wb") as file:
            file.write(content[:100])
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(module.Path, "write_bytes", full)
    with pytest.raises(OSError, match=r"shard: no space left .* make room and run the same"):
        write_shard(tmp_path / "shard", *make_content(settings), settings, [])
    assert list(tmp_path.iterdir()) == []


def test_settings_differ_in_what_counts_and_not_in_places():
    one = make_settings()
    moved = make_settings(
        latent_space=dataclasses.replace(SPACE, source="elsewhere"),
        source={**one.source, "root": "/there"},
    )
    assert one.differences(moved) == []
    other = make_settings(
        latent_space=dataclasses.replace(SPACE, sha256="ef" * 32),
        image_size=16,
        source={**one.source, "num_images": 6},
    )
    assert other.differences(one) == [
        f"latent_space.sha256 {'ef' * 32!r} instead of {'ab' * 32!r}",
        "image_size 16 instead of 8",
        "source.num_images 6 instead of 5",
    ]


def test_the_index_gives_back_what_was_written(tmp_path, settings, written):
    index = Index(settings, (written[1], dataclasses.replace(written[1], first=5)))
    write_index(tmp_path, index)
    assert read_index(tmp_path) == index
    assert (index.num_images, index.num_classes) == (10, 0)
    content = json.loads((tmp_path / "index.json").read_text())
    assert (content["format"], content["version"]) == ("dit-qat-latents", 1)
    assert content["num_images"] == 10


def test_an_index_that_cannot_be_read_is_named(tmp_path, settings):
    with pytest.raises(FileNotFoundError, match="no latent cache or an unfinished one"):
        read_index(tmp_path)
    write_index(tmp_path, Index(settings, ()))
    path = tmp_path / "index.json"
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"version": 2}))
    with pytest.raises(ValueError, match="version 2; this dit_qat reads 'dit-qat-latents'"):
        read_index(tmp_path)
    path.write_text(json.dumps({**content, "shards": [{"name": "x"}]}))
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        read_index(tmp_path)
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"index\.json: damaged"):
        read_index(tmp_path)
