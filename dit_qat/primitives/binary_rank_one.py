"""Binary weights with row and column scales: ``What_ij = sum_t r_ti c_tj b_tij``, no mean.

ARB-RC (arXiv:2410.03129, equations 12-13): a rank-1 fit of magnitudes by alternating weighted least
squares over a mask, for every zone and plane its own. Without a mask one plane converges to the top
singular triple of ``|W|``.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.primitives.binary import nearest_planes, signs

__all__ = ["RankOne", "normalized", "rank_one", "rank_one_start", "rank_one_steps", "terms"]


class RankOne(NamedTuple):
    """One zone of a weight (n, k).

    Attributes:
        rows: (order, n) scales.
        columns: (order, k) scales.
        planes: (order, n, k), -1 and +1, outside the mask too.
    """

    rows: Tensor
    columns: Tensor
    planes: Tensor


def terms(fit: RankOne) -> Tensor:
    """What every plane stands for (order, n, k); their sum is the weight."""
    return fit.rows[:, :, None] * fit.columns[:, None, :] * fit.planes


def rank_one_start(W: Tensor, mask: Tensor, order: int) -> RankOne:
    """Mean magnitudes of rows, then of columns relative to them; the second plane on the rest."""
    rows, columns, planes, rest = [], [], [], W
    for _ in range(order):
        magnitude = rest.abs() * mask
        r = magnitude.sum(1) / mask.sum(1).clamp_min(1)
        relative = magnitude / torch.where(r > 0, r, 1)[:, None]
        c = relative.sum(0) / mask.sum(0).clamp_min(1)
        planes.append(signs(rest))
        rest = rest - r[:, None] * c * planes[-1]
        rows.append(r)
        columns.append(c)
    return RankOne(torch.stack(rows), torch.stack(columns), torch.stack(planes))


def rank_one_steps(W: Tensor, mask: Tensor, fit: RankOne, iterations: int) -> Iterator[RankOne]:
    """Row scales, column scales, signs in turn; yields after every sub-step, none can hurt.

    Args:
        W: (n, k).
        mask: (n, k).
        fit: Where to start.
        iterations: Of all.
    """
    order = len(fit.rows)
    aligned = W * fit.planes[0] * mask
    for _ in range(iterations):
        for t in range(order):
            if order > 1:
                other = fit.rows[1 - t, :, None] * fit.columns[1 - t] * fit.planes[1 - t]
                aligned = (W - other) * fit.planes[t] * mask
            c = fit.columns[t]
            fit = fit._replace(rows=_put(fit.rows, t, _ratio(aligned @ c, mask @ c.square())))
            yield fit
            r = fit.rows[t]
            column = _ratio(aligned.T @ r, mask.T @ r.square())
            fit = fit._replace(columns=_put(fit.columns, t, column))
            yield fit
        if order > 1:  # with one plane, scales stay above 0 and signs those of W
            scales = fit.rows[:, :, None] * fit.columns[:, None, :]
            fit = fit._replace(planes=nearest_planes(W, list(scales)))
            yield fit


def rank_one(W: Tensor, mask: Tensor, order: int, iterations: int = 15) -> RankOne:
    """The fit that :func:`rank_one_steps` reach from :func:`rank_one_start`."""
    fit = rank_one_start(W, mask, order)
    for better in rank_one_steps(W, mask, fit, iterations):
        fit = better
    return normalized(fit, mask)


def normalized(fit: RankOne, mask: Tensor) -> RankOne:
    """Column scales of mean magnitude 1 over the columns that the mask reaches, for float16."""
    reached = (mask.sum(0) > 0).sum().clamp_min(1)
    size = fit.columns.abs().sum(1) / reached
    size = torch.where(size > 0, size, 1)
    return fit._replace(rows=fit.rows * size[:, None], columns=fit.columns / size[:, None])


def _ratio(above: Tensor, below: Tensor) -> Tensor:
    return torch.where(below > 0, above / below.clamp_min(torch.finfo(below.dtype).tiny), 0)


def _put(values: Tensor, at: int, new: Tensor) -> Tensor:
    values = values.clone()
    values[at] = new
    return values
