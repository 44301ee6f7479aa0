"""SmoothQuant (arXiv:2211.10438): divide outlier channels of the input, multiply their weights."""

from dataclasses import dataclass
from typing import Any, ClassVar

from dit_qat.calibration import BlockView, Needs
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.methods.smoothing import (
    LEAST,
    balance,
    shared_inputs,
    stacked_weight,
    weight_maxima,
)
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.layers import InputTransform, IntLinear, Scale, TokenQuantizer
from dit_qat.layers.rounding import nearest_layer
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["SmoothQuant", "SmoothQuantConfig"]


@dataclass(frozen=True)
class SmoothQuantConfig:
    """Settings of :class:`SmoothQuant`.

    Attributes:
        weight_bits: 2, 3, 4 or 8; symmetric, a scale per output channel.
        activation_bits: 2..8; symmetric, a scale per token; None: activations stay float.
        alpha: How much of a channel's range moves to the weight, 0..1.
        floor: Least maximum and least scale.

    Raises:
        ValueError: for bits, alpha or a floor outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    alpha: float = 0.5
    floor: float = LEAST

    def __post_init__(self) -> None:
        _ = self.grid, self.activation  # refuse bad bits now
        if not 0 <= self.alpha <= 1:
            raise ValueError(f"alpha={self.alpha} is outside 0..1; 0.5 is usual")
        if self.floor <= 0:
            raise ValueError(f"floor={self.floor} must be above 0; {LEAST:g} is usual")

    @property
    def grid(self) -> IntegerGrid:
        """Of the weights."""
        return IntegerGrid(self.weight_bits)

    @property
    def activation(self) -> TokenQuantizer | None:
        """Of the smoothed inputs."""
        return None if self.activation_bits is None else TokenQuantizer(self.activation_bits)


class SmoothQuant(PTQMethod):
    """SmoothQuant, dividing online: a DiT's norms have no affine part to fold a scale into.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`SmoothQuantConfig`.
    """

    name: ClassVar[str] = "smoothquant"

    def __init__(self, config: SmoothQuantConfig | None = None, **kwargs: Any) -> None:
        refuse_both("SmoothQuant", config, kwargs)
        self.config = SmoothQuantConfig(**kwargs) if config is None else config

    @property
    def needs(self) -> Needs:
        """Channel maxima."""
        return Needs()

    def quantize_block(self, view: BlockView) -> dict[str, IntLinear]:
        """Smooth linears of one input by one vector, then round to nearest."""
        c, layers = self.config, {}
        for names in shared_inputs(view):
            linears = [view.linears[name] for name in names]
            x_max = view.statistics[names[0]].absmax
            w_max = weight_maxima(stacked_weight(linears))
            s = balance(x_max, w_max, c.alpha, 1 - c.alpha, c.floor)
            transform = InputTransform(s.numel(), [Scale(s)])
            for name, linear in zip(names, linears, strict=True):
                layers[name] = nearest_layer(linear, c.grid, c.activation, transform)
        return layers
