"""BitNet v2 moved to DiT: ternary weights, Hadamard on proj and fc2 only (arXiv:2504.18415)."""

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from dit_qat.dit.methods.base import Method, dit_rules
from dit_qat.layers import (
    AbsMeanQuantizer,
    ActivationQuantizer,
    HadamardRotation,
    LayerConfig,
    MinMaxQuantizer,
    QuantConfig,
    TernaryWeight,
)

__all__ = ["BitNetV2", "BitNetV2Config"]


@dataclass(frozen=True)
class BitNetV2Config:
    """Settings of :class:`BitNetV2`.

    Attributes:
        activation_bits: For qkv, proj, fc1 and fc2.
        adaln_bits: Activation bits of the adaLN linears.
        grid: ``minmax`` at any bits, as in RobuQ's tables, or BitNet v2's own ``absmean`` at 4.
        block_size: Rotate blocks of this width, for widths without a Hadamard order; None: full.
        distillation: Weight of the squared distance to the float teacher's noise prediction.
    """

    activation_bits: int = 4
    adaln_bits: int = 4
    grid: Literal["minmax", "absmean"] = "minmax"
    block_size: int | None = None
    distillation: float = 0.0


class BitNetV2(Method):
    """The recipe RobuQ starts from: no branch, identity straight-through.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`BitNetV2Config`.
    """

    name: ClassVar[str] = "bitnet_v2"

    def __init__(self, config: BitNetV2Config | None = None, **kwargs: Any) -> None:
        if config is not None and kwargs:
            raise ValueError(f"give BitNetV2 either a config or fields of it, not both: {kwargs}")
        self._config = BitNetV2Config(**kwargs) if config is None else config
        self.quant_config()  # refuses bad settings now

    @property
    def config(self) -> BitNetV2Config:
        """The frozen settings."""
        return self._config

    @property
    def distillation(self) -> float:
        """Weight of the distance to the teacher."""
        return self.config.distillation

    def quant_config(self) -> QuantConfig:
        """Rotation in front of proj and fc2; qkv, fc1 and adaLN without."""
        c = self.config
        weight = TernaryWeight("absmean")
        activation = self._activation(c.activation_bits)
        rotated = LayerConfig(
            weight, activation, HadamardRotation(signs=False, block_size=c.block_size), None
        )
        plain = LayerConfig(weight, activation, None, None)
        adaln = LayerConfig(weight, self._activation(c.adaln_bits), None, None)
        return QuantConfig(tuple(dit_rules(rotated, plain, adaln)))

    def _activation(self, bits: int) -> ActivationQuantizer:
        kind = AbsMeanQuantizer if self.config.grid == "absmean" else MinMaxQuantizer
        return kind(bits, "identity")
