"""Errors of plain binarisation for many thresholds at once, from sorted rows and running sums.

A zone is what lies between two thresholds of ``|w|``: two contiguous stretches of a sorted row, one
of negative and one of positive values. Mean, mean magnitude and squared error of one or two planes
(:func:`dit_qat.primitives.binary.binarize`) follow from counts and sums over at most four cuts of
them, so that a threshold costs a few look-ups per row instead of passes over the weight.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["ZoneScan", "quantiles_of"]


class _Stretch(NamedTuple):
    """Zones (n, T): positions of the negative and of the positive stretch of every row."""

    low_start: Tensor
    low_stop: Tensor
    high_start: Tensor
    high_stop: Tensor


class ZoneScan:
    """Sorted rows of a weight (n, k), cut at thresholds of its magnitude.

    Args:
        W: (n, k).
        edges: (T,) thresholds above 0.
        mask: (n, k) bool, entries that count; None: all.
    """

    def __init__(self, W: Tensor, edges: Tensor, mask: Tensor | None = None) -> None:
        values = W.double()
        if mask is not None:
            values = values.masked_fill(~mask, torch.inf)
        self.values = values.sort(1).values
        zero, kept = values.new_zeros(len(values), 1), torch.full((len(values), 1), W.shape[1])
        counted, kept = self.values, kept.to(W.device)
        if mask is not None:
            counted, kept = counted.masked_fill(counted.isinf(), 0), mask.sum(1, keepdim=True)
        self.sums = torch.cat([zero, counted.cumsum(1)], 1)
        self.squares = torch.cat([zero, counted.square().cumsum(1)], 1)
        # Position of every cut: 0, the edges, infinity, on both sides of zero.
        inner = edges.double().expand(len(values), -1).contiguous()
        middle = self._below(zero)
        self.up = torch.cat([middle, self._below(inner), kept], 1)
        down = torch.searchsorted(self.values, -inner, right=True)
        self.down = torch.cat([middle, down, torch.zeros_like(kept)], 1)

    def error(self, low: Tensor, high: Tensor, order: int) -> Tensor:
        """Squared error over all rows (T,) of zones between cuts ``low`` and ``high`` (T,).

        Cut 0 is zero, cut t the t-th edge, the last one infinity; a zone holds magnitudes from its
        low cut on and below its high one.
        """
        zone = _Stretch(self.down[:, high], self.down[:, low], self.up[:, low], self.up[:, high])
        before = self._at(self.sums, zone.low_start, zone.high_start)
        count, total = self._until(zone, before, zone.high_stop)
        squares = self._at(self.squares, zone.low_stop, zone.high_stop)
        squares -= self._at(self.squares, zone.low_start, zone.high_start)
        divisor = count.clamp_min(1)
        mean = total / divisor
        below = self._until(zone, before, self._below(mean))
        scale = ((total - 2 * below[1]) - mean * (count - 2 * below[0])) / divisor
        error = squares - count * (mean.square() + scale.square())
        if order == 2:
            # The residual is w - mean + scale below the mean and w - mean - scale from it on.
            shift = -scale * (count - 2 * below[0]) / divisor
            cut = mean - scale + shift
            start = (torch.zeros_like(count), torch.zeros_like(mean))
            spread = _about(start, self._until(zone, before, self._below(cut)), below, cut)
            cut = mean + scale + shift
            middle = self._until(zone, before, self._below(cut))
            spread += _about(below, middle, (count, total), cut)
            error -= count * (shift.square() + (spread / divisor).square())
        return error.clamp_min(0).sum(0)

    def _until(self, zone: _Stretch, before: Tensor, stop: Tensor) -> tuple[Tensor, Tensor]:
        """Count and sum of a zone's entries before a position; ``before`` is the sum up to it."""
        low = stop.clamp(zone.low_start, zone.low_stop)
        high = stop.clamp(zone.high_start, zone.high_stop)
        count = low - zone.low_start + high - zone.high_start
        return count.double(), self._at(self.sums, low, high) - before

    @staticmethod
    def _at(sums: Tensor, low: Tensor, high: Tensor) -> Tensor:
        return sums.gather(1, low).add_(sums.gather(1, high))

    def _below(self, x: Tensor) -> Tensor:
        return torch.searchsorted(self.values, x.contiguous())


def quantiles_of(values: Tensor, levels: Tensor) -> Tensor:
    """Quantiles, linearly interpolated, of all values; ``torch.quantile`` takes 16 million only."""
    ordered = values.flatten().sort().values
    at = levels.to(ordered.device, torch.float64) * (ordered.numel() - 1)
    low = at.floor().long()
    high = (low + 1).clamp_max(ordered.numel() - 1)
    return torch.lerp(ordered[low].double(), ordered[high].double(), at - low).to(values.dtype)


def _about(
    start: tuple[Tensor, Tensor],
    middle: tuple[Tensor, Tensor],
    stop: tuple[Tensor, Tensor],
    cut: Tensor,
) -> Tensor:
    """Sum of ``|w - cut|`` between two positions, given as counts and sums before them."""
    return cut * (2 * middle[0] - start[0] - stop[0]) + start[1] + stop[1] - 2 * middle[1]
