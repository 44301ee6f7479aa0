"""Pictures and the page of a quantized language model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.ticker import NullFormatter, NullLocator

from dit_qat.calibration import LayerRow
from dit_qat.export.files import written_whole
from dit_qat.report.layers import layer_error_plot, layer_table
from dit_qat.report.page import bullets, duration, page, paragraph, picture, section, table
from dit_qat.report.style import (
    COLOURS,
    FAINT,
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
        reference: Perplexity of the float model.

    Raises:
        ValueError: if there are none.
    """
    if not points:
        raise ValueError("there are no models to draw; quantize at least one")
    figure, axes = new_figure(5.4)
    families = list(dict.fromkeys(point.family for point in points))
    for index, family in enumerate(families):
        own = [point for point in points if point.family == family]
        axes.scatter(
            [point.effective_bits for point in own],
            [point.perplexity for point in own],
            s=22,
            marker=_MARKERS[index % len(_MARKERS)],
            color=COLOURS[index % len(COLOURS)],
            label=family,
            zorder=3,
        )
    _join(axes, best_for_their_size(points))
    if reference is not None:
        axes.axhline(reference, color=FAINT, linewidth=0.8, linestyle=(0, (4, 2)))
        _name(axes, "float", (axes.get_xlim()[1], reference), FAINT, (0, 3), "bottom")
    axes.margins(x=0.1)
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    if high < 100 * low:
        plain_log_ticks(axes)
    else:
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color=LINES, linewidth=0.6)
    axes.set_xlabel("effective bits per weight: all that is stored", fontsize=TEXT)
    axes.set_ylabel("perplexity on held-out text", fontsize=TEXT)
    axes.legend(frameon=False, fontsize=SMALL, ncols=4, loc="lower left", bbox_to_anchor=(0, 1))
    return as_png(figure)


def _join(axes: Axes, front: Sequence[Point]) -> None:
    """A line through the best, each with its name."""
    x, y = [p.effective_bits for p in front], [p.perplexity for p in front]
    axes.plot(x, y, color=INK, linewidth=0.8, zorder=2)
    for point in front:
        _name(axes, point.name, (point.effective_bits, point.perplexity), INK, (-4, -4), "top")


def _name(
    axes: Axes,
    text: str,
    place: tuple[float, float],
    colour: str,
    offset: tuple[float, float],
    side: str,
) -> None:
    axes.annotate(
        text,
        place,
        xytext=offset,
        textcoords="offset points",
        fontsize=SMALL,
        color=colour,
        ha="right",
        va=side,
    )


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
