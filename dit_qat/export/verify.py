"""In memory against packed: do both compute the same?"""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import inf, isnan
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.export.packers import PACKERS, quantized_layers

__all__ = ["LAYER_LIMIT", "OUTPUT_LIMIT", "Agreement", "verify_packed"]

LAYER_LIMIT = 1e-5
"""Of a layer in float32 on the same input: float rounding of the branch, nothing else."""

OUTPUT_LIMIT = 1e-3
"""Of the model: rounding in one layer may move a code by one in the next."""


@dataclass(frozen=True)
class Agreement:
    """Largest relative differences: largest difference over largest magnitude.

    Attributes:
        layers: By layer, each on the input that the fake-quantized one received.
        output: Of the models' outputs.
    """

    layers: Mapping[str, float]
    output: float

    @property
    def worst_layer(self) -> tuple[str, float]:
        """The layer that differs most."""
        return max(self.layers.items(), key=lambda item: item[1])

    def check(self, layer_limit: float = LAYER_LIMIT, output_limit: float = OUTPUT_LIMIT) -> None:
        """Refuse what differs beyond float rounding.

        Raises:
            ValueError: naming the layer.
        """
        name, difference = self.worst_layer
        if not difference <= layer_limit:
            raise ValueError(
                f"packed layer {name!r} differs from the trained one by {difference:.2g}, beyond "
                f"{layer_limit:g}; the model was not trained with what is packed (a branch of "
                "other precision?)"
            )
        if not self.output <= output_limit:
            raise ValueError(
                f"the packed model's output differs by {self.output:.2g}, beyond {output_limit:g}, "
                "while its layers agree; a float part is stored in too few bits"
            )


@torch.no_grad()
def verify_packed(
    model: nn.Module,
    packed: nn.Module,
    inputs: tuple[Any, ...],
    named: Mapping[str, Any] | None = None,
) -> Agreement:
    """Run both models on fixed inputs, and every packed layer on what the trained one received.

    Args:
        model: Fake-quantized, or quantized after training.
        packed: The same as it was written and loaded, on the same device, its float parts in the
            same dtypes.
        inputs: Positional arguments of both.
        named: Arguments of both by name.

    Raises:
        ValueError: if a quantized layer has no packed twin, or saw no input.
    """
    layers = quantized_layers(model)
    wanted = {packer.packed for packer in PACKERS.values()}
    twins = {name: m for name, m in packed.named_modules() if type(m) in wanted}
    unlike = layers.keys() ^ twins.keys()
    unlike |= {n for n in layers.keys() & twins.keys() if not _are_twins(layers[n], twins[n])}
    if unlike:
        raise ValueError(
            f"the models differ in {', '.join(sorted(unlike)[:3])}; compare a model with what was "
            "packed from it"
        )
    found: dict[str, float] = {}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = partial(_compare, name, twins[name], found)
            handle = layer.register_forward_hook(hook)
            hooks.callback(handle.remove)
        expected = model(*inputs, **(named or {}))
    unseen = layers.keys() - found.keys()
    if unseen:
        raise ValueError(f"the inputs do not reach layer {min(unseen)!r}; give others")
    return Agreement(found, _largest_difference(packed(*inputs, **(named or {})), expected))


def _are_twins(layer: nn.Module, packed: nn.Module) -> bool:
    return type(packed) is PACKERS[type(layer)].packed


def _compare(
    name: str,
    twin: nn.Module,
    found: dict[str, float],
    layer: nn.Module,
    inputs: tuple[Tensor, ...],
    output: Tensor,
) -> None:
    found[name] = max(found.get(name, 0.0), _difference(twin(*inputs), output))


def _largest_difference(value: Any, reference: Any) -> float:
    """Over all tensors of two outputs, which models nest in containers of their own."""
    pairs = zip(_tensors(value), _tensors(reference), strict=True)
    return max(_difference(a, b) for a, b in pairs)


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, Mapping | list | tuple):
        for part in output.values() if isinstance(output, Mapping) else output:
            yield from _tensors(part)


def _difference(value: Tensor, reference: Tensor) -> float:
    """What is not finite counts as infinite: a NaN would be lost where the largest is sought."""
    error = (value.double() - reference.double()).abs().max()
    largest = reference.double().abs().max()
    found = float(error / largest) if largest > 0 else float(error)
    return inf if isnan(found) else found
