"""How the pictures of a report look: sizes, colours, axes; no global state of matplotlib's."""

from io import BytesIO

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

__all__ = [
    "COLOURS",
    "DPI",
    "FAINT",
    "INK",
    "LINES",
    "SMALL",
    "TEXT",
    "WIDTH",
    "as_png",
    "colour_bar",
    "cycle",
    "new_figure",
    "plain_log_ticks",
]

# Sized for a column of 760 CSS pixels: a point of text here is 1.39 pixels there.
WIDTH = 7.6
DPI = 200
TEXT, SMALL = 9.0, 8.0
INK, FAINT, LINES = "#222222", "#777777", "#e3e3e3"
# Okabe and Ito's colours, told apart by every kind of colour vision.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")


def new_figure(height: float) -> tuple[Figure, Axes]:
    """A picture of one plot, as wide as the page; height in inches."""
    figure = Figure((WIDTH, height), dpi=DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=FAINT, labelcolor=INK, labelsize=TEXT)
    axes.set_axisbelow(True)
    return figure, axes


def as_png(figure: Figure) -> bytes:
    """The bytes of a PNG file."""
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def cycle(count: int) -> list[str]:
    """Colours, again from the first when they are used up."""
    return [COLOURS[i % len(COLOURS)] for i in range(count)]


def plain_log_ticks(axes: Axes) -> None:
    """Ticks at 1, 2 and 5 times powers of ten, written out."""
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_minor_formatter(NullFormatter())


def colour_bar(figure: Figure, axes: Axes, picture: AxesImage, unit: str) -> None:
    """A scale above the map, of fixed height: one of a hundred layers has it in sight."""
    share = 0.35 / figure.get_figheight()
    bar = figure.colorbar(
        picture, ax=axes, location="top", fraction=share, pad=share / 3, aspect=50
    )
    bar.set_label(unit, fontsize=TEXT, color=INK)
    bar.ax.tick_params(which="both", labelsize=SMALL, color=FAINT, labelcolor=INK)
    bar.outline.set_visible(False)
