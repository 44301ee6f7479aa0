"""Quantize a weight column block by column block; later columns make up for the error so far.

With the second moment factored as ``H = R R^T``, R upper triangular, the block B of columns that is
best, given what the columns before it became, is

    W_B + (W - Q)_before R_before,B R_BB^-1

for the error ``tr (W - Q) H (W - Q)^T``, whatever quantizes the block. It is the update of GPTQ
(arXiv:2210.17323), ``W_rest -= (W_B - Q_B) U_BB^-1 U_B,rest`` with ``U = R^-1`` and
``H^-1 = U^T U``, in the form of LDLQ (QuIP, arXiv:2307.13304), which needs no inverse.
"""

import logging
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dit_qat.primitives.scales import widen
from dit_qat.primitives.second_moment import SecondMoment

__all__ = [
    "Block",
    "BlockQuantizer",
    "Compensated",
    "Update",
    "column_by_column",
    "compensate",
    "compensation_bytes",
]

Update = Literal["exact", "diagonal"]

_LOG = logging.getLogger(__name__)
_DOUBLE_WIDTH = 8192  # up to here a factor in float64 takes a minute at most on a CPU
_LEAST_DAMPING, _MOST_DAMPING = 1e-6, 10.0


class Block(NamedTuple):
    """What a block quantizer is told about the columns that it gets.

    Attributes:
        columns: (B,) long, their positions in the original column order.
        factor: (B, B) upper triangular, ``U_BB`` of ``H^-1 = U^T U``.
    """

    columns: Tensor
    factor: Tensor


BlockQuantizer = Callable[[Tensor, Block], Tensor]
"""Compensated weights (out, B), its own to write to, to quantized values (out, B)."""


class Compensated(NamedTuple):
    """A quantized weight and how it came about.

    Attributes:
        weight: (out, in), quantized values in the original column order.
        order: (in,) long, the columns in the order they were quantized in; None: as they are.
        damping: What was added to the diagonal at last, as a fraction of its mean.
        dead: (in,) bool, columns that no token reached; their weight is zero.
    """

    weight: Tensor
    order: Tensor | None
    damping: float
    dead: Tensor


