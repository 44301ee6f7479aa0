"""The picture of a bit policy: timesteps across, layers down."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.patches import Patch

from dit_qat.dit.methods.adatsq.policy import Policy
from dit_qat.report.layers import block_and_kind
from dit_qat.report.style import FAINT, INK, SMALL, TEXT, as_png, new_figure

__all__ = ["policy_plot"]

_FEWEST, _MOST = 2, 8
# Light to dark with rising bits, so that it also reads in grey.
_COLOURS = ("#fdf3d8", "#f6d9a0", "#8fc3dc", "#5c9fc8", "#3c7bb0", "#265a94", "#123a6b")
_MOST_TICKS = 12
_MOST_NAMED = 40  # layers that have a row and a name each; more are grouped
_ROW, _TALLEST = 0.2, 8.0  # inches: of a row, of all of them
_LABEL = 0.16  # inches that a name takes


def policy_plot(policy: Policy) -> bytes:
    """Draw activation bits by timestep (across, in the order of sampling) and layer (down): PNG.

    Up to 40 layers have their names, in the order of the model. More are grouped by kind, within
    which the blocks come from first to last, and the picture grows no taller.
    """
    order = _by_kind(policy.layers)
    bits = np.asarray(policy.bits).T[order]
    layers, steps = bits.shape
    pitch = min(_ROW, _TALLEST / layers)
    figure, axes = new_figure(1.25 + pitch * layers)
    norm = BoundaryNorm(np.arange(_FEWEST, _MOST + 2) - 0.5, len(_COLOURS))
    own = layers <= _MOST_NAMED and layers * steps <= 4000  # room for a frame around each
    axes.pcolormesh(
        bits,
        cmap=ListedColormap(_COLOURS),
        norm=norm,
        edgecolors="white" if own else "none",
        linewidth=0.6 if own else 0,
    )
    axes.invert_yaxis()
    _name_rows(axes, [policy.layers[i] for i in order], pitch)
    shown = np.arange(0, steps, -(-steps // _MOST_TICKS))
    axes.set_xticks(shown + 0.5, [f"{policy.timesteps[i]:.4g}" for i in shown], fontsize=SMALL)
    axes.tick_params(length=0, colors=INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("the model's timestep, in the order of sampling", fontsize=TEXT, color=INK)
    figure.suptitle(_title(policy), fontsize=TEXT + 1, color=INK)
    used = sorted({int(b) for b in bits.flat})
    figure.legend(
        [Patch(facecolor=_COLOURS[b - _FEWEST], edgecolor=FAINT) for b in used],
        [f"{b} bits ({(bits == b).mean():.0%})" for b in used],
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
        fontsize=TEXT,
    )
    return as_png(figure)


def _by_kind(layers: Sequence[str]) -> list[int]:
    """Rows from top to bottom: as in the model, or kind by kind where they are many."""
    if len(layers) <= _MOST_NAMED:
        return [*range(len(layers))]
    kinds: dict[str, list[int]] = {}
    for index, name in enumerate(layers):
        kinds.setdefault(block_and_kind(name)[1], []).append(index)
    return [index for rows in kinds.values() for index in rows]


def _name_rows(axes: Axes, layers: Sequence[str], pitch: float) -> None:
    """Names of layers, or of groups of one kind, as far as there is room."""
    if len(layers) <= _MOST_NAMED:
        axes.set_yticks(np.arange(len(layers)) + 0.5, layers, fontsize=SMALL)
        return
    kinds = [block_and_kind(name)[1] for name in layers]
    begins = [i for i, kind in enumerate(kinds) if i == 0 or kinds[i - 1] != kind]
    ends = [*begins[1:], len(kinds)]
    for begin in begins[1:]:
        axes.axhline(begin, color="white", linewidth=1.5)
    places, names = list[float](), list[str]()
    for begin, end in zip(begins, ends, strict=True):
        middle = (begin + end) / 2
        if not places or (middle - places[-1]) * pitch >= _LABEL:
            places.append(middle)
            names.append(f"{kinds[begin]} ({end - begin})")
    axes.set_yticks(places, names, fontsize=SMALL)
    axes.set_ylabel(
        "kinds of layer (how many), blocks from first to last", fontsize=TEXT, color=INK
    )


def _title(policy: Policy) -> str:
    return (
        f"{policy.average_bits:.3f} activation bits on average, {policy.average_asked:g} allowed "
        f"({policy.average_bits_by_operations:.3f} weighted by operations per token)"
    )
