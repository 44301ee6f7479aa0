"""``dit-qat evaluate``: score images, with the protocol printed beside the numbers."""

import hashlib
import json
import warnings
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_qat.cli.output import check_claim, claim, save_grid
from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import evaluate_digits, load_images
from dit_qat.export.files import write_json

__all__ = ["RESULTS", "evaluate"]

RESULTS = ("metrics.json", "grid.png")
"""What the command leaves in its folder."""

_CLASSIFIER = "digits_classifier.safetensors"


def evaluate(samples: Path, out: Path | None = None, overwrite: bool = False) -> None:
    """Score digits: FD-digits, precision, recall, and the accuracy of their labels if known.

    Writes metrics.json and grid.png if a folder is named.

    Args:
        samples: Folder of dit-qat sample, any folder of PNGs, or an .npz of images (N, H, W, C).
        out: Folder for the results; by default they are only printed.
        overwrite: Replace the results in the folder.

    Raises:
        FileNotFoundError: if there are no such samples.
        ValueError: for images that cannot be read or are no digits.
        FileExistsError: if the folder holds results.
    """
    pictures = samples / "images" if (samples / "images").is_dir() else samples
    if out is not None and out.resolve() in (samples.resolve(), pictures.resolve()):
        raise ValueError(f"--out {out} is the folder of the samples; choose another")
    if out is not None:
        check_claim(out, RESULTS, overwrite)  # before the work; old results stay until it is done
    images = load_images(pictures)
    labels = _labels(pictures, len(images))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        scores = evaluate_digits(images, labels)
    notes = [str(warning.message) for warning in caught]
    protocol = _protocol()
    _print(scores, protocol, notes)
    if out is not None:
        claim(out, RESULTS, overwrite)
        save_grid(out / "grid.png", [images])
        content = {"metrics": scores, "protocol": protocol, "notes": notes, "samples": str(samples)}
        write_json(out / "metrics.json", content)


def _labels(pictures: Path, count: int) -> Tensor | None:
    """The labels asked for, from the metrics.json that ``dit-qat sample`` put beside the images.

    Raises:
        ValueError: if it lists another number of labels than there are images.
    """
    path = pictures.parent / "metrics.json"
    if pictures.name not in ("images", "samples.npz") or not path.is_file():
        return None
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); move it away to score without") from error
    labels = content.get("labels") if isinstance(content, dict) else None
    if labels is None:
        return None
    if len(labels) != count:
        raise ValueError(
            f"{path} lists {len(labels)} labels for {count} images: the folder changed since "
            "it was sampled; sample again, or move metrics.json away to score without labels"
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
