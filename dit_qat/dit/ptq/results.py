"""The folder that a run leaves: the packed model, metrics, the report, pictures; whole or not."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from dit_qat.dit.methods.adatsq import Policy
from dit_qat.dit.ptq.report import PTQReport, write_ptq_report
from dit_qat.export.files import check_folder, write_json, written_whole
from dit_qat.export.folders import written_folder
from dit_qat.export.manifest import CONFIG_FILE, TENSOR_FILE
from dit_qat.layers.int_linear import IntLinear

__all__ = [
    "DRAWN",
    "RESULTS",
    "Results",
    "as_plain",
    "check_results_folder",
    "policy_of",
    "write_results",
]

DRAWN = "images"
"""Folder of the images or videos of prompts."""

_MODEL = (CONFIG_FILE, TENSOR_FILE)
_PICTURES = ("samples.png", "layers.png", "timesteps.png", "policy.png")
RESULTS = (*_MODEL, "metrics.json", "report.html", "policy.json", *_PICTURES, DRAWN)
"""What a run may leave in its folder."""

_CARD = "README.md"  # of a folder that came from the hub
_CURE = "choose another --out, or pass --overwrite true to replace them"


@dataclass(frozen=True)
class Results:
    """What is written beside the packed model.

    Attributes:
        metrics: Of ``metrics.json``.
        report: The page.
        pictures: PNG bytes by file name.
        policy: Of ``policy.json``.
        drawn: Folder of images to move along.
    """

    metrics: Mapping[str, Any]
    report: PTQReport
    pictures: Mapping[str, bytes] = field(default_factory=dict)
    policy: Mapping[str, Any] | None = None
    drawn: Path | None = None


def check_results_folder(out: Path, overwrite: bool) -> None:
    """Make sure that a run may write a folder, without touching it.

    Raises:
        FileExistsError: if it holds results and those may not go, or anything else.
        NotADirectoryError: if it is a file.
    """
    check_folder(out, RESULTS, overwrite, _CURE)
    present = {path.name for path in out.iterdir()} if out.is_dir() else set()
    foreign = sorted(present - {*RESULTS, _CARD})
    if foreign:
        raise FileExistsError(
            f"{out} holds other files ({', '.join(foreign[:3])}), which the results would replace; "
            "choose a new or an empty folder"
        )


def as_plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a JSON file gives back of these values; paths and the like become text.

    Raises:
        ValueError: for numbers that are not finite.
    """
    found: dict[str, Any] = json.loads(json.dumps(values, default=str, allow_nan=False))
    return found


def write_results(out: Path, packed: Path, results: Results) -> None:
    """Write the folder, whole or not at all; the packed model is moved there."""
    with written_folder(out) as place:
        for name, png in results.pictures.items():
            with written_whole(place / name) as temporary:
                temporary.write_bytes(png)
        if results.policy is not None:
            write_json(place / "policy.json", results.policy)
        write_ptq_report(place / "report.html", results.report)
        write_json(place / "metrics.json", results.metrics)
        if results.drawn is not None and results.drawn.is_dir():
            results.drawn.rename(place / DRAWN)
        for name in _MODEL:
            (packed / name).rename(place / name)


def policy_of(model: nn.Module, report: Mapping[str, Any]) -> Policy | None:
    """The bits of layers that have other bits at other timesteps; None if none has."""
    if "policy" in report:
        return Policy.from_dict(report["policy"], "the method's report")
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, IntLinear) and module.config.step_bits is not None
    }
    if not layers:
        return None
    found = {n: m.config.step_bits for n, m in layers.items() if m.config.step_bits is not None}
    timesteps = tuple(sorted({t for bits in found.values() for t in bits.timesteps}, reverse=True))
    table = tuple(tuple(bits.at(t) for bits in found.values()) for t in timesteps)
    nothing = ((0.0,) * len(layers),) * len(timesteps)
    mean = sum(map(sum, table)) / (len(layers) * len(timesteps))
    sizes = tuple(layer.in_features * layer.out_features for layer in layers.values())
    return Policy(tuple(found), timesteps, table, sizes, nothing, mean)
