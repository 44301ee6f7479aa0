"""The network a command is about: from a training checkpoint, or from float weights."""

from pathlib import Path

import torch

from dit_qat.dit.models import DiT, load_dit
from dit_qat.dit.training.loading import load_checkpoint

__all__ = ["load_network", "pick_device"]


def pick_device(device: str) -> torch.device:
    """The device of that name; ``auto`` is the GPU if there is one.

    Raises:
        ValueError: for a name that is no device, or a GPU that is not there.
    """
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ValueError(
            f"--device {device} is no device; use auto, cpu, cuda or cuda:1"
        ) from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch finds no GPU here; use --device cpu")
    return found


def load_network(checkpoint: Path | None, weights: str | None, device: torch.device) -> DiT:
    """The EMA network of a checkpoint, or a float network.

    Raises:
        ValueError: unless exactly one of the two is given; errors of the two loaders.
    """
    if (checkpoint is None) == (weights is None):
        given = "neither is" if checkpoint is None else "both are"
        raise ValueError(
            f"{given} given: name one source, --checkpoint FILE.ckpt (of dit-qat fit) or --weights "
            "SOURCE (digits, a .safetensors file, a published .pt)"
        )
    if checkpoint is not None:
        return load_checkpoint(checkpoint, device=device).network
    assert weights is not None
    return load_dit(weights, device).eval()
