"""``dit-qat allocate``: score the layers of a checkpoint, and allocate activation bits by it."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from dit_qat.allocation import BitMap
from dit_qat.cli.output import check_claim, claim
from dit_qat.dit.data import Digits, Latents, StepData
from dit_qat.dit.evaluation.kept_scores import ScoreSettings, kept_files, score_layers
from dit_qat.dit.evaluation.sensitivity import Score, quantized_linears
from dit_qat.dit.methods import AMPN, AMPNConfig
from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.processes import pick_device
from dit_qat.dit.training.allocation import (
    BIT_MAP,
    PICTURE,
    allocate_by,
    first_images,
    write_bit_map,
)
from dit_qat.dit.training.loading import load_checkpoint, read_checkpoint
from dit_qat.export.files import locked, write_json

__all__ = ["RESULTS", "allocate"]

RESULTS = (BIT_MAP, PICTURE, "metrics.json")
"""What the command leaves in its folder."""


def allocate(
    checkpoint: Path,
    out: Path,
    average_bits: float = 2.0,
    choices: list[int] | None = None,
    bounds: dict[str, int | tuple[int, int]] | None = None,
    score: Score = "output",
    reference: str | None = None,
    data: str = "digits",
    images: int = 32,
    timesteps: int = 8,
    weights: Literal["current", "ema"] = "current",
    seed: int = 0,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Score every block linear of a checkpoint at every choice of activation bits, and allocate.

    Writes bit_map.json, for method.init_args.bit_map of AMPN in a training configuration, and
    bit_map.png. After a kill the same command goes on with the layers that are left.

    Args:
        checkpoint: A .ckpt of dit-qat fit with quantized activations, some steps into its training.
        out: Folder for the results.
        average_bits: Largest allowed mean of bits, weighted by the layers' weights.
        choices: Bits that a layer can get; by default 1 2 3 4.
        bounds: Fixed bits, or [least, most], by glob over layer names; the last match wins.
        score: output: the error of the model's output, one layer changed at a time;
            local_gradient: an estimate of it from one backward pass.
        reference: Float weights whose output is taken as true, such as digits or a .pt; by default
            the checkpoint's own network with all these layers at the highest choice.
        data: digits, or a folder of cache-latents.
        images: Images to score with: the first training images of a run of that seed.
        timesteps: Timesteps at which each of them is noised.
        weights: Those that the optimizer was at, or their average.
        seed: Of images and noise.
        device: auto, cpu, cuda or cuda:1.
        overwrite: Replace the results in the folder.

    Raises:
        ValueError: for a checkpoint without quantized activations, a reference or data of another
            shape, or a budget that cannot be met.
        OSError: if a file is not found, or the folder holds results.
    """
    check_claim(out, RESULTS, overwrite)
    config = AMPNConfig(
        average_bits=average_bits,
        choices=tuple(choices or (1, 2, 3, 4)),
        bounds=bounds or {},
        score=score,
        score_images=images,
        score_timesteps=timesteps,
    )
    subject = _open(checkpoint, weights, AMPN(config), pick_device(device))
    truth = None if reference is None else _reference(reference, subject.network)
    source = _data(data, subject.network, seed)
    with locked(out):
        claim(out, RESULTS, overwrite)
        _run(subject, truth, source, seed, out)


@dataclass(frozen=True)
class _Subject:
    """What is scored."""

    checkpoint: Path
    network: DiT
    step: int
    method: AMPN
    device: torch.device


def _open(
    checkpoint: Path, weights: Literal["current", "ema"], method: AMPN, device: torch.device
) -> _Subject:
    """The network of a checkpoint; a budget that its layers cannot meet is refused."""
    network = load_checkpoint(checkpoint, weights, device).network
    step = int(read_checkpoint(checkpoint)["global_step"])
    nothing = [0.0] * len(method.config.choices)
    layers = quantized_linears(network, method.layers)
    allocate_by(method, network, dict.fromkeys(layers, nothing), step)
    return _Subject(checkpoint, network, step, method, device)


def _run(subject: _Subject, truth: DiT | None, source: StepData, seed: int, out: Path) -> None:
    """Score, allocate, write and print."""
    started = time.perf_counter()
    network, config = subject.network, subject.method.config
    images, labels = first_images(source, config.score_images, seed)
    rows = score_layers(
        network,
        images,
        labels if network.num_classes else None,
        [*quantized_linears(network, subject.method.layers)],
        ScoreSettings(config.choices, config.score, config.score_timesteps, seed),
        out,
        reference=None if truth is None else truth.to(subject.device),
        progress=True,
        say=tqdm.write,
    )
    found = allocate_by(subject.method, network, rows, subject.step)
    write_bit_map(out, found)
    origin = {"checkpoint": str(subject.checkpoint), "seconds": time.perf_counter() - started}
    write_json(out / "metrics.json", _metrics(found) | origin)
    for path in kept_files(out):
        path.unlink()
    _print(found, out)


def _reference(source: str, network: DiT) -> DiT:
    """The float network; refused if it takes other inputs than the checkpoint's."""
    loaded = load_dit(source).eval()
    parts = ("input_size", "in_channels", "num_classes")
    theirs, ours = ({part: net.config[part] for part in parts} for net in (loaded, network))
    if theirs != ours:
        raise ValueError(
            f"--reference {source} takes {theirs}, the checkpoint {ours}; give the float weights "
            "that the checkpoint's training started from"
        )
    return loaded


def _data(source: str, network: DiT, seed: int) -> StepData:
    data: StepData = Digits(1) if source == "digits" else Latents(source, 1, seed=seed)
    data.check_network(network)
    return data


def _metrics(found: BitMap) -> dict[str, Any]:
    chosen = [row[found.choices.index(b)] for row, b in zip(found.scores, found.bits, strict=True)]
    return {
        "average_bits": found.average_bits,
        "average_asked": found.average_asked,
        "mean_by_type": found.mean_by_type,
        "score": found.score,
        "summed_score": sum(chosen),
        "summed_score_uniform": {
            str(b): sum(row[column] for row in found.scores)
            for column, b in enumerate(found.choices)
        },
    }


def _print(found: BitMap, out: Path) -> None:
    width = max(map(len, found.mean_by_type))
    print(f"{'layers':<{width}}  mean bits  " + "  ".join(f"{b} bits" for b in found.choices))
    for kind, mean in found.mean_by_type.items():
        own = [b for name, b in found.by_layer.items() if name.endswith(kind)]
        counts = "  ".join(f"{own.count(b):>6}" for b in found.choices)
        print(f"{kind:<{width}}  {mean:>9.3f}  {counts}")
    print(
        f"\n{found.average_bits:.4f} bits on average by weights ({found.average_asked:g} allowed), "
        f"step {found.step}, score {found.score}\n{out / BIT_MAP}"
    )
