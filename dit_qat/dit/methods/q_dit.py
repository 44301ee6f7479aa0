"""Q-DiT (arXiv:2406.17343): groups of inputs share scales, and an evolution finds their sizes."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import Any, ClassVar

from torch import nn

from dit_qat.calibration import LinearStatistics, Needs, swapped
from dit_qat.dit.methods.evolution import Evolution, Genes, evolve
from dit_qat.dit.methods.output_error import OutputError
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.ptq.evaluation import spread_calls
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.dit.randomness import derive_seed
from dit_qat.layers import IntLinear, TokenQuantizer
from dit_qat.layers.rounding import (
    GPTQSettings,
    Rounding,
    legal_group,
    nearest_layer,
    round_gptq,
)
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["QDiT", "QDiTConfig"]

_LOG = logging.getLogger(__name__)

Fitness = Callable[[nn.Module], float]
"""From a model whose layers are quantized as a candidate says to a score, lower being better."""


@dataclass(frozen=True)
class QDiTConfig:
    """Settings of :class:`QDiT`.

    Attributes:
        weight_bits: 2, 3, 4 or 8; asymmetric, a scale per group.
        activation_bits: 2..8; asymmetric, a scale per token and group; None: float.
        group_size: Without a search; where it does not divide a width, the largest smaller one.
        rounding: ``gptq``, as the release is run, or ``nearest``.
        gptq: Settings of ``rounding="gptq"``.
        search: Sizes of the search of group sizes; None: ``group_size`` everywhere.
        sizes: What the search may choose from, as far as they divide a layer's width.
        least_mean: Least mean group size over layers, each counted once; never above that of
            ``group_size`` everywhere, so that this is legal.
        search_calls: Recorded calls on which candidates are compared.

    Raises:
        ValueError: for bits, groups or calls outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    group_size: int = 128
    rounding: Rounding = "gptq"
    gptq: GPTQSettings = field(default_factory=GPTQSettings)
    search: Evolution | None = field(default_factory=Evolution)
    sizes: tuple[int, ...] = (32, 64, 128, 192, 288)
    least_mean: float = 128.0
    search_calls: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "sizes", tuple(self.sizes))
        for size in (self.group_size, *self.sizes):
            self.grid(size)
            self.activation(size)
        if self.search_calls < 1:
            raise ValueError(f"search_calls={self.search_calls} is below 1; 2 or more will do")

    def grid(self, group: int, symmetric: bool = False) -> IntegerGrid:
        """Of weights with this group."""
        return IntegerGrid(self.weight_bits, symmetric, group)

    def activation(self, group: int, symmetric: bool = False) -> TokenQuantizer | None:
        """Of inputs with this group."""
        bits = self.activation_bits
        return None if bits is None else TokenQuantizer(bits, symmetric, group)


class QDiT(PTQMethod):
    """Q-DiT; weights and activations of a layer share one group size.

    The paper's fitness is the FID of 800 samples. Here it is the squared error of the model's
    output; another one is a function of the model with a candidate's layers in it.

    Args:
        config: The whole configuration, or else
        fitness: Of a model; None: its output error on recorded calls.
        kwargs: fields of :class:`QDiTConfig`.
    """

    name: ClassVar[str] = "q_dit"
    config: QDiTConfig

    def __init__(
        self, config: QDiTConfig | None = None, fitness: Fitness | None = None, **kwargs: Any
    ) -> None:
        refuse_both("QDiT", config, kwargs)
        self.config = QDiTConfig(**kwargs) if config is None else config
        self.fitness = fitness
        self.group_sizes: dict[str, int] = {}

    @property
    def needs(self) -> Needs:
        """Second moments for GPTQ."""
        return Needs(second_moment=self.config.rounding == "gptq", ranges=False)

    def start(self, run: PTQRun) -> None:
        """Search group sizes on the float model, whose layers are rounded to nearest for it."""
        c, linears = self.config, run.target.linears()
        default = {n: legal_group(x.in_features, c.group_size) for n, x in linears.items()}
        self.group_sizes = default
        if c.search is None:
            return
        space = _SearchSpace(c, linears, default)
        if space.is_single:
            _LOG.info("no mix of the sizes %s has a legal mean; all groups as they are", c.sizes)
            return
        error = OutputError(run.model, spread_calls(run.store, c.search_calls))

        def fitness(genes: Genes) -> float:
            layers = space.layers(genes)
            if self.fitness is None:
                return error(layers)
            with swapped(run.model, layers):
                return self.fitness(run.model)

        seed = derive_seed(run.seed, self.name)
        found = evolve(space.choices, space.start, fitness, space.legal, c.search, seed)
        self.group_sizes = dict(zip(linears, found.genes, strict=True))
        run.report |= {
            "group_sizes": self.group_sizes,
            "search_history": found.history,
            "search_candidates": found.evaluated,
        }

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        """Round in groups of the size found."""
        c = self.config
        group = self.group_sizes.get(name, legal_group(linear.in_features, c.group_size))
        grid = c.grid(group)
        if c.rounding == "nearest":
            return nearest_layer(linear, grid, c.activation(group))
        codes, scales, _ = round_gptq(linear.weight, statistics.second_moment, grid, c.gptq)
        return IntLinear.build(
            linear, grid=grid, scales=scales, codes=codes, activation=c.activation(group)
        )


class _SearchSpace:
    """Group sizes of all layers, and the layers that they make, each rounded once."""

    def __init__(
        self, config: QDiTConfig, linears: dict[str, nn.Linear], default: dict[str, int]
    ) -> None:
        self.config, self.linears = config, linears
        self.start: Genes = tuple(default.values())
        self.choices: Sequence[Sequence[int]] = [
            sorted({default[name], *(s for s in config.sizes if linear.in_features % s == 0)})
            for name, linear in linears.items()
        ]
        self.least_mean = min(config.least_mean, fmean(self.start))
        self._made: dict[tuple[str, int], IntLinear] = {}

    @property
    def is_single(self) -> bool:
        """Whether the start is all there is: no size below it can be paid for by one above."""
        above = any(max(c) > gene for c, gene in zip(self.choices, self.start, strict=True))
        return not above and fmean(self.start) <= self.least_mean

    def legal(self, genes: Genes) -> bool:
        return fmean(genes) >= self.least_mean

    def layers(self, genes: Genes) -> dict[str, IntLinear]:
        pairs = zip(self.linears, genes, strict=True)
        return {name: self._layer(name, size) for name, size in pairs}

    def _layer(self, name: str, size: int) -> IntLinear:
        if (name, size) not in self._made:
            linear, grid = self.linears[name], self.config.grid(size, symmetric=True)
            activation = self.config.activation(size, symmetric=True)
            self._made[name, size] = nearest_layer(linear, grid, activation)
        return self._made[name, size]
