"""Weights of feature networks, read as tensors and nothing else."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

__all__ = ["load_strictly_", "read_state"]

_BROKEN = (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError, SafetensorError)


def read_state(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a ``.safetensors`` file or a PyTorch one, which is not unpickled.

    Raises:
        FileNotFoundError: Nothing has this name.
        ValueError: A damaged file, or one that holds something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file of weights")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except _BROKEN as error:
        raise ValueError(
            f"{path} is truncated or no file of tensors ({type(error).__name__}); copy or download "
            "it again"
        ) from error
    held = content.values() if isinstance(content, dict) else ()
    if not held or not all(isinstance(value, Tensor) for value in held):
        raise ValueError(f"{path} holds no state dict of tensors; give the file of the weights")
    return dict(content)


def load_strictly_(network: nn.Module, state: Mapping[str, Tensor], path: Path) -> None:
    """Put a state into a network, made on the meta device, as float32 and without gradients.

    Raises:
        ValueError: Names or shapes that differ.
    """
    floats = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    try:
        network.load_state_dict(floats, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(
            f"{path} holds the weights of another network than {type(network).__name__}: "
            f"{' '.join(str(error).split())[:200]}"
        ) from error
    network.requires_grad_(False).eval()
