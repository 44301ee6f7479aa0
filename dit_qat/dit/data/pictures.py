"""Pictures as files hold them, of any size, and how they become images of one size."""

import hashlib
from abc import ABC, abstractmethod
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

__all__ = [
    "CROP",
    "BrokenPictureError",
    "Pictures",
    "center_crop",
    "image_of",
    "model_space",
]

CROP = "adm-center"
"""Name of :func:`center_crop` in records."""

_PIXEL_ERRORS = (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError)


class BrokenPictureError(ValueError):
    """A picture that cannot be decoded."""


class Pictures(ABC):
    """Pictures in a fixed order, with or without labels; listed when first asked for."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of pictures."""

    @abstractmethod
    def name(self, index: int) -> str:
        """What people find the picture by, such as its path."""

    @abstractmethod
    def _read(self, index: int) -> Image.Image:
        """The picture in any mode; errors of the decoder are the caller's to name."""

    @property
    @abstractmethod
    def labels(self) -> Tensor | None:
        """Classes (N,), int64; None if there are none."""

    @property
    @abstractmethod
    def num_classes(self) -> int:
        """Number of classes; 0 without labels."""

    @abstractmethod
    def _described(self) -> dict[str, Any]:
        """Where the pictures are, for people."""

    @abstractmethod
    def _digest(self) -> "hashlib._Hash":
        """A sha256 over what tells these pictures, and their order, from others."""

    def load(self, index: int) -> Image.Image:
        """The picture in RGB, upright as stored (no EXIF rotation, as the papers' pipelines).

        Raises:
            BrokenPictureError: naming the picture.
            OSError: naming it too, if it could not be read at all, which says nothing about it.
        """
        try:
            return self._read(index).convert("RGB")
        except _PIXEL_ERRORS as error:
            if isinstance(error, OSError) and error.errno is not None:  # a decoder's have none
                raise OSError(
                    f"{self.name(index)}: cannot be read ({error.strerror}); see to the file or "
                    "its disk, then run the command again"
                ) from error
            raise BrokenPictureError(
                f"{self.name(index)}: cannot be decoded ({str(error) or type(error).__name__})"
            ) from error

    def identity(self) -> dict[str, Any]:
        """Plain values for the record: kind, place, count, classes, and the sha256 of the order.

        The sha256 is over names and labels, in order; a folder may move without changing it.
        """
        digest = self._digest()
        if self.labels is not None:
            digest.update(self.labels.numpy().astype("<i8").tobytes())
        return {
            "kind": type(self).__name__,
            **self._described(),
            "num_images": len(self),
            "num_classes": self.num_classes,
            "sha256": digest.hexdigest(),
        }


def center_crop(picture: Image.Image, size: int) -> Image.Image:
    """Cut the middle square, at ``size`` pixels a side, as ADM and DiT do.

    Halved by box filters while the short side is at least twice ``size``, then resized so that
    it is ``size`` (bicubic), then cut; of an odd margin, the larger part is right or below.
    Dhariwal and Nichol, arXiv:2105.05233.
    """
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    if (width, height) != picture.size:
        picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def image_of(pictures: Pictures, index: int, size: int) -> Tensor:
    """A picture, cropped, as an image (3, size, size), uint8.

    Raises:
        BrokenPictureError: naming the picture.
        OSError: if it could not be read at all.
    """
    pixels = np.array(center_crop(pictures.load(index), size))
    return torch.from_numpy(pixels).permute(2, 0, 1)


def model_space(images: Tensor) -> Tensor:
    """Levels 0 to 255, uint8, as float32 in [-1, 1]."""
    return images.to(torch.float32).div_(127.5).sub_(1)
