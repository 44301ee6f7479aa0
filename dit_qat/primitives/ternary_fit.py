"""Asymmetric ternary rows, ``w ~ alpha t + mu`` with t in {-1, 0, +1}: PT2-LLM's two fits.

PT2-LLM, arXiv:2510.03267. Iterative ternary fitting (ITF) minimises ``||w - alpha t - mu||^2`` over
codes, scale and offset; activation-aware grid alignment (AGA) keeps the codes and minimises
``(w - alpha t - mu) S (w - alpha t - mu)^T`` with the second moment S of the columns. AGA solves
the paper's equation 12; its equation 13, as printed, does so for diagonal S only.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.primitives.scales import widen

__all__ = ["TernaryRows", "align_ternary", "fit_affine", "fit_ternary_rows", "start_ternary"]

THRESHOLD = 0.75  # of a row's mean magnitude, at the start

_SINGULAR = 1e-10  # of the product of the two norms: then t and 1 look alike to S


class TernaryRows(NamedTuple):
    """Rows ``scale * codes + offset``.

    Attributes:
        codes: (out, k) of -1, 0, +1 in the weight's dtype.
        scale: (out, 1), alpha; of either sign.
        offset: (out, 1), mu.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor

    @property
    def values(self) -> Tensor:
        """What they stand for (out, k)."""
        return (self.codes * self.scale).add_(self.offset)


def start_ternary(weight: Tensor) -> TernaryRows:
    """The quantizer that the fits begin with: threshold 0.75 mean|W - mu| about the mean.

    Args:
        weight: (out, k).
    """
    W = widen(weight)
    mean = W.mean(1, keepdim=True)
    centred = W - mean
    magnitude = centred.abs()
    codes = centred.sign().mul_(magnitude > THRESHOLD * magnitude.mean(1, keepdim=True))
    scale = (codes * centred).sum(1, keepdim=True) / codes.abs().sum(1, keepdim=True).clamp_min(1)
    return TernaryRows(codes, scale, mean)


def fit_affine(weight: Tensor, codes: Tensor) -> tuple[Tensor, Tensor]:
    """Least-squares scale and offset (out, 1) of given codes; scale 0 where a row's are constant.

    Args:
        weight: (out, k).
        codes: (out, k).
    """
    count = weight.shape[1]
    a, b = codes.square().sum(1, keepdim=True), codes.sum(1, keepdim=True)
    p, q = (weight * codes).sum(1, keepdim=True), weight.sum(1, keepdim=True)
    det = count * a - b.square()
    safe = torch.where(det > 0, det, 1)
    scale = torch.where(det > 0, (count * p - b * q) / safe, 0)
    offset = torch.where(det > 0, (a * q - b * p) / safe, q / count)
    return scale, offset


def fit_ternary_rows(weight: Tensor, sweeps: int = 50) -> TernaryRows:
    """ITF: scale and offset, then codes, in turn, each the exact minimiser of the squared error.

    A row stops when its codes do; a code changes only for one that is strictly nearer.

    Args:
        weight: (out, k); fitted in float32 or finer.
        sweeps: Most changes of codes; the paper needs about 10.
    """
    start = start_ternary(weight)
    mean = start.offset
    # About the mean, so that rows far from zero lose no digits.
    part, codes = widen(weight) - mean, start.codes
    kept, scale, offset = codes.clone(), torch.empty_like(mean), torch.empty_like(mean)
    rows = torch.arange(len(part), device=part.device)
    for sweep in range(sweeps + 1):
        scale[rows], offset[rows] = alpha, mu = fit_affine(part, codes)
        if sweep == sweeps:
            break
        nearer = _nearest(part, codes, alpha, mu)
        moved = (nearer != codes).any(1)
        if not bool(moved.any()):
            break
        rows, part, codes = rows[moved], part[moved], nearer[moved]
        kept[rows] = codes
    return TernaryRows(kept, scale, offset + mean)


def _nearest(weight: Tensor, codes: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
    """The nearest codes; those that are as near as any stay, and all do where the scale is 0."""
    flat = scale.abs() <= torch.finfo(scale.dtype).tiny
    levels = (weight - offset).div_(torch.where(flat, 1, scale))
    stay = (levels - codes).abs_() <= 0.5
    return torch.where(stay | flat, codes, levels.round_().clamp_(-1, 1))


def align_ternary(weight: Tensor, fit: TernaryRows, second_moment: Tensor) -> TernaryRows:
    """AGA: the scale and offset of least output error for the codes as they are, in float64.

    A row keeps its own where the system is singular, as far as the precision of S can tell: one
    token that outweighs all others makes it so. The scale of S does not matter, nor is S to be
    damped.

    Args:
        weight: (out, k).
        fit: Codes, and what rows fall back to.
        second_moment: S (k, k) of the same columns.
    """
    W, T, S = weight.double(), fit.codes.double(), second_moment.to(weight.device).double()
    S = (S + S.mT) / 2
    TS, ones = T @ S, S.sum(1)
    a, b, d = (TS * T).sum(1), T @ ones, ones.sum()
    p, q = (TS * W).sum(1), W @ ones
    det = a * d - b.square()
    # What the roundings of S can add up to: S_ij is known to eps sqrt(S_ii S_jj).
    size = S.diagonal().sqrt()
    rounding = (T.abs() @ size).square() * d + a * size.sum().square()
    sound = det > torch.maximum(_SINGULAR * a * d, torch.finfo(second_moment.dtype).eps * rounding)
    safe = torch.where(sound, det, 1)
    scale, offset = (d * p - b * q) / safe, (a * q - b * p) / safe
    return TernaryRows(
        fit.codes,
        torch.where(sound[:, None], scale[:, None], fit.scale).to(fit.scale.dtype),
        torch.where(sound[:, None], offset[:, None], fit.offset).to(fit.offset.dtype),
    )
