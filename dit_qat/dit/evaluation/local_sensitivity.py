"""Sensitivities from one backward pass: a layer's own error times what the output makes of it."""

from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.hooks import RemovableHandle

from dit_qat.dit.randomness import generator_for
from dit_qat.layers import QuantLinear

__all__ = ["PART", "Batch", "in_parts", "local_gradient_rows"]

Batch = tuple[Tensor, Tensor, Tensor | None]
"""x_t (N, C, H, W), t (N,), labels (N,)."""

PART = 32
"""Images that go through the network at once, however many there are to score with."""


def in_parts(batch: Batch) -> Iterator[Batch]:
    """Cut a batch into such of at most :data:`PART` images, in order."""
    x_t, t, labels = batch
    for start in range(0, len(x_t), PART):
        rows = slice(start, start + PART)
        yield x_t[rows], t[rows], None if labels is None else labels[rows]


@dataclass
class _Heard:
    """What one pass told about one layer: both (N,) over images, errors by bits."""

    errors: dict[int, Tensor] = field(default_factory=dict)
    energy: Tensor | None = None


def local_gradient_rows(
    network: nn.Module,
    inputs: Sequence[Batch],
    truth: Sequence[Tensor],
    layers: Mapping[str, QuantLinear],
    bits: Sequence[int],
    tick: Callable[[], None],
) -> Iterator[tuple[str, list[float]]]:
    """Estimate the normalised output error to first order, all layers and bits at once.

    For a batch at one timestep, ``sum_n mean((y_b - y)^2)_n * energy_n / sum(eps_ref^2)``: y is the
    layer's output with unquantized activations, y_b the one at b bits, and energy_n the squared
    gradient, summed over y, of ``v . eps`` with random signs v: on average over v the squared norm
    of the output's Jacobian (Hutchinson). Errors count as if they had no preferred direction.
    Blocks are recomputed in backward where they are in training.

    Args:
        network: Called as ``network(x_t, t, labels)``.
        inputs: One batch per timestep.
        truth: Predicted noise of the reference (N, C, H, W) per batch; its power is the unit.
        layers: Quantized linear layers by name; their bits are not changed.
        bits: Activation bits to try.
        tick: Called after every part of a batch (see :func:`in_parts`).

    Yields:
        Name and errors by bits, averaged over timesteps.
    """
    rows: dict[str, list[list[float]]] = defaultdict(list)
    for batch, true in zip(inputs, truth, strict=True):
        generator = generator_for(0, "probe", int(batch[1][0]))
        signs = torch.randint(0, 2, true.shape, generator=generator) * 2 - 1
        power = float(true.float().square().sum())
        sums = {name: [0.0 for _ in bits] for name in layers}
        for part, probe in zip(in_parts(batch), torch.split(signs, PART), strict=True):
            for name, told in _listen(network, part, probe, layers, bits).items():
                energy = torch.zeros(1) if told.energy is None else told.energy
                errors = [float((told.errors[b] * energy.to(told.errors[b])).sum()) for b in bits]
                sums[name] = [one + more for one, more in zip(sums[name], errors, strict=True)]
            tick()
        for name, errors in sums.items():
            rows[name].append([error / power if power else error for error in errors])
    for name in layers:
        yield name, [fmean(column) for column in zip(*rows[name], strict=True)]


def _listen(
    network: nn.Module,
    batch: Batch,
    probe: Tensor,
    layers: Mapping[str, QuantLinear],
    bits: Sequence[int],
) -> dict[str, _Heard]:
    """Forward, then backward from a projection of the noise, with hooks on the layers."""
    heard = {name: _Heard() for name in layers}
    handles: list[RemovableHandle] = []
    for name, layer in layers.items():
        handles.append(layer.register_forward_hook(partial(_hear, heard[name], bits)))
    try:
        with torch.enable_grad(), _recomputing(network):
            output = network(*batch)[:, : probe.shape[1]]
            # With respect to what is trained: a graph that ends nowhere would not be recorded.
            trained = [p for p in network.parameters() if p.requires_grad]
            torch.autograd.grad(output, trained, probe.to(output), allow_unused=True)
    finally:
        for handle in handles:
            handle.remove()
    return heard


@contextmanager
def _recomputing(network: nn.Module) -> Iterator[None]:
    """Have blocks recomputed in backward where training does so, for else they would not fit.

    The network looks at its own flag for that; layers stay in the mode that they are in.
    """
    before = network.training
    network.training = before or bool(getattr(network, "gradient_checkpointing", False))
    try:
        yield
    finally:
        network.training = before


def _hear(
    told: _Heard, bits: Sequence[int], layer: QuantLinear, inputs: tuple[Any, ...], output: Tensor
) -> None:
    if told.errors:
        return  # a checkpointed block computes its forward a second time
    told.errors = {b: _local_error(layer, inputs[0].detach(), b) for b in bits}

    def keep(gradient: Tensor) -> None:
        told.energy = gradient.float().square().flatten(1).sum(1)

    output.register_hook(keep)  # type: ignore[no-untyped-call]


@torch.no_grad()
def _local_error(layer: QuantLinear, x: Tensor, bits: int) -> Tensor:
    """Mean squared change of a layer's output per image (N,) by quantizing its input."""
    assert layer.config.activation is not None
    x = x.to(layer.weight.dtype)
    if layer.rotation is not None:
        x = layer.rotation.apply(x)
    quantized = replace(layer.config.activation, bits=bits).fake_quantize(x)
    weight = layer.config.weight.fake_quantize(layer.weight)
    return F.linear(quantized - x, weight).float().square().flatten(1).mean(1)
