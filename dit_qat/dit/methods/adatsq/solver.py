"""Codes and branch of a layer under one weighted error, activation rounding included.

    sum_t alpha[t] E_t || x (W - A B)^T - Q_a(x) Q^T ||^2

with inputs x as smoothed. AdaTSQ (arXiv:2602.09883) weights the steps; that the branch A B, which
reads x before it is rounded, and the codes Q, which read it after, are fitted to each other under
that same error is ours. Without activation rounding it is GPTQ on ``H' = sum_t alpha[t] X^T X``.
"""

import logging
from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.calibration.statistics import LinearStatistics
from dit_qat.dit.methods.svdquant import leading_factors
from dit_qat.layers.input_transform import InputTransform
from dit_qat.layers.rounding import transformed_moment
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["Moments", "input_moments", "rows_wanted", "weighted_factors"]

_LOG = logging.getLogger(__name__)
_DAMPING = 0.01  # as GPTQ's
# Of widths 128 and 512 (digits, one seed): with fewer rows the layers' own errors on other calls
# were above those without rounding; the model's output error gained from about one row on.
_ROWS_PER_INPUT = 4


class Moments(NamedTuple):
    """Second moments of a layer's inputs, weighted by step; float64.

    Attributes:
        exact: ``E x^T x`` (in, in).
        cross: ``E x^T Q_a(x)``.
        rounded: ``E Q_a(x)^T Q_a(x)``, with the number of tokens.
    """

    exact: Tensor
    cross: Tensor
    rounded: SecondMoment

    def target(self, weight: Tensor) -> Tensor:
        """The weight (out, in) that is best for rounded inputs: ``W C P^-1``.

        Written as ``W + W (C - P) P^-1``, so that damping P touches the change alone.
        """
        W, P = weight.double(), self.rounded.matrix
        if self._exact_only:
            return W
        change: Tensor = torch.linalg.solve(_damped(P), (self.cross - P).T @ W.T)
        return W + change.T

    def left_over(self, weight: Tensor, codes: Tensor) -> Tensor:
        """What exact inputs should add to rounded ones times codes: ``W - Q C^T H^-1``."""
        W, Q, H = weight.double(), codes.double(), self.exact
        if self._exact_only:
            return W - Q
        change: Tensor = torch.linalg.solve(_damped(H), (self.cross - H) @ Q.T)
        return W - Q - change.T

    def error(self, weight: Tensor, codes: Tensor) -> float:
        """``E || x W^T - Q_a(x) Q^T ||^2``."""
        W, Q = weight.double(), codes.double()
        if self._exact_only:
            return float(((W - Q) @ self.exact * (W - Q)).sum())
        parts = (W @ self.exact * W, -2 * (W @ self.cross * Q), Q @ self.rounded.matrix * Q)
        return float(sum(part.sum() for part in parts))

    @property
    def _exact_only(self) -> bool:
        """Whether no rounding is counted: all three are one."""
        return self.cross is self.exact


def rows_wanted(width: int) -> int:
    """Rows of an input that the rounding of activations can be estimated on."""
    return _ROWS_PER_INPUT * width


def input_moments(
    statistics: LinearStatistics,
    transform: InputTransform,
    activation: TokenQuantizer | None = None,
    step_weights: Tensor | None = None,
) -> Moments:
    """Moments of transformed inputs.

    Args:
        statistics: With a second moment; with rows, which all three are taken from, if there is an
            activation quantizer.
        transform: Of the inputs.
        activation: What rounds them; None: nothing does. Where there are fewer than
            :func:`rows_wanted`, it is left out, with a warning.
        step_weights: By sampler step (steps,), those of the second moment; None: rows count alike.
    """
    rows = 0 if activation is None else len(statistics.rows)
    wanted = rows_wanted(statistics.width)
    if activation is not None and rows < wanted:
        _LOG.warning(
            "%d rows are too few to count the rounding of %d inputs (%d would do), so it is left "
            "out; raise tokens or record more calls",
            rows,
            statistics.width,
            wanted,
        )
    if activation is None or rows < wanted:
        moment = statistics.second_moment
        assert moment is not None
        moved = transformed_moment(moment, transform)
        return Moments(moved.matrix, moved.matrix, moved)
    x = transform(statistics.rows)
    rounded = activation.fake_quantize(x).double()
    x = x.double()
    weights = _row_weights(statistics.row_steps, step_weights).to(x.device)[:, None]
    P = rounded.T @ (rounded * weights)
    state = {"matrix": P, "tokens": torch.tensor(len(x))}
    return Moments(x.T @ (x * weights), x.T @ (rounded * weights), SecondMoment.from_state(state))


def weighted_factors(rest: Tensor, H: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Float16 factors A (out, rank), B (rank, in) of least ``tr (E - A B) H (E - A B)^T``.

    With ``H = L L^T`` these are the leading ones of ``E L``, and ``L^-1`` behind.
    """
    L = torch.linalg.cholesky(_damped(H))
    up, down = (factor.double() for factor in leading_factors(rest.double() @ L, rank))
    down = torch.linalg.solve_triangular(L, down, upper=False, left=False)
    size = down.norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
    return (up * size).half(), (down / size[:, None]).half()


def _row_weights(steps: Tensor, weights: Tensor | None) -> Tensor:
    """Weights (n,) of kept rows: those of their steps, shared out among the rows of a step."""
    if weights is None:
        return torch.full((len(steps),), 1 / max(len(steps), 1), dtype=torch.float64)
    counts = torch.bincount(steps, minlength=len(weights)).clamp_min(1)
    return weights.cpu().double()[steps] / counts[steps]


def _damped(H: Tensor) -> Tensor:
    return H + _DAMPING * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype, device=H.device)
