"""AdaTSQ's weights: a strong base, then error compensation weighted by temporal Fisher information.

``min sum_t alpha[t] ||X_t W^T - X_t Q^T||^2`` per layer is GPTQ with
``H' = sum_t alpha[t] X_t^T X_t / n_t`` (AdaTSQ, arXiv:2602.09883). What it rests on is unknown; as
plain integers do not reach its numbers, the default base is SVDQuant's smoothing and branch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_qat.calibration.view import BlockView
from dit_qat.dit.methods.adatsq.solver import (
    Moments,
    input_moments,
    rows_wanted,
    weighted_factors,
)
from dit_qat.dit.methods.rotation import rotation_of
from dit_qat.dit.methods.svdquant import (
    Branched,
    SharedLayers,
    SVDQuantConfig,
    iterate_branch,
    stacked_layers,
)
from dit_qat.dit.randomness import derive_seed
from dit_qat.layers.input_transform import InputTransform, Rotate
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.rounding import (
    ClipSearch,
    GPTQSettings,
    Rounded,
    legal_group,
    round_gptq,
)
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.integer import IntegerGrid, Scales

__all__ = ["Base", "WeightSettings", "solve_block"]

_COARSE_BITS = 3
_LEAST_ROWS = 4096

Base = Literal["plain", "hadamard", "svd"]


@dataclass(frozen=True)
class WeightSettings:
    """How weights are quantized.

    Attributes:
        bits: 2, 3, 4 or 8, symmetric.
        base: ``svd`` (smoothing and a low-rank branch), ``hadamard`` (a rotation) or ``plain``.
        activation_bits: What smoothing counts on; the search changes them later.
        group_size: Inputs that share a scale, of weights and activations.
        rank: Of the branch.
        iterations: Most rounds of the branch.
        grid_steps: Of the smoothing exponents.
        gptq: Damping, blocks and order.
        round_activations: Count the rounding of activations at ``activation_bits`` in the error
            that weights are solved for (ours). None: at 3 bits and below; above, the noise that it
            takes out is less than the bias that it brings in.
        refits: Most turns of refitting branch and codes to each other under the weighted error.
        clip: Search of the weights' range; None: the full one.
        tokens: Rows of each input that the rounding of activations is estimated on; None: four
            for every input of the widest layer, at least 4,096.
        probe_calls: Calls on which candidates for the smoothing are compared.

    Raises:
        ValueError: for values out of range.
    """

    bits: int = 4
    base: Base = "svd"
    activation_bits: int = 4
    group_size: int = 64
    rank: int = 32
    iterations: int = 100
    grid_steps: int = 20
    gptq: GPTQSettings = field(default_factory=lambda: GPTQSettings(block_size=64))
    round_activations: bool | None = None
    refits: int = 4
    clip: ClipSearch | None = field(
        default_factory=lambda: ClipSearch(values=20, least=0.6, exponent=2.0)
    )
    tokens: int | None = None
    probe_calls: int = 4

    def __post_init__(self) -> None:
        if self.base not in get_args(Base):
            raise ValueError(f"base={self.base!r} is unknown; use one of {get_args(Base)}")
        if self.refits < 0:
            raise ValueError(f"refits={self.refits} is below 0; 0 is for none")
        if self.tokens is not None and self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} is below 1; None is usual")
        _ = self.svdquant  # refuses bad settings now

    def rows(self, widest: int) -> int:
        """Rows of each input to keep, where the widest layer has ``widest`` inputs."""
        if not self.counts_rounding:
            return 0
        return max(_LEAST_ROWS, rows_wanted(widest)) if self.tokens is None else self.tokens

    @property
    def counts_rounding(self) -> bool:
        """Whether the rounding of activations counts in the error of weights."""
        asked = self.round_activations
        return self.activation_bits <= _COARSE_BITS if asked is None else asked

    @property
    def svdquant(self) -> SVDQuantConfig:
        """The settings of smoothing and branch; neither for the plain base."""
        config = SVDQuantConfig(
            weight_bits=self.bits,
            activation_bits=self.activation_bits,
            group_size=self.group_size,
            rank=self.rank,
            iterations=self.iterations,
            grid_steps=self.grid_steps,
            probe_calls=self.probe_calls,
        )
        return config if self.base == "svd" else replace(config, rank=0, grid_steps=1)


def solve_block(
    view: BlockView,
    settings: WeightSettings,
    seed: int,
    step_weights: Mapping[str, Tensor] | None = None,
) -> dict[str, IntLinear]:
    """Quantize the linears of a block on the second moments of their statistics.

    Args:
        view: The block.
        settings: How.
        seed: Of the rotations' signs.
        step_weights: Those of the second moments, by full name.

    Raises:
        ValueError: for a width that cannot be rotated, or groups that do not divide one.
    """
    weights = step_weights or {}
    layers: dict[str, IntLinear] = {}
    if settings.base == "hadamard":
        for name in view.linears:
            layers[name] = _rotated(view, name, settings, seed, weights.get(name))
        return layers
    for names in stacked_layers(view):
        shared = SharedLayers(view, names, settings.svdquant)
        layers |= _Branched(shared, settings, weights).layers()
    return layers


class _Branched:
    """Linears of one input: one smoothing and branch, each layer's rows by its own moments."""

    def __init__(
        self, shared: SharedLayers, settings: WeightSettings, step_weights: Mapping[str, Tensor]
    ) -> None:
        self.shared, self.settings = shared, settings
        self.sizes = [linear.out_features for linear in shared.linears]
        self.s = shared.best_smoothing()
        self.weight = shared.weight * self.s
        transform = shared.transform(self.s) or InputTransform(len(self.s), [])
        rounds = settings.activation_bits if settings.counts_rounding else None
        activation = None if rounds is None else TokenQuantizer(rounds, group_size=shared.group)
        self.moments = [
            input_moments(
                shared.view.statistics[name], transform, activation, step_weights.get(name)
            )
            for name in shared.names
        ]

    def layers(self) -> dict[str, IntLinear]:
        """SVDQuant's branch, compensated codes; then each refitted to the other while it helps."""
        best, _ = iterate_branch(
            self.weight,
            self.shared.rank,
            self.shared.grid,
            lambda trial: self.shared.error(self.s, trial),
            self.settings.iterations,
        )
        best = best._replace(rounded=self._codes(best.residual))
        least = self._error(best)
        for _ in range(self.settings.refits if self.shared.rank else 0):
            trial = self._refitted(best)
            error = self._error(trial)
            if error >= least:
                break
            best, least = trial, error
        return self.shared.layers(self.s, best)

    def _refitted(self, best: Branched) -> Branched:
        rest = torch.cat(
            [
                moments.left_over(weight, codes)
                for moments, weight, codes in self._parts(self.weight, best.rounded.values)
            ]
        )
        H = torch.stack([moments.exact for moments in self.moments]).sum(0)
        up, down = weighted_factors(rest, H, self.shared.rank)
        residual = self.weight - up.float() @ down.float()
        return Branched(up, down, residual, self._codes(residual))

    def _codes(self, residual: Tensor) -> Rounded:
        """Codes of the stacked residual."""
        c = self.settings
        parts = [
            round_gptq(
                moments.target(rows).float(),
                moments.rounded,
                self.shared.grid,
                c.gptq,
                c.clip,
            )
            for moments, rows, _ in self._parts(residual, residual)
        ]
        codes = torch.cat([part.codes for part in parts])
        values = torch.cat([part.values for part in parts])
        return Rounded(codes, Scales(torch.cat([p.scales.scale for p in parts]), None), values)

    def _error(self, trial: Branched) -> float:
        parts = self._parts(trial.residual, trial.rounded.values)
        return sum(moments.error(rest, codes) for moments, rest, codes in parts)

    def _parts(self, first: Tensor, second: Tensor) -> list[tuple[Moments, Tensor, Tensor]]:
        """Moments of each layer, and its rows of two stacked weights."""
        rows = (torch.split(stacked, self.sizes) for stacked in (first, second))
        return list(zip(self.moments, *rows, strict=True))


def _rotated(
    view: BlockView, name: str, settings: WeightSettings, seed: int, step_weights: Tensor | None
) -> IntLinear:
    linear, width = view.linears[name], view.linears[name].in_features
    group = legal_group(width, settings.group_size)
    grid = IntegerGrid(settings.bits, group_size=group)
    activation = TokenQuantizer(settings.activation_bits, group_size=group)
    rotation = rotation_of(width, derive_seed(seed, "rotation", name), name)
    transform = InputTransform(width, [Rotate(rotation)]).to(linear.weight.device)
    weight = transform.weight(linear.weight.detach())
    rounds = activation if settings.counts_rounding else None
    moments = input_moments(view.statistics[name], transform, rounds, step_weights)
    codes, scales, _ = round_gptq(
        moments.target(weight).float(), moments.rounded, grid, settings.gptq, settings.clip
    )
    return IntLinear.build(
        linear, grid=grid, scales=scales, codes=codes, activation=activation, transform=transform
    )
