"""Ternary weights: ``W ~ scale * T`` with T in {-1, 0, +1}.

Three fits, from the cheapest to the best. Normalised squared error on Gaussian rows: absmean 0.263,
least-squares scale on the same codes 0.213, optimal threshold and scale 0.190 (closed forms in
``tests/primitives/test_ternary.py``).
"""

from typing import Literal

import torch
from torch import Tensor

from dit_qat.primitives.scales import rms, safe, widen

__all__ = [
    "GAUSSIAN_THRESHOLD",
    "TERNARY_FITS",
    "TernaryFit",
    "fit_ternary",
    "ternarize",
    "ternary_codes",
]

TernaryFit = Literal["absmean", "least_squares", "gaussian", "mse"]
TERNARY_FITS: tuple[TernaryFit, ...] = ("absmean", "least_squares", "gaussian", "mse")

GAUSSIAN_THRESHOLD = 0.612003
"""Threshold of the MSE-optimal ternary quantizer of N(0, 1): half its level of 1.224006."""


def ternary_codes(weight: Tensor, threshold: Tensor, out: Tensor | None = None) -> Tensor:
    """Codes -1, 0, +1 in the finer dtype of both: +-1 where the magnitude exceeds ``threshold``.

    ``out`` is a tensor of that dtype, shaped like ``weight``, to write them to.
    """
    return torch.div(weight, 2 * threshold, out=out).round_().clamp_(-1, 1)


def ternarize(
    weight: Tensor, fit: TernaryFit = "absmean", per_channel: bool = True
) -> tuple[Tensor, Tensor]:
    """Fit ternary codes and a scale.

    Args:
        weight: (out, in).
        fit: ``absmean``: scale mean|W|, threshold half of it (BitNet b1.58, arXiv:2402.17764, eq.
            1-3). ``least_squares``: the same codes, scale <W,T>/<T,T>. ``gaussian``: threshold
            0.612 rms, optimal for rotated (near-Gaussian) rows, least-squares scale. ``mse``: the
            exact optimum, by sorting magnitudes.
        per_channel: One scale per output channel, or one for the tensor.

    Returns:
        ``codes`` (out, in) in the weight's dtype, ``scale`` (out, 1) or (1, 1) in float32 or finer.

    Raises:
        ValueError: for an unknown fit.

    Example:
        >>> codes, scale = ternarize(torch.tensor([[0.1, -2.0, 1.0, 0.9]]), "absmean")
        >>> codes.tolist(), scale.item()
        ([[0.0, -1.0, 1.0, 1.0]], 1.0)
    """
    codes, scale, _ = fit_ternary(weight, fit, per_channel)
    return codes, scale


def fit_ternary(
    weight: Tensor, fit: TernaryFit, per_channel: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Like :func:`ternarize`, and the threshold, from which :func:`ternary_codes` repeats codes."""
    exact = widen(weight)
    magnitude = exact.abs()
    threshold, scale = _threshold(magnitude, fit, -1 if per_channel else None)
    # A weight is large and fresh memory costs more than arithmetic: use it twice.
    codes = ternary_codes(exact, threshold, out=magnitude)
    if scale is None:
        dims = (-1,) if per_channel else (-2, -1)
        count = codes.abs().sum(dims, keepdim=True)
        scale = (exact * codes).sum(dims, keepdim=True) / count.clamp_min(1)
    return codes.to(weight.dtype), scale, threshold


def _threshold(magnitude: Tensor, fit: TernaryFit, dim: int | None) -> tuple[Tensor, Tensor | None]:
    """Threshold of a fit to magnitudes (out, in), and its scale where that needs no codes."""
    if fit in ("absmean", "least_squares"):
        mean = safe(magnitude.mean(dim, keepdim=True))
        # Safe again: half the smallest normal number may be flushed to zero.
        return safe(mean / 2), mean if fit == "absmean" else None
    if fit == "gaussian":
        return safe(rms(magnitude, dim) * GAUSSIAN_THRESHOLD), None
    if fit == "mse":
        return _optimal_threshold(magnitude, dim), None
    raise ValueError(f"ternary fit {fit!r} is unknown; use one of {TERNARY_FITS}")


def _optimal_threshold(magnitude: Tensor, dim: int | None) -> Tensor:
    """Keeping the k largest magnitudes removes (sum of them)^2 / k from the error: scan every k."""
    rows = magnitude if dim is not None else magnitude.reshape(1, -1)
    ordered = rows.sort(dim=-1, descending=True).values
    count = torch.arange(1, ordered.shape[-1] + 1, dtype=ordered.dtype, device=ordered.device)
    best = (ordered.cumsum(-1).square() / count).argmax(-1, keepdim=True)
    smallest_kept = ordered.gather(-1, best)
    following = (best + 1).clamp_max(ordered.shape[-1] - 1)
    largest_dropped = ordered.gather(-1, following)
    # Between the two, so that rounding to codes keeps exactly the chosen k.
    beyond = best + 1 >= ordered.shape[-1]
    threshold = torch.where(beyond, smallest_kept / 2, (smallest_kept + largest_dropped) / 2)
    return safe(threshold)
