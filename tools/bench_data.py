"""Latents per second from shards on disk, against the same data in memory.

    python tools/bench_data.py [--images 8192] [--batches 40] [--out results.json]

All pass through the same loader and the same order. "shards" reads a synthetic cache (4x32x32
float16 moments, as of 256-pixel images) from the page cache; "moments" draws the same latents from
one tensor of the same moments; "latents" gathers rows of one tensor of latents that were drawn
before, which no noise is drawn for: what a loader could reach at most.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dit_qat.dit.data.latents import Latents
from dit_qat.dit.data.sampler import Draw, StepBatchSampler
from dit_qat.dit.data.shards import Index, Settings, shard_name, write_index, write_shard
from dit_qat.dit.models.autoencoder import LatentSpace
from dit_qat.dit.randomness import generator_for

_SPACE = LatentSpace("synthetic", "0" * 64, 0.18215, 0.0, 4, 8)
_SHARD, _WARM_UP = 1024, 8


class MemoryCache:
    """What a LatentCache holds, as one tensor."""

    space = _SPACE

    def __init__(self, moments: Tensor, labels: Tensor) -> None:
        self._moments, self.labels = moments, labels

    def __len__(self) -> int:
        return len(self.labels)

    def moments(self, indices: Sequence[int], mirrors: Sequence[int]) -> Tensor:
        return self._moments[list(indices), list(mirrors)].to(torch.float32)


class MemoryLatents:
    """Latents that were drawn before."""

    def __init__(self, latents: Tensor, labels: Tensor) -> None:
        self.latents, self.labels = latents, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        return self.latents[draw.indices], self.labels[draw.indices]


def make_cache(root: Path, images: int) -> MemoryCache:
    source = {"kind": "synthetic", "num_images": images, "num_classes": 1000, "sha256": ""}
    settings = Settings(_SPACE, 256, "adm-center", "float16", _SHARD, source)
    parts, shards = [], []
    for number, first in enumerate(range(0, images, _SHARD)):
        generator = generator_for(0, "bench", number)
        count = min(_SHARD, images - first)
        moments = torch.randn(count, *settings.image_shape, generator=generator).half()
        labels = torch.randint(0, 1000, (count,), generator=generator)
        shard = write_shard(root / shard_name(number), moments, labels, settings, [])
        shards.append(shard)
        parts.append((moments, labels))
    write_index(root, Index(settings, tuple(shards)))
    return MemoryCache(*(torch.cat(column) for column in zip(*parts, strict=True)))


def rate(data: Latents, dataset: object, workers: int, batches: int) -> float:
    """Latents per second, workers' start left out."""
    data.num_workers = workers
    total = _WARM_UP + batches
    sampler = StepBatchSampler(len(dataset), data.batch_size, seed=0, start=0, stop=total)
    for number, _ in enumerate(data._loader(dataset, sampler, seed=0), start=1):
        if number == _WARM_UP:
            started = time.perf_counter()
    return batches * data.batch_size / (time.perf_counter() - started)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--images", type=int, default=8192)
    parser.add_argument("--batch_size", type=int, default=256)
    parser.add_argument("--batches", type=int, default=40)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        memory = make_cache(Path(folder), options.images)
        data = Latents(folder, options.batch_size, seed=0)
        in_memory = Latents(folder, options.batch_size, seed=0)
        in_memory.__dict__["cache"] = memory
        latents = torch.randn(options.images, 4, 32, 32, generator=generator_for(0, "latents"))
        datasets = {
            "shards": data.train_dataset(),
            "moments": in_memory.train_dataset(),
            "latents": MemoryLatents(latents, memory.labels),
        }
        results = {}
        for workers in (0, 2):
            rates = {name: [] for name in datasets}
            for _ in range(options.repeats):  # in turn, for others may use the machine
                for name, dataset in datasets.items():
                    rates[name].append(rate(data, dataset, workers, options.batches))
            found = {name: statistics.median(values) for name, values in rates.items()}
            for name in ("moments", "latents"):
                ratios = [a / b for a, b in zip(rates["shards"], rates[name], strict=True)]
                found[f"shards / {name}"] = statistics.median(ratios)
            results[f"{workers} workers"] = found
    for workers, found in results.items():
        shown = ", ".join(
            f"{k} {v:.2f}" if "/" in k else f"{k} {v:,.0f}/s" for k, v in found.items()
        )
        print(f"{workers}: {shown}")
    if options.out is not None:
        options.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
