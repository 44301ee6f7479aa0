"""Latents drawn from a cache of moments."""

import warnings
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dit_qat.dit.data.fit import check_labels, check_shape, fixed_choice
from dit_qat.dit.data.module import StepData
from dit_qat.dit.data.sampler import Draw
from dit_qat.dit.data.shards import DTYPES, DamagedShardError, Index, ShardFile, read_index
from dit_qat.dit.models import DiT
from dit_qat.dit.models.autoencoder import LatentSpace
from dit_qat.dit.randomness import derive_seed, generator_for

__all__ = ["LatentCache", "Latents"]

_GROUP = 16  # places in the run that share a random generator, whose start costs half an image


class LatentCache:
    """The moments on disk, one image after another over all shards.

    Args:
        root: Folder of ``dit-qat cache-latents``.
        skip_damaged: Leave out shards that are damaged or missing, with a warning.
        verify: Read every shard and compare its checksum; else sizes and headers only.

    Attributes:
        index: What the folder holds.
        labels: (N,), int64.

    Raises:
        FileNotFoundError: if there is no index.
        DamagedShardError: naming a damaged or missing shard, unless they are skipped.
        ValueError: if the index cannot be read, or no shard is left.
    """

    def __init__(self, root: Path, skip_damaged: bool = False, verify: bool = False) -> None:
        self.root = root
        self.index: Index = read_index(root)
        self._shards: list[ShardFile] = []
        for listed in self.index.shards:
            try:
                shard = ShardFile(root / listed.name)
                shard.check(listed, self.index.settings, verify)
                self._shards.append(shard)
            except DamagedShardError as error:
                if not skip_damaged:
                    raise DamagedShardError(
                        f"{error}, or leave it out: skip_damaged=true"
                    ) from error
                warnings.warn(
                    f"{error}. Its {listed.count} of {self.index.num_images} images are left out",
                    stacklevel=2,
                )
        self._starts = [0, *accumulate(shard.count for shard in self._shards)]
        if not len(self):
            raise ValueError(f"{root}: no image is left in it; cache again")
        self.labels = torch.cat([shard.labels for shard in self._shards])

    def __len__(self) -> int:
        return self._starts[-1]

    @property
    def space(self) -> LatentSpace:
        """The autoencoder that the moments come from."""
        return self.index.settings.latent_space

    def moments(self, indices: Sequence[int], mirrors: Sequence[int]) -> Tensor:
        """Moments (n, 2, C, h, w) of images, float32: mean and log-variance.

        Args:
            indices: Of the images.
            mirrors: For each image, 0: as it is, 1: flipped from left to right.
        """
        settings = self.index.settings
        rows = torch.empty(len(indices), *settings.image_shape[1:], dtype=DTYPES[settings.dtype])
        filled = rows.numpy()
        for row in np.argsort(indices).tolist():  # in the order of the disk
            index = indices[row]
            shard = bisect_right(self._starts, index) - 1
            filled[row] = self._shards[shard].moments[index - self._starts[shard], mirrors[row]]
        return rows.to(torch.float32)


class _Drawn:
    """Training: a draw of the posterior of one mirror, by the image's place in the run."""

    def __init__(self, cache: LatentCache, seed: int) -> None:
        self.cache, self.seed = cache, seed

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        count, first = len(draw.indices), draw.position
        places = range(first, first + count)
        mirrors = [derive_seed(self.seed, "mirror", place) % 2 for place in places]
        mean, log_variance = self.cache.moments(draw.indices, mirrors).unbind(1)
        # In place: to fill new memory takes as long as the arithmetic.
        latents = _noise(self.seed, first, mean.shape).mul_(log_variance.mul_(0.5).exp_())
        latents.add_(mean)
        return self.cache.space.scale_(latents), self.cache.labels[draw.indices]


def _noise(seed: int, first: int, shape: torch.Size) -> Tensor:
    """Normal numbers for the images from place ``first`` on, drawn by aligned groups of places."""
    start, stop = first // _GROUP, -(-(first + shape[0]) // _GROUP)
    noise = torch.empty((stop - start) * _GROUP, *shape[1:])
    for group, part in enumerate(torch.split(noise, _GROUP), start):
        part.normal_(generator=generator_for(seed, "moments", group))
    return noise[first - start * _GROUP :][: shape[0]]


class _Means:
    """Validation: the posterior's mean of images as they are."""

    def __init__(self, cache: LatentCache, chosen: list[int]) -> None:
        self.cache, self.chosen = cache, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        indices = [self.chosen[index] for index in draw.indices]
        means = self.cache.moments(indices, [0] * len(indices))[:, 0]
        return self.cache.space.scale_(means), self.cache.labels[indices]


