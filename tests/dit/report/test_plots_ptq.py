import io

import numpy as np
import pytest
import torch
from PIL import Image

from dit_qat.dit.report.plots_ptq import pairs_plot, step_error_plot
from dit_qat.report.style import COLOURS


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)).convert("RGB"))


def has_colour(png: bytes, colour: str) -> bool:
    wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
    return bool((np.abs(pixels(png).astype(int) - wanted).sum(-1) < 6).any())


def test_errors_by_timestep_may_be_zero_and_in_any_unit() -> None:
    png = step_error_plot({"a": ([1.0, 0.5, 0.0], [0.0, 1e-9, 1.0]), "b": ([1.0], [1e-3])})
    assert has_colour(png, COLOURS[0])
    assert has_colour(png, COLOURS[1])


def test_noise_is_on_the_left_whichever_way_a_model_counts() -> None:
    """Z-Image's timesteps rise from noise to image; with low error first, its curve rises too."""
    wanted = [int(COLOURS[0][i : i + 2], 16) for i in (1, 3, 5)]
    for timesteps in ([1.0, 0.5, 0.0], [0.0, 0.5, 1.0]):
        drawn = pixels(step_error_plot({"a": (timesteps, [1e-4, 1e-2, 1.0])})).astype(int)
        rows, columns = np.nonzero(np.abs(drawn - wanted).sum(-1) < 6)
        low = rows > np.percentile(rows, 90)  # below the legend, near the smallest error
        assert columns[low].mean() < np.median(columns)


def test_curves_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="2 timesteps, 1 errors"):
        step_error_plot({"a": ([1.0, 0.0], [0.1])})
    with pytest.raises(ValueError, match="no errors by timestep"):
        step_error_plot({})


@pytest.mark.parametrize(("count", "side"), [(1, 8), (100, 8), (16, 32), (4, 256), (3, 900)])
def test_pairs_fit_the_page_whatever_their_size(count: int, side: int) -> None:
    red, blue = torch.zeros(2, count, 3, side, side, dtype=torch.uint8)
    red[:, 0], blue[:, 2] = 255, 255
    found = pixels(pairs_plot(red, blue)).astype(int)
    assert 300 <= found.shape[1] <= 1700
    for colour, on_the_left in (([255, 0, 0], True), ([0, 0, 255], False)):
        columns = (found == colour).all(-1).any(0).nonzero()[0]
        assert columns.size
        assert set(columns < found.shape[1] // 2) == {on_the_left}


def test_wide_frames_of_videos_keep_their_shape() -> None:
    frames = torch.zeros(2, 3, 48, 832, dtype=torch.uint8)
    found = pixels(pairs_plot(frames, frames))
    black = (found == 0).all(-1)
    height, width = black.any(1).sum(), black.any(0).sum() / 2
    assert width / height * 2 == pytest.approx(832 / 48, rel=0.1)  # two rows of one column
