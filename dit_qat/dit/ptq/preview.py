"""What a run will have to do, said before it does it."""

import time
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dit_qat.calibration import Call, CallStore, evaluating
from dit_qat.calibration.target import Target
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.report.page import duration

__all__ = ["Preview", "preview"]

_PASSES = 2  # of every block over all calls: gathering statistics, and going on


@dataclass(frozen=True)
class Preview:
    """Sizes of a run.

    Attributes:
        linears: Layers to quantize.
        weights: Numbers in them.
        blocks: Blocks that they lie in.
        calls: Recorded calls.
        rows: Rows of all calls.
        tokens: Fewest and most tokens that a layer sees.
        seconds: What passing the calls through the model takes; the method's own work comes on top.
    """

    linears: int
    weights: int
    blocks: int
    calls: int
    rows: int
    tokens: tuple[int, int]
    seconds: float

    @property
    def text(self) -> str:
        """In words."""
        low, high = self.tokens
        tokens = f"{low:,}" if low == high else f"{low:,} to {high:,}"
        return (
            f"{self.linears} linears ({self.weights / 1e6:.3g} million weights) in {self.blocks} "
            f"blocks; {self.calls} calls of {self.rows:,} rows in all, {tokens} tokens per layer; "
            f"passing them takes about {duration(self.seconds)}, the method's own work comes on top"
        )


def preview(model: nn.Module, target: Target, store: CallStore) -> Preview:
    """Count, and time one call of the float model."""
    linears = target.linears()
    seen = dict.fromkeys(linears, 0)
    call = store[0]

    def count(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
        (x,) = tensors_of((args, kwargs))
        seen[name] += x.numel() // x.shape[-1]

    with ExitStack() as stack:
        for name, linear in linears.items():
            hook = linear.register_forward_pre_hook(partial(count, name), with_kwargs=True)
            stack.callback(hook.remove)
        _timed(model, call)
    tokens = [number * store.rows // call.rows for number in seen.values()]
    return Preview(
        linears=len(linears),
        weights=sum(linear.weight.numel() for linear in linears.values()),
        blocks=len(target.find_blocks()),
        calls=len(store),
        rows=store.rows,
        tokens=(min(tokens), max(tokens)),
        seconds=_PASSES * _timed(model, call) * store.rows / call.rows,
    )


@torch.no_grad()
def _timed(model: nn.Module, call: Call) -> float:
    device = next(model.parameters()).device
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (call.args, call.kwargs))
    started = time.perf_counter()
    with evaluating(model):
        model(*args, **kwargs)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - started
