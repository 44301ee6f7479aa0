"""Cholesky factors of second moments, damped as far as they have to be."""

import logging

import torch
from torch import Tensor

__all__ = ["MOST_DAMPING", "damped_cholesky", "damped_inverse", "enough_damping"]

MOST_DAMPING = 10.0
DOUBLE_WIDTH = 8192  # up to here a factor in float64 takes a minute at most on a CPU

_LOG = logging.getLogger(__name__)
_LEAST_DAMPING = 1e-6


def damped_cholesky(H: Tensor, damping: float, flipped: bool = False) -> tuple[Tensor, float]:
    """Lower L with ``L L^T = H + damping * mean(diag H) * I``, and the damping that it took.

    Dead columns (zero diagonal) stand apart with the mean as their diagonal, and are not counted
    in it. Damping is raised tenfold, with a warning, while there is no well-conditioned factor.

    Args:
        H: (in, in), symmetric, of any scale.
        damping: To begin with.
        flipped: Read H backwards, from its last column to its first.

    Returns:
        L in float64, or float32 beyond a width of 8192, and the damping.

    Raises:
        ValueError: if even the largest damping leaves no factor.
    """
    live = H.diagonal() > 0
    mean = float(H.diagonal()[live].double().mean()) if bool(live.any()) else 1.0
    dtype = torch.float64 if H.shape[0] <= DOUBLE_WIDTH else torch.float32
    # Scaled, so that nothing overflows; a copy, which is written to.
    matrix = (H.flip(0, 1) if flipped else H).to(dtype, copy=True).div_(mean)
    floor = max(8 * torch.finfo(H.dtype).eps, 1e-12)
    base = matrix.diagonal().clone()
    base[base == 0] = 1
    while True:
        matrix.diagonal().copy_(base + damping)
        L, info = torch.linalg.cholesky_ex(matrix)
        if int(info) == 0 and _well_conditioned(L, floor):
            return L.mul_(mean**0.5), damping
        del L  # as large as the matrix, and so would be the next
        damping = _raised(damping, "the second moment is singular")


def damped_inverse(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Inverse of the damped second moment, and the damping; as :func:`damped_cholesky`."""
    L, damping = damped_cholesky(H, damping)
    inverse: Tensor = torch.cholesky_inverse(L)
    return inverse, damping


def enough_damping(damping: float, tokens: int | None, columns: int) -> float:
    """Raise damping where ``tokens`` cannot fill that many live columns.

    H has a null space then, where columns move freely: at 0.01 that was worse on other tokens than
    rounding to nearest, at 0.1 better.
    """
    if tokens is None or not 0 < tokens < columns:
        return damping
    return _raised(damping, f"{tokens} tokens cannot fill {columns} columns")


def _well_conditioned(L: Tensor, floor: float) -> bool:
    """Whether pivots are more than rounding, as a fraction of the diagonal they are left from."""
    whole: Tensor = torch.linalg.vector_norm(L, dim=1)
    return bool((L.diagonal().square() > floor * whole.square()).all())


def _raised(damping: float, why: str) -> float:
    raised = max(10 * damping, _LEAST_DAMPING)
    if raised > MOST_DAMPING:
        raise ValueError(
            f"{why}, even with {damping} times its mean added to the diagonal; "
            "it is no second moment"
        )
    _LOG.warning(
        "%s: damping raised from %g to %g; more calibration would help", why, damping, raised
    )
    return raised
