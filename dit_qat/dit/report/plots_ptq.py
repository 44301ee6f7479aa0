"""Pictures of post-training quantization: errors by layer and timestep, images."""

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator
from torch import Tensor
from torch.nn import functional as F

from dit_qat.dit.report.plots import side_by_side
from dit_qat.dit.report.style import (
    COLOURS,
    DPI,
    FAINT,
    LINES,
    SMALL,
    TEXT,
    WIDTH,
    as_png,
    new_figure,
    plain_log_ticks,
)

__all__ = ["block_and_kind", "layer_error_plot", "pairs_plot", "step_error_plot"]

_MARKERS = "osD^v<>PX*"
_MOST_COLUMNS, _MOST_ROWS = 10, 10
_SMALL_IMAGE = 64  # up to here, pixels are meant to be seen


def layer_error_plot(errors: Mapping[str, float]) -> bytes:
    """Draw the error of each layer over the blocks of the model, a line for each kind of layer.

    Args:
        errors: By full name, in the order of the model.

    Raises:
        ValueError: if there are none.
    """
    if not errors:
        raise ValueError("there are no layer errors to draw; quantize at least one layer")
    blocks: dict[str, int] = {}
    kinds: dict[str, tuple[list[int], list[float]]] = {}
    for name, error in errors.items():
        block, kind = block_and_kind(name)
        x, y = kinds.setdefault(kind, ([], []))
        x.append(blocks.setdefault(block, len(blocks)))
        y.append(error if error > 0 else np.nan)
    figure, axes = new_figure(3.4 + 0.12 * len(kinds))
    for index, (kind, (x, y)) in enumerate(kinds.items()):
        look = {"marker": _MARKERS[index % len(_MARKERS)], "color": COLOURS[index % len(COLOURS)]}
        axes.plot(x, y, label=kind, markersize=4, linewidth=1.2, **look)  # type: ignore[arg-type]
    _log_errors(axes, "relative squared error of the layer")
    _name_blocks(axes, list(blocks))
    axes.legend(
        frameon=False,
        fontsize=SMALL,
        ncols=min(4, len(kinds)),
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    return as_png(figure)


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
    _log_errors(axes, "relative squared error")
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


def block_and_kind(name: str) -> tuple[str, str]:
    """Split a layer's full name behind its first number.

    Example:
        >>> block_and_kind("single_transformer_blocks.11.attn.to_q")
        ('single_transformer_blocks.11', 'attn.to_q')
    """
    found = re.match(r"(.*?\.\d+)\.(.+)", name)
    return (found[1], found[2]) if found else (name, name)


def _log_errors(axes: Axes, label: str) -> None:
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:  # ticks at 1, 2 and 5; further apart, powers of ten alone
        plain_log_ticks(axes)
    axes.grid(axis="y", color=LINES, linewidth=0.6)
    axes.set_ylabel(label, fontsize=TEXT)


def _name_blocks(axes: Axes, blocks: Sequence[str]) -> None:
    """Numbers below the axis, and where a list of blocks begins its name."""
    lists = [block.rpartition(".")[0] or block for block in blocks]
    begins = [i for i, name in enumerate(lists) if i == 0 or lists[i - 1] != name]
    axes.set_xlim(-0.4, len(blocks) - 0.6)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=14))
    for begin in begins[1:]:
        axes.axvline(begin - 0.5, color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)))
    names = ", then ".join(lists[i] for i in begins)
    axes.set_xlabel(f"block, in the order of the model ({names})", fontsize=TEXT)


def _smaller(images: Tensor, scale: float) -> Tensor:
    size = [max(1, int(length * scale)) for length in images.shape[-2:]]
    small = F.interpolate(images.float(), size, mode="area")
    return small.round().to(torch.uint8)
