"""Frechet distance between Gaussians fitted to features, in float64 throughout."""

import math
import warnings

import torch
from torch import Tensor

__all__ = ["FeatureStatistics", "frechet_distance", "gaussian_frechet_distance"]


class FeatureStatistics:
    """Mean and covariance of features that arrive in batches or from several processes.

    Holds the count, the mean and the centred scatter ``sum (x - mean) (x - mean)^T``, which merge
    without the cancellation of raw second moments (Chan, Golub and LeVeque, "Updating Formulae and
    a Pairwise Algorithm for Computing Sample Variances", 1979).

    Args:
        dimension: Length of a feature vector.

    Example:
        >>> statistics = FeatureStatistics(2)
        >>> statistics.update(torch.tensor([[0.0, 1.0], [2.0, 5.0]]))
        >>> statistics.mean.tolist(), statistics.covariance.tolist()
        ([1.0, 3.0], [[2.0, 4.0], [4.0, 8.0]])
    """

    def __init__(self, dimension: int) -> None:
        if dimension < 1:
            raise ValueError(f"dimension={dimension} must be at least 1")
        self.count = 0
        self.mean = torch.zeros(dimension, dtype=torch.float64)
        self.scatter = torch.zeros(dimension, dimension, dtype=torch.float64)

    @property
    def dimension(self) -> int:
        """Length of a feature vector."""
        return self.mean.shape[0]

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance (dimension, dimension).

        Raises:
            ValueError: Fewer than two samples.
        """
        if self.count < 2:
            raise ValueError(
                f"a covariance needs at least 2 samples, these statistics have {self.count}"
            )
        return self.scatter / (self.count - 1)

    def update(self, features: Tensor) -> None:
        """Add features (N, dimension).

        Raises:
            ValueError: Another shape, or values that are not finite.
        """
        if features.ndim != 2 or features.shape[1] != self.dimension:
            raise ValueError(
                f"features of shape {tuple(features.shape)} do not fit statistics of shape "
                f"(N, {self.dimension})"
            )
        if not features.isfinite().all():
            bad = int((~features.isfinite().all(dim=1)).sum())
            raise ValueError(
                f"{bad} of {len(features)} feature vectors hold NaN or infinite values; look for "
                "broken images"
            )
        if len(features) == 0:
            return
        values = features.detach().to("cpu", torch.float64)
        batch_mean = values.mean(dim=0)
        self._add(len(values), batch_mean, values - batch_mean)

    def merge(self, other: "FeatureStatistics") -> None:
        """Add the samples of other statistics of the same dimension.

        Raises:
            ValueError: Another dimension.
        """
        _check_same_dimension(self.mean, other.mean)
        if other.count:
            self._add(other.count, other.mean, self.scatter.new_empty(0, self.dimension))
            self.scatter += other.scatter

    def _add(self, count: int, mean: Tensor, centred: Tensor) -> None:
        """Add samples by their mean and their deviations from it (n, dimension).

        What the means differ by is one more row, so that one product in place does it all.
        """
        total = self.count + count
        shift = mean - self.mean
        between = shift * math.sqrt(self.count * count / total)
        rows = torch.cat([centred, between.unsqueeze(0)])
        self.scatter.addmm_(rows.T, rows)
        self.mean += shift * (count / total)
        self.count = total


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Return the squared Frechet distance between the Gaussians fitted to two sets of features.

    Warns when a set has no more samples than dimensions, since its covariance is then singular.

    Raises:
        ValueError: Different dimensions, or fewer than two samples.
    """
    _check_same_dimension(a.mean, b.mean)
    for statistics in (a, b):
        if 2 <= statistics.count <= statistics.dimension:
            warnings.warn(
                f"{statistics.count} samples cannot fill a covariance of "
                f"{statistics.dimension} dimensions: the Frechet distance is strongly biased; "
                f"use more than {statistics.dimension} samples",
                stacklevel=2,
            )
    return gaussian_frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def gaussian_frechet_distance(
    mean_a: Tensor, covariance_a: Tensor, mean_b: Tensor, covariance_b: Tensor
) -> float:
    """Return ``|m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a^1/2 S_b S_a^1/2)^1/2)``, in float64.

    The square root is taken of a symmetric matrix that has the eigenvalues of ``S_a S_b``, so that
    singular covariances need neither an offset nor complex numbers (Dowson and Landau, "The Frechet
    Distance between Multivariate Normal Distributions", 1982).

    Raises:
        ValueError: Shapes other than (D,) and (D, D), or values that are not finite.
    """
    moments = [x.detach().to("cpu", torch.float64) for x in (mean_a, covariance_a)]
    moments += [x.detach().to("cpu", torch.float64) for x in (mean_b, covariance_b)]
    mean_a, covariance_a, mean_b, covariance_b = moments
    _check_same_dimension(mean_a, mean_b)
    for mean, covariance in ((mean_a, covariance_a), (mean_b, covariance_b)):
        _check_moments(mean, covariance)
    root = _symmetric_root(covariance_a)
    eigenvalues = torch.linalg.eigvalsh(root @ covariance_b @ root)
    overlap = eigenvalues.clamp(min=0).sqrt().sum()
    trace = covariance_a.trace() + covariance_b.trace() - 2 * overlap
    # Rounding can leave a distance of zero slightly below it.
    return max(0.0, float((mean_a - mean_b).square().sum() + trace))


def _symmetric_root(covariance: Tensor) -> Tensor:
    eigenvalues, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * eigenvalues.clamp(min=0).sqrt()) @ vectors.T
    return root


def _check_same_dimension(mean_a: Tensor, mean_b: Tensor) -> None:
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"features of {math.prod(mean_a.shape)} and {math.prod(mean_b.shape)} dimensions "
            "cannot be compared; compute both with the same feature network"
        )


def _check_moments(mean: Tensor, covariance: Tensor) -> None:
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise ValueError(
            f"a mean of shape {tuple(mean.shape)} and a covariance of shape "
            f"{tuple(covariance.shape)} do not fit; expected (D,) and (D, D)"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise ValueError(
            "a mean or covariance holds NaN or infinite values; look for broken images"
        )
