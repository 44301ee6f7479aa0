"""Where pictures come from: folders, CIFAR-10, and Hugging Face data sets."""

import hashlib
import os
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image
from torch import Tensor
from torchvision.datasets.folder import IMG_EXTENSIONS

from dit_qat.dit.data.pictures import Pictures
from dit_qat.export.extras import import_extra

__all__ = ["CIFAR10", "Folder", "HuggingFace", "ImageFolder"]


class _Files(Pictures):
    """Pictures that are files under one folder."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self.root = Path(root)

    @property
    def _paths(self) -> list[str]:
        """Of every picture, relative to the root, in order."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._paths)

    def name(self, index: int) -> str:
        """The path of the file."""
        return str(self.root / self._paths[index])

    def _read(self, index: int) -> Image.Image:
        with Image.open(self.name(index)) as picture:
            picture.load()
            return picture

    def _described(self) -> dict[str, Any]:
        return {"root": str(self.root)}

    def _digest(self) -> "hashlib._Hash":
        return hashlib.sha256(os.fsencode("\n".join(self._paths)))

    def _check_root(self) -> None:
        if not self.root.is_dir():
            raise FileNotFoundError(f"{self.root}: there is no such folder of images")


class ImageFolder(_Files):
    """A folder per class, such as ImageNet's ``train/n01440764``; classes in order of their names.

    The order, of classes and of files in them, is torchvision's, so that labels are those of the
    published class-conditional models.

    Args:
        root: The folder of the class folders.

    Raises:
        FileNotFoundError: when listed: no such folder, or no class folders, or an empty one.
    """

    @cached_property
    def _listed(self) -> tuple[list[str], Tensor, int]:
        self._check_root()
        found = torchvision.datasets.ImageFolder(str(self.root))
        start = len(str(self.root)) + 1  # os.path.relpath takes seconds for a million
        paths = [path[start:].replace(os.sep, "/") for path, _ in found.samples]
        return paths, torch.tensor(found.targets, dtype=torch.int64), len(found.classes)

    @property
    def _paths(self) -> list[str]:
        return self._listed[0]

    @property
    def labels(self) -> Tensor:
        """Positions of the class folders in the sorted list of them."""
        return self._listed[1]

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return self._listed[2]


class Folder(_Files):
    """Any folder of pictures without labels, such as FFHQ; subfolders too, sorted by path.

    Args:
        root: The folder.

    Raises:
        FileNotFoundError: when listed: no such folder, or no pictures in it.
    """

    labels = None
    num_classes = 0

    @cached_property
    def _paths(self) -> list[str]:
        self._check_root()
        found = [
            (Path(folder) / name).relative_to(self.root).as_posix()
            for folder, _, names in os.walk(self.root, followlinks=True)
            for name in names
            if name.lower().endswith(IMG_EXTENSIONS)
        ]
        if not found:
            raise FileNotFoundError(
                f"{self.root}: no pictures there ({', '.join(IMG_EXTENSIONS)}), in no subfolder"
            )
        return sorted(found)


class CIFAR10(Pictures):
    """CIFAR-10, 32 x 32 pixels, 10 classes, from the files that torchvision unpacks.

    Args:
        root: The folder that holds ``cifar-10-batches-py``.
        train: The 50,000 training images, else the 10,000 test images.
        download: Fetch it if it is not there.

    Raises:
        FileNotFoundError: when read: the files are not there, or are not those published.
    """

    num_classes = 10

    def __init__(
        self, root: str | os.PathLike[str], train: bool = True, download: bool = False
    ) -> None:
        self.root, self.train, self.download = Path(root), train, download

    @cached_property
    def _content(self) -> torchvision.datasets.CIFAR10:
        try:
            return torchvision.datasets.CIFAR10(
                str(self.root), train=self.train, download=self.download
            )
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{self.root}: no cifar-10-batches-py there, or not as published; pass "
                "download=true, or unpack cifar-10-python.tar.gz there"
            ) from error

    def __len__(self) -> int:
        return len(self._content.data)

    def name(self, index: int) -> str:
        """Its number."""
        return f"CIFAR-10 {'training' if self.train else 'test'} image {index}"

    @property
    def labels(self) -> Tensor:
        """The published ones."""
        return torch.tensor(self._content.targets, dtype=torch.int64)

    def _read(self, index: int) -> Image.Image:
        return Image.fromarray(self._content.data[index])

    def _described(self) -> dict[str, Any]:
        return {"root": str(self.root), "train": self.train}

    def _digest(self) -> "hashlib._Hash":
        return hashlib.sha256(self._content.data.tobytes())


