"""Quantization of a language model on windows of tokens, block by block."""

import json
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration import Call, CallStore, Method, Run, RunResult, Target
from dit_qat.calibration.engine import run_method
from dit_qat.llm.hf.attach import attach_fresh
from dit_qat.llm.models.checks import check_windows
from dit_qat.llm.models.residency import check_weight
from dit_qat.llm.models.roles import check_unshared, roles_of
from dit_qat.llm.packed import is_causal_lm

__all__ = ["least_bytes", "llm_target", "quantize_llm", "record_windows"]


def quantize_llm(
    model: nn.Module,
    method: Method,
    windows: Tensor,
    *,
    batch_size: int = 1,
    target: Target | None = None,
    seed: int = 0,
    state_folder: Path | None = None,
    calls_folder: Path | None = None,
    limit_bytes: int | None = None,
    moment_tokens: int | None = None,
    progress: bool = False,
) -> RunResult:
    """Quantize a float causal language model in place; ``save_pretrained`` works with it then.

    Args:
        model: Of Hugging Face, or called like one; in memory, or with blocks that come when they
            run (:func:`~dit_qat.llm.models.load_llm_by_block`).
        method: How.
        windows: Token ids (count, length) to calibrate on, each read on its own.
        batch_size: Windows per call of the model.
        target: Which layers; None: all linears of its blocks.
        seed: Of everything that the method draws.
        state_folder: Where finished blocks are kept, so that a killed run goes on; None: nowhere.
        calls_folder: Where what blocks receive is kept; None: memory.
        limit_bytes: What calibration may take.
        moment_tokens: Tokens of each call that enter second moments; None: all.
        progress: Whether to show bars.

    Returns:
        The model, one row per layer with nominal and effective bits and error, and averages.

    Raises:
        ValueError: before the run, for a model that is quantized already, windows that it cannot
            read, an architecture without known roles, weights that stand in more than one place or
            are not finite, or as :func:`~dit_qat.calibration.engine.run_method`; within it, as
            there.
    """
    _check_float(model)
    check_windows(model, windows)
    target = llm_target(model) if target is None else target
    check_unshared(model, target.linears())
    store = record_windows(windows, batch_size, calls_folder)
    run = Run(model, target, store, seed, progress)
    result = run_method(
        method,
        run,
        state_folder=state_folder,
        limit_bytes=limit_bytes,
        moment_tokens=moment_tokens,
    )
    if is_causal_lm(type(model)):
        attach_fresh(model, {"method": method.name, "config": _plain(method.config), "seed": seed})
    return result


def _check_float(model: nn.Module) -> None:
    """Refuse what is quantized already, and weights in memory that are damaged."""
    if getattr(getattr(model, "config", None), "quantization_config", None) is not None:
        raise ValueError(
            f"this {type(model).__name__} is quantized already; give the float model that it was "
            "made from"
        )
    for name, parameter in model.named_parameters():
        if not parameter.is_meta:
            check_weight(name, parameter)


def least_bytes(model: nn.Module) -> int:
    """What a packed folder of a model takes at least: floats that stay, and a bit per weight."""
    numbers = sum(linear.weight.numel() for linear in llm_target(model).linears().values())
    whole = sum(parameter.numel() for parameter in model.parameters())
    return (whole - numbers) * next(model.parameters()).element_size() + numbers // 8


def _plain(config: object) -> Any:
    """A configuration as JSON has it."""
    values = asdict(config) if is_dataclass(config) and not isinstance(config, type) else config
    return json.loads(json.dumps(values, default=str))


def llm_target(model: nn.Module) -> Target:
    """All linears in the blocks of a model; embeddings, norms and the head stay float.

    Raises:
        ValueError: for an architecture without known roles.
    """
    roles = roles_of(model)
    return Target(model, (roles.blocks,), roles.quantize)


def record_windows(windows: Tensor, batch_size: int = 1, folder: Path | None = None) -> CallStore:
    """The calls that read windows of tokens; no model is run.

    Args:
        windows: Token ids (count, length).
        batch_size: Windows per call; the last may have fewer.
        folder: Where the calls, and later what blocks receive, are kept; None: memory.

    Raises:
        ValueError: for a batch size below 1.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is no number of windows; use at least 1")
    store = CallStore(folder=folder)  # of no model: some methods rotate it before it is run
    for ids in torch.split(windows, batch_size):
        # A cache of keys and values would tie one call of a block to the next.
        store.append(Call((), {"input_ids": ids.cpu(), "use_cache": False}, rows=len(ids)))
    store.finish()
    return store
