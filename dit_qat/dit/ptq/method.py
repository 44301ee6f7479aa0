"""What a post-training method tells the engine, and what it is given to work with."""

from abc import ABC
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_qat.calibration import BlockView, CallStore, LinearStatistics, Needs, Prefix
from dit_qat.dit.ptq.target import PTQTarget
from dit_qat.dit.ptq.trajectory import Trajectory
from dit_qat.layers.int_linear import IntLinear

__all__ = ["PTQMethod", "PTQRun", "float_twin"]


@dataclass
class PTQRun:
    """One run of a method over one model.

    Attributes:
        model: Being quantized, in place.
        target: Which of its layers.
        store: Recorded calls.
        trajectory: Steps of a sampler; None for a diffusers pipeline.
        seed: Of everything that is drawn.
        progress: Whether to show bars.
        names: Full names of the linears to quantize; the target finds them while they are float.
        reference: The float model; it shares every tensor with ``model`` but those of layers that
            have been replaced, so a method must not change tensors in place.
        step_weights: Weights of the second moment by sampler step (steps,), by full name of a
            linear; a method may fill it in :meth:`PTQMethod.start`.
        layers: Plain values about each linear that a method wants kept, by full name.
        report: Plain values about the run for the report and ``metrics.json``.
    """

    model: nn.Module
    target: PTQTarget
    store: CallStore
    trajectory: Trajectory | None = None
    seed: int = 0
    progress: bool = False
    names: list[str] = field(init=False)
    reference: nn.Module = field(init=False)
    step_weights: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = list(self.target.linears())
        self.reference = float_twin(self.model)

    def note(self, layer: str, **values: Any) -> None:
        """Keep plain values about a linear; they survive a kill together with its block."""
        self.layers.setdefault(layer, {}).update(values)


class PTQMethod(ABC):
    """A post-training method: what it needs, and how it quantizes a block.

    It walks no model and opens no file. Subclasses set ``name`` and ``config`` (a frozen dataclass)
    and override :meth:`quantize_linear` or :meth:`quantize_block`.
    """

    name: ClassVar[str]
    config: Any

    @property
    def needs(self) -> Needs:
        """What is gathered about every linear."""
        return Needs()

    @property
    def prefix(self) -> Prefix:
        """Which blocks before a block are quantized while its statistics are gathered."""
        return "all"

    def start(self, run: PTQRun) -> None:  # noqa: B027
        """Prepare, while the model is float; refuse here what would fail hours later."""

    def quantize_block(self, view: BlockView) -> Mapping[str, IntLinear]:
        """Quantize the linears of one block; those that are absent stay float."""
        found = {}
        for name, linear in view.linears.items():
            try:
                found[name] = self.quantize_linear(name, linear, view.statistics[name])
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
        return found

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        """Quantize one linear; ``name`` is its full name."""
        raise NotImplementedError(f"{type(self).__name__} defines no way to quantize a linear")

    def finish(self, run: PTQRun) -> None:  # noqa: B027
        """Work on the whole quantized model: policies, searches."""


def float_twin(model: nn.Module) -> nn.Module:
    """A copy of a model's modules around the same tensors: layers replaced in one stay in it."""
    tensors = (*model.parameters(), *model.buffers())
    return deepcopy(model, {id(tensor): tensor for tensor in tensors})
