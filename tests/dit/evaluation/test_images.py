import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from dit_qat.dit.evaluation.images import (
    image_grid,
    load_images,
    save_images,
    save_npz,
    save_png,
)
from dit_qat.dit.randomness import generator_for


def random_images(count=5, channels=3, height=6, width=4):
    shape, generator = (count, channels, height, width), generator_for(0, "images")
    return torch.randint(256, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_pngs_come_back_bit_for_bit(tmp_path, channels):
    images = random_images(channels=channels)
    save_images(tmp_path / "new" / "folder", images, range(5))
    assert torch.equal(load_images(tmp_path / "new" / "folder"), images)


@pytest.mark.parametrize("channels", [1, 3])
def test_npz_comes_back_bit_for_bit_and_holds_nhwc(tmp_path, channels):
    images = random_images(channels=channels)
    save_npz(tmp_path / "samples.npz", images)
    assert torch.equal(load_images(tmp_path / "samples.npz"), images)
    with np.load(tmp_path / "samples.npz") as archive:
        assert archive.files == ["arr_0"]
        assert archive["arr_0"].shape == (5, 6, 4, channels)


def test_pngs_are_named_by_index_and_read_in_the_order_of_indices(tmp_path):
    images = random_images()
    indices = [1000000, 7, 999999, 0, 12]
    save_images(tmp_path, images, indices)
    assert (tmp_path / "000007.png").exists()
    (tmp_path / "metrics.json").write_text("{}")
    assert torch.equal(load_images(tmp_path), images[torch.tensor(indices).argsort()])


def test_interrupted_writing_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    old = random_images()
    save_npz(tmp_path / "samples.npz", old)

    def fail_halfway(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez", fail_halfway)
    with pytest.raises(OSError, match="disk full"):
        save_npz(tmp_path / "samples.npz", old.flip(0))
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    assert torch.equal(load_images(tmp_path / "samples.npz"), old)


def test_a_grid_holds_the_images_in_reading_order():
    images = random_images(count=5)
    grid = image_grid(images, columns=3, scale=2)
    assert grid.shape == (2 * 6 * 2, 3 * 4 * 2, 3)
    small = grid[::2, ::2]
    assert np.array_equal(grid, small.repeat(2, axis=0).repeat(2, axis=1))
    for index, image in enumerate(images):
        row, column = divmod(index, 3)
        cell = small[row * 6 : (row + 1) * 6, column * 4 : (column + 1) * 4]
        assert np.array_equal(cell, image.permute(1, 2, 0).numpy())
    assert not small[6:, 8:].any()


def test_a_grid_of_grey_images_has_two_axes_and_saves_as_png(tmp_path):
    grid = image_grid(random_images(channels=1), columns=5)
    assert grid.shape == (6, 20)
    save_png(tmp_path / "grid.png", grid)
    assert np.array_equal(np.array(Image.open(tmp_path / "grid.png")), grid)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (torch.zeros(2, 3, 4, 4), "float32"),
        (torch.zeros(2, 2, 4, 4, dtype=torch.uint8), r"\(2, 2, 4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.uint8), r"\(3, 4, 4\)"),
    ],
)
def test_what_is_not_an_8_bit_image_is_not_written(tmp_path, images, message):
    for write in (
        lambda: save_images(tmp_path, images, range(len(images))),
        lambda: save_npz(tmp_path / "samples.npz", images),
        lambda: image_grid(images, columns=2),
    ):
        with pytest.raises(ValueError, match=message):
            write()
    assert not list(tmp_path.iterdir())


def test_other_impossible_requests_to_write_are_refused(tmp_path):
    with pytest.raises(ValueError, match="5 images need as many indices, got 4"):
        save_images(tmp_path, random_images(), range(4))
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        save_npz(tmp_path / "samples.npy", random_images())
    with pytest.raises(ValueError, match="columns=0"):
        image_grid(random_images(), columns=0)
    with pytest.raises(ValueError, match=r"float64 of shape \(4, 4\)"):
        save_png(tmp_path / "image.png", np.zeros((4, 4)))


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing does not exist"):
        load_images(tmp_path / "nothing")
    with pytest.raises(ValueError, match="holds no PNG"):
        load_images(tmp_path)
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(ValueError, match=r"notes\.txt is neither"):
        load_images(tmp_path / "notes.txt")


def test_mixed_sizes_and_channels_are_refused(tmp_path):
    save_images(tmp_path, random_images(), range(5))
    save_images(tmp_path, random_images(1, height=7), [5])
    with pytest.raises(ValueError, match=r"000005\.png is 7x4 with 3 channels but 000000\.png"):
        load_images(tmp_path)
    save_images(tmp_path, random_images(1, channels=1), [5])
    with pytest.raises(ValueError, match=r"000005\.png is 6x4 with 1 channel but"):
        load_images(tmp_path)


def test_damaged_and_foreign_pngs_are_refused(tmp_path):
    path = tmp_path / "000000.png"
    path.write_text("not an image")
    with pytest.raises(ValueError, match=r"000000\.png cannot be read"):
        load_images(tmp_path)
    save_images(tmp_path, random_images(1, height=64, width=64), [0])
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match=r"000000\.png cannot be read"):
        load_images(tmp_path)
    Image.new("RGBA", (4, 4)).save(path)
    with pytest.raises(ValueError, match="pixel format RGBA"):
        load_images(tmp_path)


def test_damaged_npz_files_are_refused(tmp_path):
    path = tmp_path / "samples.npz"
    save_npz(path, random_images())
    whole = path.read_bytes()
    middle = whole.index(random_images().permute(0, 2, 3, 1).numpy().tobytes())
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    for damaged in (whole[: len(whole) // 2], flipped, b"", b"text"):
        path.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"samples\.npz is damaged or not"):
            load_images(path)


def test_npz_files_with_other_contents_are_refused(tmp_path):
    path = tmp_path / "samples.npz"
    np.savez(path, mu=np.zeros(3), sigma=np.eye(3))
    with pytest.raises(ValueError, match=r"no array arr_0, only \['mu', 'sigma'\]"):
        load_images(path)
    np.savez(path, np.zeros((2, 4, 4, 3)))
    with pytest.raises(ValueError, match=r"float64 of shape \(2, 4, 4, 3\)"):
        load_images(path)
    np.savez(path, np.zeros((2, 3, 4, 4), dtype=np.uint8))
    with pytest.raises(ValueError, match=r"uint8 of shape \(2, 3, 4, 4\)"):
        load_images(path)
    np.savez(path, np.array([{"pickled": "object"}], dtype=object))
    with pytest.raises(ValueError, match="damaged or not"):
        load_images(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("arr_0", "not an array")
    with pytest.raises(ValueError, match="no array arr_0"):
        load_images(path)


def test_a_bare_array_under_the_name_of_an_archive_is_refused(tmp_path):
    with (tmp_path / "samples.npz").open("wb") as file:
        np.save(file, np.zeros((2, 4, 4, 3), dtype=np.uint8))
    with pytest.raises(ValueError, match="damaged or not"):
        load_images(tmp_path / "samples.npz")
