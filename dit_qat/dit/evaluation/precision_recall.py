"""Precision and recall of generated images by nearest neighbours in feature space."""

from collections.abc import Iterator

import torch
from torch import Tensor

__all__ = ["precision_recall"]

_DISTANCES_AT_ONCE = 2**24


def precision_recall(real: Tensor, generated: Tensor, k: int = 3) -> tuple[float, float]:
    """Return the improved precision and recall of generated features.

    The manifold of a set is the union of balls around its points, each reaching to the point's
    ``k``-th nearest other point. Precision is the share of generated points in the manifold of the
    real ones, recall the share of real points in that of the generated ones (Kynkäänniemi et al.,
    "Improved Precision and Recall Metric for Assessing Generative Models", arXiv:1904.06991,
    section 3, equations 1 and 2). At most 2^24 distances exist at a time.

    Args:
        real: Features (N, D).
        generated: Features (M, D).
        k: Rank of the neighbour that sets the radius; the paper takes 3.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, or too few points for ``k``.

    Example:
        >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> precision_recall(square, square + torch.tensor([0.5, 0.0]), k=1)
        (1.0, 1.0)
    """
    _check(real, generated, k)
    real, generated = real.detach().to(torch.float64), generated.detach().to(torch.float64)
    precision = _share_inside(generated, real, _radii(real, k))
    recall = _share_inside(real, generated, _radii(generated, k))
    return precision, recall


def _check(real: Tensor, generated: Tensor, k: int) -> None:
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        raise ValueError(
            f"features of shapes {tuple(real.shape)} and {tuple(generated.shape)} do not fit; "
            "expected (N, D) and (M, D)"
        )
    for name, features in (("real", real), ("generated", generated)):
        if not 1 <= k < len(features):
            raise ValueError(
                f"k={k} must be at least 1 and below the {len(features)} {name} samples"
            )
        if not features.isfinite().all():
            raise ValueError(f"the {name} features hold NaN or infinite values")


def _distances(points: Tensor, others: Tensor) -> Iterator[Tensor]:
    """Yield the rows of the distance matrix (len(points), len(others)) in chunks."""
    for chunk in torch.split(points, max(1, _DISTANCES_AT_ONCE // len(others))):
        # Distances from products cancel for near points and would put twins outside their balls.
        yield torch.cdist(chunk, others, compute_mode="donot_use_mm_for_euclid_dist")


def _radii(points: Tensor, k: int) -> Tensor:
    """Return each point's distance to its k-th nearest other point (N,)."""
    # A point is its own nearest neighbour, hence k + 1.
    return torch.cat([d.kthvalue(k + 1, dim=1).values for d in _distances(points, points)])


def _share_inside(points: Tensor, centres: Tensor, radii: Tensor) -> float:
    inside = torch.cat([(d <= radii).any(dim=1) for d in _distances(points, centres)])
    return float(inside.to(torch.float64).mean())
