"""The picture of a bit policy: timesteps across, layers down."""

from io import BytesIO

import numpy as np
from matplotlib.colors import BoundaryNorm, ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from dit_qat.dit.methods.adatsq.policy import Policy

__all__ = ["policy_plot"]

_WIDTH, _DPI = 7.6, 200  # as the other plots of a report
_TEXT, _SMALL = 9.0, 8.0
_INK, _FAINT = "#222222", "#777777"
_FEWEST, _MOST = 2, 8
# Light to dark with rising bits, so that it also reads in grey.
_COLOURS = ("#fdf3d8", "#f6d9a0", "#8fc3dc", "#5c9fc8", "#3c7bb0", "#265a94", "#123a6b")
_MOST_TICKS = 12


def policy_plot(policy: Policy) -> bytes:
    """Draw activation bits by timestep (across, in the order of sampling) and layer (down): PNG."""
    bits = np.asarray(policy.bits).T
    layers, steps = bits.shape
    pitch = 0.2 if layers <= 48 else 0.13
    figure = Figure((_WIDTH, 1.25 + pitch * layers), dpi=_DPI, layout="constrained")
    axes = figure.add_subplot()
    norm = BoundaryNorm(np.arange(_FEWEST, _MOST + 2) - 0.5, len(_COLOURS))
    axes.pcolormesh(
        bits,
        cmap=ListedColormap(_COLOURS),
        norm=norm,
        edgecolors="white",
        linewidth=0.6 if layers * steps <= 4000 else 0,
    )
    axes.invert_yaxis()
    axes.set_yticks(
        np.arange(layers) + 0.5, policy.layers, fontsize=_SMALL if layers <= 48 else 5.5
    )
    shown = np.arange(0, steps, -(-steps // _MOST_TICKS))
    axes.set_xticks(shown + 0.5, [f"{policy.timesteps[i]:.4g}" for i in shown], fontsize=_SMALL)
    axes.tick_params(length=0, colors=_INK)
    axes.spines[:].set_visible(False)
    axes.set_xlabel("the model's timestep, in the order of sampling", fontsize=_TEXT, color=_INK)
    figure.suptitle(_title(policy), fontsize=_TEXT + 1, color=_INK)
    used = sorted({int(b) for b in bits.flat})
    handles = [Patch(facecolor=_COLOURS[b - _FEWEST], edgecolor=_FAINT) for b in used]
    figure.legend(
        handles,
        [f"{b} bits ({(bits == b).mean():.0%})" for b in used],
        loc="outside lower center",
        ncols=len(used),
        frameon=False,
        fontsize=_TEXT,
    )
    buffer = BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def _title(policy: Policy) -> str:
    return (
        f"{policy.average_bits:.3f} activation bits on average, {policy.average_asked:g} allowed "
        f"({policy.average_bits_by_operations:.3f} weighted by operations)"
    )
