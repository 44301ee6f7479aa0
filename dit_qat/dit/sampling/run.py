"""Many images into a folder: shared among processes, written as they come, continued after a kill.

Compute batch k of the index grid is one shard, and process k mod their number draws it. A shard is
whole or absent, so that whoever comes next draws what is missing and nothing else.
"""

import json
import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, TypeVar

import torch

from dit_qat.dit.processes import Processes
from dit_qat.dit.sampling.folder import Drawn, SamplingFolder
from dit_qat.dit.sampling.job import SamplingJob
from dit_qat.dit.sampling.record import differences, environment

__all__ = ["Drawn", "SamplingJob", "draw_into"]

_LOG = logging.getLogger(__name__)

T = TypeVar("T")


def draw_into(
    out: Path,
    job: SamplingJob,
    origin: Mapping[str, Any],
    processes: Processes,
    overwrite: bool = False,
    progress: bool = False,
) -> Drawn:
    """Draw the images of a job into a folder, or go on with those that are there.

    Every process of ``processes`` calls this with the same job; all must see the same folder.
    Leaves the images, ``grid.png``, ``sampling.json`` (a record of what fixes the bytes: origin,
    job, hardware and versions) and ``metrics.json`` (the record, the labels and the speed); shards
    stay only where nothing else holds the rows.

    Args:
        out: The folder.
        job: What to draw; its networks are moved to the process's device.
        origin: Where the weights and the labels came from, to be written into the record.
        processes: The processes that share the work.
        overwrite: Begin anew, replacing the results in the folder.
        progress: Whether process zero shows a bar over its model calls.

    Raises:
        FileExistsError: if the folder holds results of other settings.
        BlockingIOError: if another run is writing to it.
        OSError: if it cannot be written; the shards that are finished stay.
        ValueError: if the processes differ in hardware or weights, if the network draws NaN, or if
            the GPU's memory does not hold a batch.
    """
    with ExitStack() as held:
        held.enter_context(_fixed_threads(processes.device, job.threads))
        # As it will be read back: JSON turns tuples into lists.
        whole = {**origin, **job.record(), **environment(processes.device)}
        record = json.loads(json.dumps(whole))
        _check_same(processes.together(lambda: record))
        folder = SamplingFolder(out, job.moved(processes.device), record)
        zero = processes.is_zero
        claimed = processes.together(lambda: folder.claim(held, overwrite) if zero else None)
        missing = claimed[0]
        if missing is None:
            return Drawn(job.num, 0, 0.0)
        started = time.perf_counter()
        mine = missing[processes.rank :: processes.world_size]
        processes.together(lambda: folder.draw(mine, progress and zero))
        drawn = sum(len(folder.store.rows(first)) for first in missing)
        result = Drawn(job.num - drawn, drawn, time.perf_counter() - started)
        if zero:
            folder.finish(result, processes.world_size)
        return result


def _check_same(records: list[dict[str, Any]]) -> None:
    for rank, other in enumerate(records):
        differing = differences(records[0], other, "process 0", f"process {rank}")
        if differing:
            raise ValueError(
                f"the processes would draw different images ({differing}); give all the same files "
                "and the same kind of hardware"
            )


@contextmanager
def _fixed_threads(device: torch.device, threads: int) -> Iterator[None]:
    """Compute on so many CPU threads; sums are split, and so rounded, by their number."""
    before = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
