"""RobuQ (arXiv:2509.23582): ternary weights, low-rank branch, Hadamard, RobustQuantizer."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from dit_qat.dit.methods.base import Method, dit_rules
from dit_qat.layers import (
    HadamardRotation,
    LayerConfig,
    LowRank,
    QuantConfig,
    RobustQuantizer,
    TernaryWeight,
)
from dit_qat.layers.activation import StraightThrough
from dit_qat.layers.linear import BranchDtype
from dit_qat.primitives.ternary import TernaryFit

__all__ = ["RobuQ", "RobuQConfig"]

_PRESETS: dict[str, dict[str, Any]] = {
    "paper": {
        "signs": False,
        "center": False,
        "fit": "absmean",
        "branch_start": "svd",
        "straight_through": "identity",
        "distillation": 0.0,
    },
    "exact": {
        "signs": True,
        "center": False,
        "fit": "absmean",
        "branch_start": "svd",
        "straight_through": "soft_clip",
        "distillation": 5.0,
    },
}


@dataclass(frozen=True)
class RobuQConfig:
    """Settings of :class:`RobuQ`; None takes the preset's value.

    Attributes:
        preset: ``paper``: as published, where it is known. ``exact``: what measured better.
        activation_bits: 1..4 for qkv, proj, fc1 and fc2; higher works too.
        rank: Rank of the float branch.
        branch_dtype: What the branch is rounded to, in training and packed; 16 bits pack smaller.
        adaln_bits: Activation bits of the adaLN linears, whose weights are ternary as well.
        signs: Random signs before the Hadamard rotation.
        center: Subtract every token's mean before quantizing.
        fit: Ternary fit.
        per_channel: Ternary scale per output channel, or per tensor.
        branch_start: Start of the low-rank branch.
        straight_through: Gradient mask of the activation quantizers.
        distillation: Weight of the squared distance to the float teacher's noise prediction.
        block_size: Rotate blocks of this width, for widths without a Hadamard order; None: full.
        seed: Seed of the signs.

    Raises:
        ValueError: for an unknown preset.
    """

    preset: Literal["paper", "exact"] = "exact"
    activation_bits: int = 4
    rank: int = 16
    branch_dtype: BranchDtype = "float32"
    adaln_bits: int = 4
    signs: bool | None = None
    center: bool | None = None
    fit: TernaryFit | None = None
    per_channel: bool = True
    branch_start: Literal["svd", "alternating"] | None = None
    straight_through: StraightThrough | None = None
    distillation: float | None = None
    block_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.preset not in _PRESETS:
            raise ValueError(f"preset {self.preset!r} is unknown; use one of {sorted(_PRESETS)}")
        for key, value in _PRESETS[self.preset].items():
            if getattr(self, key) is None:
                object.__setattr__(self, key, value)


class RobuQ(Method):
    """RobuQ without mixed precision: one activation bit-width for all block linears.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`RobuQConfig`.
    """

    name: ClassVar[str] = "robuq"

    def __init__(self, config: RobuQConfig | None = None, **kwargs: Any) -> None:
        if config is not None and kwargs:
            raise ValueError(f"give RobuQ either a config or fields of it, not both: {kwargs}")
        self._config = RobuQConfig(**kwargs) if config is None else config
        self.quant_config()  # refuses bad settings now

    @property
    def config(self) -> RobuQConfig:
        """The frozen settings."""
        return self._config

    @property
    def distillation(self) -> float:
        """Weight of the distance to the teacher."""
        return self.config.distillation or 0.0

    def quant_config(self) -> QuantConfig:
        """Rotate, RobustQuantizer and branch on every block linear; adaLN at its own bits."""
        block = self._block()
        adaln = replace(block, activation=self._activation(self.config.adaln_bits))
        return QuantConfig(tuple(dit_rules(block, None, adaln)), self.config.seed)

    def _block(self) -> LayerConfig:
        c = self.config
        assert c.fit
        assert c.branch_start
        return LayerConfig(
            weight=TernaryWeight(c.fit, c.per_channel),
            activation=self._activation(c.activation_bits),
            rotation=HadamardRotation(bool(c.signs), c.block_size),
            low_rank=LowRank(c.rank, c.branch_start, dtype=c.branch_dtype) if c.rank else None,
        )

    def _activation(self, bits: int) -> RobustQuantizer:
        assert self.config.straight_through
        return RobustQuantizer(bits, self.config.straight_through, bool(self.config.center))
