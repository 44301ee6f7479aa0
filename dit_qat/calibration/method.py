"""What a method tells the engine, and what it is given to work with."""

from abc import ABC
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Generic, TypeVar

from torch import Tensor, nn

from dit_qat.calibration.calls import CallStore
from dit_qat.calibration.driver import Prefix
from dit_qat.calibration.statistics import LinearStatistics, Needs
from dit_qat.calibration.target import Target
from dit_qat.calibration.view import BlockView

__all__ = ["BlockMethod", "Method", "Run"]


@dataclass
class Run:
    """One run of a method over one model.

    Attributes:
        model: Being quantized, in place.
        target: Which of its layers.
        store: Recorded calls.
        seed: Of everything that is drawn.
        progress: Whether to show bars.
        names: Full names of the linears to quantize; the target finds them while they are float.
        step_weights: Weights of the second moment by sampler step (steps,), by full name of a
            linear; a method may fill it in :meth:`BlockMethod.start`.
        layers: Plain values about each linear that a method wants kept, by full name.
        report: Plain values about the run for the report and ``metrics.json``.
    """

    model: nn.Module
    target: Target
    store: CallStore
    seed: int = 0
    progress: bool = False
    names: list[str] = field(init=False)
    step_weights: dict[str, Tensor] = field(default_factory=dict)
    layers: dict[str, dict[str, Any]] = field(default_factory=dict)
    report: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.names = list(self.target.linears())

    def note(self, layer: str, **values: Any) -> None:
        """Keep plain values about a linear; they survive a kill together with its block."""
        self.layers.setdefault(layer, {}).update(values)


RunT = TypeVar("RunT", bound=Run)
LayerT = TypeVar("LayerT", bound=nn.Module, covariant=True)


class BlockMethod(ABC, Generic[RunT, LayerT]):
    """A method that quantizes block by block: what it needs, and how.

    It walks no model and opens no file. Subclasses set ``name`` and ``config`` (a frozen dataclass)
    and override :meth:`quantize_linear` or :meth:`quantize_block`. The parameters are the kind of
    run that it asks for and the kind of layer that it makes.
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

    def start(self, run: RunT) -> None:
        """Prepare, while the model is float; refuse here what would fail hours later."""

    def quantize_block(self, view: BlockView) -> Mapping[str, LayerT]:
        """Quantize the linears of one block; those that are absent stay float."""
        found = {}
        for name, linear in view.linears.items():
            try:
                found[name] = self.quantize_linear(name, linear, view.statistics[name])
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error
        return found

    def quantize_linear(self, name: str, linear: nn.Linear, statistics: LinearStatistics) -> LayerT:
        """Quantize one linear; ``name`` is its full name."""
        raise NotImplementedError(f"{type(self).__name__} defines no way to quantize a linear")

    def finish(self, run: RunT) -> None:
        """Work on the whole quantized model: policies, searches."""


class Method(BlockMethod[Run, nn.Module]):
    """A method for any model: it asks for a plain run, and may make any layer."""
