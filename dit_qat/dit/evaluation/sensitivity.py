"""How much the model's output suffers when one layer alone gets other activation bits.

AMPN (RobuQ, arXiv:2509.23582) allocates bits by such a table; its formula is not published, so the
measures here are ours.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import isfinite
from statistics import fmean
from typing import Literal

import torch
from torch import Tensor, nn

from dit_qat.dit.diffusion import NoiseSchedule
from dit_qat.dit.evaluation.local_sensitivity import Batch, in_parts, local_gradient_rows
from dit_qat.dit.evaluation.meter import Meter
from dit_qat.dit.randomness import generator_for
from dit_qat.layers import ActivationQuantizer, LayerConfig, QuantLinear
from dit_qat.layers.statistics import normalized_error

__all__ = [
    "BLOCK_LINEARS",
    "Score",
    "Sensitivity",
    "activation_bits",
    "layer_sensitivity",
    "output_error",
    "quantized_linears",
]

BLOCK_LINEARS = ("blocks.*.attn.*", "blocks.*.mlp.*")
"""qkv, proj, fc1 and fc2 of every block: the layers whose bits AMPN chooses."""

Score = Literal["output", "local_gradient"]
"""``output``: run the model once per layer and bits. ``local_gradient``: estimate it by a backward
pass (see :func:`~dit_qat.dit.evaluation.local_sensitivity.local_gradient_rows`)."""

_TRAINING = NoiseSchedule()


@dataclass(frozen=True, eq=False)
class Sensitivity:
    """Output errors by layer and bits, with what an allocation under a budget needs.

    Attributes:
        layers: Module names (L).
        bits: Activation bits that were tried (B).
        matrix: (L, B) float64, normalised mean squared error of the model's output.
        present_bits: Activation bits that each layer has in the model (L).
        costs: Weights of each layer (L), which is its multiply-accumulates per token.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    matrix: Tensor
    present_bits: tuple[int, ...]
    costs: tuple[int, ...]

    @property
    def average_bits(self) -> float:
        """Mean present bits of these layers, weighted by cost."""
        return _weighted_mean(self.present_bits, self.costs)


def layer_sensitivity(
    network: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    bits: Sequence[int],
    seed: int = 0,
    timesteps: int = 8,
    *,
    layers: Sequence[str] = BLOCK_LINEARS,
    score: Score = "output",
    reference: nn.Module | None = None,
    reference_bits: Mapping[str, int] | None = None,
    known: Mapping[str, Sequence[float]] | None = None,
    on_row: Callable[[str, list[float]], None] | None = None,
    progress: bool = False,
    say: Callable[[str], None] | None = None,
) -> Sensitivity:
    """Measure S[l, b]: layer l alone at b activation bits, all others as they are.

    An entry is the mean over timesteps of ``mean((eps - eps_ref)^2) / mean(eps_ref^2)``, eps being
    the predicted noise. Each image is noised once per timestep, by seed and timestep alone.

    Args:
        network: Called as ``network(x_t, t, labels)``; its noise channels come first. Every layer
            has its own bits back afterwards, after an error too.
        images: Clean images (N, C, H, W) in the network's space.
        labels: (N,), or None for an unconditional network.
        bits: Activation bits to try.
        seed: Seed of the noise.
        timesteps: How many, at the middles of as many equal slices of the training schedule.
        layers: Globs over the names of quantized linear layers.
        score: How an entry is found.
        reference: Network whose output is taken as true, such as the float teacher, on the same
            device; by default ``network`` as it stands, so that present bits have error 0, or
        reference_bits: with these bits by layer.
        known: Rows by layer that are not to be measured again.
        on_row: Called with every row that was measured, so that it can be kept.
        progress: Whether to show a bar.
        say: Told, once it shows, how long the measurement is going to take.

    Raises:
        ValueError: No bits, or such as a quantizer refuses, timesteps outside 1..1000, a glob that
            matches no layer with an activation quantizer, or outputs that are not finite.
    """
    chosen = quantized_linears(network, layers)
    _check(bits, timesteps, chosen)
    rows = {name: list(row) for name, row in (known or {}).items() if name in chosen}
    missing = {name: layer for name, layer in chosen.items() if name not in rows}
    if missing:
        device = next(network.parameters()).device
        inputs = list(_noisy_batches(images, labels, seed, timesteps, device))
        truth = _truth(network, inputs, images.shape[1], reference, reference_bits or {})
        what = f"{len(missing)} layers at {len(bits)} bit-widths"
        batches = sum(1 for batch in inputs for _ in in_parts(batch))
        passes = _passes(missing, bits) if score == "output" else 1
        # A pass and one batch more: only at its end a pass waits for the GPU.
        with Meter(what, passes * batches, batches + 1, progress, say) as meter:
            for name, row in _ROWS[score](network, inputs, truth, missing, bits, meter.tick):
                _require_finite(name, bits, row)
                rows[name] = row
                if on_row is not None:
                    on_row(name, row)
    matrix = torch.tensor([rows[name] for name in chosen], dtype=torch.float64)
    present, costs = _bits_and_costs(chosen.values())
    return Sensitivity(tuple(chosen), tuple(bits), matrix, present, costs)


