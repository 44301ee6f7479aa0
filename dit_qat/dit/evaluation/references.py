"""What samples are compared with: images, published statistics, or statistics of ours."""

import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from dit_qat.dit.evaluation.frechet import FeatureStatistics
from dit_qat.dit.evaluation.sources import ImageSource, file_sha256, open_images
from dit_qat.export.files import written_whole

__all__ = ["Moments", "Reference", "open_reference", "save_reference"]

_SUFFIXES = {"pool": "", "spatial": "_s", "dinov2": "_dinov2"}
"""How the names mu and sigma go on, by feature; the first two as in ADM's files."""

_BROKEN = (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError)
_ASYMMETRY = 1e-5


@dataclass(frozen=True)
class Moments:
    """Mean (D,) and covariance (D, D) of features, float64.

    Attributes:
        mean: The mean.
        covariance: The unbiased covariance.
        count: Of how many images; None if nobody wrote it down.
    """

    mean: Tensor
    covariance: Tensor
    count: int | None

    @classmethod
    def of(cls, statistics: FeatureStatistics) -> "Moments":
        """Moments of accumulated features."""
        return cls(statistics.mean, statistics.covariance, statistics.count)


@dataclass(frozen=True)
class Reference:
    """One side of a comparison, opened and checked, with nothing computed yet.

    Attributes:
        path: The file or folder.
        moments: Statistics that are given, by feature (pool, spatial, dinov2).
        images: Images that are given. A file of ADM has both: statistics of the whole data set,
            which FID and sFID use, and 10,000 images, which serve precision, recall and KID.
        extractors: Hash of the network that made the moments, by feature, where it is recorded.
        source_sha256: Identity of the images that the moments are of, where it is recorded.
    """

    path: Path
    moments: Mapping[str, Moments] = field(default_factory=dict)
    images: ImageSource | None = None
    extractors: Mapping[str, str] = field(default_factory=dict)
    source_sha256: str | None = None

    def sha256(self) -> str:
        """Hash of the file, or of the images' files."""
        if self.path.is_file():
            return file_sha256(self.path)
        assert self.images is not None
        return self.images.sha256()

    def serves(self, feature: str) -> bool:
        """Whether moments of a feature are given, or can be computed from images."""
        return feature in self.moments or self.images is not None

    def check_extractor(self, feature: str, dimension: int, sha256: str) -> None:
        """Make sure that given moments are those of a feature network.

        Raises:
            ValueError: Another dimension, or another network's.
        """
        if feature not in self.moments:
            return
        given = len(self.moments[feature].mean)
        name = f"mu{_SUFFIXES[feature]}"
        if given != dimension:
            raise ValueError(
                f"{self.path}: {name} has {given} dimensions, the {feature} features of this "
                f"network have {dimension}; use statistics of the same network"
            )
        made_by = self.extractors.get(feature, sha256)
        if made_by != sha256:
            raise ValueError(
                f"{self.path}: {name} was computed with a network of sha256 {made_by[:16]}, this "
                f"one has {sha256[:16]}; compute the reference again, with --cache_reference"
            )


def open_reference(path: Path) -> Reference:
    """Open images, or an ``.npz`` with ``mu`` and ``sigma``, which is never unpickled.

    Such a file may hold mu_s and sigma_s for sFID and arr_0 images (ADM's layout), or mu and sigma
    alone (pytorch-fid's), or be one of :func:`save_reference`.

    Raises:
        FileNotFoundError: Nothing has this name.
        ValueError: No images and no statistics, or damaged ones.
    """
    if not (path.is_file() and path.suffix == ".npz"):
        return Reference(path, images=open_images(path))
    names = _names(path)
    if "mu" not in names:
        return Reference(path, images=open_images(path))
    moments = {
        feature: _moments(path, suffix)
        for feature, suffix in _SUFFIXES.items()
        if f"mu{suffix}" in names
    }
    return Reference(
        path,
        moments,
        open_images(path) if "arr_0" in names else None,
        {f: _text(path, f"extractor_{f}") for f in moments if f"extractor_{f}" in names},
        _text(path, "source_sha256") if "source_sha256" in names else None,
    )


def save_reference(
    path: Path,
    moments: Mapping[str, Moments],
    extractors: Mapping[str, str],
    source_sha256: str,
) -> None:
    """Write statistics with the hashes of what made them, for :func:`open_reference`.

    Raises:
        ValueError: A name that does not end in ``.npz``.
    """
    if path.suffix != ".npz":
        raise ValueError(f"{path} must end in .npz")
    arrays: dict[str, Any] = {"source_sha256": np.array(source_sha256)}
    for feature, value in moments.items():
        suffix = _SUFFIXES[feature]
        arrays[f"mu{suffix}"] = value.mean.numpy()
        arrays[f"sigma{suffix}"] = value.covariance.numpy()
        arrays[f"extractor_{feature}"] = np.array(extractors[feature])
        if value.count is not None:
            arrays["count"] = np.array(value.count)
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **arrays)


def _names(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive:
            return [name.removesuffix(".npy") for name in archive.namelist()]
    except _BROKEN as error:
        raise ValueError(f"{path} is damaged or not an .npz archive: {error}") from error


def _array(path: Path, name: str) -> npt.NDArray[np.generic]:
    try:
        with np.load(path, allow_pickle=False) as archive:
            value = archive[name]
    except KeyError as error:
        raise ValueError(f"{path} has no {name}; statistics need mu and sigma in pairs") from error
    except _BROKEN as error:
        raise ValueError(f"{path}: {name} is damaged or no plain array: {error}") from error
    if not isinstance(value, np.ndarray):
        raise ValueError(f"{path}: {name} is no array")
    return value


def _text(path: Path, name: str) -> str:
    return str(_array(path, name))


def _moments(path: Path, suffix: str) -> Moments:
    mean, covariance = _array(path, f"mu{suffix}"), _array(path, f"sigma{suffix}")
    shown = f"{path}: mu{suffix} of shape {mean.shape} and sigma{suffix} of {covariance.shape}"
    if mean.ndim != 1 or covariance.shape != 2 * mean.shape or not len(mean):
        raise ValueError(f"{shown} are no mean and covariance; expected (D,) and (D, D)")
    if not all(np.issubdtype(array.dtype, np.floating) for array in (mean, covariance)):
        raise ValueError(f"{shown} are {mean.dtype} and {covariance.dtype}; expected floats")
    mu = torch.from_numpy(mean.astype(np.float64))
    sigma = torch.from_numpy(covariance.astype(np.float64))
    if not (mu.isfinite().all() and sigma.isfinite().all()):
        raise ValueError(f"{shown} hold NaN or infinite values; compute them again")
    spread = float(sigma.diagonal().abs().max())
    if float((sigma - sigma.T).abs().max()) > _ASYMMETRY * spread:
        raise ValueError(f"{shown}: sigma{suffix} is not symmetric, so it is no covariance")
    if float(sigma.diagonal().min()) < 0:
        raise ValueError(f"{shown}: sigma{suffix} has negative variances")
    count = int(_array(path, "count").item()) if "count" in _names(path) else None
    return Moments(mu, sigma, count)
