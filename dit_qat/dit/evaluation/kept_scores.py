"""Sensitivities kept on disk row by row, so that a measurement that was cut short goes on."""

import hashlib
import json
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.dit.evaluation.sensitivity import Score, layer_sensitivity
from dit_qat.export.files import write_json
from dit_qat.layers import QuantLinear

__all__ = ["ScoreSettings", "kept_files", "score_layers"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class ScoreSettings:
    """How layers are scored.

    Attributes:
        choices: Activation bits to try.
        score: See :func:`layer_sensitivity`.
        timesteps: At which every image is noised.
        seed: Of the noise.
    """

    choices: tuple[int, ...]
    score: Score = "output"
    timesteps: int = 8
    seed: int = 0


def score_layers(
    network: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    layers: Sequence[str],
    settings: ScoreSettings,
    folder: Path,
    *,
    reference: nn.Module | None = None,
    rank: int = 0,
    processes: int = 1,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> dict[str, list[float]]:
    """Score layers at every choice, rows on disk being taken over where they belong.

    Several processes deal the layers out; the scores do not depend on how many there are.

    Args:
        network: In evaluation mode; see :func:`layer_sensitivity`, for errors as well.
        images: Clean images (N, C, H, W).
        labels: (N,), or None.
        layers: Names, of all processes.
        settings: What to measure.
        folder: Where rows are kept, in ``.scores.RANK.json``; the caller removes them when done.
        reference: Network whose output is true; None: this one, ``layers`` at the highest choice.
        rank: Which of the processes that share the work this is.
        processes: How many there are.
        progress: Show a bar.
        say: Told how long it is going to take.

    Returns:
        Scores by choice, by layer, of this process's share of the layers.
    """
    own = layers[rank::processes]
    if not own:
        return {}
    subject = {
        **asdict(settings),
        "choices": [*settings.choices],
        "network": _digest(network),
        "reference": None if reference is None else _digest(reference),
        "images": _digest_of([images] if labels is None else [images, labels]),
    }
    rows = {name: row for path in kept_files(folder) for name, row in _kept(path, subject).items()}
    known = {name: rows[name] for name in own if name in rows}
    if known and say is not None:
        say(f"{len(known)} of {len(own)} layers were scored before")

    def keep(name: str, row: list[float]) -> None:
        known[name] = row
        write_json(folder / f".scores.{rank}.json", {"subject": subject, "rows": known})

    table = layer_sensitivity(
        network,
        images,
        labels,
        settings.choices,
        settings.seed,
        settings.timesteps,
        layers=own,
        score=settings.score,
        reference=reference,
        reference_bits=dict.fromkeys(layers, max(settings.choices)),
        known=dict(known),
        on_row=keep,
        progress=progress,
        say=say,
    )
    return dict(zip(table.layers, table.matrix.tolist(), strict=True))


def kept_files(folder: Path) -> list[Path]:
    """The files of :func:`score_layers` in a folder, of all processes."""
    return sorted(folder.glob(".scores.*.json"))


def _kept(path: Path, subject: dict[str, Any]) -> dict[str, list[float]]:
    """Rows of a file that were measured on the same subject; none otherwise."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["subject"] != subject:
            return {}
        return {str(name): [float(s) for s in row] for name, row in content["rows"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        _LOG.warning("%s is not one of ours (%s); its layers are scored again", path, error)
        return {}


def _digest(network: nn.Module) -> str:
    """Of the weights, and of what their layers do with activations."""
    quantizers = [m.config.activation for m in network.modules() if isinstance(m, QuantLinear)]
    found = hashlib.blake2b(repr(quantizers).encode(), digest_size=16)
    return _digest_of([*network.parameters()]) + found.hexdigest()


def _digest_of(tensors: Sequence[Tensor]) -> str:
    found = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        plain = tensor.detach().cpu().contiguous()
        found.update(plain.reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
