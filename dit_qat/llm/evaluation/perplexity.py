"""Perplexity of a causal language model on windows of text."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from dit_qat.calibration.capture import evaluating
from dit_qat.llm.models.checks import DEFAULT_LENGTH, check_windows

__all__ = ["perplexity", "window_losses"]


def perplexity(
    model: nn.Module, windows: Tensor, batch: int | None = None, progress: bool = False
) -> float:
    """Exponential of the mean over windows of their mean negative log-likelihood per token.

    Windows are read apart from each other, so that the first token of each predicts without
    context and is not predicted: the protocol of GPTQ, BiLLM and ARB-LLM.

    Args:
        model: As for :func:`window_losses`, as what follows.
        windows: As there.
        batch: As there.
        progress: As there.

    Returns:
        At least 1; infinite where it passes the largest float.

    Raises:
        ValueError: as :func:`window_losses`.
    """
    mean = float(window_losses(model, windows, batch, progress).mean())
    return math.exp(mean) if mean < math.log(torch.finfo(torch.float64).max) else math.inf


def window_losses(
    model: nn.Module, windows: Tensor, batch: int | None = None, progress: bool = False
) -> Tensor:
    """Mean negative log-likelihood of each window, in nats per predicted token.

    Args:
        model: A causal language model, with or without quantized layers.
        windows: Token ids (count, length).
        batch: Windows per call; by default as many as make 2048 tokens, at least one.
        progress: Whether to show a bar.

    Returns:
        (count,) in float64, on the CPU.

    Raises:
        ValueError: if the model cannot read the windows, or its outputs are not finite.
    """
    check_windows(model, windows)
    if batch is not None and batch < 1:
        raise ValueError(f"batch={batch} is no number of windows; use at least 1")
    size = batch or max(1, DEFAULT_LENGTH // windows.shape[1])
    device = next(model.parameters()).device
    losses: list[Tensor] = []
    with (
        torch.no_grad(),
        evaluating(model),
        tqdm(total=len(windows), disable=not progress, unit="window") as bar,
    ):
        for first in range(0, len(windows), size):
            found = _losses(model, windows[first : first + size].to(device))
            _check_finite(found, first)
            losses.append(found)
            bar.update(len(found))
    return torch.cat(losses)


def _losses(model: Callable[..., Any], ids: Tensor) -> Tensor:
    logits = model(input_ids=ids, use_cache=False).logits
    # One window at a time: float32 logits of a large vocabulary outweigh the model.
    return torch.stack(
        [
            F.cross_entropy(row[:-1].float(), wanted[1:]).double().cpu()
            for row, wanted in zip(logits, ids, strict=True)
        ]
    )


def _check_finite(losses: Tensor, first: int) -> None:
    bad = (~losses.isfinite()).nonzero()
    if len(bad):
        raise ValueError(
            f"the model's outputs on window {first + int(bad[0])} are not finite: its weights are "
            "damaged, or its dtype overflows (try float32 or bfloat16)"
        )
