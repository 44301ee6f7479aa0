"""Training checkpoints read back as modules."""

import os
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Literal

import torch

from dit_qat.dit.training.module import DiTTraining

__all__ = ["load_checkpoint"]


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
    source = Path(path)
    if not source.is_file():
        raise FileNotFoundError(f"there is no checkpoint {source}")
    try:
        content: dict[str, Any] = torch.load(
            source, map_location=device, weights_only=True, mmap=True
        )
        hyperparameters = content["hyper_parameters"]
        state = content["state_dict"]
        if weights == "current":
            state = content.get("current_model_state", state)
    except (RuntimeError, OSError, EOFError, UnpicklingError, LookupError, TypeError) as error:
        raise ValueError(
            f"{source} is truncated or not a checkpoint of dit-qat fit "
            f"({type(error).__name__}: {error}); take an earlier one"
        ) from error
    module = DiTTraining(**hyperparameters | {"compile": False})
    try:
        module.load_state_dict(state)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{source} does not fit its own hyper-parameters: {error}") from error
    return module.to(device).eval()
