"""What every kind of packed module says about itself."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

__all__ = ["ModuleEntry", "Owned", "owned"]

_INNER = "transform"  # the module within a layer that holds vectors of its own


class ModuleEntry(Protocol):
    """What a packed linear layer is, without its tensors."""

    @property
    def in_features(self) -> int:
        """Input width."""

    @property
    def out_features(self) -> int:
        """Output width."""

    @property
    def bias(self) -> bool:
        """Whether there is a bias."""

    @property
    def version(self) -> int:
        """The first version of the format that has this kind."""

    @property
    def weights(self) -> str:
        """What the weights are, in a word."""

    @property
    def activation_bits(self) -> float | None:
        """Of the input, the mean over timesteps where they differ; None: float."""

    @property
    def by_timestep(self) -> bool:
        """Whether the layer asks for the model's timestep."""

    @property
    def adds_bias(self) -> bool:
        """Whether there may be a bias where the float layer has none."""

    def make(self, device: torch.device | str) -> nn.Module:
        """A layer with room for the tensors.

        Raises:
            ValueError: for settings that do not fit together.
        """

    def as_json(self) -> dict[str, Any]:
        """Plain values."""

    def stored_shape(self, leaf: str, resident: Tensor) -> tuple[int, ...]:
        """Shape in the file of what is ``resident`` in memory."""

    def is_passing(self, leaf: str) -> bool:
        """Whether memory gets another form of what is in the file."""

    def resident(self, leaf: str, stored: Tensor) -> Tensor:
        """Check a tensor of the file, and give it the form that it has in memory.

        Raises:
            ValueError: for values that no writer writes.
        """

    def check(self, layer: nn.Module) -> None:
        """Check a layer of :meth:`make` that has all its tensors.

        Raises:
            ValueError: for tensors that do not fit together.
        """


class Owned(NamedTuple):
    """A tensor's place: the packed layer that it belongs to and its name there."""

    layer: str
    leaf: str


def owned(name: str, layers: Mapping[str, ModuleEntry]) -> Owned | None:
    """Whose tensor this is; None for those of float modules."""
    owner, _, leaf = name.rpartition(".")
    if owner in layers:
        return Owned(owner, leaf)
    outer, _, inner = owner.rpartition(".")
    if inner == _INNER and outer in layers:
        return Owned(outer, f"{inner}.{leaf}")
    return None
