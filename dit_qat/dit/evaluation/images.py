"""Reading and writing 8-bit images: folders of PNGs, one ``.npz``, and grids to look at."""

import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torch import Tensor

from dit_qat.export.files import written_whole

__all__ = [
    "image_grid",
    "image_shape",
    "load_images",
    "read_image",
    "save_images",
    "save_npz",
    "save_png",
]

_MODES = ("L", "RGB")
_PIL_BROKEN = (OSError, SyntaxError, ValueError)  # what PIL raises for damaged files
_ZIP_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)


class _PixelFormatError(ValueError):
    """A file that can be read, but not as 8-bit grey or RGB."""


def save_images(folder: Path, images: Tensor, indices: Iterable[int]) -> None:
    """Write images (N, C, H, W), uint8, as ``000000.png`` and so on, named by ``indices``.

    Raises:
        ValueError: Another dtype or shape, or a number of indices that differs from N.
    """
    arrays, names = _channels_last(images), list(indices)
    if len(names) != len(arrays):
        raise ValueError(f"{len(arrays)} images need as many indices, got {len(names)}")
    folder.mkdir(parents=True, exist_ok=True)
    for array, index in zip(arrays, names, strict=True):
        save_png(folder / f"{index:06d}.png", array)


def save_npz(path: Path, images: Tensor) -> None:
    """Write images (N, C, H, W), uint8, as ``arr_0`` in NHWC, as the ADM evaluator reads them.

    Raises:
        ValueError: Another dtype or shape, or a name that does not end in ``.npz``.
    """
    if path.suffix != ".npz":
        raise ValueError(f"{path} must end in .npz")
    arrays = _channels_last(images)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=arrays)


def save_png(path: Path, array: npt.NDArray[np.uint8]) -> None:
    """Write an image (H, W), (H, W, 1) or (H, W, 3), uint8, as a PNG under its final name only.

    Raises:
        ValueError: Another dtype or shape.
    """
    squeezed = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if squeezed.dtype != np.uint8 or not (squeezed.ndim == 2 or squeezed.shape[2:] == (3,)):
        raise ValueError(
            f"a PNG needs uint8 of shape (H, W), (H, W, 1) or (H, W, 3), got {array.dtype} of "
            f"shape {array.shape}"
        )
    image = Image.fromarray(np.ascontiguousarray(squeezed))
    with written_whole(path) as temporary:
        image.save(temporary, format="PNG")


def load_images(path: Path) -> Tensor:
    """Read images (N, C, H, W), uint8, from a folder of PNGs (by name) or from an ``.npz``.

    Names of different length are ordered by length, so that ``9.png`` comes before ``10.png``.

    Raises:
        FileNotFoundError: Nothing has this name.
        ValueError: No PNGs, images of several sizes, or a file that cannot be read.
    """
    if path.is_dir():
        return _load_folder(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a folder of PNGs or an .npz file")
    if path.suffix != ".npz":
        raise ValueError(f"{path} is neither a folder of PNGs nor an .npz file")
    return _load_npz(path)


def read_image(path: Path) -> npt.NDArray[np.uint8]:
    """Read a PNG or a JPEG (H, W, C), grey or RGB.

    Raises:
        ValueError: A damaged file, or another pixel format.
    """
    with _opened(path) as image:
        _check_mode(path, image)
        return np.array(image, dtype=np.uint8).reshape(*image.size[::-1], len(image.getbands()))


def image_shape(path: Path) -> tuple[int, int, int]:
    """Read channels, height and width from the header of a PNG or a JPEG; errors as above."""
    with _opened(path) as image:
        _check_mode(path, image)
        return len(image.getbands()), image.height, image.width


def image_grid(images: Tensor, columns: int, scale: int = 1) -> npt.NDArray[np.uint8]:
    """Lay images (N, C, H, W), uint8, out in rows: (H, W) for one channel, (H, W, 3) for three.

    Args:
        images: The images, in reading order; cells left over in the last row are black.
        columns: Images per row.
        scale: Every pixel becomes a square of this side.

    Raises:
        ValueError: Another dtype or shape, or ``columns`` or ``scale`` below 1.
    """
    if columns < 1 or scale < 1:
        raise ValueError(f"columns={columns} and scale={scale} must be at least 1")
    arrays = _channels_last(images)
    count, height, width, channels = arrays.shape
    rows = -(-count // columns)
    cells = np.zeros((rows * columns, height, width, channels), dtype=np.uint8)
    cells[:count] = arrays
    grid = cells.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    grid = grid.reshape(rows * height, columns * width, channels)
    grid = grid.repeat(scale, axis=0).repeat(scale, axis=1)
    return grid[..., 0] if channels == 1 else grid


def _channels_last(images: Tensor) -> npt.NDArray[np.uint8]:
    if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(
            f"expected uint8 images of shape (N, C, H, W) with 1 or 3 channels, got "
            f"{images.dtype} of shape {tuple(images.shape)}; to_uint8 converts from [-1, 1]"
        )
    array: npt.NDArray[np.uint8] = images.detach().cpu().permute(0, 2, 3, 1).contiguous().numpy()
    return array


def _load_folder(folder: Path) -> Tensor:
    paths = [path for path in folder.iterdir() if path.suffix.lower() == ".png"]
    if not paths:
        raise ValueError(f"{folder} holds no PNG images")
    paths.sort(key=lambda path: (len(path.stem), path.stem))
    arrays = [read_image(path) for path in paths]
    for path, array in zip(paths, arrays, strict=True):
        if array.shape != arrays[0].shape:
            raise ValueError(
                f"{path} is {_describe(array)} but {paths[0].name} is {_describe(arrays[0])}; "
                "all images of a folder must have one size"
            )
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous()


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Yield an image whose pixels are read later, inside the block, where the same errors apply."""
    try:
        with Image.open(path, formats=["PNG", "JPEG"]) as image:
            yield image
    except _PixelFormatError:
        raise
    except _PIL_BROKEN as error:
        raise ValueError(f"{path} cannot be read as a PNG or JPEG image: {error}") from error


def _check_mode(path: Path, image: Image.Image) -> None:
    if image.mode not in _MODES:
        raise _PixelFormatError(
            f"{path} has the pixel format {image.mode}; convert it to 8-bit grey (L) or RGB"
        )


def _describe(array: npt.NDArray[np.uint8]) -> str:
    height, width, channels = array.shape
    return f"{height}x{width} with {channels} channel{'s' if channels > 1 else ''}"


def _load_npz(path: Path) -> Tensor:
    if not zipfile.is_zipfile(path):
        raise ValueError(f"{path} is damaged or not an .npz archive: it is no zip file")
    try:
        with np.load(path, allow_pickle=False) as archive:
            names = list(archive.files)
            array = archive["arr_0"] if "arr_0" in names else None
    except _ZIP_BROKEN as error:
        raise ValueError(f"{path} is damaged or not an .npz archive: {error}") from error
    if not isinstance(array, np.ndarray):  # absent, or a zipped file of another kind
        raise ValueError(f"{path} has no array arr_0, only {names}; save images as arr_0 in NHWC")
    if array.dtype != np.uint8 or array.ndim != 4 or array.shape[3] not in (1, 3):
        raise ValueError(
            f"{path}: arr_0 is {array.dtype} of shape {array.shape}; expected uint8 of shape "
            "(N, H, W, C) with 1 or 3 channels"
        )
    return torch.from_numpy(array).permute(0, 3, 1, 2).contiguous()
