"""Cholesky factors of second moments, damped as far as they have to be."""

import logging

import torch
from torch import Tensor

__all__ = ["MOST_DAMPING", "damped_cholesky", "damped_inverse", "damped_upper", "enough_damping"]

MOST_DAMPING = 10.0
DOUBLE_WIDTH = 8192  # up to here a factor in float64 takes a minute at most on a CPU

_PANEL = 256  # columns that are factored at a time

_LOG = logging.getLogger(__name__)
_LEAST_DAMPING = 1e-6


def damped_cholesky(H: Tensor, damping: float, index: Tensor | None = None) -> tuple[Tensor, float]:
    """Lower L with ``L L^T = H + damping * mean(diag H) * I``, and the damping that it took.

    Dead columns (zero diagonal) stand apart with the mean as their diagonal, and are not counted
    in it. Damping is raised tenfold, with a warning, while there is no well-conditioned factor.
    One matrix is held beside H.

    Args:
        H: (in, in), symmetric, of any scale.
        damping: To begin with.
        index: (in,), the order in which the columns of H are read; None: as they are.

    Returns:
        L in float64, or float32 beyond a width of 8192, and the damping.

    Raises:
        ValueError: if even the largest damping leaves no factor.
    """
    live = H.diagonal() > 0
    mean = float(H.diagonal()[live].double().mean()) if bool(live.any()) else 1.0
    floor = max(8 * torch.finfo(H.dtype).eps, 1e-12)
    while True:
        matrix = _scaled(H, mean, index)
        matrix.diagonal().add_(damping)
        if _factor_(matrix) and _well_conditioned(matrix, floor):
            return matrix.mul_(mean**0.5), damping
        damping = _raised(damping, "the second moment is singular")


def damped_upper(H: Tensor, damping: float, index: Tensor) -> tuple[Tensor, float]:
    """Upper R with ``R R^T`` the damped H, its columns read in order; as :func:`damped_cholesky`.

    Args:
        H: (in, in), symmetric.
        damping: To begin with.
        index: (in,), the order.
    """
    # R R^T of H is L L^T of H read backwards.
    L, damping = damped_cholesky(H, damping, index.flip(0))
    size = len(L)
    for start in range(0, size // 2, _PANEL):  # in place: the matrix is the largest there is
        stop = min(start + _PANEL, size // 2)
        above, below = slice(start, stop), slice(size - stop, size - start)
        kept = L[above].flip(0, 1)
        L[above] = L[below].flip(0, 1)
        L[below] = kept
    if size % 2:
        L[size // 2] = L[size // 2].flip(0)
    return L, damping


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


def _scaled(H: Tensor, mean: float, index: Tensor | None) -> Tensor:
    """H over its mean, so that nothing overflows, in the order of ``index``; a copy."""
    dtype = torch.float64 if H.shape[0] <= DOUBLE_WIDTH else torch.float32
    matrix = torch.empty(H.shape, dtype=dtype, device=H.device)
    for start in range(0, len(H), _PANEL):
        rows = slice(start, start + _PANEL)
        matrix[rows] = H[rows] if index is None else H[index[rows]][:, index]
    matrix.div_(mean)
    diagonal = matrix.diagonal()
    diagonal[diagonal == 0] = 1
    return matrix


def _factor_(A: Tensor) -> bool:
    """Put the lower Cholesky factor in the place of a matrix; False if there is none."""
    for start in range(0, len(A), _PANEL):
        here, behind = slice(start, start + _PANEL), slice(start + _PANEL, None)
        corner, info = torch.linalg.cholesky_ex(A[here, here])
        if int(info):
            return False
        A[here, here] = corner
        A[here, behind] = 0
        column = torch.linalg.solve_triangular(corner.mT, A[behind, here], upper=True, left=False)
        A[behind, here] = column
        for later in range(start + _PANEL, len(A), _PANEL):  # on and below the diagonal
            at, ahead = later - start - _PANEL, slice(later, later + _PANEL)
            A[later:, ahead].addmm_(column[at:], column[at : at + _PANEL].mT, alpha=-1)
    return True


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
