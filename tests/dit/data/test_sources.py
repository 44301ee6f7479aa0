import hashlib
import os
import pickle
import shutil
import sys

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image

from dit_qat.dit.data.pictures import BrokenPictureError
from dit_qat.dit.data.sources import CIFAR10, Folder, HuggingFace, ImageFolder


def save(path, level=0, mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (4, 4), level).save(path)


def test_class_folders_are_labelled_as_torchvision_does(class_folders):
    source, reference = ImageFolder(class_folders), torchvision.datasets.ImageFolder(class_folders)
    assert source.labels.tolist() == reference.targets == [0] * 7 + [1] * 7
    assert source.num_classes == 2
    for index in (0, 6, 7, 13):
        assert source.name(index) == reference.samples[index][0]
        assert source.load(index).tobytes() == reference[index][0].tobytes()


def test_a_folder_without_labels_is_sorted_by_path(tmp_path):
    for name in ("b/2.png", "b/10.png", "a.JPEG", "c/d/e.webp", "notes.txt"):
        path = tmp_path / name
        save(path) if path.suffix != ".txt" else path.write_text("no picture")
    source = Folder(tmp_path)
    names = [source.name(index) for index in range(len(source))]
    expected = ["a.JPEG", "b/10.png", "b/2.png", "c/d/e.webp"]
    assert names == [str(tmp_path / name) for name in expected]
    assert source.labels is None
    assert source.num_classes == 0


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    save(tmp_path / "a.tif", mode=mode)
    assert Folder(tmp_path).load(0).mode == "RGB"


def test_the_identity_is_of_names_and_labels_and_not_of_the_place(class_folders, tmp_path):
    moved = shutil.copytree(class_folders, tmp_path / "moved")
    one, other = ImageFolder(class_folders).identity(), ImageFolder(moved).identity()
    assert one.pop("root") != other.pop("root")
    assert one == other
    assert (one["kind"], one["num_images"], one["num_classes"]) == ("ImageFolder", 14, 2)
    (moved / "tench" / "0.png").rename(moved / "goldfish" / "9.png")
    changed = ImageFolder(moved).identity()
    assert changed["num_images"] == 14
    assert changed["sha256"] != one["sha256"]


