"""CLPS, CLQ's cross-layer parameter search: clipping bounds by the error at a later layer.

CLQ (arXiv:2509.24416): perturb a layer's quantizer, watch the error at the layers behind it, take
the one where it varies most as the target, and choose the bounds of least error there.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dit_qat.calibration.view import BlockView
from dit_qat.layers.input_transform import InputTransform
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.integer import IntegerGrid, Scales, encode, fit_scales

__all__ = [
    "PERTURBATIONS",
    "Ahead",
    "Bounds",
    "LayerTrial",
    "Search",
    "bounded_scales",
    "find_target",
    "search_bounds",
]

Search = Literal["coordinate", "full"]
Bounds = tuple[float, float]

PERTURBATIONS = (0.8, 0.9, 1.0, 1.1, 1.2)
"""Factors on a layer's step."""


@dataclass(frozen=True)
class LayerTrial:
    """A layer that can be quantized with any bounds.

    Attributes:
        linear: The float layer.
        weight: (out, in), of transformed inputs.
        transform: Of the inputs.
        grid: Of the weight.
        activation: Of the transformed inputs; None: they stay float.
    """

    linear: nn.Linear
    weight: Tensor
    transform: InputTransform
    grid: IntegerGrid
    activation: TokenQuantizer | None

    def quantized(
        self, bounds: Bounds = (1.0, 1.0), step: float = 1.0, codes: Tensor | None = None
    ) -> IntLinear:
        """The layer with weights clipped to fractions of their range.

        Args:
            bounds: Factors on the least and the greatest weight of every output channel.
            step: Factor on the step then.
            codes: Others than the nearest ones.
        """
        scales = bounded_scales(self.weight, self.grid, bounds)
        if step != 1.0:
            scales = Scales((scales.scale * step).half().float(), scales.zero)
        return IntLinear.build(
            self.linear,
            grid=self.grid,
            scales=scales,
            codes=encode(self.weight, self.grid, scales) if codes is None else codes,
            activation=self.activation,
            transform=self.transform,
        )


class Ahead:
    """Outputs of the linears from one block on, against the float ones on the same inputs.

    Args:
        view: The block, float, behind the quantized prefix.
        blocks: How far to look.
        rows: First rows of each probe call that are used; None: all.

    Attributes:
        reference: Float outputs (rows, out) by full name, in order of execution.
    """

    def __init__(self, view: BlockView, blocks: int, rows: int | None = None) -> None:
        self._view, self._rows = view, rows
        self._depth: dict[str, int] = {}
        for depth in range(blocks + 1):
            self.reference: Mapping[str, Tensor] = view.ahead({}, depth, rows=rows)
            for name in self.reference:
                self._depth.setdefault(name, depth)

    def later(self, name: str) -> list[str]:
        """Linears that run after this one; itself if none does."""
        order = [*self.reference]
        return order[order.index(name) + 1 :] or [name]

    def l1_errors(
        self, name: str, layer: nn.Module, targets: Sequence[str], relative: bool
    ) -> Tensor:
        """Mean absolute error at each target (targets,), over the mean absolute output if asked."""
        found = self._outputs(name, layer, targets)
        errors = []
        for target in targets:
            exact = self.reference[target]
            error = float((found[target] - exact).abs().mean())
            errors.append(error / (float(exact.abs().mean()) or 1.0) if relative else error)
        return torch.tensor(errors, dtype=torch.float64)

    def squared_error(self, name: str, layer: nn.Module, target: str) -> float:
        """``||Y - Y'||_F^2`` at a target with one layer quantized."""
        found = self._outputs(name, layer, [target])[target]
        return float((found - self.reference[target]).square().sum())

    def _outputs(self, name: str, layer: nn.Module, targets: Sequence[str]) -> dict[str, Tensor]:
        depth = max(self._depth[target] for target in targets)
        return self._view.ahead({name: layer}, depth, targets, self._rows)


def find_target(ahead: Ahead, name: str, trial: LayerTrial, relative: bool = True) -> str:
    """The later linear whose L1 error varies most when the layer's step is perturbed.

    Args:
        ahead: From the layer's block on.
        name: Of the layer.
        trial: The layer.
        relative: Divide by the mean absolute output, lest layers of large norm always win.
    """
    later = ahead.later(name)
    errors = [
        ahead.l1_errors(name, trial.quantized(step=factor), later, relative)
        for factor in PERTURBATIONS
    ]
    return later[int(torch.stack(errors).var(0).argmax())]


def bounded_scales(weight: Tensor, grid: IntegerGrid, bounds: Bounds) -> Scales:
    """Scales of weights clipped to ``l = a min`` and ``r = b max`` of each output channel."""
    low = weight.amin(1, keepdim=True).clamp_max(0) * bounds[0]
    high = weight.amax(1, keepdim=True).clamp_min(0) * bounds[1]
    return fit_scales(weight.clamp(low, high), grid)


def search_bounds(
    error: Callable[[Bounds], float],
    values: Sequence[float],
    search: Search = "coordinate",
    patience: int | None = None,
) -> tuple[Bounds, float]:
    """Factors on the lower and the upper bound of least error, and that error.

    Args:
        error: Called once at most for each pair.
        values: To choose from; 1 is always among them.
        search: ``full`` tries all pairs. ``coordinate`` goes from (1, 1) along the lower bound,
            then the upper, and so on until neither helps: a coordinate-wise optimum.
        patience: A walk along a bound, from 1 down, ends after so many values without a new best;
            None: it tries all of them.
    """
    offered = sorted({1.0, *values}, reverse=True)
    known: dict[Bounds, float] = {}

    def at(bounds: Bounds) -> float:
        if bounds not in known:
            known[bounds] = error(bounds)
        return known[bounds]

    if search == "full":
        best = min(((a, b) for a in offered for b in offered), key=at)
        return best, at(best)
    best, before = (1.0, 1.0), None
    while best != before:
        before = best
        best = _walk([(a, best[1]) for a in offered], best, at, patience)
        best = _walk([(best[0], b) for b in offered], best, at, patience)
    return best, at(best)


def _walk(
    line: Sequence[Bounds], best: Bounds, error: Callable[[Bounds], float], patience: int | None
) -> Bounds:
    """The best of a line and the point so far."""
    since, least = 0, float("inf")
    for bounds in line:
        since = 0 if error(bounds) < least else since + 1
        least = min(least, error(bounds))
        if error(bounds) < error(best):
            best = bounds
        if since == patience:
            break
    return best
