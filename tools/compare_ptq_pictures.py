"""Pictures of a comparison by ``compare_ptq.py``: errors and FD-digits by method, first images.

``python tools/compare_ptq_pictures.py runs/compare_ptq --out docs/images``
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from PIL import Image

from dit_qat.report.style import COLOURS, DPI, FAINT, INK, LINES, TEXT, WIDTH, as_png

CELLS = ("w8a8", "w4a8", "w4a4", "w3a3", "w3a3.1")
SHOWN = ("rtn", "smoothquant", "vidit_q", "quarot", "clq-exact", "svdquant", "adatsq")
CELL_PIXELS = 32  # of one digit in the grids of compare_ptq.py


def error_plot(found: dict[str, dict[str, Any]]) -> bytes:
    """One row per method, in the order of their error at W4A4; a colour per number of bits."""
    reference = found["float"]["float"]["fd_digits"]
    names = sorted(
        (n for n in found if "w4a4" in found[n]),
        key=lambda name: -found[name]["w4a4"]["trajectory_error"],
    )
    figure = Figure((WIDTH, 0.6 + 0.27 * len(names)), dpi=DPI, layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    for axes, key in ((left, "trajectory_error"), (right, "fd_digits")):
        for cell, colour in zip(CELLS, COLOURS, strict=False):
            rows = [(found[n][cell][key], y) for y, n in enumerate(names) if cell in found[n]]
            axes.plot(*zip(*rows, strict=True), "o", color=colour, label=cell.upper(), markersize=5)
        axes.set_xscale("log")
        axes.grid(axis="both", color=LINES)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(which="both", color=FAINT, labelcolor=INK, labelsize=TEXT)
    right.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    right.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    right.xaxis.set_minor_locator(NullLocator())
    right.axvline(reference, color=INK, linewidth=1, label="float")
    left.set_yticks(range(len(names)), names)
    left.set_xlabel("error along the trajectory", fontsize=TEXT)
    right.set_xlabel("FD-digits", fontsize=TEXT)
    handles, labels = right.get_legend_handles_labels()
    figure.legend(
        handles, labels, ncols=6, loc="outside upper center", frameon=False, fontsize=TEXT
    )
    return as_png(figure)


def first_images(folder: Path) -> bytes:
    """The first ten images of the float model (left) and of methods at W4A4 and W3A3."""
    rows = [("float", "float", "float"), *((n, f"{n}_w4a4", f"{n}_w3a3") for n in SHOWN)]
    figure = Figure((WIDTH, 0.42 * len(rows) + 0.3), dpi=DPI, layout="constrained")
    grid = figure.subplots(len(rows), 2)
    for row, (title, *stems) in zip(grid, rows, strict=True):
        for axes, stem in zip(row, stems, strict=True):
            image = np.asarray(Image.open(folder / f"{stem}.png"))[:CELL_PIXELS]
            axes.imshow(image, cmap="gray", vmin=0, vmax=255)
            axes.set_axis_off()
        row[0].text(-6, CELL_PIXELS / 2, title, ha="right", va="center", fontsize=TEXT, color=INK)
    for axes, title in zip(grid[0], ("W4A4", "W3A3"), strict=True):
        axes.set_title(title, fontsize=TEXT, color=INK)
    return as_png(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("comparison", type=Path, help="what --out of compare_ptq.py was")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    arguments = parser.parse_args()
    found = json.loads((arguments.comparison / "metrics.json").read_text())
    (arguments.out / "ptq_errors.png").write_bytes(error_plot(found))
    (arguments.out / "ptq_samples.png").write_bytes(first_images(arguments.comparison))


if __name__ == "__main__":
    main()
