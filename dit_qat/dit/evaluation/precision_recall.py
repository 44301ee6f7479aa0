"""Precision and recall of generated images by nearest neighbours in feature space."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dit_qat.dit.evaluation.feature_file import Rows

__all__ = ["precision_recall"]

_BLOCK = 2048
_SPARE = 8
"""Candidates beyond those asked for; the choice among them is made on exact distances."""


def precision_recall(
    real: Rows, generated: Rows, k: int = 3, device: torch.device | str = "cpu"
) -> tuple[float, float]:
    """Return the improved precision and recall of generated features.

    The manifold of a set is the union of balls around its points, each reaching to the point's
    ``k``-th nearest other point. Precision is the share of generated points in the manifold of the
    real ones, recall the share of real points in that of the generated ones (Kynkäänniemi et al.,
    "Improved Precision and Recall Metric for Assessing Generative Models", arXiv:1904.06991,
    section 3, equations 1 and 2).

    Nearest points are found by matrix products of centred features, in blocks of 2,048 by 2,048,
    and a few candidates more than needed are then measured exactly: products cancel for near
    points and would put twins outside their balls.

    Args:
        real: Features (N, D).
        generated: Features (M, D).
        k: Rank of the neighbour that sets the radius; the paper takes 3.
        device: Where to compute.

    Raises:
        ValueError: Shapes that do not fit, values that are not finite, or too few points for ``k``.

    Example:
        >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
        >>> precision_recall(square, square + torch.tensor([0.5, 0.0]), k=1)
        (1.0, 1.0)
    """
    _check(real, generated, k)
    precision = _share_inside(generated, real, _radii(real, k, device), device)
    recall = _share_inside(real, generated, _radii(generated, k, device), device)
    return precision, recall


def _check(real: Rows, generated: Rows, k: int) -> None:
    shapes = tuple(real.shape), tuple(generated.shape)
    if len(shapes[0]) != 2 or len(shapes[1]) != 2 or shapes[0][1] != shapes[1][1]:
        raise ValueError(
            f"features of shapes {shapes[0]} and {shapes[1]} do not fit; expected (N, D) and (M, D)"
        )
    for name, features in (("real", real), ("generated", generated)):
        if not 1 <= k < len(features):
            raise ValueError(
                f"k={k} must be at least 1 and below the {len(features)} {name} samples"
            )
        if not all(block.isfinite().all() for _, block in _blocks(features)):
            raise ValueError(f"the {name} features hold NaN or infinite values")


def _blocks(features: Rows) -> Iterator[tuple[int, Tensor]]:
    for start in range(0, len(features), _BLOCK):
        yield start, features[start : start + _BLOCK].detach()


def _radii(points: Rows, k: int, device: torch.device | str) -> Tensor:
    """Return each point's distance to its k-th nearest other point (N,), float64."""
    zero = torch.zeros(len(points), dtype=torch.float64, device=device)
    mean = _mean(points, device)
    radii = []
    for _, block in _blocks(points):
        nearest = _candidates(block.to(device), points, zero, k + 1 + _SPARE, mean)
        # A point is its own nearest neighbour, hence k + 1.
        radii.append(_distances(block.to(device), points, nearest).kthvalue(k + 1, dim=1).values)
    return torch.cat(radii)


def _share_inside(points: Rows, centres: Rows, radii: Tensor, device: torch.device | str) -> float:
    """Return the share of points that lie in the ball of at least one centre."""
    mean = _mean(centres, device)
    inside = 0
    for _, block in _blocks(points):
        likely = _candidates(block.to(device), centres, radii, 1 + _SPARE, mean)
        distances = _distances(block.to(device), centres, likely)
        inside += int((distances <= radii[likely]).any(dim=1).sum())
    return inside / len(points)


def _candidates(points: Tensor, centres: Rows, radii: Tensor, count: int, mean: Tensor) -> Tensor:
    """Return, for each point (n, D), the centres of least ``distance^2 - radius^2`` (n, count).

    Up to the rounding of float32 products, and fewer where there are fewer centres.
    """
    centred = (points.to(torch.float64) - mean).float()
    margins = torch.empty(len(points), 0, device=points.device)
    indices = torch.empty(len(points), 0, dtype=torch.int64, device=points.device)
    for start, block in _blocks(centres):
        others = block.to(points.device, torch.float64) - mean
        reach = radii[start : start + len(block)].square()
        # Without the point's own norm, which is the same for all centres.
        offset = (others.square().sum(dim=1) - reach).float()
        margin = torch.addmm(offset, centred, others.float().T, alpha=-2)
        best = margin.topk(min(count, len(block)), largest=False)
        margins = torch.cat([margins, best.values], dim=1)
        indices = torch.cat([indices, best.indices + start], dim=1)
        kept = margins.topk(min(count, margins.shape[1]), largest=False).indices
        margins, indices = margins.gather(1, kept), indices.gather(1, kept)
    return indices


def _distances(points: Tensor, centres: Rows, indices: Tensor) -> Tensor:
    """Return the exact distances (n, count) of points (n, D) to the centres of those indices."""
    exact = points.to(torch.float64)
    # One after the other, for each is as large as the points; what is indexed may be on the CPU.
    columns = indices.cpu().unbind(dim=1)
    return torch.stack([(exact - centres[i].to(exact)).norm(dim=1) for i in columns], dim=1)


def _mean(features: Rows, device: torch.device | str) -> Tensor:
    sums = [block.to(device, torch.float64).sum(dim=0) for _, block in _blocks(features)]
    return torch.stack(sums).sum(dim=0) / len(features)
