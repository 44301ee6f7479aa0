import tracemalloc
import zipfile

import numpy as np
import pytest

from dit_qat.dit.sampling.store import Column, ShardStore, write_npz


@pytest.fixture
def rows():
    """Ten images (H, W, C)."""
    return np.random.default_rng(0).integers(0, 256, (10, 4, 5, 3), dtype=np.uint8)


@pytest.fixture
def store(tmp_path, rows):
    made = ShardStore(tmp_path / "shards", 10, 4, (4, 5, 3), "uint8", lambda index: index % 3)
    for first in made.firsts:
        made.write(first, rows[first : first + 4])
    return made


def test_a_streamed_archive_is_what_numpy_writes(tmp_path, rows):
    labels = np.arange(10)
    np.savez(tmp_path / "theirs.npz", arr_0=rows, arr_1=labels)
    columns = {
        "arr_0": Column(rows.shape, rows.dtype, (rows[i : i + 3] for i in range(0, 10, 3))),
        "arr_1": Column((10,), np.int64, [labels]),
    }
    write_npz(tmp_path / "ours.npz", columns)
    with zipfile.ZipFile(tmp_path / "ours.npz") as ours:
        assert ours.testzip() is None
        with zipfile.ZipFile(tmp_path / "theirs.npz") as theirs:
            assert ours.namelist() == theirs.namelist() == ["arr_0.npy", "arr_1.npy"]
            for name in ours.namelist():
                assert ours.read(name) == theirs.read(name)
                assert ours.getinfo(name).compress_type == zipfile.ZIP_STORED
    before = (tmp_path / "ours.npz").read_bytes()
    columns["arr_0"] = Column(rows.shape, rows.dtype, [rows[::1]])
    write_npz(tmp_path / "ours.npz", columns)
    assert (tmp_path / "ours.npz").read_bytes() == before  # no date, no trace of the pieces


def test_memory_does_not_grow_with_the_number_of_rows(tmp_path):
    def peak(pieces):
        made = (np.full((64, 64, 64, 3), i, np.uint8) for i in range(pieces))
        tracemalloc.start()
        write_npz(tmp_path / "a.npz", {"arr_0": Column((64 * pieces, 64, 64, 3), "uint8", made)})
        most = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return most

    assert peak(40) < 1.2 * peak(4)


def test_a_failure_on_the_way_leaves_the_old_file(tmp_path):
    def broken():
        yield np.zeros((1, 2), np.uint8)
        raise OSError("no space left")

    path = tmp_path / "a.npz"
    path.write_bytes(b"old")
    with pytest.raises(OSError, match="no space left"):
        write_npz(path, {"arr_0": Column((2, 2), "uint8", broken())})
    assert [each.read_bytes() for each in tmp_path.iterdir()] == [b"old"]


def test_shards_hold_rows_and_labels_and_become_one_archive(store, rows, tmp_path):
    assert sorted(path.name for path in store.folder.iterdir()) == [
        "00000000.npz",
        "00000004.npz",
        "00000008.npz",
    ]
    assert np.array_equal(store.read(8), rows[8:])
    assert np.load(store.path(4))["arr_1"].tolist() == [1, 2, 0, 1]
    assert np.array_equal(store.head(5), rows[:5])
    store.assemble(tmp_path / "all.npz")
    with np.load(tmp_path / "all.npz", allow_pickle=False) as archive:
        assert np.array_equal(archive["arr_0"], rows)
        assert archive["arr_1"].tolist() == [i % 3 for i in range(10)]
        assert archive["arr_1"].dtype == np.int64


def test_without_labels_there_is_one_array(tmp_path):
    store = ShardStore(tmp_path, 3, 4, (2, 1, 1), "float32")
    store.write(0, np.ones((3, 2, 1, 1), np.float32))
    assert np.load(store.path(0)).files == ["arr_0"]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "text", "shape", "dtype", "name"])
def test_a_damaged_shard_is_not_found_and_named(store, damage):
    path = store.path(4)
    whole = path.read_bytes()
    if damage == "cut":
        path.write_bytes(whole[: len(whole) // 2])
    elif damage == "flipped":
        middle = whole.index(b"\n", 128) + 20
        path.write_bytes(whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :])
    elif damage == "empty":
        path.write_bytes(b"")
    elif damage == "text":
        path.write_text("arr_0")
    elif damage == "shape":
        np.savez(path, arr_0=np.zeros((3, 4, 5, 3), np.uint8))
    elif damage == "dtype":
        np.savez(path, arr_0=np.zeros((4, 4, 5, 3), np.int8))
    else:
        np.savez(path, images=np.zeros((4, 4, 5, 3), np.uint8))
    assert store.find(4) is None
    with pytest.raises(ValueError, match=r"00000004\.npz"):
        store.read(4)
    assert store.find(0) is not None
    path.unlink()
    assert store.find(4) is None
    with pytest.raises(ValueError, match="missing"):
        store.assemble(path.with_name("all.npz"))
    assert not path.with_name("all.npz").exists()
