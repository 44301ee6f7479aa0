"""Scales: how large a grid step should be, apart from how values are rounded to it.

Every function reduces over ``dim`` (an int, a tuple, or None for all) and keeps the reduced
dimensions at size one, so that its result broadcasts against its input.
"""

from math import prod, sqrt

import torch
from torch import Tensor

from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.uniform import decode, encode

__all__ = ["absmax", "absmean", "min_max", "mse_optimal_step", "rms", "safe", "widen"]

Dim = int | tuple[int, ...] | None


def safe(scale: Tensor) -> Tensor:
    """Lift scales from zero to the smallest normal number, so that all-zero rows divide by it."""
    return scale.clamp_min(torch.finfo(scale.dtype).tiny)


def widen(x: Tensor) -> Tensor:
    """Return x in float32 or finer: what scales and roundings are computed in."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def absmax(x: Tensor, dim: Dim = None) -> Tensor:
    """Largest magnitude."""
    return x.abs().amax(_dims(x, dim), keepdim=True)


def absmean(x: Tensor, dim: Dim = None) -> Tensor:
    """Mean magnitude (BitNet b1.58, arXiv:2402.17764, equation 3)."""
    return x.abs().mean(_dims(x, dim), keepdim=True)


def rms(x: Tensor, dim: Dim = None) -> Tensor:
    """Root mean square about zero."""
    dims = _dims(x, dim)
    # The norm reads x once; squaring first would write as much again.
    norm: Tensor = torch.linalg.vector_norm(x, dim=dims, keepdim=True)
    return norm / sqrt(prod([x.shape[d] for d in dims]))


def min_max(x: Tensor, dim: Dim = None) -> tuple[Tensor, Tensor]:
    """Smallest and largest value."""
    dims = _dims(x, dim)
    return x.amin(dims, keepdim=True), x.amax(dims, keepdim=True)


def mse_optimal_step(
    x: Tensor, grid: UniformGrid, dim: int = -1, candidates: int = 64, refinements: int = 8
) -> Tensor:
    """Step of least squared error for each row: a scan, then alternating least squares.

    Args:
        x: Rows along ``dim``.
        grid: Any grid but ``unsigned`` with negative values, which it could not hold.
        dim: The dimension that shares a step.
        candidates: Steps tried, from 1/candidates of the absmax step upwards.
        refinements: Rounds of "round, then refit the step", none of which can raise the error.

    Returns:
        Steps, shaped as ``x`` with ``dim`` at size one.
    """
    widest = safe(absmax(x, dim)) / max(grid.code_max + grid.offset, 0.5)
    best, least = widest, torch.full_like(widest, torch.inf)
    for k in range(1, candidates + 1):
        best, least = _keep_better(x, grid, dim, widest * (k / candidates), best, least)
    for _ in range(refinements):
        level = encode(x, best, grid) + grid.offset
        norm = level.square().sum(dim, keepdim=True)
        fitted = torch.where(norm > 0, (x * level).sum(dim, keepdim=True) / safe(norm), best)
        best, least = _keep_better(x, grid, dim, safe(fitted), best, least)
    return best


def _keep_better(
    x: Tensor, grid: UniformGrid, dim: int, step: Tensor, best: Tensor, least: Tensor
) -> tuple[Tensor, Tensor]:
    error = (decode(encode(x, step, grid), step, grid) - x).square().sum(dim, keepdim=True)
    better = error < least
    return torch.where(better, step, best), torch.where(better, error, least)


def _dims(x: Tensor, dim: Dim) -> tuple[int, ...]:
    if dim is None:
        return tuple(range(x.ndim))
    return (dim,) if isinstance(dim, int) else dim
