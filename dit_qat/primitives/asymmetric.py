"""GPTAQ's asymmetric term: make up for what earlier layers did to the inputs, too.

GPTAQ (arXiv:2504.02692) matches the quantized layer on quantized inputs to the float layer on
float inputs. With the cross moment ``D = (X_fp - X_q)^T X_q``, ``H = X_q^T X_q`` and
``H^-1 = U^T U``, column j moves the columns R behind it by ``w_j P_jR``, where

    P = c triu(D U^T, 1) U,    P_jR = c D_jR (H_RR)^-1 .

The whole objective has a closed form, too: ``||Q X_q^T - W X_fp^T||^2`` is
``tr (Q - W') H (Q - W')^T`` plus a constant, with ``W' = W + W D H^-1`` (:func:`retarget`).
"""

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_qat.primitives.damped_cholesky import damped_cholesky, enough_damping
from dit_qat.primitives.scales import widen
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["Asymmetric", "Multiplied", "retarget"]

Multiplied = Literal["pre_round", "as_released"]

_PANEL = 512  # columns that are solved at a time


@dataclass(frozen=True, eq=False)
class Asymmetric:
    """The asymmetric term of :func:`~dit_qat.primitives.compensation.compensate`.

    Attributes:
        cross_moment: D (in, in), of the scale of the second moment.
        strength: c; 0.25 in the releases of GPTAQ, PT2-LLM and D2Quant.
        multiplies: What of a block multiplies P when it moves the blocks behind: its values before
            they were rounded, or the rounded ones, by which GPTAQ's release has overwritten them.
        within: Whether the block quantizer applies the term from column to column within a block,
            as ``column_by_column`` does; otherwise the term moves the blocks behind only.

    Raises:
        ValueError: for a strength that is negative or not finite, or an unknown word.
    """

    cross_moment: Tensor
    strength: float = 0.25
    multiplies: Multiplied = "pre_round"
    within: bool = True

    def __post_init__(self) -> None:
        if not 0 <= self.strength < float("inf"):
            raise ValueError(f"strength={self.strength} must be finite and at least 0")
        if self.multiplies not in get_args(Multiplied):
            raise ValueError(
                f"multiplies={self.multiplies!r} is unknown; use one of {get_args(Multiplied)}"
            )

    def check(self, width: int) -> None:
        """Refuse a cross moment of another width or with values that are not finite.

        Raises:
            ValueError: see above.
        """
        if self.cross_moment.shape != (width, width):
            raise ValueError(
                f"the cross moment {tuple(self.cross_moment.shape)} does not fit {width} columns"
            )
        if not self.cross_moment.isfinite().all():
            raise ValueError("the cross moment holds NaN or infinite values")

    def rows(self, block: Tensor, following: Tensor, dead: Tensor) -> Tensor:
        """``c D`` of a block's columns (B,) and those from it on (r,): (B, r) in float64."""
        device = self.cross_moment.device
        some = self.cross_moment[block.to(device)][:, following.to(device)].double()
        some[:, dead[following].to(device)] = 0
        return some.mul_(self.strength).to(block.device)


def p_of_factor(rows: Tensor, R: Tensor) -> Tensor:
    """P (B, r) of a block and the columns from it on, with ``H = R R^T`` of those (r, r).

    In panels: R is part of a larger matrix, of which one solve would take a copy.
    """
    P = rows.to(R.dtype, copy=True)
    panels = [slice(start, start + _PANEL) for start in range(0, len(R), _PANEL)]
    for here in reversed(panels):  # P R^T = rows
        before, corner = slice(0, here.start), R[here, here]
        P[:, here] = torch.linalg.solve_triangular(corner.mT, P[:, here], upper=False, left=False)
        P[:, before].addmm_(P[:, here], R[before, here].mT, alpha=-1)
    P.triu_(1)
    for here in panels:  # P R = what that gave
        behind, corner = slice(here.stop, None), R[here, here]
        P[:, here] = torch.linalg.solve_triangular(corner, P[:, here], upper=True, left=False)
        P[:, behind].addmm_(P[:, here], R[here, behind], alpha=-1)
    return P


def p_of_upper(rows: Tensor, U: Tensor) -> Tensor:
    """P (B, r) of a block and the columns from it on, with ``H^-1 = U^T U`` of those (r, r)."""
    P: Tensor = (rows.to(U.dtype) @ U.mT).triu_(1) @ U
    return P


def p_of_inverse(rows: Tensor, U_BB: Tensor, U_BR: Tensor, following: Tensor) -> Tensor:
    """P (B, r) of a block from its rows of U and ``(H_RR)^-1`` of the columns behind it."""
    size = len(U_BB)
    D_BB, D_BR = rows[:, :size], rows[:, size:]
    corner = (D_BB @ U_BB.mT + D_BR @ U_BR.mT).triu_(1)
    return torch.cat([corner @ U_BB, corner @ U_BR + D_BR @ following], dim=1)


@torch.no_grad()
def retarget(
    weight: Tensor,
    second_moment: Tensor | SecondMoment,
    cross_moment: Tensor,
    strength: float = 1.0,
    damping: float = 0.01,
) -> Tensor:
    """The weight ``W + c W D H^-1`` whose plain compensation minimises GPTAQ's objective (c = 1).

    It fits the calibration tokens harder than the asymmetric term does.

    Args:
        weight: W (out, in).
        second_moment: H (in, in).
        cross_moment: D (in, in), of the same scale.
        strength: c.
        damping: Of H, as in :func:`~dit_qat.primitives.compensation.compensate`.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.
    """
    Asymmetric(cross_moment, strength).check(weight.shape[1])
    tokens = second_moment.tokens if isinstance(second_moment, SecondMoment) else None
    H = second_moment.matrix if isinstance(second_moment, SecondMoment) else second_moment
    damping = enough_damping(damping, tokens, int((H.diagonal() != 0).sum()))
    W = widen(weight.detach())
    L, _ = damped_cholesky(H.to(W.device), damping)
    moved = (W @ cross_moment.to(W)).to(L.dtype)
    shift = torch.cholesky_solve(moved.mT, L).mT
    return W + strength * shift.to(W.dtype)
