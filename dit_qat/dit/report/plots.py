"""Pictures for the report, as PNG bytes; figures are built without matplotlib's global state."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from statistics import fmean

import numpy as np
import numpy.typing as npt
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FixedLocator
from torch import Tensor
from torch.nn import functional as F

from dit_qat.allocation import BitMap
from dit_qat.dit.evaluation.images import image_grid
from dit_qat.dit.evaluation.sensitivity import Sensitivity
from dit_qat.report.style import (
    DPI,
    FAINT,
    INK,
    LINES,
    SMALL,
    TEXT,
    WIDTH,
    as_png,
    colour_bar,
    cycle,
    new_figure,
    plain_log_ticks,
)

__all__ = [
    "Comparison",
    "ComparisonRow",
    "bit_map_plot",
    "comparison_plot",
    "loss_plot",
    "sensitivity_plot",
    "side_by_side",
]

_SENSITIVITY_COLOURS = "YlGnBu"
_CHOSEN = "#d55e00"

_MOST_ANNOTATED_CELLS = 160
_SMOOTHED_SHARE = 0.03
_LOG_BEYOND = 8.0


@dataclass(frozen=True)
class ComparisonRow:
    """FD-digits of one method at one bit-width.

    Attributes:
        method: Name to show.
        bits: Mean activation bits.
        fd_digits: One value per seed, at least one.

    Raises:
        ValueError: No values, or values that are not finite.
    """

    method: str
    bits: float
    fd_digits: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.fd_digits or not all(map(isfinite, self.fd_digits)):
            raise ValueError(
                f"{self.method} at {self.bits:g} bits has FD-digits {self.fd_digits}; a row needs "
                "at least one, all of them finite: leave it out, or score it again"
            )

    @property
    def mean(self) -> float:
        """Mean over seeds."""
        return fmean(self.fd_digits)


@dataclass(frozen=True)
class Comparison:
    """What methods reach, in the order to show them, and the float model's FD-digits."""

    rows: tuple[ComparisonRow, ...]
    float_fd_digits: float | None = None


