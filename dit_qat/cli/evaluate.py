"""``dit-qat evaluate``: score images, with the protocol printed beside the numbers."""

import hashlib
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_qat.cli.output import check_claim, claim, save_grid
from dit_qat.cli.scoring import RESULTS, ScoringOptions, score_images
from dit_qat.dit.data import digit_images
from dit_qat.dit.data.digits import Digits
from dit_qat.dit.evaluation import evaluate_digits
from dit_qat.dit.evaluation.protocol import find_record, record_folder
from dit_qat.dit.evaluation.report import CompareTo
from dit_qat.dit.evaluation.scoring import Metric
from dit_qat.dit.evaluation.sources import ImageSource, open_images
from dit_qat.export.files import write_json

__all__ = ["RESULTS", "evaluate"]

_CLASSIFIER = "digits_classifier.safetensors"
_READ_AT_ONCE = 1024


def evaluate(
    samples: Path,
    reference: Path | None = None,
    metrics: list[Metric] | None = None,
    inception: str = "auto",
    dino: Path | None = None,
    batch_size: int = 64,
    seed: int = 0,
    device: str = "auto",
    devices: int = 1,
    num_nodes: int = 1,
    out: Path | None = None,
    overwrite: bool = False,
    cache_reference: Path | None = None,
    compare_to: CompareTo = "auto",
    allow_few_samples: bool = False,
) -> None:
    """Score images: FID, sFID, IS, KID, precision, recall; 1x8x8 without reference by FD-digits.

    Args:
        samples: Folder of dit-qat sample, any folder of PNGs, or an .npz of images (N, H, W, C).
        reference: The same of real images, or an .npz of statistics (mu, sigma, mu_s, sigma_s).
        metrics: fid, sfid, is, kid, precision, recall, fd_dinov2; all there can be by default.
        inception: File of torch-fidelity's Inception weights; auto downloads them once.
        dino: File of DINOv2's ViT-L/14 weights, for fd_dinov2.
        batch_size: Images per call of the networks.
        seed: Decides the subsets of KID.
        device: auto, cpu, cuda, cuda:1, ...
        devices: Processes on this machine, each with a device of its own.
        num_nodes: Machines, each of which is told to run this command (torchrun and SLURM do it).
        out: Folder for metrics.json and grid.png; by default the results are only printed.
        overwrite: Replace the results in the folder.
        cache_reference: Write statistics of the reference's images to this .npz, a --reference.
        compare_to: Published protocol to check ours against; auto is dit for 256x256 classes.
        allow_few_samples: Compute Frechet distances even from fewer images than features.

    Raises:
        ValueError: for images, statistics or options that do not fit.
        OSError: for files that are missing, or a folder that holds results.
    """
    source = _open(samples, out, overwrite)
    if reference is None and (cache_reference or dino):
        raise ValueError("--dino and --cache_reference are about real images: name a --reference")
    if reference is None and metrics is None:
        return _score_digits(source, out, overwrite)
    options = ScoringOptions(
        metrics=metrics,
        inception=inception,
        dino=dino,
        batch_size=batch_size,
        seed=seed,
        device=device,
        devices=devices,
        num_nodes=num_nodes,
        cache_reference=cache_reference,
        compare_to=compare_to,
        allow_few_samples=allow_few_samples,
    )
    return score_images(source, reference, options, out, overwrite)


def _open(samples: Path, out: Path | None, overwrite: bool) -> ImageSource:
    """Open the samples, and refuse a folder that cannot take the results: nothing is done yet."""
    source = open_images(samples)
    if out is not None:
        of_samples = {samples.resolve(), source.path.resolve(), record_folder(source)}
        if out.resolve() in of_samples:
            raise ValueError(f"--out {out} is the folder of the samples; choose another")
        check_claim(out, RESULTS, overwrite)
    return source


def _score_digits(source: ImageSource, out: Path | None, overwrite: bool) -> None:
    """Score digits by the classifier that ships with the package."""
    if source.shape != Digits.image_shape:
        raise ValueError(
            f"images of shape {(len(source), *source.shape)} are not digits (N, "
            f"{', '.join(map(str, Digits.image_shape))}); name real images or their statistics "
            "with --reference, or ask for --metrics is"
        )
    images = torch.cat(list(source.batches(0, len(source), _READ_AT_ONCE)))
    labels = _labels(source)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = evaluate_digits(images, labels)
    notes = [str(warning.message) for warning in caught]
    protocol = _protocol()
    _print(scores, protocol, notes)
    if out is not None:
        claim(out, RESULTS, overwrite)
        save_grid(out / "grid.png", [images])
        content = {
            "metrics": scores,
            "protocol": protocol,
            "notes": notes,
            "samples": str(source.path),
        }
        write_json(out / "metrics.json", content)


def _labels(source: ImageSource) -> Tensor | None:
    """The labels asked for, from the metrics.json that ``dit-qat sample`` put beside the images.

    Raises:
        ValueError: if it lists another number of labels than there are images.
    """
    labels = find_record(source).get("labels")
    if labels is None:
        return None
    if len(labels) != len(source):
        raise ValueError(
            f"{source.path.parent / 'metrics.json'} lists {len(labels)} labels for {len(source)} "
            "images: the folder changed since it was sampled; sample again, or move metrics.json "
            "away to score without labels"
        )
    return torch.tensor(labels, dtype=torch.int64)


def _protocol() -> dict[str, Any]:
    """What the numbers depend on, beside the samples."""
    asset = resources.files("dit_qat.dit") / "assets" / _CLASSIFIER
    return {
        "classifier": _CLASSIFIER,
        "classifier_sha256": hashlib.sha256(asset.read_bytes()).hexdigest(),
        "real_images": len(digit_images()[0]),
        "rounding": "uint8, round((x + 1) * 127.5), both sides",
    }


def _print(scores: dict[str, float], protocol: dict[str, Any], notes: list[str]) -> None:
    width = max(map(len, scores))
    for name, value in scores.items():
        shown = f"{value:>10d}" if isinstance(value, int) else f"{value:>10.4f}"
        print(f"{name:<{width}}  {shown}")
    print(
        f"protocol: features of {protocol['classifier']} (sha256 "
        f"{protocol['classifier_sha256'][:16]}), {protocol['real_images']} real images, "
        f"{protocol['rounding']}; FD-digits is no FID"
    )
    for note in notes:
        print(f"note: {note}")
