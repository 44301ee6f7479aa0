"""The network a command is about: from a training checkpoint, a packed folder or float weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.models.autoencoder import LatentSpace
from dit_qat.dit.models.packed_source import load_packed_dit, locate_weights
from dit_qat.dit.training.loading import load_checkpoint, read_checkpoint
from dit_qat.export.manifest import read_manifest

__all__ = ["Source", "load_source"]

_LATENTS = "Latents"  # the data module, under whose name Lightning keeps what it has to say


@dataclass(frozen=True)
class Source:
    """A network and where it came from.

    Attributes:
        network: In evaluation mode.
        name: What the user called it.
        weights: ``ema`` of a checkpoint, ``packed``, or ``float``.
        step: Optimizer steps behind a checkpoint.
        latent_space: What the latents mean that a checkpoint was trained on.
        folder: Where packed weights are.
    """

    network: DiT
    name: str
    weights: str
    step: int | None = None
    latent_space: LatentSpace | None = None
    folder: Path | None = None


def load_source(
    checkpoint: Path | None, weights: str | None, device: torch.device | str = "cpu"
) -> Source:
    """The EMA network of a checkpoint, a packed network, or a float network.

    Raises:
        ValueError: unless exactly one of the two is given; errors of the two loaders.
    """
    if (checkpoint is None) == (weights is None):
        given = "neither is" if checkpoint is None else "both are"
        raise ValueError(
            f"{given} given: name one source, --checkpoint FILE.ckpt (of dit-qat fit) or --weights "
            "SOURCE (digits, a packed folder of dit-qat export, a .safetensors file, a published "
            ".pt, a diffusers folder, a hub id)"
        )
    if checkpoint is None:
        assert weights is not None
        path, packed = locate_weights(weights)
        if packed:
            return _load_packed(path, weights, device)
        return Source(load_dit(path, device).eval(), weights, "float")
    content = read_checkpoint(checkpoint)
    space = _latent_space(checkpoint, content.get(_LATENTS, {}).get("latent_space"))
    network = load_checkpoint(checkpoint, device=device).network
    return Source(network, str(checkpoint), "ema", int(content["global_step"]), space)


def _load_packed(folder: Path, name: str, device: torch.device | str) -> Source:
    provenance = read_manifest(folder).provenance
    space, step = _latent_space(folder, provenance.get("latent_space")), provenance.get("step")
    return Source(load_packed_dit(folder, device), name, "packed", step, space, folder)


def _latent_space(source: Path, saved: Mapping[str, Any] | None) -> LatentSpace | None:
    if saved is None:
        return None
    try:
        return LatentSpace(**saved)
    except TypeError as error:
        raise ValueError(
            f"{source} describes its latents in another way ({error}); load it with the "
            "version of dit_qat that wrote it"
        ) from error
