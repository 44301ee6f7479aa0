"""Quantize a weight column block by column block; later columns make up for the error so far.

With the second moment factored as ``H = R R^T``, R upper triangular, the block B of columns that is
best, given what the columns before it became, is

    W_B + (W - Q)_before R_before,B R_BB^-1

for the error ``tr (W - Q) H (W - Q)^T``, whatever quantizes the block. It is the update of GPTQ
(arXiv:2210.17323), ``W_rest -= (W_B - Q_B) U_BB^-1 U_B,rest`` with ``U = R^-1`` and
``H^-1 = U^T U``, in the form of LDLQ (QuIP, arXiv:2307.13304), which needs no inverse.
"""

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from dit_qat.primitives.asymmetric import Asymmetric, p_of_factor, p_of_inverse, p_of_upper
from dit_qat.primitives.column_order import Chooser, Order, bring_forward, permutation_of
from dit_qat.primitives.damped_cholesky import (
    DOUBLE_WIDTH,
    MOST_DAMPING,
    damped_inverse,
    damped_upper,
    enough_damping,
)
from dit_qat.primitives.scales import widen
from dit_qat.primitives.second_moment import SecondMoment

__all__ = [
    "Block",
    "BlockQuantizer",
    "Chooser",
    "Compensated",
    "Order",
    "Update",
    "column_by_column",
    "compensate",
    "compensation_bytes",
]

Update = Literal["exact", "diagonal"]


class Block(NamedTuple):
    """What a block quantizer is told about the columns that it gets.

    Attributes:
        columns: (B,) long, their positions in the original column order.
        factor: (B, B) upper triangular, ``U_BB`` of ``H^-1 = U^T U``.
        asymmetric: (B, B) strictly upper triangular, P within the block; None: it does not apply.
    """

    columns: Tensor
    factor: Tensor
    asymmetric: Tensor | None = None


