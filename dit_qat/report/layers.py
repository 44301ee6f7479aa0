"""Layers in a report: the error of each over the blocks of the model, and the table of all."""

import re
from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from dit_qat.calibration.table import LayerRow
from dit_qat.report.page import paragraph, table
from dit_qat.report.style import (
    COLOURS,
    FAINT,
    LINES,
    SMALL,
    TEXT,
    as_png,
    new_figure,
    plain_log_ticks,
)

__all__ = ["block_and_kind", "layer_error_plot", "layer_table", "log_errors"]

_MARKERS = "osD^v<>PX*"
_MOST_ROWS = 64
_KIND = "*"
_KINDS_NOTE = "Means over the layers of one kind; metrics.json has every layer."


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
    log_errors(axes, "relative squared error of the layer")
    _name_blocks(axes, list(blocks))
    axes.legend(
        frameon=False,
        fontsize=SMALL,
        ncols=min(4, len(kinds)),
        loc="lower left",
        bbox_to_anchor=(0, 1),
    )
    return as_png(figure)


def layer_table(rows: Sequence[LayerRow]) -> str:
    """All layers as HTML; of a large model, means over the layers of each kind."""
    header = ("Layer", "In", "Out", "W bits", "Effective", "A bits", "Error")
    if len(rows) <= _MOST_ROWS:
        return table(header, [_layer_row(row.name, [row]) for row in rows])
    kinds: dict[str, list[LayerRow]] = {}
    for row in rows:
        kinds.setdefault(f"{_KIND}.{block_and_kind(row.name)[1]}", []).append(row)
    lines = [_layer_row(f"{name} ({len(own)})", own) for name, own in kinds.items()]
    return table(header, lines) + paragraph(_KINDS_NOTE, "note")


def block_and_kind(name: str) -> tuple[str, str]:
    """Split a layer's full name behind its first number.

    Example:
        >>> block_and_kind("single_transformer_blocks.11.attn.to_q")
        ('single_transformer_blocks.11', 'attn.to_q')
    """
    found = re.match(r"(.*?\.\d+)\.(.+)", name)
    return (found[1], found[2]) if found else (name, name)


def log_errors(axes: Axes, label: str) -> None:
    """A logarithmic axis of errors, its ticks written out where they are close."""
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


def _layer_row(name: str, rows: Sequence[LayerRow]) -> tuple[str, ...]:
    def mean(what: str) -> float:
        return fmean(getattr(row, what) for row in rows)

    return (
        name,
        _one_or_many({row.in_features for row in rows}),
        _one_or_many({row.out_features for row in rows}),
        f"{mean('weight_bits'):.3g}",
        f"{mean('effective_weight_bits'):.2f}",
        f"{mean('activation_bits'):.3g}",
        f"{mean('error'):.2g}",
    )


def _one_or_many(sizes: set[int]) -> str:
    return f"{min(sizes):,}" if len(sizes) == 1 else f"{min(sizes):,} – {max(sizes):,}"
