"""Training checkpoints read back: what they say about themselves, and as modules."""

import os
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from dit_qat.dit.training.module import DiTTraining

__all__ = ["load_checkpoint", "read_checkpoint"]

# What reading a damaged file raises (OSError comes from mapping one that was cut short), and what
# building a module raises from settings or tensors that are not ours.
_BROKEN = (
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    OSError,
    RuntimeError,
    TypeError,
    UnpicklingError,
    ValueError,
)


def read_checkpoint(
    path: str | os.PathLike[str], device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """The content of a checkpoint file; on the CPU, its tensors stay on disk until used.

    Args:
        path: A ``.ckpt`` file of ``dit-qat fit``.
        device: Where the tensors go.

    Returns:
        Lightning's dictionary, with at least ``global_step``, ``state_dict`` and
        ``hyper_parameters``; of the latter, ``network`` is a specification (see ``specs``).

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of ours, or damaged.
    """
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no checkpoint {source}")
    try:
        content = torch.load(source, map_location=device, weights_only=True, mmap=True)
    except _BROKEN as error:
        raise ValueError(
            f"{source} is truncated or not a checkpoint of dit-qat fit "
            f"({type(error).__name__}: {error}); take an earlier one"
        ) from error
    if not _is_ours(content):
        raise ValueError(
            f"{source} is not a checkpoint of dit-qat fit (it lacks the step, the weights or the "
            "specification of the network); give a .ckpt of its checkpoints folder"
        )
    ours: dict[str, Any] = content
    return ours


def load_checkpoint(
    path: str | os.PathLike[str],
    weights: Literal["ema", "current"] = "ema",
    device: torch.device | str = "cpu",
) -> DiTTraining:
    """Rebuild the module of a checkpoint from its own hyper-parameters, in evaluation mode.

    Args:
        path: A ``.ckpt`` file of ``dit-qat fit``.
        weights: The averaged weights, or those the optimizer was at (the same without EMA).
        device: Where the weights go.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint of ours, is damaged, or does not fit its own
            hyper-parameters.
    """
    content = read_checkpoint(path, device)
    # Whatever the file says, reading it must not read float weights, or ask the hub for them.
    settings = content["hyper_parameters"] | {"compile": False, "fresh_start": False}
    state = content["state_dict"]
    if weights == "current":
        state = content.get("current_model_state", state)
    try:
        module = DiTTraining(**settings)
    except _BROKEN as error:
        raise ValueError(
            f"{path} holds hyper-parameters that build no DiTTraining ({type(error).__name__}: "
            f"{error}); load it with the version of dit_qat that wrote it"
        ) from error
    try:
        module.load_state_dict(state)
    except _BROKEN as error:
        raise ValueError(f"{path} does not fit its own hyper-parameters: {error}") from error
    return module.to(device).eval()


def _is_ours(content: Any) -> bool:
    """Whether a file holds what every checkpoint of ``dit-qat fit`` holds."""
    if not isinstance(content, dict):
        return False
    settings = content.get("hyper_parameters")
    return (
        isinstance(content.get("global_step"), int)
        and isinstance(content.get("state_dict"), Mapping)
        and isinstance(settings, dict)
        and isinstance(settings.get("network"), Mapping)
        and all(_is_specification(settings.get(name)) for name in ("method", "optimizer"))
    )


def _is_specification(value: Any) -> bool:
    return value is None or isinstance(value, Mapping)
