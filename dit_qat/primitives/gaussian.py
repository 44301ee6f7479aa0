"""Quantizers of a standard normal variable: uniform grids and Lloyd-Max, exact in float64."""

from functools import lru_cache
from itertools import pairwise
from math import erfc, exp, inf, pi, sqrt
from operator import index
from statistics import NormalDist

import torch
from torch import Tensor

from dit_qat.primitives.formats import GridKind, UniformGrid
from dit_qat.primitives.tracing import compile_time_constant

__all__ = ["gaussian_mse", "gaussian_step", "lloyd_max_levels", "lloyd_max_mse"]

_LEAST_BITS: dict[GridKind, int] = {"mid_rise": 1, "twos_complement": 2, "symmetric": 2}
_MOST_BITS = 8
_NEWTON_STEPS = 50
_RESIDUAL = 1e-12


def _density(t: float) -> float:
    return exp(-t * t / 2) / sqrt(2 * pi)


def _tail(t: float) -> float:
    return erfc(t / sqrt(2)) / 2


def _probability(low: float, high: float) -> float:
    """Return P(low < x < high), from the tail on the side where that loses no digits."""
    return _tail(low) - _tail(high) if low >= 0 else _tail(-high) - _tail(-low)


def _moments(levels: tuple[float, ...]) -> tuple[float, float]:
    """Return E[x c(x)] and E[c(x)^2] of rounding x ~ N(0, 1) to the nearest level c(x)."""
    edges = [-inf, *((a + b) / 2 for a, b in pairwise(levels)), inf]
    cells = list(zip(levels, pairwise(edges), strict=True))
    correlation = sum(c * (_density(low) - _density(high)) for c, (low, high) in cells)
    power = sum(c * c * _probability(low, high) for c, (low, high) in cells)
    return correlation, power


def _unit_levels(bits: int, grid: GridKind) -> tuple[float, ...]:
    """Return the levels of a grid in steps, after checking that a normal variable fits it."""
    if grid not in _LEAST_BITS:
        raise ValueError(f"grid={grid!r} is no grid around zero; use one of {(*_LEAST_BITS,)}")
    if not _LEAST_BITS[grid] <= bits <= _MOST_BITS:
        limits = f"{_LEAST_BITS[grid]}..{_MOST_BITS}"
        raise ValueError(f"bits={bits} is outside {limits} for a {grid} grid; choose bits in it")
    return UniformGrid(bits, grid).levels


def gaussian_mse(step: float, bits: int, grid: GridKind = "mid_rise") -> float:
    """Return the mean squared error of rounding N(0, 1) to a uniform grid, in closed form.

    ``MSE = 1 - 2 sum c (phi(t_low) - phi(t_high)) + sum c^2 (Phi(t_high) - Phi(t_low))`` over the
    levels c and the thresholds t halfway between them.

    Raises:
        ValueError: bits outside 1..8 (2..8 for the grids with a zero level), an unknown or unsigned
            grid, or a step that is not positive.
    """
    if not step > 0:
        raise ValueError(f"step={step} must be above 0")
    correlation, power = _moments(tuple(c * step for c in _unit_levels(bits, grid)))
    return 1 - 2 * correlation + power


@lru_cache(maxsize=64)
def _optimal_step(bits: int, grid: GridKind) -> float:
    levels = _unit_levels(bits, grid)
    # Half the derivative of the MSE by the step is (E[c^2] - E[x c]) / step: thresholds lie halfway
    # between levels, so moving them changes nothing to first order. Bisect for its sign change.
    low, high = 2.0 ** (1 - bits), 2.0 ** (4 - bits)
    while low < (middle := (low + high) / 2) < high:
        correlation, power = _moments(tuple(c * middle for c in levels))
        low, high = (middle, high) if power < correlation else (low, middle)
    return low


@compile_time_constant
def _constant_step(bits: int, grid: GridKind) -> float:
    return _optimal_step(bits, grid)


def gaussian_step(bits: int, grid: GridKind = "mid_rise") -> float:
    """Return the step of the uniform grid with the least mean squared error on N(0, 1).

    Raises:
        ValueError: bits outside 1..8 (2..8 for the grids with a zero level), or an unknown or
            unsigned grid.

    Example:
        >>> round(gaussian_step(2), 4)
        0.9957
    """
    return _constant_step(index(bits), grid)


def _centroids(levels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return per positive cell its probability and centroid, and the inner thresholds."""
    inner = (levels[1:] + levels[:-1]) / 2
    edges = [0.0, *inner.tolist(), inf]
    probability = levels.new_tensor([_probability(a, b) for a, b in pairwise(edges)])
    mass = levels.new_tensor([_density(a) - _density(b) for a, b in pairwise(edges)])
    return probability, mass / probability, inner


def _newton_step(levels: Tensor, damping: float) -> tuple[Tensor, float]:
    """Return the next positive levels and how far the present ones are from their centroids."""
    probability, centroid, inner = _centroids(levels)
    # The gradient is P (c - centroid). A level pulls its neighbour through the threshold between
    # them, at distance (c_next - c) / 2 from both, so the Hessian is tridiagonal and symmetric.
    coupling = (levels[1:] - levels[:-1]) / 4 * torch.exp(-inner * inner / 2) / sqrt(2 * pi)
    diagonal = probability * (1 + damping)
    diagonal[:-1] -= coupling
    diagonal[1:] -= coupling
    hessian = torch.diag(diagonal) - torch.diag(coupling, 1) - torch.diag(coupling, -1)
    gradient = probability * (levels - centroid)
    return levels - torch.linalg.solve(hessian, gradient), float((levels - centroid).abs().max())


@lru_cache(maxsize=_MOST_BITS)
def _positive_levels(bits: int) -> tuple[float, ...]:
    if not 1 <= bits <= _MOST_BITS:
        raise ValueError(f"bits={bits} is outside 1..{_MOST_BITS} for Lloyd-Max levels")
    half = 2 ** (bits - 1)
    # Panter and Dite: at high rate the levels are spread as the cube root of the density, N(0, 3).
    spread = NormalDist(sigma=sqrt(3))
    start = [spread.inv_cdf((half + i + 0.5) / (2 * half)) for i in range(half)]
    levels = torch.tensor(start, dtype=torch.float64, device="cpu")
    # Damping tends to Lloyd's own step, which never overshoots; it fades as Newton takes over.
    for damping in (2.0 ** (2 - i) for i in range(_NEWTON_STEPS)):
        following, residual = _newton_step(levels, damping)
        if residual < _RESIDUAL:
            return tuple(levels.tolist())
        levels = following
    raise RuntimeError(f"Lloyd-Max levels for bits={bits} did not converge: residual {residual}")


def lloyd_max_levels(bits: int) -> Tensor:
    """Return the levels with the least mean squared error on N(0, 1), each its cell's centroid.

    Returns:
        float64 tensor of 2^bits levels, ascending.

    Raises:
        ValueError: bits outside 1..8.
    """
    positive = torch.tensor(_positive_levels(bits), dtype=torch.float64, device="cpu")
    return torch.cat([-positive.flip(0), positive])


def lloyd_max_mse(bits: int) -> float:
    """Return the mean squared error of :func:`lloyd_max_levels` on N(0, 1).

    Raises:
        ValueError: bits outside 1..8.
    """
    positive = _positive_levels(bits)
    correlation, power = _moments((*(-c for c in reversed(positive)), *positive))
    return 1 - 2 * correlation + power
