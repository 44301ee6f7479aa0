"""How far two networks are apart, on inputs that are always the same."""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.dit.models.dit import DiT
from dit_qat.dit.randomness import generator_for

__all__ = ["TIMESTEPS", "Difference", "Inputs", "difference", "fixed_inputs", "outputs"]

TIMESTEPS = (0, 10, 100, 250, 500, 750, 999)
"""One image each."""


class Inputs(NamedTuple):
    """Arguments of a DiT: images (N, C, H, W), timesteps (N,), labels (N,) or None."""

    x: Tensor
    t: Tensor
    y: Tensor | None


@dataclass(frozen=True)
class Difference:
    """Norm of the difference of two outputs over the norm of the first.

    Attributes:
        overall: Over all inputs.
        by_timestep: For each input, by its timestep.
    """

    overall: float
    by_timestep: dict[int, float]

    @property
    def largest(self) -> tuple[int, float]:
        """The timestep that differs most, and by how much."""
        return max(self.by_timestep.items(), key=lambda item: item[1])


def fixed_inputs(network: DiT) -> Inputs:
    """Gaussian noise at several timesteps, labels spread over the classes, the last one null."""
    rows, size = len(TIMESTEPS), network.input_size
    generator = generator_for(0, "convert")
    x = torch.randn(rows, network.in_channels, size, size, generator=generator)
    t = torch.tensor(TIMESTEPS)
    if not network.num_classes:
        return Inputs(x, t, None)
    y = torch.arange(rows) * network.num_classes // rows
    if network.class_dropout_prob:
        y[-1] = network.null_class
    return Inputs(x, t, y)


def outputs(forward: Callable[[Tensor, Tensor, Tensor | None], Tensor], inputs: Inputs) -> Tensor:
    """What a network in evaluation mode predicts, (N, out_channels, H, W)."""
    with torch.inference_mode():
        return forward(*inputs)


def difference(before: Tensor, after: Tensor) -> Difference:
    """Compare two outputs of :func:`outputs`."""
    rows = zip(TIMESTEPS, before, after, strict=True)
    return Difference(_relative(before, after), {t: _relative(a, b) for t, a, b in rows})


def _relative(before: Tensor, after: Tensor) -> float:
    error, size = (float(part.double().norm()) for part in (after - before, before))
    if error == 0:
        return 0.0
    return error / size if size else inf