BlockQuantizer = Callable[[Tensor, Block], Tensor]
"""Compensated weights (out, B), its own to write to, to quantized values (out, B).

With an asymmetric term, what it leaves in the weights is what the term multiplies. If the term is
to apply within blocks, it does that with ``Block.asymmetric``, from each column to those behind it.
"""


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
    order: Order | Tensor | Chooser | None = None,
    group_size: int | None = None,
    damping: float = 0.01,
    asymmetric: Asymmetric | None = None,
) -> Compensated:
    """Quantize (out, in) weights so that ``tr (W - Q) H (W - Q)^T`` is small.

    Args:
        weight: (out, in); computed in float32 or finer.
        second_moment: H (in, in), of any scale.
        block_quantizer: Called once per block, in order; keeps its own codes if it needs them.
        block_size: Columns per block; raised to a multiple of ``group_size``.
        update: ``exact`` is the least-squares optimum of the columns to come. ``diagonal`` divides
            the block's error by the diagonal of ``U_BB`` only, as several releases do.
        order: ``activation`` takes columns of large second moment first; ``group_activation`` whole
            groups by their largest, and columns within each so; or any permutation; or a function
            that chooses each next block from the weights as compensated so far.
        group_size: Columns that share a scale; ``activation`` then orders whole groups by their
            mean, so that they stay contiguous.
        damping: Added to the diagonal of H, as a fraction of its mean; raised tenfold, with a
            warning, while H has no Cholesky factor or holds fewer tokens than columns.
        asymmetric: Makes up for the error of the inputs as well (GPTAQ); None: does not.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, or an order that is no
            permutation or tears groups apart.
    """
    tokens = second_moment.tokens if isinstance(second_moment, SecondMoment) else None
    H = second_moment.matrix if isinstance(second_moment, SecondMoment) else second_moment
    _check(weight, H, block_size, update, group_size, damping)
    if asymmetric is not None:
        asymmetric.check(weight.shape[1])
    H = H.to(weight.device)
    dead = H.diagonal() == 0
    damping = enough_damping(damping, tokens, int((~dead).sum()))
    size = block_size if group_size is None else -(-block_size // group_size) * group_size
    sweep = _Sweep(block_quantizer, size, update, dead, asymmetric)
    if callable(order):
        if group_size is not None:
            raise ValueError("an order chosen block by block tears groups apart; drop group_size")
        G, damping = damped_inverse(H, damping)
        Q, chosen = sweep.choosing(_alive(weight, dead), G, order)
        return Compensated(Q, chosen, damping, dead)
    permutation = permutation_of(order, H.diagonal(), group_size)
    columns = torch.arange(len(H), device=H.device) if permutation is None else permutation
    R, damping = damped_upper(H, damping, columns)
    W = _alive(weight, dead)
    if permutation is None:
        return Compensated(sweep.in_order(W, R, columns), None, damping, dead)
    W = W[:, permutation]
    Q = sweep.in_order(W, R, permutation)
    return Compensated(Q[:, permutation.argsort()], permutation, damping, dead)


def compensation_bytes(rows: int, width: int) -> int:
    """What :func:`compensate` takes at most beside a weight (rows, width), H and its result."""
    factor = 8 if width <= DOUBLE_WIDTH else 4
    return (4 * factor + 4) * width * width + 4 * 4 * rows * width


def column_by_column(quantize_columns: Callable[[Tensor, Tensor], Tensor]) -> BlockQuantizer:
    """GPTQ's inner loop: each column of a block makes up for those before it.

    Args:
        quantize_columns: Called with one column (out, 1) and its position (1,) in the original
            order; returns its quantized values (out, 1).
    """

    def quantize(given: Tensor, block: Block) -> Tensor:
        U, P, W = block.factor, block.asymmetric, given.T.contiguous()  # a column is a row
        Q = torch.empty_like(W)
        for j in range(W.shape[0]):
            Q[j] = quantize_columns(W[j, :, None], block.columns[j : j + 1]).squeeze(1)
            error = (W[j] - Q[j]) / U[j, j]
            W[j + 1 :].addr_(U[j, j + 1 :], error, alpha=-1)
            if P is not None:
                W[j + 1 :].addr_(P[j, j + 1 :], W[j])
        if P is not None:
            given.copy_(W.T)  # as they were just before rounding
        return Q.T

    return quantize


class _Sweep(NamedTuple):
    """How blocks follow on each other; weights are written to and become quantized."""

    quantizer: BlockQuantizer
    size: int
    update: Update
    dead: Tensor
    asymmetric: Asymmetric | None

    def in_order(self, W: Tensor, R: Tensor, columns: Tensor) -> Tensor:
        """Quantize W (out, in) from its first column to its last, with ``H = R R^T``."""
        return (self._exact if self.update == "exact" else self._diagonal)(W, R, columns)

    def _exact(self, W: Tensor, R: Tensor, columns: Tensor) -> Tensor:
        error = torch.empty_like(W)
        for block in _blocks(W.shape[1], self.size):
            before, corner = slice(0, block.start), R[block, block]
            feedback = torch.linalg.solve_triangular(
                corner, R[before, block], upper=True, left=False
            )
            target = torch.addmm(W[:, block], error[:, before], feedback.to(W.dtype))
            P = self._p(R, columns, block, W)
            Q = self._called(target, columns[block], _inverse(corner), P)
            error[:, block] = self._aim(W[:, block], target, P) - Q
            W[:, block] = Q
            self._move(W, block, target, Q, P)
        return W

    def _diagonal(self, W: Tensor, R: Tensor, columns: Tensor) -> Tensor:
        U = _inverted_(R, self.size)
        for block in _blocks(W.shape[1], self.size):
            factor, rest, target = U[block, block], slice(block.stop, None), W[:, block].clone()
            P = self._p(U, columns, block, W, p_of_upper)
            Q = self._called(target, columns[block], factor, P)
            error = (self._aim(W[:, block], target, P) - Q) / factor.diagonal().to(W.dtype)
            W[:, rest] -= error @ U[block, rest].to(W.dtype)
            W[:, block] = Q
            self._move(W, block, target, Q, P)
        return W

    def choosing(self, W: Tensor, G: Tensor, choose: Chooser) -> tuple[Tensor, Tensor]:
        """Quantize W (out, in) in an order found on the way, with ``G = H^-1``, written to.

        Eliminating a block turns G into the inverse over the columns that are left, so that all
        blocks together cost what one factor costs.

        Returns:
            Quantized values in the original order, and the order.
        """
        columns = torch.arange(W.shape[1], device=W.device)
        for block in _blocks(W.shape[1], self.size):
            start, rest = block.start, slice(block.stop, None)
            if block.stop < W.shape[1]:
                picked = choose(W[:, start:], self.size)
                bring_forward(picked, self.size, W[:, start:], G[start:, start:], columns[start:])
            U_BB: Tensor = torch.linalg.cholesky(G[block, block], upper=True)
            U_BR = torch.linalg.solve_triangular(U_BB.mT, G[block, rest], upper=False)
            G[rest, rest].addmm_(U_BR.mT, U_BR, alpha=-1)
            P = None
            if self.asymmetric is not None:
                rows = self.asymmetric.rows(columns[block], columns[start:], self.dead)
                P = p_of_inverse(rows.to(G.dtype), U_BB, U_BR, G[rest, rest]).to(W.dtype)
            target = W[:, block].clone()
            Q = self._called(target, columns[block], U_BB, P)
            error = self._aim(W[:, block], target, P) - Q
            if self.update == "exact":
                moves = torch.linalg.solve_triangular(U_BB, U_BR, upper=True)
            else:
                moves = U_BR / U_BB.diagonal()[:, None]
            W[:, rest].addmm_(error, moves.to(W.dtype), alpha=-1)
            W[:, block] = Q
            self._move(W, block, target, Q, P)
        return W[:, columns.argsort()], columns

    def _p(
        self,
        factor: Tensor,
        columns: Tensor,
        block: slice,
        W: Tensor,
        form: Callable[[Tensor, Tensor], Tensor] = p_of_factor,
    ) -> Tensor | None:
        """P of a block and the columns from it on; the factor is what the form takes."""
        if self.asymmetric is None:
            return None
        rows = self.asymmetric.rows(columns[block], columns[block.start :], self.dead)
        return form(rows, factor[block.start :, block.start :]).to(W.dtype)

    def _called(self, W: Tensor, columns: Tensor, factor: Tensor, P: Tensor | None) -> Tensor:
        applied = self.asymmetric is not None and self.asymmetric.within
        within = P[:, : len(columns)] if P is not None and applied else None
        Q = self.quantizer(W, Block(columns, factor.to(W.dtype), within))
        if Q.shape != W.shape:
            raise ValueError(
                f"the block quantizer made {tuple(Q.shape)} of a block of {tuple(W.shape)}; it "
                "must return quantized values of the same shape"
            )
        return Q

    def _aim(self, W: Tensor, target: Tensor, P: Tensor | None) -> Tensor:
        """What a block is to be near: the asymmetric term moves columns within it, too."""
        if P is None or self.asymmetric is None or not self.asymmetric.within:
            return W
        return W + target @ P[:, : W.shape[1]]

    def _move(self, W: Tensor, block: slice, target: Tensor, Q: Tensor, P: Tensor | None) -> None:
        """The asymmetric term: move what the columns to come aim at."""
        if P is None or self.asymmetric is None:
            return
        factor = target if self.asymmetric.multiplies == "pre_round" else Q
        W[:, block.stop :].addmm_(factor, P[:, block.stop - block.start :])


def _alive(weight: Tensor, dead: Tensor) -> Tensor:
    """A copy in float32 or finer, without the columns that no token reaches."""
    W = widen(weight.detach()).clone()
    W[:, dead] = 0
    return W


def _blocks(width: int, size: int) -> Iterator[slice]:
    for start, stop in pairwise([*range(0, width, size), width]):
        yield slice(start, stop)


def _inverted_(upper: Tensor, size: int) -> Tensor:
    """The inverse of a triangular matrix, written over it: nothing here is larger."""
    for block in _blocks(upper.shape[0], size):
        before, corner = slice(0, block.start), _inverse(upper[block, block])
        upper[before, block] = -(upper[before, before] @ upper[before, block]) @ corner
        upper[block, block] = corner
    return upper


def _inverse(upper: Tensor) -> Tensor:
    identity = torch.eye(upper.shape[0], dtype=upper.dtype, device=upper.device)
    inverse: Tensor = torch.linalg.solve_triangular(upper, identity, upper=True)
    return inverse


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
    if not 0 <= damping <= MOST_DAMPING:
        raise ValueError(f"damping={damping} is outside 0..{MOST_DAMPING:g}; 0.01 is usual")
    for name, tensor in (("weight", weight), ("second moment", H)):
        if not tensor.isfinite().all():
            raise ValueError(f"the {name} holds NaN or infinite values")
    if bool((H.diagonal() < 0).any()):
        raise ValueError("the second moment has a negative diagonal; it is none")
