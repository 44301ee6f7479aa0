"""Cost of evaluation after feature extraction, against torch-fidelity, and its memory.

FID of synthetic features (50,000 x 2,048 by default, rectified and correlated): seconds to
accumulate them batch by batch and for the distance, and the same by torch-fidelity, which needs
them all at once. Then all metrics on synthetic images of two numbers, each in a process of its own
with a stand-in network, for the peak of its memory.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dit_qat.dit.evaluation import FeatureStatistics, frechet_distance
from dit_qat.dit.evaluation.extraction import Networks
from dit_qat.dit.evaluation.inception import Activations
from dit_qat.dit.evaluation.references import open_reference
from dit_qat.dit.evaluation.scoring import METRICS, Comparison
from dit_qat.dit.evaluation.sources import open_images
from dit_qat.dit.processes import Processes
from dit_qat.dit.sampling import Column, write_npz

DIMENSION, LATENT = 2048, 512
BATCH = 64
UPDATE = 1024  # rows per update of the covariance, as the command does it
REFERENCE_IMAGES = 4000


def features(count: int, seed: int, shift: float = 0.0) -> Tensor:
    """Rectified mixtures of a few hundred factors, about as correlated as Inception's."""
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(LATENT, DIMENSION, generator=torch.Generator().manual_seed(0)) / 16
    parts = [
        (torch.randn(n, LATENT, generator=generator) @ mixing + shift).relu() * 0.4
        for n in [5000] * (count // 5000) + [count % 5000]
    ]
    return torch.cat(parts)


def timed(action: Callable[[], Any]) -> tuple[Any, float]:
    start = perf_counter()
    result = action()
    return result, perf_counter() - start


def accumulate(values: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(DIMENSION)
    for batch in values.split(UPDATE):
        statistics.update(batch)
    return statistics


def measure_fid(count: int) -> dict[str, Any]:
    """Both sides of a FID on the same features, ours and torch-fidelity's."""
    generated, real = features(count, 1, 0.05), features(count, 2)
    ours, accumulation = timed(lambda: accumulate(generated))
    reference = accumulate(real)
    distance, seconds = timed(lambda: frechet_distance(ours, reference))
    theirs, their_accumulation = timed(lambda: fid_features_to_statistics(generated))
    their_reference = fid_features_to_statistics(real)
    result, their_seconds = timed(
        lambda: fid_statistics_to_metric(theirs, their_reference, verbose=False)
    )
    value = result["frechet_inception_distance"]
    return {
        "features": [count, DIMENSION],
        "rows_per_update": UPDATE,
        "seconds": {"accumulation": accumulation, "distance": seconds},
        "torch_fidelity_seconds": {"accumulation": their_accumulation, "distance": their_seconds},
        "ratio": (accumulation + seconds) / (their_accumulation + their_seconds),
        "fid": distance,
        "torch_fidelity_fid": value,
        "difference": abs(distance - value),
    }


class StandIn(nn.Module):
    """A projection with the outputs of Inception."""

    num_features, num_spatial, sha256 = DIMENSION, 2023, "0" * 64

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = torch.randn(3 * 8 * 8, DIMENSION + 2023 + 1008, generator=generator) / 8

    def activations(self, images: Tensor) -> Activations:
        outputs = (images.flatten(1).float() / 64 - 2) @ self.weight
        return Activations(*outputs.split([DIMENSION, 2023, 1008], dim=1))


def save_noise(path: Path, count: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    pieces = (
        generator.integers(256, size=(min(1000, count - first), 8, 8, 3), dtype=np.uint8)
        for first in range(0, count, 1000)
    )
    write_npz(path, {"arr_0": Column((count, 8, 8, 3), "uint8", pieces)})


def score(folder: Path, count: int) -> dict[str, Any]:
    """All metrics but FD-DINOv2 on ``count`` images; what a child process runs."""
    samples = folder / f"{count}.npz"
    save_noise(samples, count, 1)
    save_noise(folder / "real.npz", REFERENCE_IMAGES, 2)
    metrics = [metric for metric in METRICS if metric != "fd_dinov2"]
    networks = Networks(StandIn())  # type: ignore[arg-type]
    reference = open_reference(folder / "real.npz")
    comparison = Comparison(open_images(samples), metrics, networks, reference, BATCH)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    _, seconds = timed(lambda: comparison.run(Processes(0, 1, torch.device("cpu")), folder))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    features_mb = count * DIMENSION * 4 / 2**20
    return {
        "images": count,
        "seconds": seconds,
        "peak_mb": peak / 1024,
        "before_mb": before / 1024,
        "features_mb": features_mb,
    }


def measure_memory(counts: list[int], threads: int) -> dict[str, Any]:
    runs = []
    for count in counts:
        with tempfile.TemporaryDirectory() as folder:
            command = [sys.executable, __file__, "--child", str(count), "--folder", folder]
            command += ["--threads", str(threads)]
            finished = subprocess.run(command, check=True, capture_output=True, text=True)
        runs.append(json.loads(finished.stdout.splitlines()[-1]))
    growth = runs[-1]["peak_mb"] - runs[0]["peak_mb"]
    more = runs[-1]["features_mb"] - runs[0]["features_mb"]
    return {"runs": runs, "growth_mb": growth, "growth_of_features_mb": more}


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=50_000, help="feature vectors on each side")
    parser.add_argument("--memory", type=int, nargs="*", default=[5_000, 20_000], help="images")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="write the measurements to this JSON file")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    args = parse()
    torch.set_num_threads(args.threads)
    if args.child:
        print(json.dumps(score(args.folder, args.child)))
        return
    settings = {"torch": torch.__version__, "threads": args.threads, "load": os.getloadavg()}
    memory = measure_memory(args.memory, args.threads) if args.memory else None
    fid = measure_fid(args.count)
    report = {**settings, "fid": fid, "memory": memory}
    print(json.dumps(report, indent=2))
    if args.out:
        args.out.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
