"""A column block while it is being fitted: zones, signs and values, and how they are improved."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.layers.binary_code import BinaryBlock, BinaryLayout, decode_block
from dit_qat.llm.methods.zones import Zones
from dit_qat.primitives.binary import (
    arb,
    moment_error,
    moment_fit,
    nearest_planes,
    normal_equations,
    solve,
)
from dit_qat.primitives.binary_rank_one import rank_one

__all__ = ["BlockFit", "Plain", "best_rows", "feed_back", "fit_block", "rounded", "solve_jointly"]

_ROWS = 1024  # whose basis exists at a time
_HALF = torch.finfo(torch.float16)


@dataclass(frozen=True)
class Plain:
    """How every zone alone is fitted.

    Attributes:
        iterations: Of ARB; 0: the plain means of BiLLM.
        closed: Mean and scales by their joint optimum in every iteration.
        moment: Fit the values to the second moment after that (ARB-X), signs as they are.
        sweeps: Coordinate sweeps of that; None: its solution.
    """

    iterations: int = 15
    closed: bool = False
    moment: bool = False
    sweeps: int | None = 15


class BlockFit(NamedTuple):
    """A block (n, k) in the dtype of the weight.

    Attributes:
        layout: What it will be stored as.
        zones: Of its entries.
        first: (n, k), -1 and +1.
        second: (n, salient columns), -1 and +1.
        values: (n, row values).
        columns: (columns, groups) and (salient columns, 2 groups); None: no column scales.
        keep: (n, k) bool; None: everything.
    """

    layout: BinaryLayout
    zones: Zones
    first: Tensor
    second: Tensor
    values: Tensor
    columns: tuple[Tensor, Tensor] | None = None
    keep: Tensor | None = None

    def basis(self) -> list[Tensor]:
        """What the values are coefficients of, (n, k) each, in their order."""
        dtype, found = self.first.dtype, []
        salient = self.zones.salient
        second = torch.zeros_like(self.first)
        second[:, salient] = self.second
        sides = ((~salient, self.layout.plain_groups), (salient, self.layout.salient_groups))
        for part, (columns, count) in enumerate(sides):
            for g in range(count):
                mask = ((self.zones.group == g) & columns).to(dtype)
                mask = mask if self.keep is None else mask * self.keep
                planes = [self.first, second][: 1 + part]
                if self.columns is None:
                    found += [mask, *(mask * plane for plane in planes)]
                    continue
                own = self.columns[part].view(len(self.columns[part]), count, -1)[:, g]
                for t, plane in enumerate(planes):
                    scale = torch.zeros_like(self.first[0])
                    scale[columns] = own[:, t]
                    found.append(mask * plane * scale)
        return found

    def rows(self, start: int, stop: int) -> "BlockFit":
        """Some rows of it."""
        at = slice(start, stop)
        return self._replace(
            zones=Zones(self.zones.salient, self.zones.group[at]),
            first=self.first[at],
            second=self.second[at],
            values=self.values[at],
            keep=None if self.keep is None else self.keep[at],
        )


def fit_block(
    W: Tensor,
    zones: Zones,
    layout: BinaryLayout,
    plain: Plain,
    S: Tensor | None = None,
    keep: Tensor | None = None,
) -> BlockFit:
    """Fit every zone alone.

    Args:
        W: (n, k).
        zones: Of its entries.
        layout: With or without column scales.
        plain: How.
        S: (k, k), for ``plain.moment``.
        keep: (n, k) bool, entries that are not pruned; None: all.
    """
    first, values = torch.ones_like(W), []
    second = W.new_ones(len(W), int(zones.salient.count_nonzero()))
    columns = []
    sides = ((~zones.salient, layout.plain_groups), (zones.salient, layout.salient_groups))
    for part, (at, count) in enumerate(sides):
        target, scales = W[:, at], []
        cut = None if S is None else S[at][:, at]
        for g in range(count):
            mask = zones.group[:, at] == g
            if keep is not None:
                mask &= keep[:, at]
            own = mask.to(W.dtype)
            if layout.column_scales:
                fit = rank_one(target, own, 1 + part, plain.iterations)
                planes, value = fit.planes, fit.rows.T
                scales.append(fit.columns.T)
            else:
                found = arb(target, own, 1 + part, plain.iterations, plain.closed)
                if plain.moment and cut is not None:
                    found = moment_fit(target, own, found, cut, plain.sweeps)
                planes, value = found.planes, found.values
            values.append(value)
            first[:, at] = torch.where(mask, planes[0], first[:, at])
            if part:
                second = torch.where(mask, planes[1], second)
        if layout.column_scales:
            columns.append(torch.cat(scales, 1))
    pair = (columns[0], columns[1]) if layout.column_scales else None
    fit_all = BlockFit(layout, zones, first, second, torch.cat(values, 1), pair, keep)
    return fit_all if pair is None else _with_stored_columns(fit_all)


def rounded(fit: BlockFit) -> BinaryBlock:
    """The block as it is stored.

    Raises:
        ValueError: for values beyond float16.
    """
    columns = fit.columns
    if not bool((fit.values.abs() <= _HALF.max).all()):
        row = int((~(fit.values.abs() <= _HALF.max)).any(1).nonzero()[0])
        raise ValueError(
            f"row {row} of the weight needs a scale beyond the {_HALF.max:g} of float16, or is not "
            "finite; scale the layer down"
        )
    return BinaryBlock(
        fit.zones.salient,
        fit.zones.group if fit.keep is None else fit.zones.group * fit.keep,
        fit.first > 0 if fit.keep is None else (fit.first > 0) & fit.keep,
        fit.second > 0,
        fit.values.to(torch.float16),
        None if columns is None else (columns[0].half(), columns[1].half()),
        fit.keep,
    )


def solve_jointly(W: Tensor, fit: BlockFit, S: Tensor) -> BlockFit:
    """Values of all zones together for the least ``tr R S R^T``, signs and columns as they are.

    Pruned entries count with all that they lose. A row keeps its values where the new ones would
    not fit float16.
    """
    values = torch.empty_like(fit.values)
    for start in range(0, len(W), _ROWS):
        stop = min(start + _ROWS, len(W))
        G, h = normal_equations(fit.rows(start, stop).basis(), W[start:stop], S)
        values[start:stop] = solve(G, h, fit.values[start:stop])
    storable = (values.abs() <= _HALF.max).all(1, keepdim=True)
    return fit._replace(values=torch.where(storable, values, fit.values))


def feed_back(W: Tensor, fit: BlockFit, factor: Tensor) -> BlockFit:
    """Choose signs again, column by column, each making up for the errors of those before it.

    GPTQ's inner loop with the levels of every entry's zone; zones and values stay.

    Args:
        W: (n, k).
        fit: Zones and values.
        factor: (k, k), U_BB.
    """
    mean, first, second = (part.T.contiguous() for part in _entry_levels(fit))
    # A copy: of a single row, ``contiguous`` would hand out W itself.
    target = W.T.clone(memory_format=torch.contiguous_format)
    salient = fit.zones.salient.tolist()
    planes = torch.ones(2, *target.shape, dtype=W.dtype, device=W.device)
    keep = None if fit.keep is None else fit.keep.T.to(W.dtype).contiguous()
    for j in range(len(target)):
        scales = [first[j], second[j]] if salient[j] else [first[j]]
        found = nearest_planes(target[j] - mean[j], scales)
        planes[: len(found), j] = found
        made = mean[j] + first[j] * planes[0, j]
        if salient[j]:
            made = made + second[j] * planes[1, j]
        if keep is not None:
            made = made * keep[j]
        error = (target[j] - made) / factor[j, j]
        target[j + 1 :].addr_(factor[j, j + 1 :], error, alpha=-1)
    second_plane = planes[1].T[:, fit.zones.salient]
    return fit._replace(first=planes[0].T.contiguous(), second=second_plane.contiguous())


def best_rows(W: Tensor, fits: Sequence[BlockFit], S: Tensor | None) -> BlockFit:
    """Row by row, of fits with the same zones and columns, the best one as stored."""
    best, least = fits[0], _stored_error(W, fits[0], S)
    for fit in fits[1:]:
        error = _stored_error(W, fit, S)
        better = (error < least)[:, None]
        best = best._replace(
            first=torch.where(better, fit.first, best.first),
            second=torch.where(better, fit.second, best.second),
            values=torch.where(better, fit.values, best.values),
        )
        least = torch.minimum(error, least)
    return best


def _stored_error(W: Tensor, fit: BlockFit, S: Tensor | None) -> Tensor:
    residual = W - decode_block(fit.layout, rounded(fit)).to(W.dtype)
    error = moment_error(residual, S)
    return torch.where(error.isfinite(), error, torch.inf)


def _with_stored_columns(fit: BlockFit) -> BlockFit:
    """Column scales as float16 has them, so that whatever follows is fitted to those."""
    assert fit.columns is not None
    plain, salient = (part.half().to(part.dtype) for part in fit.columns)
    return fit._replace(columns=(plain, salient))


def _entry_levels(fit: BlockFit) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, first and second scale (n, k) of every entry's zone, as stored."""
    layout, values = fit.layout, fit.values.half().to(fit.values.dtype)
    n, start = len(values), layout.plain_groups * layout.widths[0]
    parts = [torch.zeros_like(fit.first) for _ in range(3)]
    for part, at in enumerate((~fit.zones.salient, fit.zones.salient)):
        own = (values[:, start:] if part else values[:, :start]).view(n, -1, layout.widths[part])
        group = fit.zones.group[:, at].long()
        for t in range(layout.widths[part]):
            entry = own[..., t].gather(1, group)
            if fit.columns is not None:
                by_group = fit.columns[part].view(int(at.sum()), -1, 1 + part)[..., t]
                entry = entry * by_group.T.gather(0, group)
            parts[t + 1 if layout.column_scales else t][:, at] = entry
    return parts[0], parts[1], parts[2]
