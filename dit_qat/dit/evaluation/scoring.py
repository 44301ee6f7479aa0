"""FID, sFID, Inception Score, KID, precision, recall and FD-DINOv2 of images on disk."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch

from dit_qat.dit.evaluation.exact import exact_arithmetic
from dit_qat.dit.evaluation.extraction import Collected, Networks, Wanted, extract
from dit_qat.dit.evaluation.feature_file import FeatureFile
from dit_qat.dit.evaluation.frechet import gaussian_frechet_distance
from dit_qat.dit.evaluation.kernel_distance import kernel_distance
from dit_qat.dit.evaluation.precision_recall import precision_recall
from dit_qat.dit.evaluation.references import Moments, Reference
from dit_qat.dit.evaluation.sources import ImageSource
from dit_qat.dit.processes import Processes

__all__ = [
    "KID_SUBSETS",
    "METRICS",
    "NEIGHBOURS",
    "Comparison",
    "Metric",
    "Scores",
    "choose_metrics",
    "kid_subset",
]

Metric = Literal["fid", "sfid", "is", "kid", "precision", "recall", "fd_dinov2"]
METRICS: tuple[Metric, ...] = get_args(Metric)

FRECHET: Mapping[str, str] = {"fid": "pool", "sfid": "spatial", "fd_dinov2": "dinov2"}
"""The feature behind each Frechet distance."""

NEIGHBOURS = 3
KID_SUBSETS = 100
_KID_SUBSET = 1000
_BY_FEATURES = {"kid", "precision", "recall"}


@dataclass(frozen=True)
class Scores:
    """Results, and what can be kept of them.

    Attributes:
        values: By name; "is" and "kid" are means and have their deviation beside them.
        reference: The moments of the reference that were used or computed, by feature.
    """

    values: Mapping[str, float]
    reference: Mapping[str, Moments]


def kid_subset(*counts: int) -> int:
    """Return how many images a subset of KID has: 1,000, or all where there are fewer."""
    return min(_KID_SUBSET, *counts)


@dataclass(frozen=True)
class Comparison:
    """Samples, what to compare them with, and how.

    Attributes:
        samples: The images to score.
        metrics: What to compute.
        networks: Feature networks, on the device of this process.
        reference: The other side; the Inception Score alone needs none.
        batch_size: Images at a time.
        seed: Decides the subsets of KID.
        keep: Features whose moments of the reference are wanted whatever the metrics.
    """

    samples: ImageSource
    metrics: Sequence[Metric]
    networks: Networks
    reference: Reference | None = None
    batch_size: int = 64
    seed: int = 0
    keep: frozenset[str] = frozenset()

    def check(self) -> list[str]:
        """Raise for what cannot be computed; return what is too few to be trusted, in words.

        Raises:
            ValueError: A metric that the reference cannot serve, statistics of another network or
                dimension, or too few images to compute it at all.
        """
        for feature in self._frechet_features | self.keep:
            if self.reference is not None:
                dimension, sha256 = self.networks.dimension(feature), self.networks.sha256(feature)
                self.reference.check_extractor(feature, dimension, sha256)
        for metric in self.metrics:
            self._check_served(metric)
        return [line for metric in self.metrics for line in self._too_few(metric)]

    def unlike(self) -> list[str]:
        """Return, in words, how the two sides differ in what features should not measure."""
        images = None if self.reference is None else self.reference.images
        if images is None or images.shape == self.samples.shape or set(self.metrics) <= {"is"}:
            return []
        ours, theirs = (" x ".join(map(str, side.shape)) for side in (self.samples, images))
        return [
            f"the samples are {ours} and the images of {images.path} {theirs} (channels, height, "
            "width): features depend on the size, so crop and resize those images as the training "
            "data were"
        ]

    def run(self, processes: Processes, scratch: Path, progress: bool = False) -> Scores | None:
        """Compute the metrics; process zero gets them, the others None.

        Args:
            processes: All of those that call this together.
            scratch: A folder that all of them see, for features; the caller clears it.
            progress: Whether process zero shows how far it is.

        Raises:
            ValueError: Damaged images.
            OSError: Files that cannot be read or written.
        """
        of_samples = Wanted(
            self._frechet_features,
            "is" in self.metrics,
            self._file(scratch / "samples.f32", self.samples),
        )
        of_reference = self._wanted_of_reference(scratch)
        files = [w.features for w in (of_samples, of_reference) if w.features is not None]
        processes.together(lambda: _create(files if processes.is_zero else []))
        titles = ("samples", "reference") if progress else ("", "")
        found = self._extract(self.samples, of_samples, processes, titles[0])
        images = None if self.reference is None else self.reference.images
        known = self._extract(images, of_reference, processes, titles[1])
        return self._finish(found, known, processes.device) if processes.is_zero else None

    @property
    def _frechet_features(self) -> frozenset[str]:
        return frozenset(FRECHET[metric] for metric in self.metrics if metric in FRECHET)

    def _file(self, path: Path, images: ImageSource | None) -> FeatureFile | None:
        if images is None or not _BY_FEATURES & set(self.metrics):
            return None
        return FeatureFile(path, len(images), self.networks.dimension("pool"))

    def _wanted_of_reference(self, scratch: Path) -> Wanted:
        if self.reference is None:
            return Wanted()
        missing = (self._frechet_features | self.keep) - self.reference.moments.keys()
        return Wanted(missing, False, self._file(scratch / "reference.f32", self.reference.images))

    def _extract(
        self, images: ImageSource | None, wanted: Wanted, processes: Processes, title: str
    ) -> Collected:
        if images is None or wanted.nothing:
            return Collected(wanted, self.networks.dimension)
        return extract(images, wanted, self.networks, processes, self.batch_size, title)

    def _finish(self, found: Collected, known: Collected, device: torch.device) -> Scores:
        moments = {name: Moments.of(statistics) for name, statistics in known.moments.items()}
        if self.reference is not None:
            moments = {**moments, **self.reference.moments}
        values: dict[str, float] = {}
        for metric, feature in FRECHET.items():
            if metric in self.metrics:
                ours, theirs = Moments.of(found.moments[feature]), moments[feature]
                values[metric] = gaussian_frechet_distance(
                    ours.mean, ours.covariance, theirs.mean, theirs.covariance
                )
        if found.score is not None:
            values["is"], values["is_std"] = found.score.compute()
        if found.features is not None and known.features is not None:
            with exact_arithmetic(device):
                values |= self._by_features(known.features, found.features, device)
        return Scores(values, moments)

    def _by_features(
        self, real: FeatureFile, generated: FeatureFile, device: torch.device
    ) -> dict[str, float]:
        values: dict[str, float] = {}
        if "kid" in self.metrics:
            size = kid_subset(len(real), len(generated))
            values["kid"], values["kid_std"] = kernel_distance(
                real, generated, KID_SUBSETS, size, self.seed, device
            )
        if {"precision", "recall"} & set(self.metrics):
            both = precision_recall(real, generated, NEIGHBOURS, device)
            pair = zip(("precision", "recall"), both, strict=True)
            values |= {name: value for name, value in pair if name in self.metrics}
        return values

    def _check_served(self, metric: Metric) -> None:
        if metric == "is":
            return
        if self.reference is None:
            raise ValueError(f"{metric} compares with real images: name them with --reference")
        reference = self.reference
        if metric in FRECHET and not reference.serves(FRECHET[metric]):
            raise ValueError(
                f"{reference.path} has neither images nor statistics of {FRECHET[metric]} features "
                f"for {metric}, only {', '.join(reference.moments)}; leave {metric} out, or give "
                "images"
            )
        if metric in _BY_FEATURES:
            self._check_features(metric, reference)

    def _check_features(self, metric: Metric, reference: Reference) -> None:
        if reference.images is None:
            raise ValueError(
                f"{reference.path} holds statistics and no images, which {metric} needs; leave "
                f"{metric} out, or give images (ADM's reference files have both)"
            )
        least = 2 if metric == "kid" else NEIGHBOURS + 1
        for images in (self.samples, reference.images):
            if len(images) < least:
                raise ValueError(
                    f"{images.path} has {len(images)} images, {metric} needs at least {least}"
                )

    def _too_few(self, metric: Metric) -> list[str]:
        if metric not in FRECHET or self.reference is None:
            return []
        feature = FRECHET[metric]
        given = self.reference.moments.get(feature)
        images = self.reference.images
        of_reference = len(images) if given is None and images is not None else None
        counts = {
            self.samples.path: len(self.samples),
            self.reference.path: of_reference if given is None else given.count,
        }
        needed = self.networks.dimension(feature)
        return [
            f"{path} has {count} images, too few for {metric}: it needs more than {needed}, the "
            "dimension of its features, and 50,000 to compare with papers"
            for path, count in counts.items()
            if count is not None and count <= needed
        ]


def choose_metrics(
    asked: Sequence[Metric] | None, reference: Reference | None, dinov2: bool
) -> tuple[list[Metric], list[str]]:
    """Return the metrics to compute, and why others are left out.

    Args:
        asked: Those that were asked for; by default all that the reference can serve.
        reference: The other side.
        dinov2: Whether there are weights for FD-DINOv2.

    Raises:
        ValueError: FD-DINOv2 without weights, or nothing to compute.
    """
    if asked is not None:
        if not asked:
            raise ValueError(f"--metrics is an empty list; choose from {', '.join(METRICS)}")
        if "fd_dinov2" in asked and not dinov2:
            raise ValueError("fd_dinov2 needs the weights of DINOv2: name them with --dino FILE")
        return [metric for metric in METRICS if metric in asked], []
    chosen: list[Metric] = []
    notes = []
    for metric in METRICS:
        by_images = metric in _BY_FEATURES
        if metric == "fd_dinov2" and not dinov2:
            continue
        if metric == "is" or _serves(reference, None if by_images else FRECHET[metric]):
            chosen.append(metric)
        else:
            lacks = (
                "images" if by_images else f"images and statistics of {FRECHET[metric]} features"
            )
            notes.append(f"{metric} is left out: the reference has no {lacks}")
    return chosen, notes


def _serves(reference: Reference | None, feature: str | None) -> bool:
    if reference is None:
        return False
    return reference.images is not None if feature is None else reference.serves(feature)


def _create(files: Sequence[FeatureFile]) -> None:
    for file in files:
        file.create()
