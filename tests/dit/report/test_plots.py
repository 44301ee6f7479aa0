import io

import matplotlib
import numpy as np
import pytest
import torch
from PIL import Image

from dit_qat.allocation import BitMap
from dit_qat.dit.evaluation.sensitivity import Sensitivity
from dit_qat.dit.report.plots import (
    Comparison,
    ComparisonRow,
    bit_map_plot,
    comparison_plot,
    loss_plot,
    sensitivity_plot,
    side_by_side,
)

ROWS = tuple(
    ComparisonRow(method, bits, (value, value * 1.1))
    for bits in (4, 2)
    for method, value in (("min-max", 20 / bits), ("RobuQ", 12 / bits))
)


def pixels(png):
    with Image.open(io.BytesIO(png)) as image:
        assert image.format == "PNG"
        return np.array(image.convert("RGB"))


def has_colour(png):
    array = pixels(png).astype(int)
    return (np.ptp(array, axis=2) > 60).mean() > 0.001


def sensitivity(layers, bits=(1, 2, 3, 4)):
    errors = 0.1 * 4.0 ** -torch.arange(len(bits), dtype=torch.float64).repeat(layers, 1)
    errors[:, 1] = 0
    names = tuple(f"blocks.{i}.attn.proj" for i in range(layers))
    return Sensitivity(names, bits, errors, (2,) * layers, (1,) * layers)


def bit_map(bits, above=0.0):
    scores = tuple((above + 0.5, above + 0.125, above) for _ in bits)
    names = tuple(f"blocks.{i}.attn.proj" for i in range(len(bits)))
    return BitMap(names, bits, (4,) * len(bits), (1, 2, 3), scores, "output", 2.0)


def grey(count, level, size=8):
    return torch.full((count, 1, size, size), level, dtype=torch.uint8)


def test_pictures_are_coloured_and_as_wide_as_the_report_expects():
    pictures = (
        loss_plot({"RobuQ": (range(50), np.linspace(2, 1, 50))}),
        sensitivity_plot(sensitivity(4)),
        bit_map_plot(bit_map((1, 2, 3))),
        comparison_plot(Comparison(ROWS, 3.4)),
    )
    for png in pictures:
        assert has_colour(png)
        assert pixels(png).shape[1] == 1520


def test_a_bit_map_shows_what_was_chosen_and_nothing_that_all_choices_share():
    chosen = bit_map_plot(bit_map((1, 2, 3)))
    assert chosen == bit_map_plot(bit_map((1, 2, 3), above=1.0))
    other = bit_map_plot(bit_map((3, 2, 1)))
    changed = (pixels(chosen) != pixels(other)).any(axis=2)
    assert 0.001 < changed.mean() < 0.2
    with pytest.raises(ValueError, match="nothing to draw"):
        bit_map_plot(bit_map(()))


def test_a_map_of_a_hundred_layers_is_one_picture():
    assert pixels(bit_map_plot(bit_map((1, 2, 3, 2) * 28))).shape[0] > 3000


def test_the_same_numbers_give_the_same_bytes_and_leave_global_state_alone():
    before = dict(matplotlib.rcParams)
    assert comparison_plot(Comparison(ROWS, 3.4)) == comparison_plot(Comparison(ROWS, 3.4))
    assert dict(matplotlib.rcParams) == before


def test_losses_that_a_log_axis_cannot_show_are_left_out():
    steps, values = list(range(8)), [3.0, 2.5, 2.2, 2.0, 1.9, 1.8, 1.7, 1.6]
    broken = [*values[:3], 0.0, -1.0, float("nan"), float("inf"), *values[7:]]
    kept = [0, 1, 2, 7]
    expected = loss_plot({"a": (kept, [values[i] for i in kept])})
    assert loss_plot({"a": (steps, broken)}) == expected


def test_a_curve_without_anything_to_show_is_still_a_picture():
    assert pixels(loss_plot({"empty": ([], []), "zero": ([1], [0.0])})).size


