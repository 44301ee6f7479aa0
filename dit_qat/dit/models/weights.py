"""Float weights from wherever they are: our files, published checkpoints, diffusers, the hub."""

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_qat.dit.models.build import build_dit, check_state
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.from_diffusers import weights_from_diffusers
from dit_qat.dit.models.locate import locate
from dit_qat.dit.models.native import read_native
from dit_qat.dit.models.published import PUBLISHED_SUFFIXES, Weights, infer_config, read_published
from dit_qat.dit.models.transformer_folder import read_transformer

__all__ = ["load_dit", "load_weights_"]


def load_dit(
    source: str | os.PathLike[str], device: torch.device | str = "cpu", weights: Weights = "ema"
) -> DiT:
    """Load a float DiT, in float32 and training mode.

    Args:
        source: An embedded name ("digits"), a .safetensors file of :func:`save_dit` or a folder
            with one named model.safetensors, a published .pt checkpoint (configuration inferred
            from shapes), a folder of diffusers' DiTTransformer2DModel or DiTPipeline, or a hub id
            "org/name" of a repository like one of these folders.
        device: Where the weights go.
        weights: Which weights of a published training checkpoint; without averaged ones, "ema"
            takes the others.

    Raises:
        FileNotFoundError: If the file is nowhere to be found.
        ValueError: If the file is damaged or was changed (files of ours carry a sha256 of their
            tensors), is of another format, or does not fit its configuration.
    """
    path = locate(source)
    config, state = _read(path, weights)
    return build_dit(config, state, path).to(device)


def load_weights_(model: DiT, source: str | os.PathLike[str], weights: Weights = "ema") -> None:
    """Put float weights into an existing DiT of the same architecture.

    Args:
        model: A float DiT; its parameters are replaced, so that no second copy stays.
        source: As for :func:`load_dit`.
        weights: As for :func:`load_dit`.

    Raises:
        FileNotFoundError: If the file is nowhere to be found.
        ValueError: As for :func:`load_dit`, or for weights of another architecture.
    """
    path = locate(source)
    config, state = _read(path, weights)
    own = model.config
    differing = [
        f"{key}={value} in the file, {own.get(key)} here"
        for key, value in config.items()
        if own.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{path}: weights of another architecture ({'; '.join(differing)}); set the network's "
            "arguments to those of the file"
        )
    check_state(model.state_dict(), state, path)
    device = model.pos_embed.device
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    floats = {key: value.to(device, torch.float32) for key, value in state.items()}
    model.load_state_dict(floats, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _read(path: Path, weights: Weights) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Arguments of :class:`DiT`, as far as the source tells them, and tensors by our names."""
    if path.is_dir():
        theirs = read_transformer(path)
        return weights_from_diffusers(theirs.state, theirs.config, path)
    if path.suffix == ".safetensors":
        return read_native(path)
    if path.suffix in PUBLISHED_SUFFIXES:
        _, state = read_published(path, weights)
        return infer_config(state, path), state
    if path.suffix == ".ckpt":
        raise ValueError(
            f"{path}: is a training checkpoint, not float weights; turn it into such by dit-qat "
            "convert (convert_checkpoint), or call dit_qat.dit.training.loading.load_checkpoint"
        )
    raise ValueError(
        f"{path}: unknown format {path.suffix!r}; give a .safetensors file written by save_dit "
        f"or a published checkpoint ({', '.join(PUBLISHED_SUFFIXES)})"
    )