def test_a_picture_that_is_cut_short_is_named(tmp_path):
    save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_bytes(b"no picture at all")
    content = (tmp_path / "a.png").read_bytes()
    (tmp_path / "c.png").write_bytes(content[: len(content) // 2])
    source = Folder(tmp_path)
    for index, name in ((1, r"b\.jpg"), (2, r"c\.png")):
        with pytest.raises(BrokenPictureError, match=f"{name}: cannot be decoded"):
            source.load(index)


@pytest.mark.parametrize("kind", [ImageFolder, Folder])
def test_a_folder_that_is_not_there_is_named_when_listed(tmp_path, kind):
    source = kind(tmp_path / "nowhere")  # which costs nothing yet
    with pytest.raises(FileNotFoundError, match="nowhere: there is no such folder"):
        len(source)


def test_a_folder_without_pictures_is_refused(tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no pictures there"):
        len(Folder(tmp_path))
    with pytest.raises(FileNotFoundError, match="empty"):
        len(ImageFolder(tmp_path))


@pytest.fixture
def tiny_cifar(tmp_path, monkeypatch):
    """Ten images in files as those of CIFAR-10, whose checksums torchvision then expects."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    numbers = np.random.default_rng(0)

    def write(name, content):
        path = folder / name
        path.write_bytes(pickle.dumps(content))
        return [name, hashlib.md5(path.read_bytes()).hexdigest()]

    def batch(name):
        data = numbers.integers(0, 256, (5, 3072), dtype=np.uint8)
        return write(name, {"data": data, "labels": [3, 1, 4, 1, 9]})

    kind = torchvision.datasets.CIFAR10
    monkeypatch.setattr(kind, "train_list", [batch("data_batch_1"), batch("data_batch_2")])
    monkeypatch.setattr(kind, "test_list", [batch("test_batch")])
    name, md5 = write("batches.meta", {"label_names": list("0123456789")})
    meta = {"filename": name, "key": "label_names", "md5": md5}
    monkeypatch.setattr(kind, "meta", meta)
    return tmp_path


def test_cifar10_is_read_from_its_files(tiny_cifar):
    source = CIFAR10(tiny_cifar)
    assert len(source) == 10
    assert source.labels.tolist() == [3, 1, 4, 1, 9] * 2
    assert source.num_classes == 10
    raw = pickle.loads((tiny_cifar / "cifar-10-batches-py" / "data_batch_2").read_bytes())
    expected = raw["data"][1].reshape(3, 32, 32).transpose(1, 2, 0)
    assert (np.array(source.load(6)) == expected).all()
    assert source.identity()["sha256"] != CIFAR10(tiny_cifar, train=False).identity()["sha256"]


def test_cifar10_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="no cifar-10-batches-py there"):
        len(CIFAR10(tmp_path))


def test_without_the_datasets_library_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ValueError, match=r"pip install 'dit-qat\[data\]'"):
        len(HuggingFace("somewhere"))


@pytest.fixture
def saved_dataset(tmp_path):
    datasets = pytest.importorskip("datasets")
    pictures = [Image.new("L", (4, 4), level) for level in (0, 50, 100)]
    features = datasets.Features(
        {
            "picture": datasets.Image(),
            "class": datasets.ClassLabel(names=list("abcd")),
            "number": datasets.Value("int64"),
        }
    )
    columns = {"picture": pictures, "class": [2, 0, 1], "number": [5, 0, 1]}
    content = datasets.Dataset.from_dict(columns, features=features)
    content.save_to_disk(tmp_path / "plain")
    datasets.DatasetDict({"train": content}).save_to_disk(tmp_path / "splits")
    return tmp_path


@pytest.mark.parametrize("name", ["plain", "splits"])
def test_a_saved_dataset_is_read_by_column(saved_dataset, name):
    source = HuggingFace(str(saved_dataset / name), image_column="picture", label_column="class")
    assert len(source) == 3
    assert source.labels.tolist() == [2, 0, 1]
    assert source.labels.dtype == torch.int64
    assert source.num_classes == 4  # as declared, though "d" does not occur
    assert source.load(1).getpixel((0, 0)) == (50, 50, 50)
    assert source.identity()["num_images"] == 3


def test_labels_of_a_dataset_may_be_numbers_or_absent(saved_dataset):
    path = str(saved_dataset / "plain")
    assert HuggingFace(path, "train", "picture", "number").num_classes == 6
    unlabelled = HuggingFace(path, "train", "picture", None)
    assert (unlabelled.labels, unlabelled.num_classes) == (None, 0)


def test_columns_and_splits_that_are_not_there_are_named(saved_dataset):
    with pytest.raises(ValueError, match=r"no column 'image'; it has picture, class, number"):
        len(HuggingFace(str(saved_dataset / "plain")))
    with pytest.raises(ValueError, match=r"no split 'test'; it has train"):
        len(HuggingFace(str(saved_dataset / "splits"), "test", "picture", "class"))


def test_pictures_of_a_dataset_are_not_turned_by_their_exif_entry(tmp_path):
    datasets = pytest.importorskip("datasets")
    picture = Image.new("RGB", (20, 10))
    exif = picture.getexif()
    exif[0x112] = 6  # to be shown turned by 90 degrees
    picture.save(tmp_path / "turned.png", exif=exif)
    features = datasets.Features({"image": datasets.Image()})
    rows = {"image": [str(tmp_path / "turned.png"), None]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "saved")
    source = HuggingFace(str(tmp_path / "saved"), label_column=None)
    assert source.load(0).size == Folder(tmp_path).load(0).size == (20, 10)
    with pytest.raises(BrokenPictureError, match=r"row 1: cannot be decoded \(the row has none"):
        source.load(1)


def test_a_column_without_pictures_is_named(saved_dataset):
    with pytest.raises(ValueError, match=r"column 'number' holds no pictures but Value"):
        len(HuggingFace(str(saved_dataset / "plain"), "train", "number", None))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere, names of files are text")
def test_names_of_files_may_be_any_bytes(tmp_path):
    Image.new("RGB", (4, 4)).save(tmp_path / os.fsdecode(b"\xff.png"))
    source = Folder(tmp_path)
    assert source.load(0).size == (4, 4)
    assert len(source.identity()["sha256"]) == 64