class HuggingFace(Pictures):
    """A column of a Hugging Face data set; needs the ``datasets`` library (extra ``data``).

    Args:
        path: A folder of ``Dataset.save_to_disk``, or a name on the hub.
        split: Which part of it.
        image_column: The column of pictures.
        label_column: The column of integer classes; None for none.

    Raises:
        ValueError: when read: ``datasets`` is not installed, or there is no such column or split.
        FileNotFoundError: when read: no such data set, or the hub cannot be reached.
    """

    def __init__(
        self,
        path: str,
        split: str = "train",
        image_column: str = "image",
        label_column: str | None = "label",
    ) -> None:
        self.path, self.split = path, split
        self.image_column, self.label_column = image_column, label_column

    @cached_property
    def _content(self) -> Any:
        datasets = import_extra("datasets", "data")
        content = self._split(datasets)
        for column in (self.image_column, self.label_column):
            if column is not None and column not in content.column_names:
                raise ValueError(
                    f"{self.path}: no column {column!r}; it has {', '.join(content.column_names)} "
                    "(image_column, label_column; label_column=null for none)"
                )
        try:
            # Undecoded, for the library's decoder turns pictures by their EXIF entry.
            return content.cast_column(self.image_column, datasets.Image(decode=False))
        except (TypeError, ValueError, NotImplementedError) as error:
            raise ValueError(
                f"{self.path}: column {self.image_column!r} holds no pictures but "
                f"{content.features[self.image_column]}; choose another image_column"
            ) from error

    def _split(self, datasets: Any) -> Any:
        if not Path(self.path).is_dir():
            try:
                return datasets.load_dataset(self.path, split=self.split)
            except (OSError, datasets.exceptions.DatasetNotFoundError) as error:
                raise FileNotFoundError(
                    f"{self.path}: no such folder, and no data set could be had from the hub "
                    f"({type(error).__name__}); check the name and the connection"
                ) from error
        content = datasets.load_from_disk(self.path)
        splits = getattr(content, "keys", None)  # a dictionary of splits, or one of them
        if splits is None:
            return content
        if self.split not in content:
            raise ValueError(f"{self.path}: no split {self.split!r}; it has {', '.join(splits())}")
        return content[self.split]

    def __len__(self) -> int:
        return len(self._content)

    def name(self, index: int) -> str:
        """Data set, split and row."""
        return f"{self.path} [{self.split}] row {index}"

    @cached_property
    def labels(self) -> Tensor | None:
        """The label column."""
        if self.label_column is None:
            return None
        column = self._content.select_columns([self.label_column]).with_format("numpy")[:]
        return torch.from_numpy(np.asarray(column[self.label_column], dtype=np.int64))

    @property
    def num_classes(self) -> int:
        """As the data set declares it, else the largest label and one."""
        if self.labels is None or self.label_column is None:
            return 0
        declared = getattr(self._content.features[self.label_column], "num_classes", None)
        return int(self.labels.max()) + 1 if declared is None else int(declared)

    def _read(self, index: int) -> Image.Image:
        stored = self._images[index][self.image_column]
        if stored is None:
            raise ValueError("the row has none")
        content = stored["path"] if stored["bytes"] is None else BytesIO(stored["bytes"])
        with Image.open(content) as picture:
            picture.load()
            return picture

    @cached_property
    def _images(self) -> Any:
        return self._content.select_columns([self.image_column])

    def _described(self) -> dict[str, Any]:
        return {"path": self.path, "split": self.split, "columns": self._columns}

    @property
    def _columns(self) -> list[str | None]:
        return [self.image_column, self.label_column]

    def _digest(self) -> "hashlib._Hash":
        # A data set has no file names; its fingerprint differs between versions of the library.
        return hashlib.sha256(f"{self.split} {self._columns} {len(self)}".encode())
