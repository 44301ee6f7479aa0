"""AdaTSQ's weights: a strong base, then error compensation weighted by temporal Fisher information.

``min sum_t alpha[t] ||X_t W^T - X_t Q^T||^2`` per layer is GPTQ with
``H' = sum_t alpha[t] X_t^T X_t / n_t`` (AdaTSQ, arXiv:2602.09883). What it rests on is unknown; as
plain integers do not reach its numbers, the default base is SVDQuant's smoothing and branch.
"""

from dataclasses import dataclass, field, replace
from typing import Literal, get_args

import torch

from dit_qat.calibration.view import BlockView
from dit_qat.dit.methods.rotation import rotation_of
from dit_qat.dit.methods.rounding import (
    ClipSearch,
    GPTQSettings,
    Rounded,
    legal_group,
    round_gptq,
)
from dit_qat.dit.methods.smoothing import shared_inputs
from dit_qat.dit.methods.svdquant import SharedLayers, SVDQuantConfig, iterate_branch
from dit_qat.dit.randomness import derive_seed
from dit_qat.layers.input_transform import InputTransform, Rotate
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.integer import IntegerGrid, Scales

__all__ = ["Base", "WeightSettings", "solve_block"]

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
        clip: Search of the weights' range; None: the full one.
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
    clip: ClipSearch | None = field(
        default_factory=lambda: ClipSearch(values=20, least=0.6, exponent=2.0)
    )
    probe_calls: int = 4

    def __post_init__(self) -> None:
        if self.base not in get_args(Base):
            raise ValueError(f"base={self.base!r} is unknown; use one of {get_args(Base)}")
        _ = self.svdquant  # refuses bad settings now

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


def solve_block(view: BlockView, settings: WeightSettings, seed: int) -> dict[str, IntLinear]:
    """Quantize the linears of a block on the second moments of their statistics.

    Args:
        view: The block.
        settings: How.
        seed: Of the rotations' signs.

    Raises:
        ValueError: for a width that cannot be rotated, or groups that do not divide one.
    """
    if settings.base == "hadamard":
        return {name: _rotated(view, name, settings, seed) for name in view.linears}
    layers: dict[str, IntLinear] = {}
    for names in shared_inputs(view):
        layers |= _branched(SharedLayers(view, names, settings.svdquant), settings)
    return layers


def _branched(shared: SharedLayers, settings: WeightSettings) -> dict[str, IntLinear]:
    """Smoothing and branch together, the residual of each layer by its own second moment."""
    s = shared.best_smoothing()
    branched, _ = iterate_branch(
        shared.weight * s,
        shared.rank,
        shared.grid,
        lambda trial: shared.error(s, trial),
        settings.iterations,
    )
    transform = shared.transform(s)
    sizes = [linear.out_features for linear in shared.linears]
    parts = [
        round_gptq(
            residual,
            shared.view.statistics[name].second_moment,
            shared.grid,
            settings.gptq,
            settings.clip,
            transform,
        )
        for name, residual in zip(shared.names, torch.split(branched.residual, sizes), strict=True)
    ]
    codes = torch.cat([part.codes for part in parts])
    values = torch.cat([part.values for part in parts])
    scales = Scales(torch.cat([part.scales.scale for part in parts]), None)
    return shared.layers(s, branched._replace(rounded=Rounded(codes, scales, values)))


def _rotated(view: BlockView, name: str, settings: WeightSettings, seed: int) -> IntLinear:
    linear, width = view.linears[name], view.linears[name].in_features
    group = legal_group(width, settings.group_size)
    grid = IntegerGrid(settings.bits, group_size=group)
    rotation = rotation_of(width, derive_seed(seed, "rotation", name), name)
    transform = InputTransform(width, [Rotate(rotation)]).to(linear.weight.device)
    moment = view.statistics[name].second_moment
    codes, scales, _ = round_gptq(
        transform.weight(linear.weight.detach()),
        moment,
        grid,
        settings.gptq,
        settings.clip,
        transform,
    )
    return IntLinear.build(
        linear,
        grid=grid,
        scales=scales,
        codes=codes,
        activation=TokenQuantizer(settings.activation_bits, group_size=group),
        transform=transform,
    )
