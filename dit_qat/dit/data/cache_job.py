"""What ``dit-qat cache-latents`` is to encode, and how much that is."""

from dataclasses import dataclass
from functools import cached_property

from dit_qat.dit.data.pictures import CROP, Pictures
from dit_qat.dit.data.shards import DTYPES, Settings
from dit_qat.dit.models.autoencoder import Autoencoder

__all__ = ["IMAGENET_IMAGES", "CacheJob", "size_text"]

IMAGENET_IMAGES = 1_281_167
"""Images in the training part of ImageNet (ILSVRC 2012)."""

_LABEL_BYTES = 8


@dataclass(frozen=True)
class CacheJob:
    """What to encode, and how.

    Attributes:
        pictures: The source.
        autoencoder: What encodes; its device is where.
        size: Pixels a side of an image, after the crop.
        batch_size: Images per call of the encoder, each in both mirrors.
        dtype: Of the moments on disk: float16 or float32.
        shard_images: Pictures per shard.
        skip_broken: Leave out pictures that cannot be decoded, on record, rather than stop.
        num_workers: Processes that decode pictures, for each process that encodes.

    Raises:
        ValueError: for a size or a number that is out of its range.
    """

    pictures: Pictures
    autoencoder: Autoencoder
    size: int
    batch_size: int = 32
    dtype: str = "float16"
    shard_images: int = 4096
    skip_broken: bool = False
    num_workers: int = 0

    def __post_init__(self) -> None:
        for name, least in (("batch_size", 1), ("shard_images", 1), ("num_workers", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is none of {', '.join(DTYPES)}")
        self.autoencoder.space.side(self.size)  # before pictures are listed

    @cached_property
    def settings(self) -> Settings:
        """What the shards will say; lists the pictures."""
        return Settings(
            latent_space=self.autoencoder.space,
            image_size=self.size,
            crop=CROP,
            dtype=self.dtype,
            shard_images=self.shard_images,
            source=self.pictures.identity(),
        )

    @cached_property
    def shards(self) -> list[range]:
        """Which pictures each shard holds."""
        count = len(self.pictures)
        starts = range(0, count, self.shard_images)
        return [range(start, min(start + self.shard_images, count)) for start in starts]

    def bytes_of(self, images: int) -> int:
        """On disk, for so many images."""
        return images * (self.settings.image_bytes + _LABEL_BYTES)

    def describe(self) -> str:
        """What will be written, and how large it is."""
        channels, height, width = self.settings.image_shape[2:]
        count = len(self.pictures)
        return (
            f"{count:,} images x 2 mirrors x 2 moments x {channels}x{height}x{width} {self.dtype} "
            f"= {size_text(self.bytes_of(count))} in {len(self.shards)} shards (ImageNet's "
            f"{IMAGENET_IMAGES:,} at this size: {size_text(self.bytes_of(IMAGENET_IMAGES))})"
        )


def size_text(count: int) -> str:
    """Bytes as people read them, in powers of 1000, as disks are sold."""
    value, units = float(count), ["B", "kB", "MB", "GB", "TB"]
    while value >= 1000 and len(units) > 1:
        value, units = value / 1000, units[1:]
    return f"{value:.1f} {units[0]}"
