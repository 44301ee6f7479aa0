"""Temporal Fisher information: how much each layer's weights matter at each denoising step.

Sampled-output Fisher of the float model: with ``L = <f(x_t, t, c), eps>``, ``eps ~ N(0, I)``, the
expected squared gradient is the Gauss-Newton diagonal; unlike an error against the model's own
output it does not vanish, and it needs no labels (our choice where AdaTSQ, arXiv:2602.09883, is
silent). Sums over the entries of a weight, means over samples.
"""

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dit_qat.calibration.calls import Call, CallStore
from dit_qat.calibration.capture import evaluating
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.dit.randomness import generator_for

__all__ = [
    "StepScores",
    "first_rows",
    "narrowed",
    "noise_channels",
    "temporal_fisher",
    "temporal_weights",
]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False)
class StepScores:
    """A score of every layer at every step that was looked at.

    Attributes:
        steps: Sampler steps (S), ascending.
        timesteps: The model's own timestep of each (S).
        layers: Full names (L).
        values: (S, L) float64 on the CPU.
    """

    steps: tuple[int, ...]
    timesteps: tuple[float, ...]
    layers: tuple[str, ...]
    values: Tensor

    def at(self, timestep: float) -> Tensor:
        """Scores (L,) at the nearest timestep that was looked at."""
        nearest = min(range(len(self.steps)), key=lambda i: abs(self.timesteps[i] - timestep))
        return self.values[nearest]

    def by_step(self, values: Tensor) -> dict[str, Tensor]:
        """Columns of (S, L) as tensors indexed by sampler step, zero at steps not looked at."""
        table = values.new_zeros(max(self.steps) + 1, len(self.layers))
        table[list(self.steps)] = values
        return dict(zip(self.layers, table.unbind(1), strict=True))


def temporal_fisher(
    model: nn.Module,
    store: CallStore,
    layers: Mapping[str, nn.Linear],
    *,
    rows: int = 16,
    seed: int = 0,
    blocks: Sequence[nn.Module] = (),
) -> StepScores:
    """Measure ``I[t, l] = E ||dL / dW_l||^2`` on the float model.

    Args:
        model: Float.
        store: Its recorded calls.
        layers: By full name; one that the output does not depend on scores 0.
        rows: Samples taken from each step.
        seed: Of the eps.
        blocks: Modules that are run again on the way back, so that only their inputs are held;
            one after the other, none within another.

    Raises:
        ValueError: for a gradient that is not finite, naming layer and timestep.
    """
    steps = sorted(set(store.steps))
    sums = torch.zeros(len(steps), len(layers), dtype=torch.float64)
    counts = torch.zeros(len(steps), 1, dtype=torch.float64)
    with evaluating(model), _run_again(blocks):
        for index, call in first_rows(store, rows):
            generator = generator_for(seed, "fisher", index)
            found = _squared_gradients(model, call, layers, generator)
            if not bool(found.isfinite().all()):
                name = [*layers][int((~found.isfinite()).nonzero()[0])]
                raise ValueError(
                    f"the Fisher information of layer {name} at timestep {call.timestep:g} is not "
                    "finite; the weights are damaged, or the dtype overflows (try float32)"
                )
            sums[steps.index(call.step)] += found
            counts[steps.index(call.step)] += call.rows
    timesteps = tuple(store.timesteps[step] for step in steps)
    return StepScores(tuple(steps), timesteps, tuple(layers), sums / counts)


def temporal_weights(scores: Tensor, tau: float = 1.0, ratio: float = 10.0) -> Tensor:
    """Softmax over steps, apart for each layer, of scores over their mean (S, L) -> (S, L).

    Args:
        scores: (S, L), none negative.
        tau: Temperature; infinite: uniform.
        ratio: Largest quotient of two weights of a layer; a warning says where it was met.

    Raises:
        ValueError: for a tau that is not positive, or a ratio below 1.
    """
    if not tau > 0 or not ratio >= 1:
        raise ValueError(f"tau={tau} must be above 0 and ratio={ratio} at least 1")
    means = scores.mean(0, keepdim=True)
    logits = scores / torch.where(means > 0, means, torch.ones_like(means)) / tau
    least = logits.amax(0, keepdim=True) - math.log(ratio)
    capped = int((logits.amin(0) < least[0] - 1e-12).sum())
    if capped:
        _LOG.warning(
            "Fisher weights of %d of %d layers differ by more than %g between steps; the smallest "
            "are raised to that",
            capped,
            scores.shape[1],
            ratio,
        )
    return torch.softmax(logits.maximum(least), 0)


