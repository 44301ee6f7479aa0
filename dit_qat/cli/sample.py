"""``dit-qat sample``: images from a checkpoint or from float weights."""

import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dit_qat.cli.output import GRID_IMAGES, claim, save_grid
from dit_qat.cli.sources import load_network, pick_device
from dit_qat.dit.evaluation import save_images, save_npz
from dit_qat.dit.models import DiT
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.export.files import write_json, written_whole

__all__ = ["RESULTS", "sample"]

RESULTS = ("images", "grid.png", "samples.npz", "latents.npz", "metrics.json")
"""What the command leaves in its folder."""

_DEFAULT_SAMPLER = SamplerConfig()
_PIXEL_CHANNELS = (1, 3)


def sample(
    out: Path,
    checkpoint: Path | None = None,
    weights: str | None = None,
    num: int = 64,
    classes: list[int] | None = None,
    sampler: SamplerConfig = _DEFAULT_SAMPLER,
    npz: bool = False,
    latents: bool = False,
    device: str = "auto",
    overwrite: bool = False,
) -> None:
    """Draw images 0 to num - 1, each a function of its index, the seed and the network alone.

    Writes images/000000.png and so on, grid.png and metrics.json.

    Args:
        out: Folder for the results.
        checkpoint: A .ckpt of dit-qat fit, whose EMA weights are used.
        weights: Float weights instead: digits, a .safetensors file, a published .pt.
        num: Number of images.
        classes: Labels, dealt out to the images in turn; all classes in turn by default.
        sampler: How to sample.
        npz: Also write samples.npz, as the ADM evaluator reads it.
        latents: Write what the network draws as float32, latents.npz, and no images.
        device: auto, cpu, cuda, cuda:1, ...
        overwrite: Replace the results in the folder.

    Raises:
        ValueError: for options that do not fit together or the network.
        FileExistsError: if the folder holds results.
    """
    if num < 1:
        raise ValueError(f"--num {num}: draw at least 1 image")
    network = load_network(checkpoint, weights, pick_device(device))
    _check_output(network, latents, npz)
    label_of = _labels(network, classes)
    batches = sample_images(network, sampler, range(num), label_of, progress=True)
    claim(out, RESULTS, overwrite)
    started = time.perf_counter()
    if latents:
        _save_latents(out / "latents.npz", torch.cat([drawn for _, drawn in batches]))
    else:
        _save_pictures(out, batches, npz)
    seconds = time.perf_counter() - started
    metrics = {
        "num_samples": num,
        "seconds": seconds,
        "images_per_second": num / seconds,
        "source": weights if checkpoint is None else str(checkpoint),
        "weights": "float" if checkpoint is None else "ema",
        "device": str(next(network.parameters()).device),
        "shape": [network.in_channels, network.input_size, network.input_size],
        "sampler": asdict(sampler),
        "labels": None if label_of is None else [label_of(index) for index in range(num)],
    }
    write_json(out / "metrics.json", metrics)
    print(f"{num} images in {seconds:.1f} s ({num / seconds:.2f} images/s), in {out}")


def _check_output(network: DiT, latents: bool, npz: bool) -> None:
    if latents and npz:
        raise ValueError("--npz holds images and --latents writes none; choose one of them")
    if not latents and network.in_channels not in _PIXEL_CHANNELS:
        raise ValueError(
            f"this network draws latents of {network.in_channels} channels, and decoding latents "
            "comes with the ImageNet path; --latents true writes them as they are, to latents.npz"
        )


def _labels(network: DiT, classes: list[int] | None) -> Callable[[int], int] | None:
    """The label of any index; None for an unconditional network."""
    if classes is not None:
        if not classes:
            raise ValueError("--classes is an empty list; name a class, or leave the option out")
        dealt = classes
        return lambda index: dealt[index % len(dealt)]
    count = network.num_classes
    return (lambda index: index % count) if count else None


def _save_pictures(out: Path, batches: Iterator[tuple[list[int], Tensor]], npz: bool) -> None:
    kept: list[Tensor] = []
    for indices, drawn in batches:
        images = to_uint8(drawn).cpu()
        save_images(out / "images", images, indices)
        if npz or sum(map(len, kept)) < GRID_IMAGES:
            kept.append(images)
    save_grid(out / "grid.png", kept[:GRID_IMAGES])
    if npz:
        save_npz(out / "samples.npz", torch.cat(kept))


def _save_latents(path: Path, drawn: Tensor) -> None:
    """Write ``arr_0`` (N, C, H, W), float32, under its final name only."""
    with written_whole(path) as temporary, temporary.open("wb") as file:
        np.savez(file, arr_0=drawn.float().cpu().numpy())
