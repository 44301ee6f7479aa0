"""One pass over images: their features, reduced to sums or written to a file, in any processes."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from dit_qat.dit.evaluation.dinov2 import DinoFeatures
from dit_qat.dit.evaluation.feature_file import FeatureFile
from dit_qat.dit.evaluation.frechet import FeatureStatistics
from dit_qat.dit.evaluation.inception import InceptionFeatures
from dit_qat.dit.evaluation.inception_score import InceptionScore
from dit_qat.dit.evaluation.sources import ImageSource
from dit_qat.dit.processes import Processes

__all__ = ["Collected", "Networks", "Wanted", "extract"]

T = TypeVar("T")

_UPDATE_ROWS = 1024
_LENGTHS = {"pool": "num_features", "spatial": "num_spatial"}


@dataclass(frozen=True)
class Networks:
    """Feature networks, on a device.

    Attributes:
        inception: For every metric but one.
        dinov2: For FD-DINOv2.
    """

    inception: InceptionFeatures | None = None
    dinov2: DinoFeatures | None = None

    def outputs(self, images: Tensor) -> dict[str, Tensor]:
        """Return the features of images (n, C, H, W), uint8, by name: (n, D) each."""
        found: dict[str, Tensor] = {}
        if self.inception is not None:
            found |= self.inception.activations(images)._asdict()
        if self.dinov2 is not None:
            found["dinov2"] = self.dinov2(images)
        return found

    def dimension(self, feature: str) -> int:
        """Return the length of a feature vector (pool, spatial or dinov2)."""
        if feature == "dinov2":
            assert self.dinov2 is not None
            return self.dinov2.num_features
        assert self.inception is not None
        length: int = getattr(self.inception, _LENGTHS[feature])
        return length

    def sha256(self, feature: str) -> str:
        """Return the hash of the weights behind a feature."""
        network = self.dinov2 if feature == "dinov2" else self.inception
        assert network is not None
        return network.sha256


@dataclass(frozen=True)
class Wanted:
    """What to take from a pass.

    Attributes:
        moments: Features whose mean and covariance are wanted.
        score: Whether the Inception Score is.
        features: The file for the pooled features, if they are.
    """

    moments: frozenset[str] = frozenset()
    score: bool = False
    features: FeatureFile | None = None

    @property
    def nothing(self) -> bool:
        """Whether the pass can be left out."""
        return not (self.moments or self.score or self.features)

    def restrict(self, networks: Networks) -> Networks:
        """Return the networks that have to run."""
        inception = self.score or self.features is not None or self.moments - {"dinov2"}
        return Networks(
            networks.inception if inception else None,
            networks.dinov2 if "dinov2" in self.moments else None,
        )


class Collected:
    """Sums over images, of one process or of all.

    Args:
        wanted: What to sum.
        dimension: Length of a feature, by its name.
    """

    def __init__(self, wanted: Wanted, dimension: Callable[[str], int]) -> None:
        self.moments = {name: FeatureStatistics(dimension(name)) for name in wanted.moments}
        self.score = InceptionScore() if wanted.score else None
        self.features = wanted.features
        self.count = 0

    def update(self, first: int, outputs: dict[str, Tensor]) -> None:
        """Add the features of the images from number ``first`` on."""
        for name, statistics in self.moments.items():
            statistics.update(outputs[name])
        if self.score is not None:
            self.score.update(first, outputs["logits"])
        if self.features is not None:
            self.features.write(first, outputs["pool"])
        self.count += len(next(iter(outputs.values())))

    def merge(self, other: "Collected") -> None:
        """Add the sums of another process."""
        for name, statistics in other.moments.items():
            self.moments[name].merge(statistics)
        if self.score is not None and other.score is not None:
            self.score.merge(other.score)
        self.count += other.count


def extract(
    source: ImageSource,
    wanted: Wanted,
    networks: Networks,
    processes: Processes,
    batch_size: int,
    title: str = "",
) -> Collected:
    """Collect what is wanted over all images, each of which one process sees once.

    Processes take contiguous runs of the batches that a single one would see, so that features, and
    sums up to their rounding, do not depend on the number of processes. Every process gets the sums
    of all.

    Args:
        source: The images.
        wanted: What to take from them.
        networks: On this process's device.
        processes: Those that call this together.
        batch_size: Images at a time.
        title: Shown beside the progress of process zero; none is shown without it.

    Raises:
        ValueError: Damaged images, here or in another process, or features that are not finite.
        OSError: Files that cannot be read or written.
    """
    start, stop = _share(len(source), batch_size, processes)
    running = wanted.restrict(networks)

    def collect() -> Collected:
        collected = Collected(wanted, networks.dimension)
        batches = source.batches(start, stop, batch_size)
        shown = bool(title) and processes.is_zero
        shown_batches = _progress(batches, stop - start, title, shown)
        outputs = (running.outputs(images.to(processes.device)) for images in shown_batches)
        for several in _grouped(outputs):
            collected.update(start + collected.count, several)
        return collected

    first, *others = processes.together(collect)
    for other in others:
        first.merge(other)
    assert first.count == len(source)
    return first


def _share(count: int, batch_size: int, processes: Processes) -> tuple[int, int]:
    """Return the range of images of this process, which begins where a batch does."""
    batches = math.ceil(count / batch_size)
    ends = [batches * rank // processes.world_size for rank in (processes.rank, processes.rank + 1)]
    start, stop = (min(end * batch_size, count) for end in ends)
    return start, stop


def _grouped(outputs: Iterable[dict[str, Tensor]]) -> Iterator[dict[str, Tensor]]:
    """Yield the features of several batches together, since a covariance costs per update."""
    held: list[dict[str, Tensor]] = []
    rows = 0
    for found in outputs:
        held.append({name: value.cpu() for name, value in found.items()})
        rows += len(next(iter(found.values())))
        if rows >= _UPDATE_ROWS:
            yield {name: torch.cat([part[name] for part in held]) for name in found}
            held, rows = [], 0
    if held:
        yield {name: torch.cat([part[name] for part in held]) for name in held[0]}


def _progress(batches: Iterable[Tensor], count: int, title: str, shown: bool) -> Iterable[Tensor]:
    """Yield the batches under a bar that counts this process's images and says how long to go."""
    with tqdm(total=count, desc=title, unit="img", disable=not shown) as bar:
        for images in batches:
            yield images
            bar.update(len(images))