def test_loss_curves_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="no loss curves"):
        loss_plot({})
    with pytest.raises(ValueError, match="'a' has 3 steps but 2 values"):
        loss_plot({"a": ([1, 2, 3], [1.0, 2.0])})


def test_more_layers_make_a_taller_map():
    heights = [pixels(sensitivity_plot(sensitivity(n))).shape[0] for n in (1, 16, 60)]
    assert heights == sorted(set(heights))


@pytest.mark.parametrize("value", [0.0, 0.01, float("inf")])
def test_a_map_of_a_single_value_can_be_drawn(value):
    errors = torch.full((2, 2), value, dtype=torch.float64)
    single = Sensitivity(("a", "b"), (2, 3), errors, (2, 2), (1, 1))
    assert pixels(sensitivity_plot(single)).size


def test_an_empty_map_is_refused():
    with pytest.raises(ValueError, match=r"shape \(0, 4\) has nothing to draw"):
        sensitivity_plot(sensitivity(0))


def test_a_comparison_can_span_two_decades_or_be_a_single_row():
    wide = (*ROWS, ComparisonRow("diverged", 2, (900.0,)))
    assert has_colour(comparison_plot(Comparison(wide, 3.4)))
    assert has_colour(comparison_plot(Comparison(ROWS[:1])))
    assert has_colour(comparison_plot(Comparison((ComparisonRow("ideal", 2, (0.0,)), *ROWS))))


def test_comparisons_without_numbers_are_refused():
    with pytest.raises(ValueError, match="no rows"):
        comparison_plot(Comparison(()))
    for values in ((), (3.0, float("nan"))):
        with pytest.raises(ValueError, match=r"RobuQ at 2\.5 bits has FD-digits .* finite"):
            ComparisonRow("RobuQ", 2.5, values)


def test_both_sides_show_their_images_pixel_by_pixel():
    left, right = grey(20, 60), grey(20, 180)
    left[:, :, 0, 0] = 90
    array = pixels(side_by_side(left, right, ("", "")))
    width = array.shape[1]
    scale = 9  # 1520 // 21 = 72 pixels per image of 8
    assert (array[:, : width // 2] == 60).all(axis=2).sum() == 20 * 63 * scale**2
    assert (array[:, : width // 2] == 90).all(axis=2).sum() == 20 * scale**2
    assert (array[:, width // 2 :] == 180).all(axis=2).sum() == 20 * 64 * scale**2


def test_sides_may_differ_in_number_colour_and_size():
    colour = torch.zeros(7, 3, 16, 16, dtype=torch.uint8)
    colour[:, 0] = 200
    array = pixels(side_by_side(grey(3, 60), colour, ("few", "many"), columns=4))
    assert (array == 60).all(axis=2).any()
    assert (array == (200, 0, 0)).all(axis=2).any()


def test_large_images_are_never_shrunk():
    array = pixels(side_by_side(grey(4, 60, 256), grey(4, 60, 256), ("", ""), columns=4))
    assert (array == 60).all(axis=2).sum() == 8 * 256**2


def test_titles_are_drawn_above_the_images():
    plain, titled = (
        pixels(side_by_side(grey(2, 0), grey(2, 0), titles, columns=2))
        for titles in (("", ""), ("Float", "RobuQ"))
    )
    rows = np.flatnonzero((plain != titled).any(axis=(1, 2)))
    assert rows.size
    assert rows.max() < np.flatnonzero((plain == 0).all(axis=2).any(axis=1)).min()


def test_images_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="0 and 2 images"):
        side_by_side(grey(0, 1), grey(2, 1), ("", ""))
    with pytest.raises(ValueError, match="expected uint8"):
        side_by_side(grey(2, 1).float(), grey(2, 1).float(), ("", ""))
    with pytest.raises(ValueError, match="columns=0"):
        side_by_side(grey(2, 1), grey(2, 1), ("", ""), columns=0)
