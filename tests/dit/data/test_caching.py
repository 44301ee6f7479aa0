import json
import shutil
import threading
from itertools import pairwise

import numpy as np
import pytest
import torch

from dit_qat.dit.data import caching, encoding
from dit_qat.dit.data.caching import write_cache
from dit_qat.dit.data.pictures import BrokenPictureError, image_of, model_space
from dit_qat.dit.data.shards import ShardFile, read_index, shard_name
from dit_qat.dit.data.sources import Folder, ImageFolder
from dit_qat.dit.processes import Processes
from dit_qat.export.files import locked


def contents(root):
    return {path.name: path.read_bytes() for path in root.iterdir() if path.name != ".lock"}


class Group:
    """Processes as threads: every one runs the job with its own rank."""

    def __init__(self, size):
        self.size, self.values = size, [None] * size
        self.barrier = threading.Barrier(size, timeout=300)

    def run(self, action):
        outcomes = [None] * self.size

        def enter(rank):
            try:
                outcomes[rank] = action(self._member(rank))
            except Exception as error:
                outcomes[rank] = error

        threads = [threading.Thread(target=enter, args=(rank,)) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return outcomes

    def _member(self, rank):
        group = self

        class Member(Processes):
            def gather(self, value):
                group.values[rank] = value
                group.barrier.wait()
                values = list(group.values)
                group.barrier.wait()
                return values

        return Member(rank, self.size, torch.device("cpu"))


def test_moments_are_those_of_both_mirrors(cached, class_folders, autoencoder):
    pictures, index = ImageFolder(class_folders), read_index(cached)
    stored = np.concatenate([ShardFile(cached / shard.name).moments for shard in index.shards])
    assert stored.shape == (14, 2, 2, 4, 8, 8)
    for number in (0, 5, 13):
        image = model_space(image_of(pictures, number, 16)).unsqueeze(0)
        for mirror, pixels in enumerate((image, image.flip(-1))):
            expected = torch.stack(autoencoder.encode(pixels), dim=1)[0]
            found = torch.from_numpy(stored[number, mirror]).float()
            assert torch.allclose(found, expected, rtol=2e-3, atol=1e-4)


def test_the_mirror_is_not_a_flipped_latent(cached):
    # Which is why both are stored.
    moments = ShardFile(cached / shard_name(0)).moments
    assert np.abs(moments[:, 1, 0] - moments[:, 0, 0, :, :, ::-1]).max() > 0.01


def test_the_index_lists_every_image_once(cached, class_folders):
    index = read_index(cached)
    assert [(shard.first, shard.count) for shard in index.shards] == [
        (0, 4),
        (4, 4),
        (8, 4),
        (12, 2),
    ]
    assert (index.num_images, index.num_classes) == (14, 2)
    labels = torch.cat([ShardFile(cached / shard.name).labels for shard in index.shards])
    assert labels.tolist() == [0] * 7 + [1] * 7
    assert index.settings.source["root"] == str(class_folders)
    for shard in index.shards:
        ShardFile(cached / shard.name).check(shard, index.settings, checksum=True)


@pytest.mark.parametrize("size", [2, 3, 6])
def test_any_number_of_processes_writes_the_same_files(cached, tmp_path, make_job, size):
    results = Group(size).run(lambda processes: write_cache(tmp_path, make_job(), processes))
    assert contents(tmp_path) == contents(cached)
    assert [result.encoded for result in results] == [14] * size


def test_loader_processes_change_nothing(cached, tmp_path, make_job, alone):
    write_cache(tmp_path, make_job(num_workers=1), alone)
    assert contents(tmp_path) == contents(cached)


def test_a_finished_cache_is_left_as_it_is(cached, make_job, alone):
    before = {path: path.stat().st_mtime_ns for path in cached.glob("*.safetensors")}
    assert write_cache(cached, make_job(), alone).encoded == 0
    assert {path: path.stat().st_mtime_ns for path in cached.glob("*.safetensors")} == before


class Killed(BaseException):
    pass


@pytest.mark.parametrize("survivors", [0, 1, 3])
def test_a_killed_run_continues_where_it_was(
    cached, tmp_path, make_job, alone, monkeypatch, survivors
):
    write, calls = encoding.write_shard, []

    def write_or_die(path, *arguments):
        if len(calls) == survivors:
            raise Killed
        calls.append(path.name)
        return write(path, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "write_shard", write_or_die)
        with pytest.raises(Killed):
            write_cache(tmp_path, make_job(), alone)
    assert sorted(contents(tmp_path)) == calls  # and no index
    result = write_cache(tmp_path, make_job(), alone)
    assert result.encoded == 14 - 4 * survivors
    assert contents(tmp_path) == contents(cached)


def test_damaged_and_missing_shards_are_written_again(cached, tmp_path, make_job, alone, caplog):
    root = shutil.copytree(cached, tmp_path / "copy")
    flipped = bytearray((root / shard_name(0)).read_bytes())
    flipped[-1] ^= 1
    (root / shard_name(0)).write_bytes(flipped)
    (root / shard_name(1)).write_bytes(b"short")
    (root / shard_name(3)).unlink()
    assert write_cache(root, make_job(), alone).encoded == 4 + 4 + 2
    assert contents(root) == contents(cached)
    assert "its sha256 is not that in the index" in caplog.text
    assert "moments-00001.safetensors: damaged" in caplog.text


def test_a_damaged_index_is_written_again(cached, tmp_path, make_job, alone):
    root = shutil.copytree(cached, tmp_path / "copy")
    (root / "index.json").write_text("{")
    assert write_cache(root, make_job(), alone).encoded == 0
    assert contents(root) == contents(cached)


@pytest.mark.parametrize("indexed", [True, False])
def test_other_settings_are_refused_by_name(
    cached, tmp_path, make_job, make_autoencoder, class_folders, alone, indexed
):
    root = shutil.copytree(cached, tmp_path / "copy")
    if not indexed:
        (root / "index.json").unlink()
    before = contents(root)
    others = {
        "latent_space.sha256": make_job(autoencoder=make_autoencoder(1)),
        "latent_space.scaling_factor": make_job(autoencoder=make_autoencoder(scaling_factor=0.25)),
        "image_size 16 instead of 32": make_job(size=32),
        "dtype 'float16' instead of 'float32'": make_job(dtype="float32"),
        "shard_images 4 instead of 5": make_job(shard_images=5),
        "source.kind 'ImageFolder' instead of 'Folder'": make_job(pictures=Folder(class_folders)),
    }
    for name, job in others.items():
        with pytest.raises(ValueError, match=f"was written with .*{name}"):
            write_cache(root, job, alone)
    assert contents(root) == before


def test_pictures_in_another_order_are_refused(cached, tmp_path, class_folders, make_job, alone):
    moved = shutil.copytree(class_folders, tmp_path / "pictures")
    root = shutil.copytree(cached, tmp_path / "copy")
    assert write_cache(root, make_job(pictures=ImageFolder(moved)), alone).encoded == 0
    (moved / "tench" / "3.png").rename(moved / "tench" / "8.png")
    with pytest.raises(ValueError, match=r"source\.sha256"):
        write_cache(root, make_job(pictures=ImageFolder(moved)), alone)


@pytest.fixture
def broken(class_folders, tmp_path):
    root = shutil.copytree(class_folders, tmp_path / "pictures")
    for name in ("goldfish/2.png", "goldfish/5.png"):
        (root / name).write_bytes(b"no picture")
    return ImageFolder(root)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_picture_stops_the_run_by_name(tmp_path, make_job, alone, broken, workers):
    job = make_job(pictures=broken, num_workers=workers)
    with pytest.raises(BrokenPictureError, match=r"goldfish/2\.png: cannot .* --skip_broken true"):
        write_cache(tmp_path / "cache", job, alone)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_file_that_cannot_be_read_is_not_skipped_as_broken(
    tmp_path, class_folders, make_job, alone, workers
):
    pictures = ImageFolder(shutil.copytree(class_folders, tmp_path / "pictures"))
    assert len(pictures) == 14
    (tmp_path / "pictures" / "tench" / "3.png").unlink()  # as when a disk is gone
    job = make_job(pictures=pictures, skip_broken=True, num_workers=workers)
    with pytest.raises(OSError, match=r"^\S*tench/3\.png: cannot be read \(No such file"):
        write_cache(tmp_path / "cache", job, alone)


def test_broken_pictures_are_skipped_on_record(tmp_path, make_job, alone, broken):
    root = tmp_path / "cache"
    index = write_cache(root, make_job(pictures=broken, skip_broken=True), alone).index
    assert [shard.count for shard in index.shards] == [3, 3, 4, 2]
    assert [shard.first for shard in index.shards] == [0, 3, 6, 10]
    skipped = [name for shard in read_index(root).shards for name in shard.skipped]
    assert [name.partition(":")[0] for name in skipped] == [broken.name(2), broken.name(5)]
    assert write_cache(root, make_job(pictures=broken), alone).encoded == 0  # they stay skipped


def test_one_process_that_fails_fails_all(tmp_path, make_job, broken):
    def run(processes):
        return write_cache(tmp_path / "cache", make_job(pictures=broken), processes)

    outcomes = Group(2).run(run)
    assert isinstance(outcomes[0], BrokenPictureError)
    assert isinstance(outcomes[1], ValueError)
    assert "process 0 failed" in str(outcomes[1]) or "goldfish" in str(outcomes[1])


def test_two_runs_do_not_write_to_one_folder(tmp_path, make_job, alone):
    with locked(tmp_path), pytest.raises(BlockingIOError, match="another run is writing"):
        write_cache(tmp_path, make_job(), alone)


def test_too_little_space_is_said_before_the_work(tmp_path, make_job, alone, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=10_000)
    monkeypatch.setattr(caching.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(OSError, match=r"14 images need 28\.8 kB, but 10\.0 kB are free"):
        write_cache(tmp_path, make_job(), alone)
    assert contents(tmp_path) == {}


def test_a_file_is_no_folder(tmp_path, make_job, alone):
    (tmp_path / "file").touch()
    for outcome in Group(2).run(lambda found: write_cache(tmp_path / "file", make_job(), found)):
        assert "is a file" in str(outcome)  # on both: neither is left waiting
    with pytest.raises(NotADirectoryError, match="is a file"):
        write_cache(tmp_path / "file", make_job(), alone)


def test_moments_that_float16_cannot_hold_are_refused(tmp_path, make_job, make_autoencoder, alone):
    large = make_autoencoder()
    with torch.no_grad():
        large.network.quant_conv.weight.mul_(1e6)
    with pytest.raises(ValueError, match="not finite in float16; pass --dtype float32"):
        write_cache(tmp_path, make_job(autoencoder=large), alone)
    write_cache(tmp_path, make_job(autoencoder=large, dtype="float32"), alone)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 15}, "image size 15 is no multiple of 2"),
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"num_workers": -1}, "num_workers=-1 must be at least 0"),
        ({"dtype": "int8"}, "dtype='int8' is none of float16, float32"),
    ],
)
def test_options_out_of_range_are_refused(make_job, options, message):
    with pytest.raises(ValueError, match=message):
        make_job(**options)


def test_the_size_that_is_stated_is_the_size_on_disk(cached, make_job):
    job = make_job()
    on_disk = sum(path.stat().st_size for path in cached.glob("*.safetensors"))
    header = 2000 * len(job.shards)
    assert job.bytes_of(14) <= on_disk <= job.bytes_of(14) + header
    assert "14 images x 2 mirrors x 2 moments x 4x8x8 float16 = 28.8 kB in 4" in job.describe()


def test_the_shards_of_a_job_cover_the_pictures(make_job):
    shards = make_job().shards
    assert [number for shard in shards for number in shard] == list(range(14))
    assert all(left.stop == right.start for left, right in pairwise(shards))


def test_the_record_is_plain(cached):
    assert json.loads((cached / "index.json").read_text())["source"]["num_images"] == 14
