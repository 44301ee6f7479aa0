"""Pictures of post-training quantization of DiTs: errors by timestep, images."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_qat.dit.report.plots import side_by_side
from dit_qat.report.layers import log_errors
from dit_qat.report.style import (
    COLOURS,
    DPI,
    TEXT,
    WIDTH,
    as_png,
    new_figure,
)

__all__ = ["pairs_plot", "step_error_plot"]

_MOST_COLUMNS, _MOST_ROWS = 10, 10
_SMALL_IMAGE = 64  # up to here, pixels are meant to be seen


def step_error_plot(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """Draw errors over the model's timesteps, noise on the left and images on the right.

    Args:
        curves: Timesteps, in the order of sampling, and errors by name. Most models count down to
            the image; Z-Image counts up.

    Raises:
        ValueError: if there are none, or timesteps and errors differ in number.
    """
    if not curves:
        raise ValueError("there are no errors by timestep to draw; record at least one call")
    figure, axes = new_figure(3.0)
    for index, (name, (timesteps, errors)) in enumerate(curves.items()):
        if len(timesteps) != len(errors):
            raise ValueError(f"curve {name!r} has {len(timesteps)} timesteps, {len(errors)} errors")
        shown = [error if error > 0 else np.nan for error in errors]
        colour = COLOURS[index % len(COLOURS)]
        axes.plot(timesteps, shown, ".-", label=name, color=colour, markersize=5, linewidth=1.2)
    if not any(timesteps[-1] > timesteps[0] for timesteps, _ in curves.values()):
        axes.invert_xaxis()
    axes.set_xlabel("the model's timestep (noise left, image right)", fontsize=TEXT)
    log_errors(axes, "relative squared error")
    axes.legend(frameon=False, fontsize=TEXT, loc="lower left", bbox_to_anchor=(0, 1))
    return as_png(figure)


def pairs_plot(
    left: Tensor, right: Tensor, titles: tuple[str, str] = ("float", "quantized")
) -> bytes:
    """Lay two sets of images (N, C, H, W), uint8, out side by side, large ones made smaller.

    Raises:
        ValueError: as :func:`~dit_qat.dit.report.plots.side_by_side`.
    """
    room = int(WIDTH * DPI)
    side = max(left.shape[-2:]) if left.ndim == 4 else 0
    columns = _MOST_COLUMNS if side <= _SMALL_IMAGE else max(1, min(3, room // (2 * side + 1)))
    cell = room // (2 * columns + 1)  # as side_by_side has it: half a cell of room in the middle
    if side > cell:
        left, right = (_smaller(images, cell / side) for images in (left, right))
    shown = columns * _MOST_ROWS if side <= _SMALL_IMAGE else 3 * columns
    return side_by_side(left[:shown], right[:shown], titles, min(columns, max(len(left), 1)))


def _smaller(images: Tensor, scale: float) -> Tensor:
    size = [max(1, int(length * scale)) for length in images.shape[-2:]]
    small = F.interpolate(images.float(), size, mode="area")
    return small.round().to(torch.uint8)
