"""RTN: round weights and activations to the nearest integer, with no calibration at all."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.layers import IntLinear, TokenQuantizer
from dit_qat.layers.rounding import nearest_layer
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["RTN", "RTNConfig"]


@dataclass(frozen=True)
class RTNConfig:
    """Settings of :class:`RTN`.

    Attributes:
        weight_bits: 2, 3, 4 or 8; a scale per output channel.
        activation_bits: 2..8, a scale per token; None: activations stay float.
        weight_symmetric: Signed codes; otherwise with a zero point.
        activation_symmetric: The same of activations.

    Raises:
        ValueError: for bits outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    weight_symmetric: bool = True
    activation_symmetric: bool = True

    def __post_init__(self) -> None:
        _ = self.grid, self.activation  # refuse bad bits now

    @property
    def grid(self) -> IntegerGrid:
        """Of the weights."""
        return IntegerGrid(self.weight_bits, self.weight_symmetric)

    @property
    def activation(self) -> TokenQuantizer | None:
        """Of the inputs."""
        bits = self.activation_bits
        return None if bits is None else TokenQuantizer(bits, self.activation_symmetric)


class RTN(PTQMethod):
    """Round to nearest: weights per output channel, activations per token.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`RTNConfig`.
    """

    name: ClassVar[str] = "rtn"

    def __init__(self, config: RTNConfig | None = None, **kwargs: Any) -> None:
        refuse_both("RTN", config, kwargs)
        self.config = RTNConfig(**kwargs) if config is None else config

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs(ranges=False)

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        """Round the weight as it is."""
        return nearest_layer(linear, self.config.grid, self.config.activation)
