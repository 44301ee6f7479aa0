"""D2Quant's dual-scale quantizer: sign planes with row scales, and a scale that columns share.

For a group of columns, ``W_ij ~ c_j sum_p r_ip B_p,ij``. Row scales, column scale and codes are
fitted in turn, each the exact minimiser of the squared error, so that it never rises.
"""

from collections.abc import Iterator
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "DualScale",
    "Levels",
    "fit_dual_scale",
    "fit_row_scales",
    "nearest_planes",
    "steps_of_dual_scale",
]

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
    c, count = fit.columns.double(), len(fit.planes)
    gram, against = c.new_empty(len(weight), count, count), c.new_empty(len(weight), count)
    for p, plane in enumerate(fit.planes):  # signs multiply without rounding
        against[:, p] = (plane * weight).double() @ c
        for q, other in enumerate(fit.planes[: p + 1]):
            gram[:, p, q] = gram[:, q, p] = (plane * other).double() @ c.square()
    norms = gram.diagonal(dim1=1, dim2=2).prod(1)
    sound = torch.linalg.det(gram) > _SINGULAR * norms
    identity = torch.eye(count, dtype=gram.dtype, device=gram.device)
    solved = torch.linalg.solve(torch.where(sound[:, None, None], gram, identity), against)
    rows = torch.where(sound[:, None], solved, fit.rows.double()).to(fit.rows.dtype)
    flips = torch.where(rows < 0, -1, 1).to(fit.planes.dtype)
    return fit._replace(planes=fit.planes * flips.T[:, :, None], rows=rows.abs())


class Levels(NamedTuple):
    """What the planes of each row can add up to, from least to greatest.

    Attributes:
        values: (out, 2^planes).
        signs: (planes, out, 2^planes), of which each is the sum.
    """

    values: Tensor
    signs: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Levels":
        """All sums of row scales (out, planes), added in the order in which they are decoded."""
        signs = rows.new_tensor([*product((1.0, -1.0), repeat=rows.shape[1])]).T
        values = rows.new_zeros(len(rows), signs.shape[1])
        for plane, scale in zip(signs, rows.unbind(1), strict=True):
            values += scale[:, None] * plane
        values, numbers = values.sort(dim=1)
        return cls(values, signs[:, numbers])

    def nearest(self, weight: Tensor) -> Tensor:
        """Number of the nearest level of weights (out, k), which columns have been divided from."""
        place = torch.zeros_like(weight, dtype=torch.long)
        between = (self.values[:, 1:] + self.values[:, :-1]) / 2
        for edge in torch.split(between, 1, dim=1):  # one at a time: all at once take much memory
            place += weight > edge
        return place

    def planes(self, numbers: Tensor) -> Tensor:
        """Signs (planes, out, k) of levels (out, k)."""
        return torch.stack([plane.gather(1, numbers) for plane in self.signs])


def nearest_planes(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The nearest of all sums of signs (planes, out, k); of weights (out, k) of such columns."""
    levels = Levels.of(rows)
    at = torch.where(columns > 0, weight / torch.where(columns > 0, columns, 1), 0)
    return levels.planes(levels.nearest(at))


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
