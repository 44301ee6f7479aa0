"""What is converted: any source of float weights, or a training checkpoint."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dit_qat.dit.models.build import build_dit
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.from_diffusers import weights_from_diffusers
from dit_qat.dit.models.locate import locate
from dit_qat.dit.models.published import PUBLISHED_SUFFIXES, Weights, infer_config, read_published
from dit_qat.dit.models.transformer_folder import read_transformer
from dit_qat.dit.models.weights import load_dit
from dit_qat.dit.pipelines import read_labels
from dit_qat.dit.training.loading import load_checkpoint, read_checkpoint

__all__ = ["Opened", "open_source"]


@dataclass(frozen=True)
class Opened:
    """A source, read.

    Attributes:
        network: Its DiT, float or quantized, in evaluation mode.
        forward: (x, t, y) to outputs, by the code that the source is meant for.
        weights: Which weights were taken, where there was a choice.
        labels: Names of classes by number, if it has them.
        latent_space: Of the autoencoder that it was trained with, if it tells.
    """

    network: DiT
    forward: Callable[[Tensor, Tensor, Tensor | None], Tensor]
    weights: str | None = None
    labels: dict[str, str] | None = None
    latent_space: Mapping[str, Any] | None = None


def open_source(source: str | os.PathLike[str], weights: Weights) -> Opened:
    """Read a source of :func:`~dit_qat.dit.models.load_dit`, or a ``.ckpt`` of dit-qat fit.

    Raises:
        FileNotFoundError: If it is nowhere to be found.
        ValueError: If it is damaged or of an unknown format.
    """
    if Path(source).suffix == ".ckpt":
        return _open_training(Path(source), weights)
    path = locate(source)
    if path.is_dir():
        return _open_diffusers(path)
    if path.suffix in PUBLISHED_SUFFIXES:
        taken, state = read_published(path, weights)
        network = build_dit(infer_config(state, path), state, path).eval()
        return Opened(network, network, None if taken == "raw" else taken)
    network = load_dit(path).eval()
    return Opened(network, network)


def _open_training(path: Path, weights: Weights) -> Opened:
    content = read_checkpoint(path)
    averaged = weights == "ema" and "current_model_state" in content
    network = load_checkpoint(path, "ema" if averaged else "current").network.eval()
    latents = content.get("Latents")  # what the data module of that name says
    space = latents.get("latent_space") if isinstance(latents, Mapping) else None
    return Opened(network, network, "ema" if averaged else "model", latent_space=space)


def _open_diffusers(folder: Path) -> Opened:
    theirs = read_transformer(folder)
    config, state = weights_from_diffusers(theirs.state, theirs.config, folder)
    network, original = build_dit(config, state, folder).eval(), theirs.build()

    def forward(x: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        predicted: Tensor = original(x, timestep=t, class_labels=y).sample
        return predicted

    return Opened(network, forward, labels=read_labels(folder))
