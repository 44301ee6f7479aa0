"""Kernel distance (KID): the squared maximum mean discrepancy of features."""

import torch
from torch import Tensor

from dit_qat.dit.evaluation.feature_file import Rows
from dit_qat.dit.randomness import generator_for

__all__ = ["kernel_distance"]

_DEGREE = 3


def kernel_distance(
    real: Rows,
    generated: Rows,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 0,
    device: torch.device | str = "cpu",
) -> tuple[float, float]:
    """Return mean and standard deviation of the unbiased squared MMD over random subsets.

    The kernel is ``(x y / D + 1)^3`` (Bińkowski et al., "Demystifying MMD GANs", arXiv:1801.01401,
    section 4); the number and size of the subsets are torch-fidelity's. The mean has no bias by the
    number of samples and can lie slightly below zero.

    Args:
        real: Features (N, D).
        generated: Features (M, D).
        subsets: How many pairs of subsets.
        subset_size: Vectors per subset, drawn without replacement.
        seed: Decides which.
        device: Where to compute; products in float32, powers and sums in float64.

    Raises:
        ValueError: Different dimensions, or fewer vectors than a subset has.
    """
    if len(real.shape) != 2 or real.shape[1:] != generated.shape[1:]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(generated.shape)} do not fit; "
            "expected (N, D) and (M, D)"
        )
    smallest = min(len(real), len(generated))
    if not 2 <= subset_size <= smallest or subsets < 1:
        raise ValueError(
            f"{subsets} subsets of {subset_size} cannot be drawn from {smallest} samples; at least "
            "1 subset of 2 to that many"
        )
    values = [
        _squared_mmd(
            _subset(real, subset_size, seed, "real", number).to(device),
            _subset(generated, subset_size, seed, "generated", number).to(device),
        )
        for number in range(subsets)
    ]
    result = torch.tensor(values, dtype=torch.float64)
    return float(result.mean()), float(result.std(correction=0))


def _subset(features: Rows, size: int, seed: int, name: str, number: int) -> Tensor:
    order = torch.randperm(len(features), generator=generator_for(seed, "kid", name, number))
    return features[order[:size].sort().values].detach().float()


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """Unbiased estimate from (n, D) and (n, D): pairs of a vector with itself are left out."""
    count = len(x)
    within = sum(_kernel(z, z).fill_diagonal_(0).sum() for z in (x, y)) / (count * (count - 1))
    return float(within - 2 * _kernel(x, y).mean())


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return ((x @ y.T).to(torch.float64) / x.shape[1] + 1) ** _DEGREE
