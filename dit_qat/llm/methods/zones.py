"""Zones of a column block: salient columns, and magnitude groups by thresholds.

BiLLM (arXiv:2402.04291), ARB-LLM (arXiv:2410.03129), STBLLM (arXiv:2408.01803) and our PBS2P look
for the same two things. The columns of largest saliency become salient, as many as lets plain
two-plane fits of the two parts err least; then the entries of a part are divided into groups at
thresholds of their magnitude, tried at quantiles, again by the error of plain fits. The releases do
both on the *saliency* matrix ``w^2 / U_jj^2`` and not on the weight.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.primitives.binary import binarize, moment_error, plain_error, reconstruct
from dit_qat.primitives.binary_scan import ZoneScan, quantiles_of

__all__ = ["Groups", "ZoneSearch", "Zones", "find_zones", "saliency", "salient_columns"]

_CHUNK = 512  # rows whose temporaries stay in the caches
_ROUNDS = 8  # of coordinate descent over several thresholds; it stops by itself before

Score = Callable[[Tensor], Tensor]


class Zones(NamedTuple):
    """A column block (n, k), divided.

    Attributes:
        salient: (k,) bool.
        group: (n, k) uint8, of growing magnitude; salient columns have their own.
    """

    salient: Tensor
    group: Tensor


@dataclass(frozen=True)
class ZoneSearch:
    """What is tried.

    Attributes:
        most_salient: Columns of a block that may be salient; 0 for none.
        quantiles: Thresholds tried, evenly over quantiles of the magnitude.
        lowest: The first of them.
        highest: The last.

    Raises:
        ValueError: for values outside their range.
    """

    most_salient: int = 49
    quantiles: int = 81
    lowest: float = 0.1
    highest: float = 0.9

    def __post_init__(self) -> None:
        if self.most_salient < 0 or self.quantiles < 1:
            raise ValueError(f"{self}: most_salient is 0 or more, quantiles 1 or more")
        if not 0 < self.lowest <= self.highest < 1:
            raise ValueError(f"{self}: quantiles go from lowest to highest, both within 0..1")

    def edges(self, magnitudes: Tensor) -> Tensor:
        """Thresholds (quantiles,) for magnitudes of any shape; above 0."""
        levels = torch.linspace(self.lowest, self.highest, self.quantiles)
        if not magnitudes.numel():
            return torch.ones(self.quantiles).to(magnitudes)
        return quantiles_of(magnitudes, levels).clamp_min(torch.finfo(magnitudes.dtype).tiny)


@dataclass(frozen=True)
class Groups:
    """How entries of plain and of salient columns are grouped.

    Attributes:
        plain: Groups of plain columns.
        salient: Groups of salient columns; 1 without the column-group bitmap.
        doubled: Three plain groups with the second threshold at twice the first (STBLLM).
        zeros_count: The quantiles of plain columns also count a zero for every entry of a salient
            one (BiLLM), and zeros at all.
    """

    plain: int = 2
    salient: int = 1
    doubled: bool = False
    zeros_count: bool = False


def saliency(W: Tensor, factor: Tensor) -> Tensor:
    """``w_ij^2 / U_jj^2``, U_jj^2 = [(H_j:,j:)^-1]_jj: the error that zeroing an entry would cause.

    Args:
        W: (n, k).
        factor: (k, k), U_BB.
    """
    return (W / factor.diagonal()).square()


def find_zones(
    matrix: Tensor,
    columns: Tensor,
    search: ZoneSearch,
    groups: Groups,
    keep: Tensor | None = None,
    S: Tensor | None = None,
) -> Zones:
    """Divide a block.

    Args:
        matrix: (n, k) on which fits are tried: the saliency or the weight.
        columns: (k,) scores by which columns become salient.
        search: What is tried.
        groups: How many groups.
        keep: (n, k) bool, entries that count; None: all.
        S: (k, k); thresholds of plain columns are then scored by ``tr R S R^T`` (ARB-X).
    """
    salient = salient_columns(matrix, columns, search.most_salient, keep)
    group = torch.zeros(matrix.shape, dtype=torch.uint8, device=matrix.device)
    for part, count, order in ((~salient, groups.plain, 1), (salient, groups.salient, 2)):
        if count == 1 or not bool(part.any()):
            continue
        own = None if keep is None else keep[:, part]
        values = matrix[:, part]
        pool = values.abs() if own is None else values[own].abs()
        if order == 1 and groups.zeros_count:
            absent = matrix.new_zeros(len(matrix) * int(salient.count_nonzero()))
            edges = search.edges(torch.cat([pool.flatten(), absent]))
        else:
            edges = search.edges(pool[pool > 0])
        if order == 1 and groups.doubled:
            cuts = _doubled(values, edges, own)
        elif order == 1 and S is not None:
            cuts = _descent(_moment_score(values, edges, own, S[part][:, part]), edges, count)
        else:
            cuts = _descent(_scan_score(values, edges, own, order), edges, count)
        group[:, part] = torch.bucketize(values.abs(), cuts, right=True).to(torch.uint8)
    return Zones(salient, group)


def salient_columns(
    matrix: Tensor, columns: Tensor, most: int, keep: Tensor | None = None
) -> Tensor:
    """Columns (k,) bool of largest score whose number gives the least plain two-plane error."""
    chosen = torch.zeros(matrix.shape[1], dtype=torch.bool, device=matrix.device)
    most = min(most, matrix.shape[1] - 1)
    if most < 1:
        return chosen
    order = columns.argsort(descending=True, stable=True)
    errors = torch.zeros(most, dtype=torch.float64, device=matrix.device)
    for start in range(0, len(matrix), _CHUNK):
        values = matrix[start : start + _CHUNK, order]
        mask = None if keep is None else keep[start : start + _CHUNK, order].to(matrix.dtype)
        for count in range(1, most + 1):
            for side in (slice(count), slice(count, None)):
                own = None if mask is None else mask[:, side]
                errors[count - 1] += plain_error(values[:, side], 2, own).double().sum()
    chosen[order[: int(errors.argmin()) + 1]] = True
    return chosen


def _descent(score: Score, edges: Tensor, groups: int) -> Tensor:
    """Thresholds (groups - 1,): the best single one; several by coordinate descent."""
    count = len(edges)
    if groups - 1 > count:
        raise ValueError(f"{groups} groups from {count} thresholds; try more quantiles")
    cuts = (torch.arange(1, groups) * count) // groups
    for _ in range(_ROUNDS):
        before = cuts.clone()
        for t in range(groups - 1):
            low = int(cuts[t - 1]) + 1 if t else 0
            high = int(cuts[t + 1]) if t + 2 < groups else count
            trials = cuts.repeat(high - low, 1)
            trials[:, t] = torch.arange(low, high)
            cuts = trials[int(score(trials).argmin())]
        if groups == 2 or torch.equal(cuts, before):
            break
    return edges[cuts.to(edges.device)]


def _scan_score(values: Tensor, edges: Tensor, keep: Tensor | None, order: int) -> Score:
    scans = [
        ZoneScan(part, edges, None if keep is None else keep[at : at + _CHUNK])
        for at, part in zip(range(0, len(values), _CHUNK), torch.split(values, _CHUNK), strict=True)
    ]

    def score(cuts: Tensor) -> Tensor:
        cuts = cuts.to(values.device) + 1  # cut 0 is zero
        low = torch.cat([torch.zeros_like(cuts[:, :1]), cuts], 1)
        high = torch.cat([cuts, torch.full_like(cuts[:, :1], len(edges) + 1)], 1)
        pairs = torch.stack([low.flatten(), high.flatten()])
        zones, index = torch.unique(pairs, dim=1, return_inverse=True)
        error = torch.stack([scan.error(zones[0], zones[1], order) for scan in scans]).sum(0)
        return error[index].view(low.shape).sum(1)

    return score


def _moment_score(values: Tensor, edges: Tensor, keep: Tensor | None, S: Tensor) -> Score:
    def score(cuts: Tensor) -> Tensor:
        errors = []
        for cut in cuts:
            group = torch.bucketize(values.abs(), edges[cut.to(edges.device)], right=True)
            residual = values.clone() if keep is None else values * keep
            for g in range(cuts.shape[1] + 1):
                mask = group == g if keep is None else (group == g) & keep
                own = mask.to(values.dtype)
                residual -= own * reconstruct(binarize(values, own, 1))
            errors.append(moment_error(residual, S).double().sum())
        return torch.stack(errors)

    return score


def _doubled(values: Tensor, edges: Tensor, keep: Tensor | None) -> Tensor:
    """Thresholds p and 2 p of least error, 2 p not above the highest quantile."""
    usable = edges[2 * edges <= edges[-1]]
    edges = usable if len(usable) else edges[:1]
    count = len(edges)
    first = torch.arange(1, count + 1, device=edges.device)
    scan = ZoneScan(values, torch.cat([edges, 2 * edges]), keep)
    zero, last = torch.zeros_like(first), torch.full_like(first, 2 * count + 1)
    error = scan.error(zero, first, 1) + scan.error(first, first + count, 1)
    best = edges[int((error + scan.error(first + count, last, 1)).argmin())]
    return torch.stack([best, 2 * best])
