"""Temporal Fisher information: how much each layer's weights matter at each denoising step.

Sampled-output Fisher of the float model: with ``L = <f(x_t, t, c), eps>``, ``eps ~ N(0, I)``, the
expected squared gradient is the Gauss-Newton diagonal; unlike an error against the model's own
output it does not vanish, and it needs no labels (our choice where AdaTSQ, arXiv:2602.09883, is
silent). Sums over the entries of a weight, means over samples.
"""

import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration.calls import Call, CallStore
from dit_qat.calibration.capture import evaluating
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.dit.randomness import generator_for

__all__ = ["StepScores", "narrowed", "noise_channels", "temporal_fisher", "temporal_weights"]

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
) -> StepScores:
    """Measure ``I[t, l] = E ||dL / dW_l||^2`` on the float model.

    Args:
        model: Float.
        store: Its recorded calls.
        layers: By full name.
        rows: Samples taken from each call.
        seed: Of the eps.

    Raises:
        ValueError: for a gradient that is not finite, naming layer and timestep.
    """
    steps = sorted(set(store.steps))
    sums = torch.zeros(len(steps), len(layers), dtype=torch.float64)
    counts = torch.zeros(len(steps), 1, dtype=torch.float64)
    with evaluating(model):
        for index, call in enumerate(store):
            part = narrowed(call, rows)
            generator = generator_for(seed, "fisher", index)
            found = _squared_gradients(model, part, layers, generator)
            if not bool(found.isfinite().all()):
                name = [*layers][int((~found.isfinite()).nonzero()[0])]
                raise ValueError(
                    f"the Fisher information of layer {name} at timestep {call.timestep:g} is not "
                    "finite; the weights are damaged, or the dtype overflows (try float32)"
                )
            sums[steps.index(call.step)] += found
            counts[steps.index(call.step)] += part.rows
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
    """What a model predicts of the noise; channels beyond those of its input are a variance."""
    f, x = tensors_of(output)[0], tensors_of(inputs)[0]
    return f[:, : x.shape[1]] if f.ndim == x.ndim and x.ndim > 2 else f


def narrowed(call: Call, rows: int) -> Call:
    """The first rows of a call."""
    if call.rows <= rows:
        return call

    def cut(tensor: Tensor) -> Tensor:
        return tensor[:rows] if tensor.ndim and len(tensor) == call.rows else tensor

    args, kwargs = map_tensors(cut, (call.args, call.kwargs))
    return Call(args, kwargs, call.step, call.timestep, rows)


def _squared_gradients(
    model: nn.Module, call: Call, layers: Mapping[str, nn.Linear], generator: torch.Generator
) -> Tensor:
    """Squared norms of the gradients of all layers (L,), summed over samples."""
    device = next(model.parameters()).device
    inputs = map_tensors(lambda tensor: tensor.to(device), (call.args, call.kwargs))
    with torch.enable_grad(), _recorded(layers) as (seen, probes):
        f = noise_channels(model(*inputs[0], **inputs[1]), inputs)
        noise = torch.randn(f.shape, generator=generator).to(f)
        names = [*probes]
        gradients = torch.autograd.grad((f * noise).sum(), [probes[name] for name in names])
    found = {
        name: float(_squared_norm(gradient, seen[name], call.rows))
        for name, gradient in zip(names, gradients, strict=True)
    }
    return torch.tensor([found[name] for name in layers], dtype=torch.float64)


@contextmanager
def _recorded(
    layers: Mapping[str, nn.Linear],
) -> Iterator[tuple[dict[str, Tensor], dict[str, Tensor]]]:
    """Keep the inputs of layers, and add zeros to their outputs whose gradient can be asked for."""
    seen: dict[str, Tensor] = {}
    probes: dict[str, Tensor] = {}

    def hook(name: str, args: tuple[Any, ...], output: Tensor) -> Tensor:
        seen[name] = args[0].detach()
        probes[name] = torch.zeros_like(output, requires_grad=True)
        return output + probes[name]

    with ExitStack() as stack:
        for name, layer in layers.items():
            handle = layer.register_forward_hook(
                lambda _, args, output, name=name: hook(name, args, output)
            )
            stack.callback(handle.remove)
        yield seen, probes


def _squared_norm(gradient: Tensor, x: Tensor, rows: int) -> Tensor:
    """``sum_i ||g_i^T x_i||_F^2`` over samples i, the first dimension being theirs."""
    g = gradient.reshape(rows, -1, gradient.shape[-1]).float()
    x = x.reshape(rows, -1, x.shape[-1]).float()
    tokens, out, width = g.shape[1], g.shape[2], x.shape[2]
    if tokens * (out + width) < out * width:
        return ((g @ g.mT) * (x @ x.mT)).sum()  # the same by tokens, where they are few
    return (g.mT @ x).square().sum()