def loss_plot(curves: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> bytes:
    """Draw loss curves over steps on a log axis: raw values faint, a running mean on top.

    Args:
        curves: Steps and values by name; values that a log axis cannot show (zero, negative, not
            finite) are left out.

    Raises:
        ValueError: No curves, or steps and values of different length.
    """
    if not curves:
        raise ValueError("there are no loss curves to draw; pass at least one")
    figure, axes = new_figure(3.0)
    for (name, (steps, values)), colour in zip(curves.items(), cycle(len(curves)), strict=True):
        if len(steps) != len(values):
            raise ValueError(f"curve {name!r} has {len(steps)} steps but {len(values)} values")
        x, y = np.asarray(steps, dtype=float), np.asarray(values, dtype=float)
        shown = np.isfinite(y) & (y > 0)
        x, y = x[shown], y[shown]
        axes.plot(x, y, color=colour, alpha=0.22, linewidth=0.7)
        axes.plot(x, _running_mean(y), color=colour, linewidth=1.6, label=name)
    axes.set_yscale("log")
    plain_log_ticks(axes)
    axes.grid(axis="y", color=LINES, linewidth=0.6)
    axes.set_xlabel("training step", fontsize=TEXT)
    axes.set_ylabel("loss", fontsize=TEXT)
    axes.margins(x=0.01)
    axes.legend(frameon=False, fontsize=TEXT, loc="upper right")
    return as_png(figure)


def sensitivity_plot(sensitivity: Sensitivity) -> bytes:
    """Draw S[l, b] as a heat map, layers down and bits across, on a log colour scale.

    The outlined cell of a row is the layer's present bits; cells without error are white.

    Raises:
        ValueError: The matrix holds no layers or no bits.
    """
    figure, axes = _score_map(sensitivity)
    _outline(axes, sensitivity, colour=FAINT, width=0.8)
    axes.set_xlabel("activation bits of this layer alone", fontsize=TEXT)
    return as_png(figure)


def bit_map_plot(found: BitMap) -> bytes:
    """Draw a bit map, layers down and bits across: scores as a heat map, the chosen cells framed.

    Raises:
        ValueError: The bit map holds no layers.
    """
    scores = torch.tensor(found.scores, dtype=torch.float64)
    # What all choices of a layer share decides nothing, and would hide what does.
    above = scores - scores.amin(1, keepdim=True) if scores.numel() else scores
    table = Sensitivity(found.layers, found.choices, above, found.bits, found.costs)
    figure, axes = _score_map(table, "score above the layer's best choice")
    _outline(axes, table, colour=_CHOSEN, width=2.0)
    axes.set_xlabel("activation bits (framed: allocated)", fontsize=TEXT)
    cost = sum(b * c for b, c in zip(found.bits, found.costs, strict=True))
    figure.suptitle(
        f"{found.average_bits:.3f} bits on average, {found.average_asked:g} allowed "
        f"({cost / 1e6:.3g} million weight bits per token)",
        fontsize=TEXT + 1,
        color=INK,
    )
    return as_png(figure)


def _score_map(
    sensitivity: Sensitivity, unit: str = "normalised output error"
) -> tuple[Figure, Axes]:
    values = sensitivity.matrix.numpy()
    if not values.size:
        raise ValueError(f"a sensitivity of shape {values.shape} has nothing to draw")
    rows, columns = values.shape
    pitch = 0.235 if rows <= 48 else 0.16
    figure, axes = new_figure(1.25 + pitch * rows)
    positive = values[np.isfinite(values) & (values > 0)]
    low, high = (positive.min(), positive.max()) if positive.size else (1.0, 1.0)
    norm = LogNorm(low, max(high, low * 10))
    drawn = np.ma.masked_where(~(values > 0), values)
    picture = axes.imshow(drawn, cmap=_SENSITIVITY_COLOURS, norm=norm, aspect="auto")
    axes.set_xticks(range(columns), [f"{b}" for b in sensitivity.bits])
    axes.set_yticks(range(rows), sensitivity.layers, fontsize=SMALL if rows <= 48 else 6.5)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if values.size <= _MOST_ANNOTATED_CELLS:
        _annotate(axes, values, norm)
    colour_bar(figure, axes, picture, unit)
    return figure, axes


def comparison_plot(table: Comparison) -> bytes:
    """Draw mean FD-digits as bars grouped by bits, with a dot per seed and the float model's line.

    The axis is logarithmic where the worst mean is beyond 8 times the best.

    Raises:
        ValueError: The table has no rows.
    """
    if not table.rows:
        raise ValueError("the comparison has no rows to draw; leave it out of the report")
    methods = list(dict.fromkeys(row.method for row in table.rows))
    bits = sorted({row.bits for row in table.rows}, reverse=True)
    figure, axes = new_figure(3.2)
    width = 0.8 / len(methods)
    colours = dict(zip(methods, cycle(len(methods)), strict=True))
    for group, group_bits in enumerate(bits):
        # Bars that are there stand together, whatever is missing at these bits.
        rows = sorted(
            (row for row in table.rows if row.bits == group_bits),
            key=lambda row: methods.index(row.method),
        )
        for place, row in enumerate(rows):
            offset = (place - (len(rows) - 1) / 2) * width
            _bar(axes, row, group + offset, width, colours[row.method])
    _comparison_axes(axes, table, bits)
    handles = [Rectangle((0, 0), 1, 1, color=colours[m], alpha=0.75) for m in methods]
    axes.legend(
        handles,
        methods,
        frameon=False,
        fontsize=TEXT,
        ncols=min(4, len(methods)),
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=0.2,
    )
    return as_png(figure)


def side_by_side(left: Tensor, right: Tensor, titles: tuple[str, str], columns: int = 10) -> bytes:
    """Lay two sets of images (N, C, H, W), uint8, out as titled grids next to each other.

    Every pixel becomes a square of whole screen pixels, so nothing is interpolated.

    Raises:
        ValueError: Another dtype or shape, no images, or ``columns`` below 1.
    """
    if not len(left) or not len(right):
        raise ValueError(f"{len(left)} and {len(right)} images: both sides need at least one")
    room = int(WIDTH * DPI)
    cell = room // (2 * max(columns, 1) + 1)
    grids = [
        _spaced_grid(images, columns, max(1, cell // images.shape[-1])) for images in (left, right)
    ]
    return _titled(grids, titles, middle=max(cell // 2, 8))


def _running_mean(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Centred mean over a small share of the curve.

    Windows shrink on both sides at the start, where losses fall steeply, and on one at the end.
    """
    index, n = np.arange(len(values)), len(values)
    half = max(1, int(_SMOOTHED_SHARE * n / 2))
    first = index - np.minimum(half, index)
    last = np.minimum(index + np.minimum(half, index), n - 1)
    total = np.concatenate([[0.0], values.cumsum()])
    mean: npt.NDArray[np.float64] = (total[last + 1] - total[first]) / (last + 1 - first)
    return mean


def _outline(axes: Axes, sensitivity: Sensitivity, colour: str, width: float) -> None:
    for row, present in enumerate(sensitivity.present_bits):
        if present in sensitivity.bits:
            corner = (sensitivity.bits.index(present) - 0.5, row - 0.5)
            axes.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=colour, linewidth=width))


def _annotate(axes: Axes, values: npt.NDArray[np.float64], norm: LogNorm) -> None:
    for (row, column), value in np.ndenumerate(values):
        dark = value > 0 and norm(value) > 0.62
        text = f"{value:.2g}" if value else "0"
        colour = "white" if dark else INK
        axes.text(column, row, text, ha="center", va="center", fontsize=SMALL - 0.5, color=colour)


def _bar(axes: Axes, row: ComparisonRow, x: float, width: float, colour: str) -> None:
    axes.bar(x, row.mean, width * 0.9, color=colour, alpha=0.75)
    shifts = np.linspace(-1, 1, len(row.fd_digits) + 2)[1:-1] * width * 0.35
    dots = {"color": "white", "edgecolors": INK, "linewidths": 0.7, "zorder": 3}
    axes.scatter(x + shifts, row.fd_digits, s=11, **dots)  # type: ignore[arg-type]
    axes.annotate(
        f"{row.mean:.1f}",
        (x, max(row.fd_digits)),
        xytext=(0, 4),
        textcoords="offset points",
        ha="center",
        fontsize=SMALL,
        color=INK,
    )


def _comparison_axes(axes: Axes, table: Comparison, bits: Sequence[float]) -> None:
    means = [row.mean for row in table.rows]
    log = 0 < min(means) < max(means) / _LOG_BEYOND
    if log:
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(1.0, min(means) / 2))
        plain_log_ticks(axes)
    highest = max(value for row in table.rows for value in row.fd_digits)
    axes.set_ylim(top=highest * (1.6 if log else 1.12))
    axes.grid(axis="y", color=LINES, linewidth=0.6)
    axes.set_xlim(-0.5, len(bits) - 0.5)
    axes.xaxis.set_major_locator(FixedLocator(list(range(len(bits)))))
    axes.set_xticklabels([f"{b:g} bits" for b in bits])
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("FD-digits (lower is better)", fontsize=TEXT)
    if table.float_fd_digits is not None:
        level = table.float_fd_digits
        axes.axhline(level, color=INK, linewidth=1, linestyle=(0, (4, 2)), zorder=2.5)
        axes.annotate(
            f"float\n{level:.1f}",
            (1, level),
            xycoords=("axes fraction", "data"),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize=SMALL,
            color=INK,
        )


def _spaced_grid(images: Tensor, columns: int, scale: int) -> npt.NDArray[np.uint8]:
    """Upscaled images in rows, with white gaps; cells left over are white as well."""
    gap = max(2, scale // 3)
    large = images.repeat_interleave(scale, dim=-2).repeat_interleave(scale, dim=-1)
    spaced = F.pad(large, (0, gap, 0, gap), value=255)
    left_over = -len(images) % max(columns, 1)
    blank = torch.full_like(spaced[:1], 255).expand(left_over, -1, -1, -1)
    grid = image_grid(torch.cat([spaced, blank]), columns)[:-gap, :-gap]
    return grid if grid.ndim == 3 else grid[..., None].repeat(3, axis=2)


def _titled(grids: Sequence[npt.NDArray[np.uint8]], titles: Sequence[str], middle: int) -> bytes:
    """Put grids (H, W, 3) in a row below their titles, pixel by pixel."""
    height = max(len(grid) for grid in grids)
    width = sum(grid.shape[1] for grid in grids) + middle * (len(grids) - 1)
    header = width // 24
    figure = Figure((width / DPI, (height + header) / DPI), dpi=DPI, facecolor="white")
    left = 0
    for grid, title in zip(grids, titles, strict=True):
        figure.figimage(grid, left, height - len(grid))
        size = 1.15 * TEXT * width / (WIDTH * DPI)
        at = (left / width, (height + header * 0.3) / (height + header))
        figure.text(*at, title, fontsize=size, color=INK, va="baseline")
        left += grid.shape[1] + middle
    return as_png(figure)
