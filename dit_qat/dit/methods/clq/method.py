"""CLQ (arXiv:2509.24416): orthogonal smoothing and clipping bounds, behind quantized blocks.

Cross-block calibration is the driver's quantized prefix: inputs come from quantized blocks, the
block itself is float while it is recorded.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from dit_qat.calibration import BlockView, LinearStatistics, Needs, Prefix
from dit_qat.dit.methods.clq.parameters import (
    Ahead,
    Bounds,
    LayerTrial,
    Search,
    bounded_scales,
    find_target,
    search_bounds,
)
from dit_qat.dit.methods.clq.smoothing import (
    Permutation,
    Score,
    Smoothing,
    channel_scores,
    choose_smoothing,
    smoothings,
)
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.dit.randomness import derive_seed
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.rounding import transformed_moment
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.compensation import column_by_column, compensate
from dit_qat.primitives.integer import IntegerGrid, decode, encode

__all__ = ["CLQ", "CLQConfig"]


Bounded = Literal["both", "weights", "activations", "none"]


@dataclass(frozen=True)
class CLQConfig:
    """Settings of :class:`CLQ`.

    Attributes:
        weight_bits: 2, 3, 4 or 8; asymmetric, per output channel.
        activation_bits: 2..8; asymmetric, per token; None: activations stay float.
        preset: ``paper`` rounds weights to nearest. ``exact`` (ours) makes later columns of the
            smoothed weight make up for earlier ones, as GPTQ does, and clips nothing: what clipping
            wins at a target it loses along the sampler's path, where its bias adds up.
        previous_blocks: Calibrate behind ``all`` quantized blocks or only the ``previous`` one.
        score: Of channels: .999 quantile of magnitude (``absmax``) or root mean square.
        permutations: Tried in front of the Hadamard, by measured error of the layer.
        signs: Try random signs in front of it as well.
        block_size: Largest Hadamard block; None: half of the width where that has an order.
        ahead: Blocks behind the present one that a target may lie in.
        relative_target: Choose targets by relative L1 error; otherwise by raw L1.
        bounds: Search the clipping bounds of ``weights``, ``activations``, ``both`` or ``none``.
            None: of both for ``paper``, of none for ``exact``.
        values: Factors that are tried for a bound, evenly from ``least`` to 1.
        least: The smallest.
        search: Along one bound after the other, or over all pairs.
        patience: A walk along a bound ends after so many values without a new best; None: never,
            which alone makes sure of an optimum along each bound, in several times the time.
        tokens: Rows of each layer's input that smoothings are compared on.
        probe_calls: Recorded calls that bounds are compared on.
        probe_rows: First rows of each of them.

    Raises:
        ValueError: for values out of range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    preset: Literal["paper", "exact"] = "paper"
    previous_blocks: Literal["all", "previous"] = "all"
    score: Score = "absmax"
    permutations: tuple[Permutation, ...] = ("group", "zigzag", "none")
    signs: bool = True
    block_size: int | None = None
    ahead: int = 3
    relative_target: bool = True
    bounds: Bounded | None = None
    values: int = 20
    least: float = 0.5
    search: Search = "coordinate"
    patience: int | None = 3
    tokens: int = 512
    probe_calls: int = 8
    probe_rows: int = 4

    def __post_init__(self) -> None:
        object.__setattr__(self, "permutations", tuple(self.permutations))
        _ = self.grid, self.activation  # refuse bad bits now
        if self.bounds is None:
            object.__setattr__(self, "bounds", "none" if self.preset == "exact" else "both")
        kinds = {
            "preset": ("paper", "exact"),
            "previous_blocks": ("all", "previous"),
            "score": get_args(Score),
            "bounds": get_args(Bounded),
            "search": get_args(Search),
        }
        for name, known in kinds.items():
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")
        if not self.permutations or not {*self.permutations} <= {*get_args(Permutation)}:
            raise ValueError(
                f"permutations={self.permutations} must be some of {get_args(Permutation)}"
            )
        for name, low in (
            ("ahead", 0),
            ("values", 1),
            ("tokens", 1),
            ("probe_calls", 1),
            ("probe_rows", 1),
        ):
            if getattr(self, name) < low:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {low}")
        if not 0 < self.least <= 1:
            raise ValueError(f"least={self.least} must be above 0 and up to 1")

    @property
    def grid(self) -> IntegerGrid:
        """Of the weights."""
        return IntegerGrid(self.weight_bits, symmetric=False)

    @property
    def activation(self) -> TokenQuantizer | None:
        """Of the smoothed inputs."""
        bits = self.activation_bits
        return None if bits is None else TokenQuantizer(bits, symmetric=False)

    @property
    def factors(self) -> list[float]:
        """Of clipping bounds."""
        found: list[float] = torch.linspace(self.least, 1.0, self.values).tolist()
        return found