def output_error(
    network: nn.Module,
    reference: nn.Module,
    images: Tensor,
    labels: Tensor | None,
    seed: int = 0,
    timesteps: int = 8,
) -> float:
    """The normalised error of a network's predicted noise, as an entry of S is one.

    Arguments and errors as :func:`layer_sensitivity`.
    """
    _check((1,), timesteps, {})
    device = next(network.parameters()).device
    inputs = list(_noisy_batches(images, labels, seed, timesteps, device))
    return _error(network, inputs, _predictions(reference, inputs, images.shape[1]))


@contextmanager
def activation_bits(layer: QuantLinear, bits: int) -> Iterator[None]:
    """Give a layer other activation bits until the block ends.

    Raises:
        ValueError: The layer's activations are not quantized, or not to these bits.
    """
    before = layer.config
    layer.config = _with_bits(layer, bits)
    try:
        yield
    finally:
        layer.config = before


def quantized_linears(
    network: nn.Module, patterns: Sequence[str] = BLOCK_LINEARS
) -> dict[str, QuantLinear]:
    """Layers by name, in the network's order, that match any of the globs.

    Raises:
        ValueError: for a glob that matches none, or a layer without activation quantizer.
    """
    linears = {n: m for n, m in network.named_modules() if isinstance(m, QuantLinear)}
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in linears):
            known = ", ".join(list(linears)[:3]) or "none; quantize_ it first"
            raise ValueError(
                f"{pattern!r} matches no quantized linear layer; this network has {known}"
            )
    chosen = {n: m for n, m in linears.items() if any(fnmatchcase(n, p) for p in patterns)}
    for name, layer in chosen.items():
        with _naming(name):
            _quantizer(layer)
    return chosen


