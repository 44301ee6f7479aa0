"""Binary weights: a mean plus one or two planes of signs, each with a scale, per row and mask.

A row of W is written as ``mean + sum_t scale_t b_t`` on the entries of a mask, ``b_t`` in {-1, +1}.
For fixed planes its values are coefficients of the basis ``m, m b_1, m b_2``, so that every update
of ARB-LLM (arXiv:2410.03129) is a coordinate step on one small system per row, ``G v = h``: with
the masked counts in G it lowers ``||M (W - What)||^2`` (ARB), with a second moment between the
basis vectors it lowers ``tr R S R^T`` (ARB-X), and with the basis of all zones of a row it is the
joint problem. Rows are solved together; nothing larger than (rows, columns) is formed.

Masks are 0 and 1 in the dtype of the weight. The sign of zero is +1, empty rows become zero.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = [
    "Fit",
    "arb",
    "arb_steps",
    "basis_of",
    "binarize",
    "coordinate_step",
    "moment_error",
    "moment_fit",
    "nearest_planes",
    "normal_equations",
    "plain_error",
    "reconstruct",
    "signs",
    "solve",
    "sweep",
]

_RIDGE = 16  # roundings


class Fit(NamedTuple):
    """One zone of a weight (n, k).

    Attributes:
        values: (n, 1 + order), the mean and the scale of every plane.
        planes: (order, n, k), -1 and +1, outside the mask too.
    """

    values: Tensor
    planes: Tensor


def signs(x: Tensor) -> Tensor:
    """-1 and +1 in the dtype of ``x``; +1 at zero, for a sign plane has no third code."""
    return torch.ones((), dtype=x.dtype, device=x.device).copysign(x + 0.0)  # -0.0 + 0.0 is 0.0


def nearest_planes(target: Tensor, scales: Sequence[Tensor]) -> Tensor:
    """Signs (order, n, k) whose level ``sum_t scale_t b_t`` is nearest to ``target`` (n, k).

    Args:
        target: What the planes stand for.
        scales: One or two, of any sign, that broadcast against it.
    """
    if len(scales) == 1:
        return (signs(target) * signs(scales[0]))[None]
    first, second = scales
    # With the larger scale taken first, taking one sign after the other finds the nearest level.
    larger = first.abs() >= second.abs()
    coarse = signs(target)
    fine = signs(target - torch.where(larger, first, second).abs() * coarse)
    return torch.stack(
        [
            torch.where(larger, coarse, fine) * signs(first),
            torch.where(larger, fine, coarse) * signs(second),
        ]
    )


def binarize(W: Tensor, mask: Tensor, order: int) -> Fit:
    """Mean, mean magnitude about it, signs; for order 2 once more on what is left.

    BiLLM, arXiv:2402.04291, section 3.2; the start of ARB.

    Args:
        W: (n, k).
        mask: (n, k).
        order: 1 or 2 planes.
    """
    count = mask.sum(1).clamp_min(1)
    mean, scales, planes, rest = W.new_zeros(W.shape[0]), [], [], W
    for _ in range(order):
        shift = (rest * mask).sum(1) / count
        rest = rest - shift[:, None]
        planes.append(signs(rest))
        scales.append((rest.abs() * mask).sum(1) / count)
        rest = rest - scales[-1][:, None] * planes[-1]
        mean = mean + shift
    return Fit(torch.stack([mean, *scales], 1), torch.stack(planes))


def plain_error(W: Tensor, order: int, mask: Tensor | None = None) -> Tensor:
    """Squared error (n,) of :func:`binarize`, from its means alone; without a mask, of all of W."""
    if mask is None:
        count, rest = torch.full((W.shape[0],), float(W.shape[1])).to(W), W
    else:
        count, rest = mask.sum(1), W * mask
    error = torch.linalg.vector_norm(rest, dim=1).square()
    divisor = count.clamp_min(1)
    for step in range(order):
        mean = rest.sum(1) / divisor
        centred = rest - mean[:, None]
        if mask is not None:
            centred *= mask
        scale = centred.abs().sum(1) / divisor
        error = error - count * (mean.square() + scale.square())
        if step + 1 < order:
            rest = centred.sub_(scale[:, None].copysign(centred))
            if mask is not None:
                rest *= mask
    least: Tensor = error.clamp_min(0)
    return least


def reconstruct(fit: Fit) -> Tensor:
    """The weight (n, k) that a fit stands for, outside its mask too."""
    mean, scales = fit.values[:, 0], fit.values[:, 1:]
    return mean[:, None] + torch.einsum("nt,tnk->nk", scales, fit.planes)


def basis_of(mask: Tensor, planes: Tensor) -> list[Tensor]:
    """``m, m b_1, ...``: what the values of a fit are coefficients of, (n, k) each."""
    return [mask, *(mask * plane for plane in planes)]


def normal_equations(
    basis: Sequence[Tensor], target: Tensor, S: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """G (n, q, q) and h (n, q) of ``min_v tr R S R^T``, R = target - sum_a v_a basis_a.

    The closed forms of arXiv:2410.03129 (equations 7, 8 and 11 in masked form) are rows of it.

    Args:
        basis: q tensors (n, k).
        target: (n, k).
        S: (k, k) second moment of the columns; None: the identity.
    """
    n, q = target.shape[0], len(basis)
    G, h = target.new_empty(n, q, q), target.new_empty(n, q)
    for a in range(q):
        weighted = basis[a] if S is None else basis[a] @ S
        h[:, a] = (weighted * target).sum(1)
        for b in range(a, q):
            G[:, a, b] = G[:, b, a] = (weighted * basis[b]).sum(1)
    return G, h


def coordinate_step(G: Tensor, h: Tensor, values: Tensor, at: int) -> Tensor:
    """Values (n, q) with coefficient ``at`` at its optimum given the others; 0 if it is free."""
    own = G[:, at, at]
    others = (G[:, at] * values).sum(1) - own * values[:, at]
    best = torch.where(own > 0, (h[:, at] - others) / own.clamp_min(torch.finfo(own.dtype).tiny), 0)
    values = values.clone()
    values[:, at] = best
    return values


def sweep(G: Tensor, h: Tensor, values: Tensor, rounds: int = 1) -> Tensor:
    """Coordinate steps over all coefficients, the mean first, ``rounds`` times."""
    for _ in range(rounds):
        for at in range(values.shape[1]):
            values = coordinate_step(G, h, values, at)
    return values


def solve(G: Tensor, h: Tensor, start: Tensor | None = None) -> Tensor:
    """The joint optimum (n, q): what sweeps converge to; 0 for coefficients without effect.

    Coefficients that G hardly tells apart share evenly: each carries a ridge of a few roundings of
    its own diagonal. With ``start`` (n, q), a row that rounding would make worse stays there.
    """
    G64, h64 = G.double(), h.double()
    size = G64.diagonal(dim1=1, dim2=2).clamp_min(0)
    scale = torch.where(size > 0, size, 1).rsqrt()
    unit = G64 * scale[:, :, None] * scale[:, None, :]
    ridge = _RIDGE * torch.finfo(G.dtype).eps + (size <= 0)  # 1 where nothing is
    found: Tensor = torch.linalg.solve_ex(unit + torch.diag_embed(ridge), h64 * scale)[0]
    values = (found * scale).to(h.dtype)
    if start is None:
        return values
    fine = (_quadratic(G64, h64, values) <= _quadratic(G64, h64, start))[:, None]
    return torch.where(fine, values, start)


def _quadratic(G: Tensor, h: Tensor, values: Tensor) -> Tensor:
    """The loss (n,) up to a constant; NaN for values that are not finite."""
    v = values.double()
    loss: Tensor = torch.einsum("na,nab,nb->n", v, G, v) - 2 * (h * v).sum(1)
    return loss


def arb_steps(
    W: Tensor, mask: Tensor, fit: Fit, iterations: int, closed: bool = False
) -> Iterator[Fit]:
    """ARB: mean, scales and signs in turn; yields after every sub-step, none of which can hurt.

    arXiv:2410.03129, algorithm 1, with means over the mask; ends with values refitted to the last
    signs, which algorithm 1 leaves out.

    Args:
        W: (n, k).
        mask: (n, k).
        fit: Where to start.
        iterations: Of all three.
        closed: Mean and scales by their joint optimum instead of one after the other.
    """
    masked = W * mask
    for last in range(iterations + 1):
        G, h = normal_equations(basis_of(mask, fit.planes), masked)
        if closed:
            fit = Fit(solve(G, h, fit.values), fit.planes)
            yield fit
        else:
            for at in range(fit.values.shape[1]):
                fit = Fit(coordinate_step(G, h, fit.values, at), fit.planes)
                yield fit
        if last < iterations:
            mean, *scales = fit.values.T[..., None]
            fit = Fit(fit.values, nearest_planes(W - mean, scales))
            yield fit


def arb(W: Tensor, mask: Tensor, order: int, iterations: int = 15, closed: bool = False) -> Fit:
    """The fit that :func:`arb_steps` reach from :func:`binarize`."""
    fit = binarize(W, mask, order)
    for better in arb_steps(W, mask, fit, iterations, closed) if iterations else ():
        fit = better
    return fit


def moment_fit(W: Tensor, mask: Tensor, fit: Fit, S: Tensor, rounds: int | None = None) -> Fit:
    """ARB-X: values for the least ``tr R S R^T`` with ``R = M (W - What)``, signs as they are.

    Args:
        W: (n, k).
        mask: (n, k).
        fit: Signs, and where sweeps start.
        S: (k, k), of any scale.
        rounds: Of coordinate sweeps (arXiv:2410.03129, equation 11; 15 there); None: the solution.
    """
    G, h = normal_equations(basis_of(mask, fit.planes), W * mask, S)
    values = solve(G, h, fit.values) if rounds is None else sweep(G, h, fit.values, rounds)
    return Fit(values, fit.planes)


def moment_error(residual: Tensor, S: Tensor | None = None) -> Tensor:
    """``r S r^T`` of every row (n,) of a residual (n, k); without S its squared norm."""
    weighted = residual if S is None else residual @ S
    return (weighted * residual).sum(1)