@torch.no_grad()
def compensate(
    weight: Tensor,
    second_moment: Tensor | SecondMoment,
    block_quantizer: BlockQuantizer,
    block_size: int = 128,
    update: Update = "exact",
    order: Literal["activation"] | Tensor | None = None,
    group_size: int | None = None,
    damping: float = 0.01,
) -> Compensated:
    """Quantize (out, in) weights so that ``tr (W - Q) H (W - Q)^T`` is small.

    Args:
        weight: (out, in); computed in float32 or finer.
        second_moment: H (in, in), of any scale.
        block_quantizer: Called once per block, in order; keeps its own codes if it needs them.
        block_size: Columns per block; raised to a multiple of ``group_size``.
        update: ``exact`` is the least-squares optimum of the columns to come. ``diagonal`` divides
            the block's error by the diagonal of ``U_BB`` only, as several releases do.
        order: ``activation`` takes columns of large second moment first; or any permutation.
        group_size: Columns that share a scale; ``activation`` then orders whole groups by their
            mean, so that they stay contiguous.
        damping: Added to the diagonal of H, as a fraction of its mean; raised tenfold, with a
            warning, while H has no Cholesky factor or holds fewer tokens than columns.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, or an order that is no
            permutation or tears groups apart.
    """
    tokens = second_moment.tokens if isinstance(second_moment, SecondMoment) else None
    H = second_moment.matrix if isinstance(second_moment, SecondMoment) else second_moment
    _check(weight, H, block_size, update, group_size, damping)
    W, H = widen(weight.detach()).clone(), H.to(weight.device)
    dead = H.diagonal() == 0
    W[:, dead] = 0
    permutation = _permutation(order, H.diagonal(), group_size)
    if permutation is not None:
        W, H = W[:, permutation], H[permutation][:, permutation]
    # H has a null space then, where columns move freely: at 0.01 that was worse on other tokens
    # than rounding to nearest, at 0.1 better.
    if tokens is not None and 0 < tokens < int((~dead).sum()):
        damping = _raised(damping, f"{tokens} tokens cannot fill {int((~dead).sum())} columns")
    R, damping = _factor(H, damping)
    size = block_size if group_size is None else -(-block_size // group_size) * group_size
    sweep = _exact_sweep if update == "exact" else _diagonal_sweep
    columns = torch.arange(W.shape[1], device=W.device) if permutation is None else permutation
    Q = sweep(W, R, block_quantizer, columns, size)
    if permutation is not None:
        Q = Q[:, permutation.argsort()]
    return Compensated(Q, permutation, damping, dead)


def compensation_bytes(rows: int, width: int) -> int:
    """What :func:`compensate` takes at most beside a weight (rows, width), H and its result."""
    factor = 8 if width <= _DOUBLE_WIDTH else 4
    return (5 * factor + 4) * width * width + 4 * 4 * rows * width


def column_by_column(quantize_columns: Callable[[Tensor, Tensor], Tensor]) -> BlockQuantizer:
    """GPTQ's inner loop: each column of a block makes up for those before it.

    Args:
        quantize_columns: Called with one column (out, 1) and its position (1,) in the original
            order; returns its quantized values (out, 1).
    """

    def quantize(W: Tensor, block: Block) -> Tensor:
        U, W = block.factor, W.T.contiguous()  # a column is a contiguous row
        Q = torch.empty_like(W)
        for j in range(W.shape[0]):
            Q[j] = quantize_columns(W[j, :, None], block.columns[j : j + 1]).squeeze(1)
            error = (W[j] - Q[j]) / U[j, j]
            W[j + 1 :].addr_(U[j, j + 1 :], error, alpha=-1)
        return Q.T

    return quantize


def _exact_sweep(
    W: Tensor, R: Tensor, quantizer: BlockQuantizer, columns: Tensor, size: int
) -> Tensor:
    Q, error = torch.empty_like(W), torch.empty_like(W)
    for block in _blocks(W.shape[1], size):
        before, corner = slice(0, block.start), R[block, block]
        feedback = torch.linalg.solve_triangular(corner, R[before, block], upper=True, left=False)
        compensated = torch.addmm(W[:, block], error[:, before], feedback.to(W.dtype))
        Q[:, block] = _called(quantizer, compensated, columns[block], _inverse(corner))
        error[:, block] = W[:, block] - Q[:, block]
    return Q


def _diagonal_sweep(
    W: Tensor, R: Tensor, quantizer: BlockQuantizer, columns: Tensor, size: int
) -> Tensor:
    Q, U = torch.empty_like(W), _inverse(R)
    for block in _blocks(W.shape[1], size):
        factor, rest = U[block, block], slice(block.stop, None)
        Q[:, block] = _called(quantizer, W[:, block].clone(), columns[block], factor)
        error = (W[:, block] - Q[:, block]) / factor.diagonal().to(W.dtype)
        W[:, rest] -= error @ U[block, rest].to(W.dtype)
    return Q


def _called(quantizer: BlockQuantizer, W: Tensor, columns: Tensor, factor: Tensor) -> Tensor:
    Q = quantizer(W, Block(columns, factor.to(W.dtype)))
    if Q.shape != W.shape:
        raise ValueError(
            f"the block quantizer made {tuple(Q.shape)} of a block of {tuple(W.shape)}; it must "
            "return quantized values of the same shape"
        )
    return Q


def _blocks(width: int, size: int) -> Iterator[slice]:
    for start, stop in pairwise([*range(0, width, size), width]):
        yield slice(start, stop)


def _inverse(upper: Tensor) -> Tensor:
    identity = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


def _factor(H: Tensor, damping: float) -> tuple[Tensor, float]:
    """Upper triangular R with ``R R^T = H + damping * mean(diag H) * I``, and that damping."""
    live = H.diagonal() > 0
    mean = float(H.diagonal()[live].double().mean()) if bool(live.any()) else 1.0
    # R R^T of H is L L^T of H read backwards. Scaled, so that nothing overflows.
    dtype = torch.float64 if H.shape[0] <= _DOUBLE_WIDTH else torch.float32
    reverse = H.flip(0, 1).to(dtype).div_(mean)
    floor = max(8 * torch.finfo(H.dtype).eps, 1e-12)
    base = reverse.diagonal().clone()
    base[base == 0] = 1  # dead columns stand apart; they only must not be singular
    while True:
        reverse.diagonal().copy_(base + damping)
        L, info = torch.linalg.cholesky_ex(reverse)
        if int(info) == 0 and _well_conditioned(L, floor):
            return L.flip(0, 1).mul_(mean**0.5), damping
        damping = _raised(damping, "the second moment is singular")


def _well_conditioned(L: Tensor, floor: float) -> bool:
    """Whether pivots are more than rounding, as a fraction of the diagonal they are left from."""
    return bool((L.diagonal().square() > floor * L.square().sum(1)).all())


def _raised(damping: float, why: str) -> float:
    raised = max(10 * damping, _LEAST_DAMPING)
    if raised > _MOST_DAMPING:
        raise ValueError(
            f"{why}, even with {damping} times its mean added to the diagonal; "
            "it is no second moment"
        )
    _LOG.warning(
        "%s: damping raised from %g to %g; more calibration would help", why, damping, raised
    )
    return raised


def _permutation(
    order: Literal["activation"] | Tensor | None, diagonal: Tensor, group_size: int | None
) -> Tensor | None:
    if order is None:
        return None
    if not isinstance(order, Tensor):
        if order != "activation":
            raise ValueError(f"order={order!r} is unknown; use 'activation', a permutation or None")
        size = group_size or 1
        ranked = diagonal.view(-1, size).mean(1).argsort(descending=True, stable=True)
        return (ranked[:, None] * size + torch.arange(size, device=diagonal.device)).flatten()
    order = order.to(diagonal.device, torch.long)
    identity = torch.arange(diagonal.numel(), device=diagonal.device)
    if order.shape != identity.shape or not torch.equal(order.sort().values, identity):
        raise ValueError(
            f"order of shape {tuple(order.shape)} is no permutation of {diagonal.numel()} columns"
        )
    if group_size is not None:
        groups = (order // group_size).view(-1, group_size)
        if not bool((groups == groups[:, :1]).all()):
            raise ValueError(f"order tears groups of {group_size} columns apart; move whole groups")
    return order


def _check(
    weight: Tensor,
    H: Tensor,
    block_size: int,
    update: str,
    group_size: int | None,
    damping: float,
) -> None:
    if weight.ndim != 2 or H.shape != (weight.shape[1], weight.shape[1]):
        raise ValueError(
            f"weight {tuple(weight.shape)} and second moment {tuple(H.shape)} do not fit; "
            "(out, in) and (in, in) do"
        )
    if block_size < 1:
        raise ValueError(f"block_size={block_size} is below 1; 128 is usual")
    if update not in get_args(Update):
        raise ValueError(f"update={update!r} is unknown; use one of {get_args(Update)}")
    if group_size is not None and (group_size < 1 or weight.shape[1] % group_size):
        raise ValueError(f"group_size={group_size} does not divide {weight.shape[1]} columns")
    if not 0 <= damping <= _MOST_DAMPING:
        raise ValueError(f"damping={damping} is outside 0..{_MOST_DAMPING:g}; 0.01 is usual")
    for name, tensor in (("weight", weight), ("second moment", H)):
        if not tensor.isfinite().all():
            raise ValueError(f"the {name} holds NaN or infinite values")
    if bool((H.diagonal() < 0).any()):
        raise ValueError("the second moment has a negative diagonal; it is none")