@contextmanager
def _naming(layer: str) -> Iterator[None]:
    """Say in user errors which layer they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"layer {layer!r}: {error}") from error


def _check(bits: Sequence[int], timesteps: int, chosen: Mapping[str, QuantLinear]) -> None:
    if not bits:
        raise ValueError("no bits to try; pass at least one, such as (1, 2, 3, 4)")
    if not 1 <= timesteps <= _TRAINING.steps:
        raise ValueError(
            f"timesteps={timesteps} is outside 1..{_TRAINING.steps}; 8 are usually enough"
        )
    for name, layer in chosen.items():  # before hours of measuring, not after
        with _naming(name):
            for b in bits:
                _with_bits(layer, b)


def _with_bits(layer: QuantLinear, bits: int) -> LayerConfig:
    return replace(layer.config, activation=replace(_quantizer(layer), bits=bits))


def _quantizer(layer: QuantLinear) -> ActivationQuantizer:
    if layer.config.activation is None:
        raise ValueError(
            "activations are not quantized, so there are no bits; choose layers that have an "
            "activation quantizer"
        )
    return layer.config.activation


def _bits_and_costs(chosen: Collection[QuantLinear]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    bits = tuple(_quantizer(layer).bits for layer in chosen)
    return bits, tuple(layer.weight.numel() for layer in chosen)


def _weighted_mean(values: Iterable[int], weights: Sequence[int]) -> float:
    return sum(v * w for v, w in zip(values, weights, strict=True)) / sum(weights)


def _noisy_batches(
    images: Tensor, labels: Tensor | None, seed: int, timesteps: int, device: torch.device
) -> Iterator[Batch]:
    """One batch per timestep; the noise is drawn on the CPU, alike for every device."""
    for index in range(timesteps):
        step = (2 * index + 1) * _TRAINING.steps // (2 * timesteps)
        noise = torch.randn(images.shape, generator=generator_for(seed, "sensitivity", step))
        t = torch.full((len(images),), step, device=device)
        x_t = _TRAINING.add_noise(images.to(device), noise.to(device, images.dtype), t)
        yield x_t, t, None if labels is None else labels.to(device)


def _passes(layers: Mapping[str, QuantLinear], bits: Sequence[int]) -> int:
    """Over all inputs, for the output's error: at present bits only one, for all layers."""
    return 1 + sum(b != _quantizer(layer).bits for layer in layers.values() for b in bits)


def _require_finite(layer: str, bits: Sequence[int], row: Sequence[float]) -> None:
    broken = [b for b, error in zip(bits, row, strict=True) if not isfinite(error)]
    if broken:
        raise ValueError(
            f"with {layer!r} at {', '.join(map(str, broken))} bits the network's output is not "
            "finite; leave these bits out of the choices, or, where it is so at all bits, check "
            "the weights and the learning rates that led to them"
        )


def _truth(
    network: nn.Module,
    inputs: Sequence[Batch],
    channels: int,
    reference: nn.Module | None,
    reference_bits: Mapping[str, int],
) -> list[Tensor]:
    with ExitStack() as stack:
        if reference is None:
            for name, layer in quantized_linears(network, [*reference_bits]).items():
                stack.enter_context(activation_bits(layer, reference_bits[name]))
        truth = _predictions(network if reference is None else reference, inputs, channels)
    if not all(bool(output.isfinite().all()) for output in truth):
        raise ValueError(
            "the reference network's output is not finite, so no error can be measured against it; "
            "check its weights"
        )
    return truth


def _nothing() -> None:
    """What a batch that nobody counts does."""


def _output_rows(
    network: nn.Module,
    inputs: Sequence[Batch],
    truth: Sequence[Tensor],
    layers: Mapping[str, QuantLinear],
    bits: Sequence[int],
    tick: Callable[[], None],
) -> Iterator[tuple[str, list[float]]]:
    """The error of the output itself: a pass over the inputs per layer and bits."""
    unchanged = _error(network, inputs, truth, tick)
    for name, layer in layers.items():
        row = []
        for b in bits:
            if b == _quantizer(layer).bits:
                row.append(unchanged)
            else:
                with activation_bits(layer, b):
                    row.append(_error(network, inputs, truth, tick))
        yield name, row


@torch.no_grad()
def _predictions(
    network: nn.Module, inputs: Iterable[Batch], channels: int, tick: Callable[[], None] = _nothing
) -> list[Tensor]:
    found = []
    for batch in inputs:
        parts = []
        for part in in_parts(batch):
            parts.append(network(*part)[:, :channels])
            tick()
        found.append(torch.cat(parts))
    return found


def _error(
    network: nn.Module,
    inputs: Sequence[Batch],
    truth: Sequence[Tensor],
    tick: Callable[[], None] = _nothing,
) -> float:
    """Mean over timesteps of the normalised error."""
    found = _predictions(network, inputs, truth[0].shape[1], tick)
    return fmean(normalized_error(*pair) for pair in zip(found, truth, strict=True))


_ROWS = {"output": _output_rows, "local_gradient": local_gradient_rows}
