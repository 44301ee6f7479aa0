"""Pictures and the page of a quantized language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from dit_qat.calibration import LayerRow
from dit_qat.export.files import written_whole
from dit_qat.report.layers import layer_error_plot, layer_table
from dit_qat.report.page import bullets, duration, page, paragraph, picture, section, table
from dit_qat.report.style import (
    COLOURS,
    INK,
    LINES,
    SMALL,
    TEXT,
    as_png,
    new_figure,
    plain_log_ticks,
)

__all__ = ["LLMReport", "Point", "perplexity_plot", "write_llm_report"]

_MARKERS = "osD^v<>PX*"


@dataclass(frozen=True)
class Point:
    """One quantized model.

    Attributes:
        name: Its label.
        family: Its colour.
        effective_bits: Per weight, with all that is stored.
        perplexity: On held-out text.
    """

    name: str
    family: str
    effective_bits: float
    perplexity: float


def perplexity_plot(points: Sequence[Point], reference: float | None = None) -> bytes:
    """Draw perplexity over effective bits; a line joins those that nothing smaller beats.

    Args:
        points: At least one.
        reference: Perplexity of the float model. Where all points are above it, heights are the
            logarithms of what they have more, so that the best stand apart.

    Raises:
        ValueError: if there are none.
    """
    if not points:
        raise ValueError("there are no models to draw; quantize at least one")
    base = 0.0
    if reference is not None and all(point.perplexity > reference for point in points):
        base = reference
    figure, axes = new_figure(5.4)
    families = list(dict.fromkeys(point.family for point in points))
    for index, family in enumerate(families):
        own = [point for point in points if point.family == family]
        axes.scatter(
            [point.effective_bits for point in own],
            [point.perplexity - base for point in own],
            s=22,
            marker=_MARKERS[index % len(_MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            label=family,
            zorder=3,
        )
    front = best_for_their_size(points)
    _join(axes, front, base)
    for point in _smallest_and_best(points):
        if point not in front:
            _name(axes, point, base, on_the_right=True)
    _perplexity_axis(axes, base)
    told = "" if reference is None else f" (float: {reference:.4g})"
    axes.set_xlabel("effective bits per weight: all that is stored", fontsize=TEXT)
    axes.set_ylabel(f"perplexity on held-out text{told}", fontsize=TEXT)
    axes.legend(frameon=False, fontsize=SMALL, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return as_png(figure)


def _perplexity_axis(axes: Axes, base: float) -> None:
    """Logarithmic above the base, and marked with whole perplexities."""
    axes.margins(x=0.12)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 1000 * low:
        plain_log_ticks(axes)
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value + base:.4g}"))
    else:
        axes.yaxis.set_minor_locator(NullLocator())
    axes.grid(color=LINES, linewidth=0.6)


def _join(axes: Axes, front: Sequence[Point], base: float) -> None:
    """A line through the best, with names; of neighbours, that of the better one."""
    x, y = [p.effective_bits for p in front], [p.perplexity - base for p in front]
    axes.plot(x, y, color=INK, linewidth=0.8, zorder=2)
    apart = 0.04 * (max(x) - min(x))
    for index, point in enumerate(front):
        if index + 1 == len(front) or x[index + 1] - x[index] > apart:
            _name(axes, point, base)


def _name(axes: Axes, point: Point, base: float, on_the_right: bool = False) -> None:
    axes.annotate(
        point.name,
        (point.effective_bits, point.perplexity - base),
        xytext=(5, -4) if on_the_right else (-4, -4),
        textcoords="offset points",
        fontsize=SMALL,
        color=INK,
        ha="left" if on_the_right else "right",
        va="top",
    )


def _smallest_and_best(points: Sequence[Point]) -> list[Point]:
    """Of each family, the point of fewest bits and the one of least perplexity."""
    found = []
    for family in dict.fromkeys(point.family for point in points):
        own = [point for point in points if point.family == family]
        found.append(min(own, key=lambda p: (p.perplexity, p.effective_bits)))
        found.append(min(own, key=lambda p: (p.effective_bits, p.perplexity)))
    return list(dict.fromkeys(found))


def best_for_their_size(points: Sequence[Point]) -> list[Point]:
    """Those points that none with as few bits or fewer is below, from few bits to many."""
    found: list[Point] = []
    for point in sorted(points, key=lambda p: (p.effective_bits, p.perplexity)):
        if not found or point.perplexity < found[-1].perplexity:
            found.append(point)
    return found


@dataclass(frozen=True)
class LLMReport:
    """What the page shows.

    Attributes:
        model: What was quantized.
        method: Its name and settings.
        calibration: On what, in words.
        seconds: Of the run.
        averages: Of :func:`~dit_qat.calibration.table.average_bits`.
        bytes: Of the packed model.
        layers: One row per quantized layer.
    """

    model: str
    method: str
    calibration: str
    seconds: float
    averages: Mapping[str, float]
    bytes: int
    layers: Sequence[LayerRow]


def write_llm_report(path: Path, report: LLMReport) -> None:
    """Write the page under its final name only, replacing an earlier one."""
    text = page(f"{report.model} by {report.method}", _body(report))
    with written_whole(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def _body(report: LLMReport) -> list[str]:
    summary = (
        f"Weights quantized block by block after training, calibrated on {report.calibration}; "
        f"{duration(report.seconds)}."
    )
    errors = picture(
        layer_error_plot({row.name: row.error for row in report.layers}),
        "Error of layers",
        _LAYERS_NOTE,
    )
    return [
        f"<h1>{escape(report.model)} by {escape(report.method)}</h1>",
        paragraph(summary, "summary"),
        section("Size", table(("", "Quantized"), _sizes(report))),
        section("Error by layer", errors),
        section("Layers", layer_table(report.layers)),
        section("How to read this", bullets(_READING)),
    ]


def _sizes(report: LLMReport) -> list[tuple[str, str]]:
    own = report.averages
    return [
        ("Nominal bits per weight, as papers count", f"{own['weight_bits']:.3f}"),
        ("Effective bits, all that is stored", f"{own['effective_weight_bits']:.3f}"),
        ("Megabytes of the whole model", f"{report.bytes / 1e6:.2f}"),
    ]


_LAYERS_NOTE = (
    "Relative squared error of each layer's output on calibration windows: the float layer is "
    "given the same input. What earlier layers did wrong does not count here."
)
_READING = (
    "Bits are means over the weights of quantized layers. Effective bits count planes, bitmaps, "
    "masks, permutations, scales and offsets, as they are in the file. Embeddings, norms and the "
    "head stay float. dit-qat llm evaluate measures what the errors do to perplexity.",
    "Weights are decoded and multiplied in floating point. Nothing here says how fast a kernel for "
    "the codes would be.",
)
