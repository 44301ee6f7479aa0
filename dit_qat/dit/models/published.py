"""The published ``.pt`` checkpoints: weights only, from which the configuration is inferred."""

import argparse
import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.native import float_state
from dit_qat.export.files import written_whole
from dit_qat.export.folders import writing

__all__ = [
    "PUBLISHED_SUFFIXES",
    "Weights",
    "check_published",
    "infer_config",
    "read_published",
    "read_torch_file",
    "save_published",
]

PUBLISHED_SUFFIXES = (".pt", ".pth")

Weights = Literal["ema", "model"]
"""Which weights of a training checkpoint: the averaged ones, or those the optimizer was at."""

_XL_WIDTH, _XL_HEADS, _HEAD_WIDTH = 1152, 16, 64


def read_torch_file(path: Path) -> Any:
    """Load a file of tensors and plain types.

    Raises:
        ValueError: If it is damaged, or holds anything else.
    """
    try:
        # Training checkpoints of the original code carry their arguments along.
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: truncated or not a checkpoint of tensors ({type(error).__name__}); copy or "
            "download it again"
        ) from error


def read_published(path: Path, weights: Weights = "ema") -> tuple[str, dict[str, Tensor]]:
    """Read a state dict, or one of those of a training checkpoint.

    Args:
        path: A ``.pt`` file.
        weights: Which weights of a training checkpoint; without averaged ones, "ema" takes the
            others. A raw state dict has no choice.

    Returns:
        What was taken ("ema", "model" or "raw"), and the tensors.

    Raises:
        ValueError: If the file is damaged, holds no state dict, or not the weights asked for.
    """
    content = read_torch_file(path)
    taken = "raw"
    if isinstance(content, dict) and not content.keys().isdisjoint(get_args(Weights)):
        if weights == "ema" and "ema" not in content:
            weights = "model"
        if weights not in content:
            raise ValueError(
                f"{path}: holds no {weights!r} weights, only 'ema'; ask for weights='ema'"
            )
        taken, content = weights, content[weights]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"{path}: holds no state dict of tensors, neither at the top nor under 'ema' or "
            "'model'; is it a DiT checkpoint?"
        )
    return taken, content


def infer_config(state: Mapping[str, Tensor], path: object) -> dict[str, Any]:
    """Derive the arguments of :class:`DiT` from the shapes of a published checkpoint.

    The label table is taken to have a row for the null class; the number of heads is that of the
    published sizes (arXiv:2212.09748, table 1): 16 at width 1152, else one per 64 features.

    Raises:
        ValueError: If it is no DiT, or of a width whose number of heads cannot be told.
    """
    try:
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        grid = round(state["pos_embed"].shape[1] ** 0.5)
        out_features = state["final_layer.linear.weight"].shape[0]
        mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / hidden
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: not a DiT checkpoint (stopped at {error}); of diffusers' weights, give the "
            "folder with their config.json"
        ) from error
    if hidden != _XL_WIDTH and hidden % _HEAD_WIDTH:
        raise ValueError(
            f"{path}: the number of heads does not show in the shapes, and hidden_size={hidden} is "
            f"no multiple of {_HEAD_WIDTH}; load it into a DiT of your own and write that with "
            "save_dit"
        )
    table = state.get("y_embedder.embedding_table.weight")
    return {
        "input_size": grid * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "num_heads": _XL_HEADS if hidden == _XL_WIDTH else hidden // _HEAD_WIDTH,
        "mlp_ratio": mlp_ratio,
        "num_classes": 0 if table is None else table.shape[0] - 1,
        "learn_sigma": out_features == 2 * channels * patch**2,
    }


def check_published(model: DiT) -> None:
    """Refuse a float DiT that would be read back as another one.

    Raises:
        ValueError: If an argument neither shows in the shapes nor is that of the published models.
    """
    state = model.state_dict()
    defaults = {"timestep_shift": 0, "norm2_eps": 1e-6}
    told = defaults | infer_config(state, "the published format")
    own = {name: model.config[name] for name in told}
    # (A table without a null class shows as one class fewer.)
    differing = [f"{name}={own[name]} as {told[name]}" for name in told if own[name] != told[name]]
    if differing:
        raise ValueError(
            f"the published format holds tensors only, and would be read back with "
            f"{'; '.join(differing)}; use "
            "the format dit_qat (save_dit), which holds the configuration"
        )


def save_published(model: DiT, path: str | os.PathLike[str]) -> None:
    """Write the raw state dict of a float DiT as ``torch.save`` does, at once or not at all.

    Raises:
        ValueError: If the model has quantized layers, or would be read back as another one.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    state = float_state(model)
    check_published(model)
    with writing(path), written_whole(path) as temporary:
        torch.save(state, temporary)
