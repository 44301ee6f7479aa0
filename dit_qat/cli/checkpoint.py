"""What a checkpoint says about itself, read before anything long starts."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.strategies import FSDPStrategy

from dit_qat.dit.training import EMA
from dit_qat.dit.training.bit_maps import saved_bits
from dit_qat.dit.training.loading import read_checkpoint

__all__ = ["check_fits", "check_goes_on", "step_of"]

_RESTORED = ("lr_ternary", "lr_low_rank", "lr_float", "betas", "weight_decay")
"""Optimizer settings that come with the optimizer's state; the others are the configuration's."""


def check_fits(path: Path, configured: Mapping[str, Any], continues: bool) -> None:
    """Compare what a checkpoint says with the configuration.

    Args:
        path: The checkpoint.
        configured: Hyper-parameters of the module that is about to load it.
        continues: Whether training goes on, so that the seed and the optimizer matter as well;
            other optimizer settings are a warning only.

    Raises:
        ValueError: if network, method, float layers or seed differ; as ``read_checkpoint``.
    """
    saved = read_checkpoint(path)["hyper_parameters"]
    method = _with_allocated_bits(saved, configured["method"])
    for part, ours in (("network", configured["network"]), ("method", method)):
        differing = _differences(saved.get(part) or {}, ours or {})
        _refuse(path, part, differing)
    left, theirs = (list(each.get("float_layers") or []) for each in (configured, saved))
    _refuse(path, "set of float layers", _unequal("float_layers", theirs, left))
    if continues:
        _refuse(path, "seed", _unequal("seed", saved.get("seed", 0), configured["seed"]))
        _warn_of_optimizer(path, saved.get("optimizer"), configured["optimizer"])


def _with_allocated_bits(
    saved: Mapping[str, Any], method: Mapping[str, Any] | None
) -> Mapping[str, Any] | None:
    """A configured method with the bits of the checkpoint, where it does not say them itself."""
    bits = saved_bits({"hyper_parameters": saved})
    if method is None or bits is None or isinstance(method["init_args"].get("bit_map"), dict):
        return method
    return {**method, "init_args": {**method["init_args"], "bit_map": bits}}


def check_goes_on(path: Path, trainer: pl.Trainer) -> None:
    """Refuse to go on training in a way that would lose a part of what was saved.

    Args:
        path: The checkpoint.
        trainer: Of the run that is to load it.

    Raises:
        ValueError: for averaged weights that no callback takes, whose place the weights in training
            would not take either; or an optimizer's state of whole weights for sharded ones.
    """
    content = read_checkpoint(path)
    callbacks: list[pl.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    if "current_model_state" in content and not any(isinstance(c, EMA) for c in callbacks):
        raise ValueError(
            f"{path} holds averaged weights besides those in training, and ema.enabled=false would "
            "go on from the average with an optimizer state that is not its own; leave EMA "
            "enabled, or start another run from its weights (dit-qat convert)"
        )
    states = content.get("optimizer_states") or [{"state": {}}]
    # FSDP numbers all parameters, those that are not trained as well; we only have trained ones.
    numbers = sorted(states[0]["state"])
    if isinstance(trainer.strategy, FSDPStrategy) and numbers == list(range(len(numbers))):
        raise ValueError(
            f"{path} was written by a run that did not shard its weights, whose optimizer state "
            "Lightning does not shard; continue it with trainer.strategy=ddp, or start another "
            "run from its weights"
        )


def step_of(ckpt_path: str | None) -> int | None:
    """Optimizer steps behind a checkpoint; None without one."""
    return None if ckpt_path is None else int(read_checkpoint(ckpt_path)["global_step"])


def _refuse(path: Path, part: str, differing: list[str]) -> None:
    if differing:
        raise ValueError(
            f"{path} holds another {part} than the configuration ({'; '.join(differing)}); use "
            "the config.yaml beside the checkpoint, or start a new run without --ckpt_path"
        )


def _warn_of_optimizer(
    path: Path, saved: Mapping[str, Any] | None, configured: Mapping[str, Any]
) -> None:
    differing = _differences(saved or {}, configured)
    if differing:
        warnings.warn(
            f"{path} was trained with other optimizer settings than the configuration's "
            f"({'; '.join(differing)}): {', '.join(_RESTORED)} go on as saved, warm-up and decay "
            "as configured; to change the former, start a new run",
            stacklevel=2,
        )


def _differences(saved: Mapping[str, Any], configured: Mapping[str, Any]) -> list[str]:
    """What a checkpoint's specification says otherwise than the configuration's."""
    ours, theirs = configured.get("class_path"), saved.get("class_path")
    if ours != theirs:
        return [f"{theirs or 'none'} saved, {ours or 'none'} configured"]
    given = configured.get("init_args", {})
    return [
        line
        for name, value in saved.get("init_args", {}).items()
        for line in _unequal(name, value, given.get(name))
    ]


def _unequal(name: str, saved: Any, configured: Any) -> list[str]:
    # Files hand tuples back as lists.
    one, other = (list(v) if isinstance(v, tuple) else v for v in (saved, configured))
    return [] if one == other else [f"{name}={saved} saved, {configured} configured"]
