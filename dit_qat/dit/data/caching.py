"""The job that turns pictures into a latent cache: shared among processes, continued after a kill.

Shard k holds the moments of a fixed range of pictures and is written by process k mod their
number. It is whole or absent; the index comes last.
"""

import logging
import shutil
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm

from dit_qat.dit.data.cache_job import CacheJob, size_text
from dit_qat.dit.data.encoding import encode_shards
from dit_qat.dit.data.shards import (
    INDEX,
    DamagedShardError,
    Index,
    Settings,
    Shard,
    ShardFile,
    file_sha256,
    read_index,
    shard_name,
    write_index,
)
from dit_qat.dit.processes import Processes
from dit_qat.export.files import locked

__all__ = ["Cached", "write_cache"]

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Cached:
    """What came of a job.

    Attributes:
        index: The finished cache.
        encoded: Images that were encoded now; the others were there.
        seconds: How long that took.
    """

    index: Index
    encoded: int
    seconds: float


def write_cache(out: Path, job: CacheJob, processes: Processes, progress: bool = False) -> Cached:
    """Write a latent cache, or go on with one that was begun by the same job.

    Every process calls this with the same job, on its own device; all must see the same folder.
    What is there already is checked first, byte for byte where an index has the checksums, and
    damaged shards are written again.

    Args:
        out: The folder.
        job: What to encode.
        processes: The processes that share the work.
        progress: Whether process zero shows bars, with the time that is left.

    Raises:
        BlockingIOError: if another run is writing to the folder.
        ValueError: if the folder holds a cache of other settings, a picture is broken (and not to
            be skipped), moments are not finite, or the GPU's memory does not hold a batch.
        OSError: if there is not enough space; finished shards stay.
    """
    with ExitStack() as held:
        processes.together(lambda: _lock(out, held) if processes.is_zero else None)
        shards = dict(enumerate(job.shards))
        mine = list(shards)[processes.rank :: processes.world_size]
        shown = progress and processes.is_zero
        found = _merged(processes.together(lambda: _check_found(out, job, mine, shown)))
        missing = [number for number in shards if number not in found]
        images = sum(len(shards[number]) for number in missing)
        processes.together(lambda: _prepare(out, job, images) if processes.is_zero else None)
        started = time.perf_counter()
        wanted = [number for number in mine if number not in found]
        written = _merged(processes.together(lambda: encode_shards(out, job, wanted, shown)))
        index = _index(job.settings, found | written)
        if processes.is_zero:
            write_index(out, index)
        processes.barrier()
        encoded = sum(shard.count for shard in written.values())
        return Cached(index, encoded, time.perf_counter() - started)


def _merged(parts: Sequence[dict[int, Shard]]) -> dict[int, Shard]:
    return {number: shard for part in parts for number, shard in part.items()}


def _lock(out: Path, held: ExitStack) -> None:
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"{out} is a file; choose another folder")
    held.enter_context(locked(out))


def _check_found(out: Path, job: CacheJob, mine: list[int], progress: bool) -> dict[int, Shard]:
    """This process's shards that are there and sound.

    Raises:
        ValueError: if any was written with other settings.
    """
    listed = _listed(out, job)
    there = [number for number in mine if (out / shard_name(number)).exists()]
    found = {}
    for number in tqdm(there, "checking shards", disable=not progress or not there, unit="shard"):
        try:
            shard = _sound(out, job, number)
            if listed.get(number, shard.sha256) != shard.sha256:
                raise DamagedShardError(f"{out / shard.name}: its sha256 is not that in the index")
            found[number] = shard
        except DamagedShardError as error:
            _LOG.warning("%s; this run writes it", error)
    return found


def _listed(out: Path, job: CacheJob) -> dict[int, str]:
    """Checksums by shard, from the index of a cache that was complete."""
    try:
        index = read_index(out)
    except FileNotFoundError:
        return {}
    except ValueError as error:
        _LOG.warning("%s; this run writes it", error)
        return {}
    _check_same(out / INDEX, index.settings, job)
    return {number: shard.sha256 for number, shard in enumerate(index.shards)}


def _sound(out: Path, job: CacheJob, number: int) -> Shard:
    path, pictures = out / shard_name(number), job.shards[number]
    file = ShardFile(path)
    _check_same(path, file.settings, job)
    if file.count + len(file.skipped) != len(pictures):
        raise DamagedShardError(f"{path}: {file.count} images of {len(pictures)} pictures")
    return Shard(path.name, 0, file.count, file.bytes, file_sha256(path), file.skipped)


def _check_same(path: Path, settings: Settings, job: CacheJob) -> None:
    differing = settings.differences(job.settings)
    if differing:
        raise ValueError(
            f"{path} was written with {'; '.join(differing)}; use the same options to continue, or "
            "another --out"
        )


def _prepare(out: Path, job: CacheJob, images: int) -> None:
    """Make sure that there is space, and that no index promises what is about to change."""
    needed, free = job.bytes_of(images), shutil.disk_usage(out).free
    if needed > free:
        raise OSError(
            f"{out}: {images:,} images need {size_text(needed)}, but {size_text(free)} are free "
            "there; make room or choose another --out (float16 takes half of float32)"
        )
    if images:
        (out / INDEX).unlink(missing_ok=True)


def _index(settings: Settings, shards: dict[int, Shard]) -> Index:
    first, placed = 0, []
    for number in sorted(shards):
        placed.append(replace(shards[number], first=first))
        first += shards[number].count
    return Index(settings, tuple(placed))
