"""RobuQ's enhanced baseline: low-rank branch and Hadamard everywhere, per-token min-max grids."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

from dit_qat.dit.methods.base import Method, dit_rules
from dit_qat.layers import (
    HadamardRotation,
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    QuantConfig,
    TernaryWeight,
)

__all__ = ["MinMax", "MinMaxConfig"]


@dataclass(frozen=True)
class MinMaxConfig:
    """Settings of :class:`MinMax`.

    Attributes:
        activation_bits: For qkv, proj, fc1 and fc2.
        rank: Rank of the float branch.
        adaln_bits: Activation bits of the adaLN linears.
        signs: Random signs before the rotation.
        zero_point: Float offset or rounded zero point of the min-max grid.
        distillation: Weight of the squared distance to the float teacher's noise prediction.
        block_size: Rotate blocks of this width, for widths without a Hadamard order; None: full.
        seed: Seed of the signs.
    """

    activation_bits: int = 4
    rank: int = 16
    adaln_bits: int = 4
    signs: bool = False
    zero_point: Literal["float", "rounded"] = "float"
    distillation: float = 0.0
    block_size: int | None = None
    seed: int = 0


class MinMax(Method):
    """The paper's "Baseline": RobuQ with min-max grids in place of RobustQuantizer.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`MinMaxConfig`.
    """

    name: ClassVar[str] = "minmax"

    def __init__(self, config: MinMaxConfig | None = None, **kwargs: Any) -> None:
        if config is not None and kwargs:
            raise ValueError(f"give MinMax either a config or fields of it, not both: {kwargs}")
        self._config = MinMaxConfig(**kwargs) if config is None else config
        self.quant_config()  # refuses bad settings now

    @property
    def config(self) -> MinMaxConfig:
        """The frozen settings."""
        return self._config

    @property
    def distillation(self) -> float:
        """Weight of the distance to the teacher."""
        return self.config.distillation

    def quant_config(self) -> QuantConfig:
        """Rotation, branch and min-max on every block linear and adaLN."""
        c = self.config
        block = LayerConfig(
            weight=TernaryWeight("absmean"),
            activation=MinMaxQuantizer(c.activation_bits, "identity", c.zero_point),
            rotation=HadamardRotation(c.signs, c.block_size),
            low_rank=LowRank(c.rank) if c.rank else None,
        )
        adaln = MinMaxQuantizer(c.adaln_bits, "identity", c.zero_point)
        return QuantConfig(tuple(dit_rules(block, None, replace(block, activation=adaln))), c.seed)
