import hashlib
import tracemalloc

import numpy as np
import pytest
import torch
from PIL import Image

from dit_qat.dit.evaluation.images import load_images, save_images, save_npz
from dit_qat.dit.evaluation.sources import file_sha256, open_images


def save_shards(folder, images, size, name="{:08d}.npz"):
    folder.mkdir(parents=True)
    for first in range(0, len(images), size):
        save_npz(folder / name.format(first), images[first : first + size])


@pytest.fixture
def images(make_images):
    return make_images(11, shape=(3, 6, 4))


@pytest.fixture(params=["png", "npz", "compressed", "shards", "sample npz", "sample images"])
def stored(request, images, tmp_path):
    """The same images in every form that can be opened."""
    array = images.permute(0, 2, 3, 1).numpy()
    match request.param:
        case "png":
            save_images(tmp_path / "x", images, range(11))
        case "npz":
            save_npz(tmp_path / "x.npz", images)
            return tmp_path / "x.npz"
        case "compressed":
            np.savez_compressed(tmp_path / "x.npz", labels=np.arange(11), arr_0=array)
            return tmp_path / "x.npz"
        case "shards":
            save_shards(tmp_path / "x" / "shards", images, 4)
        case "sample npz":
            save_images(tmp_path / "x" / "images", images.flip(0), range(11))
            save_npz(tmp_path / "x" / "samples.npz", images)
        case "sample images":
            save_images(tmp_path / "x" / "images", images, range(11))
            Image.new("RGB", (50, 50)).save(tmp_path / "x" / "grid.png")
    return tmp_path / "x"


@pytest.mark.parametrize("size", [1, 3, 4, 5, 11, 100])
def test_batches_are_the_images_in_order(stored, images, size):
    source = open_images(stored)
    assert (len(source), source.shape) == (11, (3, 6, 4))
    batches = list(source.batches(0, 11, size))
    assert [len(batch) for batch in batches[:-1]] == [size] * (len(batches) - 1)
    assert torch.equal(torch.cat(batches), images)


@pytest.mark.parametrize(("start", "stop"), [(0, 0), (3, 9), (10, 11), (4, 8)])
def test_ranges_can_be_read_alone_and_again(stored, images, start, stop):
    source = open_images(stored)
    for _ in range(2):
        batches = list(source.batches(start, stop, 3))
        assert torch.equal(torch.cat([images[:0], *batches]), images[start:stop])


def test_ranges_beyond_the_source_are_refused(stored):
    for start, stop, size in ((0, 12, 3), (5, 4, 3), (-1, 4, 3), (0, 11, 0)):
        with pytest.raises(ValueError, match="not within the 11"):
            next(open_images(stored).batches(start, stop, size))


def test_the_identity_follows_the_content(stored):
    source = open_images(stored)
    before = source.sha256()
    assert before == open_images(stored).sha256() == source.sha256()
    files = [stored] if stored.is_file() else sorted(source.path.parent.rglob("*.*"))
    for path in files:
        path.write_bytes(path.read_bytes() + b" ")
    assert open_images(stored).sha256() != before


def test_a_file_has_the_hash_that_everybody_computes(images, tmp_path):
    save_npz(tmp_path / "x.npz", images)
    digest = hashlib.sha256((tmp_path / "x.npz").read_bytes()).hexdigest()
    assert open_images(tmp_path / "x.npz").sha256() == file_sha256(tmp_path / "x.npz") == digest


def test_pngs_come_in_the_order_of_load_images_and_jpegs_too(make_images, tmp_path):
    save_images(tmp_path, make_images(3), [9, 10, 1000000])
    assert torch.equal(next(open_images(tmp_path).batches(0, 3, 3)), load_images(tmp_path))
    Image.new("L", (5, 7), 77).save(tmp_path / "grey.JPG")
    with pytest.raises(
        ValueError, match=r"is \(1, 7, 5\).* but grey\.JPG|grey\.JPG is \(1, 7, 5\)"
    ):
        open_images(tmp_path)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert open_images(tmp_path).shape == (1, 7, 5)


def test_memory_does_not_grow_with_the_number_of_images(tmp_path):
    np.savez(tmp_path / "x.npz", arr_0=np.zeros((1500, 64, 64, 3), dtype=np.uint8))
    source = open_images(tmp_path / "x.npz")
    tracemalloc.start()
    count = sum(len(batch) for batch in source.batches(0, 1200, 10))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 1200
    assert peak < 1e6 < 1500 * 64 * 64 * 3 / 10


class TestRefusals:
    def test_nothing_there(self, tmp_path):
        with pytest.raises(FileNotFoundError, match="nothing does not exist"):
            open_images(tmp_path / "nothing")
        with pytest.raises(ValueError, match="holds no PNG images"):
            open_images(tmp_path)
        (tmp_path / "x.txt").write_text("text")
        with pytest.raises(ValueError, match="neither a folder of images nor"):
            open_images(tmp_path / "x.txt")

    def test_a_missing_shard(self, images, tmp_path):
        save_shards(tmp_path / "shards", images, 4)
        (tmp_path / "shards" / "00000004.npz").unlink()
        with pytest.raises(ValueError, match=r"00000008\.npz begins with image 8, but 4 images"):
            open_images(tmp_path)

    def test_shards_of_several_sizes(self, images, tmp_path):
        save_shards(tmp_path / "x", images, 6, "part{}.npz")
        save_npz(tmp_path / "x" / "part7.npz", images[..., :3])
        with pytest.raises(ValueError, match=r"part7\.npz holds images of \(3, 6, 3\)"):
            open_images(tmp_path / "x")

    @pytest.mark.parametrize(
        "array",
        [
            np.zeros((2, 4, 4, 3)),
            np.zeros((2, 3, 4, 4), dtype=np.uint8),
            np.zeros((0, 4, 4, 3), dtype=np.uint8),
            np.asfortranarray(np.zeros((2, 4, 4, 3), dtype=np.uint8)),
        ],
    )
    def test_arrays_of_another_kind(self, array, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=array)
        with pytest.raises(ValueError, match="expected uint8 of shape"):
            open_images(tmp_path / "x.npz")

    def test_pickles_are_not_opened(self, tmp_path):
        np.savez(tmp_path / "x.npz", arr_0=np.array([{"a": 1}], dtype=object))
        with pytest.raises(ValueError, match="arr_0 is object"):
            open_images(tmp_path / "x.npz")

    @pytest.mark.parametrize("compress", [np.savez, np.savez_compressed])
    def test_damage_is_found_while_reading(self, compress, images, tmp_path):
        path = tmp_path / "x.npz"
        compress(path, arr_0=images.permute(0, 2, 3, 1).numpy())
        whole = path.read_bytes()
        middle = len(whole) // 2
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 255]) + whole[middle + 1 :])
        with pytest.raises(ValueError, match=r"x\.npz is damaged"):
            list(open_images(path).batches(0, 11, 4))
        for damaged in (whole[:middle], b"", b"text"):
            path.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"x\.npz is damaged"):
                open_images(path)

    def test_other_arrays_only(self, tmp_path):
        np.savez(tmp_path / "x.npz", mu=np.zeros(3))
        with pytest.raises(ValueError, match=r"no array arr_0, only \['mu'\]"):
            open_images(tmp_path / "x.npz")
