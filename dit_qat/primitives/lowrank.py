"""Low-rank split ``W = A B + R``: what a quantizer sees is the residual R."""

from collections.abc import Callable

import torch
from torch import Tensor

from dit_qat.primitives.scales import widen

__all__ = ["split_alternating", "split_svd"]


def split_svd(weight: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Best rank-r factors of the weight: ``A = U_r S_r``, ``B = V_r^T`` (RobuQ, arXiv:2509.23582).

    Args:
        weight: (out, in).
        rank: 1 .. min(out, in).

    Returns:
        ``A`` (out, rank) and ``B`` (rank, in) in the weight's dtype, computed in float32 or finer.

    Raises:
        ValueError: for a rank outside that range.
    """
    limit = min(weight.shape)
    if not 1 <= rank <= limit:
        raise ValueError(
            f"rank={rank} is outside 1..{limit} for a {tuple(weight.shape)} weight; choose it lower"
        )
    u, s, vt = torch.linalg.svd(widen(weight), full_matrices=False)
    return (u[:, :rank] * s[:rank]).to(weight.dtype), vt[:rank].to(weight.dtype)


def split_alternating(
    weight: Tensor, rank: int, quantize: Callable[[Tensor], Tensor], iterations: int = 5
) -> tuple[Tensor, Tensor]:
    """Factors that lower the error after quantization: ``A B <- SVD_r(W - Q(W - A B))``.

    Each round is kept only if ``||W - A B - Q(W - A B)||`` falls, so the result is never worse
    than :func:`split_svd`.

    Args:
        weight: (out, in).
        rank: 1 .. min(out, in).
        quantize: Fake-quantizer of the residual.
        iterations: Rounds tried.

    Returns:
        ``A`` (out, rank) and ``B`` (rank, in).
    """
    a, b = best = split_svd(weight, rank)
    residual = weight - a @ b
    quantized = quantize(residual)
    least = (residual - quantized).norm()
    for _ in range(iterations):
        a, b = split_svd(weight - quantized, rank)
        residual = weight - a @ b
        quantized = quantize(residual)
        error = (residual - quantized).norm()
        if error < least:
            best, least = (a, b), error
    return best