class CLQ(PTQMethod):
    """CLQ: cross-block calibration, orthogonal-based smoothing, cross-layer parameter search.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`CLQConfig`.
    """

    name: ClassVar[str] = "clq"
    config: CLQConfig

    def __init__(self, config: CLQConfig | None = None, **kwargs: Any) -> None:
        refuse_both("CLQ", config, kwargs)
        self.config = CLQConfig(**kwargs) if config is None else config
        self._run: PTQRun | None = None

    @property
    def needs(self) -> Needs:
        """Rows of every input."""
        c = self.config
        exact = c.preset == "exact"
        return Needs(exact, tokens=c.tokens, ranges=False, probe_calls=c.probe_calls)

    @property
    def prefix(self) -> Prefix:
        """All blocks before, or the one before."""
        return self.config.previous_blocks

    def start(self, run: PTQRun) -> None:
        """Refuse widths without a rotation before anything is recorded."""
        self._run = run
        for name, linear in run.target.linears().items():
            smoothings(
                torch.ones(linear.in_features), ("none",), self.config.block_size, (0,), name
            )

    def quantize_block(self, view: BlockView) -> dict[str, IntLinear]:
        """Smooth every linear, then search its bounds, the others of the block being float."""
        ahead = (
            None
            if self.config.bounds == "none"
            else Ahead(view, self.config.ahead, self.config.probe_rows)
        )
        return {name: self._layer(name, view, ahead) for name in view.linears}

    def _layer(self, name: str, view: BlockView, ahead: Ahead | None) -> IntLinear:
        statistics, linear = view.statistics[name], view.linears[name]
        smoothing, error = self._smoothing(name, linear.weight.detach().float(), statistics)
        weight = smoothing.transform.weight(linear.weight.detach())
        trial = LayerTrial(
            linear, weight, smoothing.transform, self.config.grid, self.config.activation
        )
        target, weight_bounds, token_bounds = name, (1.0, 1.0), (1.0, 1.0)
        if ahead is not None:
            target = find_target(ahead, name, trial, self.config.relative_target)
            if self.config.bounds != "activations":
                weight_bounds = self._weight_bounds(ahead, name, trial, target)
        codes = self._compensated(trial, weight_bounds, statistics)
        layer = trial.quantized(weight_bounds, codes=codes)
        activation = self.config.activation
        if ahead is not None and activation is not None and self.config.bounds != "weights":
            token_bounds = self._token_bounds(ahead, name, layer, target)
            layer = layer.with_activation(_clipped(activation, token_bounds))
        assert self._run is not None
        self._run.note(
            name,
            permutation=smoothing.permutation,
            signs=smoothing.signs,
            smoothing_error=error,
            target=target,
            weight_bounds=[*weight_bounds],
            activation_bounds=[*token_bounds],
        )
        return layer

    def _smoothing(
        self, name: str, weight: Tensor, statistics: LinearStatistics
    ) -> tuple[Smoothing, float]:
        c = self.config
        assert self._run is not None
        seed = derive_seed(self._run.seed, "rotation", name)
        seeds = (None, seed) if c.signs else (None,)
        scores = channel_scores(statistics, c.score)
        offered = smoothings(scores, c.permutations, c.block_size, seeds, name)
        return choose_smoothing(offered, weight, statistics.rows, c.grid, c.activation)

    def _weight_bounds(self, ahead: Ahead, name: str, trial: LayerTrial, target: str) -> Bounds:
        def error(bounds: Bounds) -> float:
            return ahead.squared_error(name, trial.quantized(bounds), target)

        return self._searched(error)

    def _token_bounds(self, ahead: Ahead, name: str, layer: IntLinear, target: str) -> Bounds:
        activation = self.config.activation
        assert activation is not None

        def error(bounds: Bounds) -> float:
            trial = layer.with_activation(_clipped(activation, bounds))
            return ahead.squared_error(name, trial, target)

        return self._searched(error)

    def _searched(self, error: Callable[[Bounds], float]) -> Bounds:
        c = self.config
        return search_bounds(error, c.factors, c.search, c.patience)[0]

    def _compensated(
        self, trial: LayerTrial, bounds: Bounds, statistics: LinearStatistics
    ) -> Tensor | None:
        """Codes on the clipped grid that make up for each other; None: the nearest ones."""
        if self.config.preset == "paper":
            return None
        assert statistics.second_moment is not None
        grid, scales = trial.grid, bounded_scales(trial.weight, trial.grid, bounds)
        codes = torch.empty(trial.weight.shape, dtype=torch.uint8, device=trial.weight.device)

        def column(weight: Tensor, at: Tensor) -> Tensor:
            codes[:, at] = encode(weight, grid, scales, at)
            return decode(codes[:, at], grid, scales, at)

        moment = transformed_moment(statistics.second_moment, trial.transform)
        compensate(trial.weight, moment, column_by_column(column))
        return codes


def _clipped(activation: TokenQuantizer, bounds: Bounds) -> TokenQuantizer:
    return TokenQuantizer(activation.bits, symmetric=False, clip=bounds)
