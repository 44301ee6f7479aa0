"""PTQ4DiT (arXiv:2405.16005): balance salient channels, then learn how to round."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_qat.calibration import BlockView, LinearStatistics, Needs
from dit_qat.dit.methods.reconstruction import Reconstruction, reconstruct_block
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.methods.smoothing import (
    LEAST,
    SharedInput,
    balance,
    shared_inputs,
    stacked_weight,
    weight_maxima,
)
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.layers import InputTransform, IntLinear, Scale, TokenQuantizer
from dit_qat.layers.rounding import ClipSearch, nearest_layer
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["PTQ4DiT", "PTQ4DiTConfig", "spearman", "temporal_salience"]


@dataclass(frozen=True)
class PTQ4DiTConfig:
    """Settings of :class:`PTQ4DiT`.

    Attributes:
        weight_bits: 2, 3, 4 or 8; asymmetric, a scale per output channel.
        activation_bits: 2..8; asymmetric, one static range per layer; None: float. The paper has 8.
        clip: Search of the weight's range.
        reconstruction: Learned rounding of each block; None: to nearest. The paper takes 20,000
            steps, this default a few hundred, so that a small model takes seconds.
        probe_calls: Calls on which blocks are reconstructed.

    Raises:
        ValueError: for bits or calls outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 8
    clip: ClipSearch = field(default_factory=lambda: ClipSearch(80))
    reconstruction: Reconstruction | None = field(default_factory=Reconstruction)
    probe_calls: int = 8

    def __post_init__(self) -> None:
        _ = self.grid
        if self.activation_bits is not None:
            TokenQuantizer(self.activation_bits)
        Needs(probe_calls=self.probe_calls)

    @property
    def grid(self) -> IntegerGrid:
        """Of the balanced weights."""
        return IntegerGrid(self.weight_bits, symmetric=False)


class PTQ4DiT(PTQMethod):
    """PTQ4DiT without quantized attention weights; linears of one input are balanced together.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`PTQ4DiTConfig`.
    """

    name: ClassVar[str] = "ptq4dit"
    config: PTQ4DiTConfig

    def __init__(self, config: PTQ4DiTConfig | None = None, **kwargs: Any) -> None:
        refuse_both("PTQ4DiT", config, kwargs)
        self.config = PTQ4DiTConfig(**kwargs) if config is None else config

    @property
    def needs(self) -> Needs:
        """Channel maxima call by call."""
        return Needs(call_ranges=True, probe_calls=self.config.probe_calls)

    def quantize_block(self, view: BlockView) -> Mapping[str, IntLinear]:
        """Balance, round, and learn the rounding of the whole block."""
        layers: dict[str, IntLinear] = {}
        for names in shared_inputs(view):
            layers |= self._balanced(view, names)
        if self.config.reconstruction is None:
            return layers
        return reconstruct_block(view, layers, self.config.reconstruction)

    def _balanced(self, view: BlockView, names: SharedInput) -> dict[str, IntLinear]:
        linears = [view.linears[name] for name in names]
        statistics = view.statistics[names[0]]
        w_max = weight_maxima(stacked_weight(linears))
        x_max = temporal_salience(statistics.call_absmax, w_max)
        B = balance(x_max, w_max, 0.5, 0.5)
        transform = InputTransform(B.numel(), [Scale(B)])
        activation = self._activation(statistics, B)
        layers = {}
        for name, linear in zip(names, linears, strict=True):
            layers[name] = nearest_layer(
                linear, self.config.grid, activation, transform, self.config.clip
            )
        return layers

    def _activation(self, statistics: LinearStatistics, B: Tensor) -> TokenQuantizer | None:
        """One range for all tokens: that of the balanced inputs seen, zero included."""
        if self.config.activation_bits is None:
            return None
        low = min(0.0, float((statistics.low / B).min()))
        high = max(LEAST, float((statistics.high / B).max()))
        bits = self.config.activation_bits
        return TokenQuantizer(bits, symmetric=False, fixed_range=(low, high))


def temporal_salience(call_maxima: Tensor, w_max: Tensor) -> Tensor:
    """Activation salience over time: ``sum_i softmax_i(-spearman(s_x^(i), s_w)) s_x^(i)``.

    Calls whose salient channels coincide least with those of the weight count most, since there
    balancing has most to gain (section 4.2).

    Args:
        call_maxima: (calls, in) ``max|X|`` of every call.
        w_max: (in,) ``max_out|W|``.

    Returns:
        (in,).
    """
    alignment = torch.stack([spearman(x_max, w_max) for x_max in call_maxima])
    weights: Tensor = torch.softmax(-alignment, 0)
    return weights @ call_maxima


def spearman(x: Tensor, y: Tensor) -> Tensor:
    """Rank correlation () of two vectors (n,), equal values sharing their mean rank.

    Where all of one are equal it is 0.
    """
    a, b = _centred_ranks(x), _centred_ranks(y)
    lengths: Tensor = torch.linalg.vector_norm(a) * torch.linalg.vector_norm(b)
    return (a @ b) / lengths.clamp_min(torch.finfo(a.dtype).tiny)


def _centred_ranks(x: Tensor) -> Tensor:
    _, place, counts = torch.unique(x, return_inverse=True, return_counts=True)
    last = counts.cumsum(0).float()
    ranks: Tensor = (last - (counts - 1) / 2)[place]
    return ranks - ranks.mean()
