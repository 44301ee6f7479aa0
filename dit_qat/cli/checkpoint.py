"""What a checkpoint says about itself, read before anything long starts."""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

__all__ = ["check_fits", "step_of"]

# What torch.load raises for damaged files; OSError comes from mapping one that was cut short.
_BROKEN = (RuntimeError, EOFError, OSError, UnpicklingError, KeyError, TypeError, ValueError)


def check_fits(path: Path, configured: Mapping[str, Any]) -> None:
    """Compare the network and method of a checkpoint with those of the configuration.

    Raises:
        ValueError: if they differ.
    """
    saved = _read_checkpoint(path)
    for part in ("network", "method"):
        differing = _differences(saved[part] or {}, configured[part] or {})
        if differing:
            raise ValueError(
                f"{path} holds another {part} than the configuration ({'; '.join(differing)}); use "
                "the config.yaml beside the checkpoint, or start a new run without --ckpt_path"
            )


def step_of(ckpt_path: str | None) -> int | None:
    """Optimizer steps behind a checkpoint; None without one."""
    return None if ckpt_path is None else int(_read_checkpoint(Path(ckpt_path))["step"])


def _read_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's hyper-parameters and step; its tensors stay on disk.

    Raises:
        ValueError: if it is damaged or not ours.
    """
    try:
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return {"step": content["global_step"], **content["hyper_parameters"]}
    except _BROKEN as error:
        raise ValueError(
            f"{path} is truncated or not a checkpoint of dit-qat fit ({type(error).__name__}: "
            f"{error}); take an earlier one"
        ) from error


def _differences(saved: dict[str, Any], configured: dict[str, Any]) -> list[str]:
    """What a checkpoint's specification says otherwise than the configuration's."""
    ours, theirs = configured.get("class_path"), saved.get("class_path")
    if ours != theirs:
        return [f"{theirs or 'none'} saved, {ours or 'none'} configured"]
    given = configured.get("init_args", {})
    return [
        f"{name}={value} saved, {given.get(name)} configured"
        for name, value in saved.get("init_args", {}).items()
        if given.get(name) != value
    ]