def noise_channels(output: Any, inputs: Any) -> Tensor:
    """What a model predicts of the noise (values,); channels beyond its input's are a variance.

    Args:
        output: Of the model: tensors in any containers.
        inputs: Of the same call; the one of the output's height and width has the channels.
    """
    known, found = tensors_of(inputs), []
    for f in (tensor for tensor in tensors_of(output) if tensor.is_floating_point()):
        alike = (x for x in known if x.ndim == f.ndim > 3 and x.shape[2:] == f.shape[2:])
        x = next(alike, f)
        found.append(f[:, : x.shape[1]].flatten())
    return torch.cat(found)


def first_rows(store: CallStore, rows: int) -> Iterator[tuple[int, Call]]:
    """Calls by index, the last of a step cut so that each step has at most ``rows`` rows."""
    left = dict.fromkeys(store.steps, rows)
    for index, step in enumerate(store.steps):
        if left[step] > 0:
            call = narrowed(store[index], left[step])
            left[step] -= call.rows
            yield index, call


def narrowed(call: Call, rows: int) -> Call:
    """The first rows of a call; a list of one tensor per row is cut as a list."""
    if call.rows <= rows:
        return call

    def cut(tree: Any) -> Any:
        if isinstance(tree, Tensor):
            return tree[:rows] if tree.ndim and len(tree) == call.rows else tree
        if isinstance(tree, dict):
            return {key: cut(value) for key, value in tree.items()}
        if isinstance(tree, list) and len(tree) == call.rows:
            return tree[:rows]
        return type(tree)(map(cut, tree)) if type(tree) in (list, tuple) else tree

    return Call(cut(call.args), cut(call.kwargs), call.step, call.timestep, rows)


def _squared_gradients(
    model: nn.Module, call: Call, layers: Mapping[str, nn.Linear], generator: torch.Generator
) -> Tensor:
    """Squared norms of the gradients of all layers (L,), summed over samples."""
    device = next(model.parameters()).device
    inputs = map_tensors(lambda tensor: tensor.to(device), (call.args, call.kwargs))
    found = dict.fromkeys(layers, 0.0)
    anchor = torch.zeros((), device=device, requires_grad=True)

    def keep(name: str, gradient: Tensor, x: Tensor) -> None:
        found[name] += float(_squared_norm(gradient, x, call.rows))

    with torch.enable_grad(), _tapped(layers, anchor, keep):
        f = noise_channels(model(*inputs[0], **inputs[1]), inputs)
        noise = torch.randn(f.shape, generator=generator).to(f)
        # Of the anchor alone: no gradient of a weight is formed.
        torch.autograd.grad((f * noise).sum(), anchor)
    return torch.tensor([found[name] for name in layers], dtype=torch.float64)


class _Tap(torch.autograd.Function):
    """Hands on the output of a linear, and tells the gradient that comes back, with the input."""

    @staticmethod
    def forward(
        ctx: Any, output: Tensor, x: Tensor, anchor: Tensor, keep: Callable[[Tensor, Tensor], None]
    ) -> Tensor:
        ctx.save_for_backward(x, anchor)
        ctx.keep = keep
        return output.view_as(output)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, Tensor, None]:
        x, anchor = ctx.saved_tensors
        ctx.keep(gradient, x)
        return gradient, None, torch.zeros_like(anchor), None


@contextmanager
def _tapped(
    layers: Mapping[str, nn.Linear], anchor: Tensor, keep: Callable[[str, Tensor, Tensor], None]
) -> Iterator[None]:
    """Tell ``keep`` the gradient and the input of each layer; all depend on the anchor ()."""

    def hook(name: str, _: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor:
        (x,) = tensors_of((args, kwargs))
        tapped: Tensor = _Tap.apply(output, x.detach(), anchor, partial(keep, name))
        return tapped

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(partial(hook, name), with_kwargs=True)
            stack.callback(handle.remove)
        yield


@contextmanager
def _run_again(blocks: Sequence[nn.Module]) -> Iterator[None]:
    """Hold only the inputs of blocks on the way there, and run each again on the way back."""
    former = [(block, block.__dict__.get("forward")) for block in blocks]
    try:
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        yield
    finally:
        for block, own in former:
            if own is None:
                del block.forward
            else:
                block.forward = own


def _squared_norm(gradient: Tensor, x: Tensor, rows: int) -> Tensor:
    """``sum_i ||g_i^T x_i||_F^2`` over samples i, the first dimension being theirs."""
    g = gradient.reshape(rows, -1, gradient.shape[-1]).float()
    x = x.reshape(rows, -1, x.shape[-1]).float()
    tokens, out, width = g.shape[1], g.shape[2], x.shape[2]
    if tokens * (out + width) < out * width:
        return ((g @ g.mT) * (x @ x.mT)).sum()  # the same by tokens, where they are few
    return (g.mT @ x).square().sum()