class Latents(StepData):
    """Serve latents of a cache that ``dit-qat cache-latents`` wrote.

    In training, an image's latent is ``(mean + exp(log-variance / 2) noise - shift) * scaling`` of
    the picture or of its mirror image. Noise and mirror depend on the seed and on the image's
    place in the run, not on processes or workers. Validation takes the scaled mean, unmirrored, of
    ``validation_images`` images in a fixed order: of ``val_root``, or, without it, of the training
    data themselves, which are then not held out.

    Args:
        root: Folder of the cache.
        batch_size: Images per optimizer step, over all processes and accumulated micro-batches.
        val_root: Folder of a cache of other images, of the same autoencoder and size.
        validation_images: How many images to validate on at most; 0 for no validation.
        skip_damaged: Leave out shards that are damaged or missing, with a warning.
        verify: Compare the checksums of all shards first, which reads them whole.
        seed: Of order, noise and mirrors; by default the ``seed`` of the module in training.
        num_workers: Loader processes of each training process.

    Raises:
        ValueError: for a number that is out of its range; when opened, as :class:`LatentCache`.
    """

    def __init__(
        self,
        root: str,
        batch_size: int = 256,
        val_root: str | None = None,
        validation_images: int = 1024,
        skip_damaged: bool = False,
        verify: bool = False,
        seed: int | None = None,
        num_workers: int = 0,
    ) -> None:
        super().__init__(batch_size, seed, num_workers)
        if validation_images < 0:
            raise ValueError(f"validation_images={validation_images} must not be negative")
        self.root, self.val_root = Path(root), None if val_root is None else Path(val_root)
        self.validation_images = validation_images
        self.skip_damaged, self.verify = skip_damaged, verify

    @cached_property
    def cache(self) -> LatentCache:
        """The training images, opened when first asked for."""
        return LatentCache(self.root, self.skip_damaged, self.verify)

    @cached_property
    def val_cache(self) -> LatentCache:
        """The images to validate on; raises ValueError for another autoencoder or size."""
        if self.val_root is None:
            return self.cache
        cache = LatentCache(self.val_root, self.skip_damaged, self.verify)
        differing = _differences(_compared(self.cache), _compared(cache))
        if differing:
            raise ValueError(
                f"{self.val_root} was cached with another autoencoder or size than {self.root} "
                f"({differing}); cache both with the same"
            )
        return cache

    def train_dataset(self) -> _Drawn:
        """Latents drawn anew for every place in the run."""
        return _Drawn(self.cache, self.run_seed())

    def validation_dataset(self) -> _Means:
        """Scaled means, the same ones for every run."""
        chosen = fixed_choice(len(self.val_cache), self.validation_images)
        return _Means(self.val_cache, chosen)

    def check_network(self, network: DiT) -> None:
        """Refuse a network of another shape, or whose classes are not those of the labels.

        Raises:
            ValueError: saying which argument of the network to change.
        """
        for cache in (self.cache, self.val_cache):
            what = f"the latents in {cache.root}"
            channels, side, _ = cache.index.settings.image_shape[2:]
            check_shape(network, channels, side, what)
            check_labels(network, cache.labels if cache.index.num_classes else None, what)

    def state_dict(self) -> dict[str, Any]:
        """For the checkpoint: what its latents mean, and which images they are of."""
        return {"latent_space": asdict(self.cache.space), **_content(self.cache)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse to continue with latents of another autoencoder or size.

        Other images are allowed, with a warning: the run then continues with another order.

        Raises:
            ValueError: naming both.
        """
        before = {**state_dict["latent_space"], "image_size": state_dict["image_size"]}
        differing = _differences(before, _compared(self.cache))
        if differing:
            raise ValueError(
                f"the checkpoint was trained on latents of {before['source']}, {self.root} holds "
                f"those of {self.cache.space.source} ({differing}); use the cache of the "
                "interrupted run, or start another run with its weights (model.float_weights)"
            )
        if _content(self.cache) != {name: state_dict[name] for name in _content(self.cache)}:
            warnings.warn(
                f"{self.root} holds other images than those of the interrupted run; it continues "
                "with these, in another order",
                stacklevel=2,
            )


def _content(cache: LatentCache) -> dict[str, Any]:
    settings = cache.index.settings
    return {
        "image_size": settings.image_size,
        "source_sha256": settings.source["sha256"],
        "num_images": len(cache),
    }


def _compared(cache: LatentCache) -> dict[str, Any]:
    return {**asdict(cache.space), "image_size": cache.index.settings.image_size}


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    names = [name for name in now if name != "source" and before.get(name) != now[name]]
    return ", ".join(f"{name} {before.get(name)!r} and {now[name]!r}" for name in names)
