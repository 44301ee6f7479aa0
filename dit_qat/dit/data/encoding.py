"""Pictures through the autoencoder into shards, by one process."""

from collections.abc import Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from dit_qat.dit.data.cache_job import CacheJob
from dit_qat.dit.data.pictures import BrokenPictureError, image_of, model_space
from dit_qat.dit.data.shards import DTYPES, Shard, shard_name, write_shard
from dit_qat.dit.randomness import generator_for

__all__ = ["encode_shards"]


def encode_shards(
    out: Path, job: CacheJob, shards: list[int], progress: bool = False
) -> dict[int, Shard]:
    """Write the shards of these numbers; return their lines of the index, with ``first`` 0.

    Args:
        out: The folder.
        job: What to encode; on the device of its autoencoder.
        shards: Numbers of the shards.
        progress: Whether to show a bar over these shards' pictures.

    Raises:
        BrokenPictureError: naming a picture that cannot be decoded and is not to be skipped.
        ValueError: if moments are not finite, or the GPU's memory does not hold a batch.
        OSError: if a shard cannot be written, or the file of a picture cannot be read.
    """
    pictures = sum(len(job.shards[number]) for number in shards)
    written = {}
    hidden = not progress or not shards
    with (
        closing(_decoded(job, shards)) as batches,
        tqdm(total=pictures, desc="encoding", unit="image", disable=hidden) as bar,
    ):
        for number in shards:
            own = islice(batches, -(-len(job.shards[number]) // job.batch_size))
            moments, kept, broken = _moments(job, number, own, bar)
            labels = torch.zeros(len(kept), dtype=torch.int64)
            if job.pictures.labels is not None:
                labels = job.pictures.labels[kept]
            path = out / shard_name(number)
            written[number] = write_shard(path, moments, labels, job.settings, broken)
    return written


class _Batch(NamedTuple):
    images: Tensor
    kept: list[int]
    broken: list[str]
    unread: str | None = None


class _Batches:
    """Decode pictures, a batch at once: what loader processes run."""

    def __init__(self, job: CacheJob, shards: list[int]) -> None:
        self.pictures, self.size, step = job.pictures, job.size, job.batch_size
        self.parts = [
            job.shards[number][start : start + step]
            for number in shards
            for start in range(0, len(job.shards[number]), step)
        ]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: int) -> _Batch:
        part = self.parts[number]
        images = torch.empty(len(part), 3, self.size, self.size, dtype=torch.uint8)
        kept: list[int] = []
        broken: list[str] = []
        for index in part:
            try:
                images[len(kept)] = image_of(self.pictures, index, self.size)
                kept.append(index)
            # As text: an error from a loader process arrives with its traceback for a message.
            except BrokenPictureError as error:
                broken.append(str(error))
            except OSError as error:
                return _Batch(images[:0], [], [], str(error))
        return _Batch(images[: len(kept)], kept, broken)


def _as_it_is(batch: Any) -> Any:
    return batch


def _decoded(job: CacheJob, shards: list[int]) -> Generator[_Batch, None, None]:
    """Batches of shard after shard; when closed, the loader's processes end at once."""
    items: Dataset[Any] = _Batches(job, shards)  # type: ignore[assignment]
    yield from DataLoader(
        items,
        batch_size=None,
        num_workers=job.num_workers,
        collate_fn=_as_it_is,
        generator=generator_for(0, "loader"),  # else it draws from the global one
    )


def _moments(
    job: CacheJob, number: int, batches: Iterator[_Batch], bar: "tqdm[Any]"
) -> tuple[Tensor, list[int], list[str]]:
    """Moments of a shard, the pictures that they are of, and the broken ones."""
    dtype, shape = DTYPES[job.dtype], job.settings.image_shape
    moments = torch.empty(len(job.shards[number]), *shape, dtype=dtype)
    kept: list[int] = []
    broken: list[str] = []
    for batch in batches:
        if batch.unread is not None:
            raise OSError(batch.unread)
        if batch.broken and not job.skip_broken:
            raise BrokenPictureError(
                f"{batch.broken[0]}; replace the file, or pass --skip_broken true to leave such "
                "pictures out, on record"
            )
        broken += batch.broken
        if batch.kept:
            encoded = _encode(job, batch.images).to(dtype)
            if not encoded.isfinite().all():
                raise ValueError(_not_finite(job, batch))
            moments[len(kept) : len(kept) + len(batch.kept)] = encoded.cpu()
            kept += batch.kept
        bar.update(len(batch.kept) + len(batch.broken))
    return moments[: len(kept)], kept, broken


def _encode(job: CacheJob, images: Tensor) -> Tensor:
    """Both mirrors of images (n, 3, S, S), uint8: moments (n, 2, 2, C, h, w), float32."""
    pixels = model_space(images.to(job.autoencoder.device))
    try:
        pairs = job.autoencoder.encode(torch.cat([pixels, pixels.flip(-1)]))
    except torch.OutOfMemoryError as error:
        raise ValueError(
            f"a batch of {job.batch_size} images in both mirrors does not fit in the memory of "
            f"{job.autoencoder.device}; lower --batch_size"
        ) from error
    mirrors = torch.stack(pairs, dim=1)  # (2n, 2 moments, C, h, w), the mirrored ones last
    return torch.stack(mirrors.chunk(2), dim=1)


def _not_finite(job: CacheJob, batch: _Batch) -> str:
    names = [job.pictures.name(batch.kept[end]) for end in (0, -1)]
    cure = "pass --dtype float32" if job.dtype == "float16" else "check the autoencoder's weights"
    return (
        f"moments of pictures between {names[0]} and {names[1]} are not finite in {job.dtype}; "
        f"{cure}"
    )
