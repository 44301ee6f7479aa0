"""The folder of a sampling run: what is in it, what is missing, what is left at the end."""

import json
import logging
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor

from dit_qat.dit.evaluation.images import image_grid, save_images, save_png
from dit_qat.dit.sampling.job import SamplingJob
from dit_qat.dit.sampling.record import (
    METRICS,
    RECORD,
    check_record,
    claim_record,
    differences,
)
from dit_qat.dit.sampling.sampler import sample_images
from dit_qat.export.files import locked, write_json

__all__ = ["Drawn", "SamplingFolder"]

_LOG = logging.getLogger(__name__)

_GRID_IMAGES, _GRID_COLUMNS, _GRID_CELL = 100, 10, 32


@dataclass(frozen=True)
class Drawn:
    """What a call of :func:`draw_into` did.

    Attributes:
        found: Images that were there already.
        drawn: Images drawn, by all processes together.
        seconds: For drawing and writing them.
    """

    found: int
    drawn: int
    seconds: float


class SamplingFolder:
    """A folder and the job whose results it holds, some of them perhaps already.

    Args:
        out: The folder; it need not exist.
        job: What to draw.
        record: What fixes the bytes, in plain JSON types.
    """

    def __init__(self, out: Path, job: SamplingJob, record: Mapping[str, Any]) -> None:
        self.out, self.job, self.record = out, job, record
        self.store = job.store(out)
        self.packed = None if job.packed is None else out / job.packed

    def claim(self, held: ExitStack, overwrite: bool) -> list[int] | None:
        """Take the folder; return the first indices of the shards to draw, None at the end."""
        check_record(self.out, self.record, overwrite)
        held.enter_context(locked(self.out))
        continues = claim_record(self.out, self.record, overwrite)
        if continues and self._is_finished():
            self._tidy()  # which a kill may have kept it from
            return None
        missing = [first for first in self.store.firsts if not self._restore(first)]
        self._check_space(missing)
        return missing

    def draw(self, firsts: list[int], progress: bool) -> None:
        """Draw these shards, each on disk before the next one begins."""
        job, indices = self.job, [i for first in firsts for i in self.store.rows(first)]
        batches = sample_images(job.network, job.sampler, indices, job.label_of, progress)
        try:
            for rows, drawn in batches:
                array = job.rows(drawn)
                self._check_ours()
                with self._writing():
                    self.store.write(rows[0], array)
                    self._write_pngs(rows, array)
        except torch.OutOfMemoryError as error:
            raise ValueError(
                "the GPU's memory does not hold a batch; with --overwrite true, lower "
                f"--sampler.batch_size (now {job.sampler.batch_size}) or --decode_batch_size (now "
                f"{job.decode_batch_size}): {error}"
            ) from error

    def finish(self, result: Drawn, processes: int) -> None:
        """Write what is made of all shards, and remove them if they are no longer needed."""
        label_of = self.job.label_of
        speed = {
            "seconds": result.seconds,
            "images_drawn": result.drawn,
            "images_per_second": result.drawn / result.seconds,
            "processes": processes,
        }
        labels = None if label_of is None else [label_of(i) for i in range(self.job.num)]
        with self._writing():
            if self.packed is not None:
                self.store.assemble(self.packed)
            if not self.job.latents:
                self._save_grid()
            write_json(self.out / METRICS, {**speed, **self.record, "labels": labels})
            self._tidy()

    def _is_finished(self) -> bool:
        if not (self.out / METRICS).is_file():
            return False
        if self.packed is not None and not self.packed.is_file():
            return False
        if self.job.pictures and not all(map(self._has_png, range(self.job.num))):
            return False
        return not self._keeps_shards or all(
            self.store.find(f) is not None for f in self.store.firsts
        )

    @property
    def _keeps_shards(self) -> bool:
        return self.packed is None and not self.job.pictures

    def _tidy(self) -> None:
        if not self._keeps_shards and self.store.folder.exists():
            shutil.rmtree(self.store.folder)

    def _restore(self, first: int) -> bool:
        """Whether a shard is there and sound; its pictures are then completed from it."""
        array = self.store.find(first)
        if array is None:
            if self.store.path(first).exists():
                _LOG.warning("%s is damaged and is drawn again", self.store.path(first))
            return False
        rows = self.store.rows(first)
        if not all(map(self._has_png, rows)):
            self._write_pngs(rows, array)
        return True

    def _has_png(self, index: int) -> bool:
        return not self.job.pictures or (self.out / "images" / f"{index:06d}.png").is_file()

    def _write_pngs(self, rows: Iterable[int], array: npt.NDArray[Any]) -> None:
        if self.job.pictures:
            save_images(self.out / "images", _channels_first(array), rows)

    def _save_grid(self) -> None:
        shown = _channels_first(self.store.head(_GRID_IMAGES))
        scale = max(1, _GRID_CELL // shown.shape[-1])
        grid = image_grid(shown, min(_GRID_COLUMNS, len(shown)), scale)
        save_png(self.out / "grid.png", grid)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise OSError(
                f"could not write to {self.out} ({error}); what is finished stays: mend the cause, "
                "such as a full disk, and repeat the command to go on"
            ) from error

    def _check_ours(self) -> None:
        """Stop a process that outlived its run before it writes into that of another."""
        try:
            current = json.loads((self.out / RECORD).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            current = None
        if differences(current, self.record, "there", "here"):
            raise ValueError(f"{self.out / RECORD} has changed: another run took the folder over")

    def _check_space(self, missing: list[int]) -> None:
        rows = sum(len(self.store.rows(first)) for first in missing)
        rows += self.job.num if self.packed is not None else 0
        needed, free = rows * self.store.row_bytes, shutil.disk_usage(self.out).free
        if needed > free:
            raise OSError(
                f"{self.out} needs at least {needed / 1e9:.2f} GB more and {free / 1e9:.2f} GB are "
                "free; make room or choose an --out elsewhere"
            )


def _channels_first(array: npt.NDArray[Any]) -> Tensor:
    return torch.from_numpy(array).permute(0, 3, 1, 2)
