import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from dit_qat.dit.data.pictures import center_crop, model_space


def gradient(width, height):
    """Red is the column, green the row, so that a cut shows where it was made."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.arange(width)
    pixels[..., 1] = np.arange(height)[:, None]
    return Image.fromarray(pixels)


@given(width=st.integers(1, 200), height=st.integers(1, 200), size=st.integers(1, 40))
def test_a_crop_has_the_size_asked_for(width, height, size):
    assert center_crop(gradient(width, height), size).size == (size, size)


@given(st.integers(8, 15), st.integers(0, 20), st.booleans())
def test_a_picture_of_the_right_short_side_is_cut_and_not_resized(size, extra, wide):
    width, height = (size + extra, size) if wide else (size, size + extra)
    cut = np.array(center_crop(gradient(width, height), size))
    margin = extra // 2  # the smaller half is left or above
    left, top = (margin, 0) if wide else (0, margin)
    assert (cut[0, :, 0] == np.arange(left, left + size)).all()
    assert (cut[:, 0, 1] == np.arange(top, top + size)).all()


@pytest.mark.parametrize("halvings", [1, 2, 3])
def test_large_pictures_are_averaged_by_halves(halvings):
    size, factor = 8, 2**halvings
    pixels = np.random.default_rng(0).integers(0, 256, (size * factor,) * 2 + (3,), np.uint8)
    expected = pixels.astype(np.int64)
    for _ in range(halvings):  # along rows, then along columns, rounded half up each time
        expected = (expected[:, ::2] + expected[:, 1::2] + 1) // 2
        expected = (expected[::2] + expected[1::2] + 1) // 2
    assert (np.array(center_crop(Image.fromarray(pixels), size)) == expected).all()


def test_just_under_twice_the_size_is_not_halved():
    picture = gradient(31, 31)
    expected = picture.resize((16, 16), Image.Resampling.BICUBIC)
    assert center_crop(picture, 16).tobytes() == expected.tobytes()


def test_a_resized_picture_keeps_its_shape():
    # 100 x 50 halves once to 50 x 25, then 25 becomes 16 and 50 becomes 32, of which 8 to 24 stay.
    picture = gradient(100, 50)
    halved = picture.resize((50, 25), Image.Resampling.BOX)
    whole = halved.resize((32, 16), Image.Resampling.BICUBIC)
    assert center_crop(picture, 16).tobytes() == whole.crop((8, 0, 24, 16)).tobytes()


def test_model_space_reaches_from_minus_one_to_one():
    levels = torch.arange(256, dtype=torch.uint8)
    values = model_space(levels)
    assert values.dtype == torch.float32
    assert (values[0], values[-1]) == (-1, 1)
    assert torch.equal(torch.round((values + 1) * 127.5).to(torch.uint8), levels)
