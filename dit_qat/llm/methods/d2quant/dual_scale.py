"""D2Quant's dual-scale quantizer: sign planes with row scales, and a scale that columns share.

For a group of columns, ``W_ij ~ c_j sum_p r_ip B_p,ij``. Row scales, column scale and codes are
fitted in turn, each the exact minimiser of the squared error, so that it never rises.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["DualScale", "fit_dual_scale", "fit_row_scales", "nearest_planes", "steps_of_dual_scale"]

_SINGULAR = 1e-9  # of the product of the planes' norms: then two planes look alike


class DualScale(NamedTuple):
    """Scales and codes of a group.

    Attributes:
        planes: (planes, out, k) of -1 and +1.
        rows: (out, planes), r; at least 0.
        columns: (k,), c; at least 0.
    """

    planes: Tensor
    rows: Tensor
    columns: Tensor

    @property
    def values(self) -> Tensor:
        """What they stand for (out, k)."""
        return torch.einsum("pok,op->ok", self.planes, self.rows) * self.columns


def fit_dual_scale(weight: Tensor, planes: int = 2, iterations: int = 15) -> DualScale:
    """Fit a group of columns; the codes are those of the last iteration.

    Args:
        weight: (out, k).
        planes: Bits.
        iterations: Rounds of row scales, column scale and codes.
    """
    fit = _start(weight, planes)
    for fit in steps_of_dual_scale(weight, fit, iterations):  # noqa: B007, B020
        pass
    return fit


def steps_of_dual_scale(weight: Tensor, fit: DualScale, iterations: int) -> Iterator[DualScale]:
    """Every half-step of the fit, from a start."""
    for _ in range(iterations):
        fit = fit_row_scales(weight, fit)
        yield fit
        fit = _column_scale(weight, fit)
        yield fit
        fit = fit._replace(planes=nearest_planes(weight, fit.rows, fit.columns))
        yield fit


def fit_row_scales(weight: Tensor, fit: DualScale) -> DualScale:
    """Least-squares row scales of given planes and columns, in float64; signs go to the planes.

    A row keeps its scales where two of its planes look alike.
    """
    B, c = fit.planes.double(), fit.columns.double()
    gram = torch.einsum("pok,qok,k->opq", B, B, c.square())
    against = torch.einsum("pok,ok,k->op", B, weight.double(), c)
    norms = gram.diagonal(dim1=1, dim2=2).prod(1)
    sound = torch.linalg.det(gram) > _SINGULAR * norms
    identity = torch.eye(len(B), dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(torch.where(sound[:, None, None], gram, identity), against)
    rows = torch.where(sound[:, None], solved, fit.rows.double()).to(fit.rows.dtype)
    flips = torch.where(rows < 0, -1, 1).to(fit.planes.dtype)
    return fit._replace(planes=fit.planes * flips.T[:, :, None], rows=rows.abs())


def nearest_planes(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The nearest of all sums of signs (planes, out, k); of weights (out, k) of such columns."""
    signs = weight.new_tensor([*product((1.0, -1.0), repeat=rows.shape[1])])  # (levels, planes)
    levels = rows @ signs.T
    at = torch.where(columns > 0, weight / torch.where(columns > 0, columns, 1), 0)
    best, least = torch.zeros_like(at, dtype=torch.long), torch.full_like(at, torch.inf)
    for number in range(len(signs)):  # one level at a time: all at once take much memory
        distance = (at - levels[:, number : number + 1]).abs_()
        nearer = distance < least
        best[nearer] = number
        least = torch.where(nearer, distance, least)
    return signs.T[:, best]


def _start(weight: Tensor, planes: int) -> DualScale:
    """Columns by their mean magnitude, then one plane after the other of what is left."""
    columns = weight.abs().mean(0)
    norm = columns.square().sum().clamp_min(torch.finfo(weight.dtype).tiny)
    rest, found, rows = weight, [], []
    for _ in range(planes):
        plane = torch.where(rest < 0, -1.0, 1.0).to(weight.dtype)
        scale = (rest * plane) @ columns / norm
        rest = rest - scale[:, None] * columns * plane
        found.append(plane)
        rows.append(scale)
    return DualScale(torch.stack(found), torch.stack(rows, 1), columns)


def _column_scale(weight: Tensor, fit: DualScale) -> DualScale:
    """Least-squares column scales; a sign goes to the planes, an empty column keeps its own."""
    S = torch.einsum("pok,op->ok", fit.planes, fit.rows)
    norm = S.square().sum(0)
    columns = torch.where(norm > 0, (S * weight).sum(0) / torch.where(norm > 0, norm, 1), 0)
    columns = torch.where(norm > 0, columns, fit.columns)
    flips = torch.where(columns < 0, -1, 1).to(fit.planes.dtype)
    return fit._replace(planes=fit.planes * flips, columns=columns.abs())
