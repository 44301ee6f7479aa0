"""ViDiT-Q (arXiv:2406.02540): scale what is static, rotate what is dynamic, mix bits by metric."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import nn

from dit_qat.calibration import BlockView, Needs
from dit_qat.dit.methods.mixed_precision import MixedPrecision, Score, allocate, layer_groups
from dit_qat.dit.methods.rotation import check_rotations, rotation_of
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.methods.smoothing import (
    SharedInput,
    balance,
    shared_inputs,
    stacked_weight,
    weight_maxima,
)
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.layers import InputTransform, IntLinear, Rotate, Scale, StepBits, TokenQuantizer
from dit_qat.layers.rounding import nearest_layer
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["ViDiTQ", "ViDiTQConfig"]

Balance = Literal["static_dynamic", "channel", "none"]

_LEAST_FACTOR = 1e-3  # floor of what multiplies inputs, as in the release
_SCALING = {"static_dynamic": 0.99, "channel": 0.3, "none": 0.0}


@dataclass(frozen=True)
class ViDiTQConfig:
    """Settings of :class:`ViDiTQ`; None takes what belongs to the kind of balance.

    Attributes:
        weight_bits: 2, 3, 4 or 8; asymmetric, a scale per output channel.
        activation_bits: 2..8, a scale per token; None: activations stay float.
        balance: ``static_dynamic``, the later generation: scale channels by
            ``m = max|W|^a / max|X|^(1-a)``, then rotate. ``channel``, the early one: divide by
            ``max|X|^a / max|W|^(1-a)``, X over all steps: without the release's running mean of
            maxima and its two ranges of timesteps. ``none``: round as it is.
        alpha: a; .99 (static_dynamic) or .3 (channel), as for PixArt.
        activation_symmetric: Whether inputs have signed codes; so in the later generation.
        block_size: Rotate blocks of at most this; None: as :func:`rotation_of` finds.
        mixed: Mixed precision under budgets; None: the same bits everywhere.
        seed: Of the random signs.

    Raises:
        ValueError: for values outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    balance: Balance = "static_dynamic"
    alpha: float | None = None
    activation_symmetric: bool | None = None
    block_size: int | None = None
    mixed: MixedPrecision | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.balance not in get_args(Balance):
            raise ValueError(
                f"balance={self.balance!r} is unknown; use one of {', '.join(get_args(Balance))}"
            )
        if self.alpha is None:
            object.__setattr__(self, "alpha", _SCALING[self.balance])
        if self.activation_symmetric is None:
            object.__setattr__(self, "activation_symmetric", self.balance == "static_dynamic")
        if not 0 <= (self.alpha or 0) <= 1:
            raise ValueError(f"alpha={self.alpha} is outside 0..1")
        _ = self.grid(), self.activation
        if self.mixed is not None and self.activation_bits is None and self.mixed.activation_budget:
            raise ValueError("an activation_budget needs activation_bits; give both or neither")

    def grid(self, bits: int | None = None) -> IntegerGrid:
        """Of the weights, at other bits if given."""
        return IntegerGrid(self.weight_bits if bits is None else bits, symmetric=False)

    @property
    def activation(self) -> TokenQuantizer | None:
        """Of the balanced inputs."""
        bits = self.activation_bits
        return None if bits is None else TokenQuantizer(bits, bool(self.activation_symmetric))


class ViDiTQ(PTQMethod):
    """ViDiT-Q; the weight is quantized once, behind scaling and rotation.

    Its mixed precision gives each group of layers (self-attention, cross-attention, feed-forward,
    temporal attention) a share of the budget by squared error, and ranks the layers in a group by
    a metric of their own: CLIPScore, video quality, optical flow. Where no metric is given, by
    squared error too.

    Args:
        config: The whole configuration, or else
        metrics: By group, a score of the model with a layer quantized, lower being better.
        kwargs: fields of :class:`ViDiTQConfig`.
    """

    name: ClassVar[str] = "vidit_q"
    config: ViDiTQConfig

    def __init__(
        self,
        config: ViDiTQConfig | None = None,
        metrics: Mapping[str, Score] | None = None,
        **kwargs: Any,
    ) -> None:
        refuse_both("ViDiTQ", config, kwargs)
        self.config = ViDiTQConfig(**kwargs) if config is None else config
        self.metrics = dict(metrics or {})
        self.weight_bits: dict[str, int] = {}
        self.step_bits: dict[str, StepBits] = {}

    @property
    def needs(self) -> Needs:
        """Channel maxima over all steps."""
        return Needs(ranges=self.config.balance != "none")

    def start(self, run: PTQRun) -> None:
        """Refuse widths that cannot be rotated; divide the budgets, if there are any."""
        self.weight_bits, self.step_bits = {}, {}
        if self.config.balance == "static_dynamic":
            check_rotations(run.target.linears(), self.config.block_size)
        if self.config.mixed is None:
            return
        groups = layer_groups(run.target.linears())
        unknown = sorted(set(self.metrics) - set(groups))
        if unknown:
            raise ValueError(f"metrics for {unknown}: this model has the groups {sorted(groups)}")
        bits = allocate(run, groups, self.config.mixed, self._trial, self.metrics)
        self.weight_bits, self.step_bits = bits.weights, bits.activations
        run.report |= bits.report

    def quantize_block(self, view: BlockView) -> dict[str, IntLinear]:
        """Balance linears of one input together, then round to nearest."""
        layers: dict[str, IntLinear] = {}
        for names in shared_inputs(view):
            transform = self._transform(view, names)
            for name in names:
                bits = self.weight_bits.get(name, self.config.weight_bits)
                layer = self._rounded(view.linears[name], bits, self.config.activation, transform)
                layers[name] = layer.with_step_bits(self.step_bits.get(name))
        return layers

    def _transform(self, view: BlockView, names: SharedInput) -> InputTransform | None:
        c, linears = self.config, [view.linears[name] for name in names]
        if c.balance == "none":
            return None
        assert c.alpha is not None
        x_max, w_max = view.statistics[names[0]].absmax, weight_maxima(stacked_weight(linears))
        width = w_max.numel()
        if c.balance == "channel":
            return InputTransform(width, [Scale(balance(x_max, w_max, c.alpha, 1 - c.alpha))])
        m = balance(w_max, x_max, c.alpha, 1 - c.alpha, _LEAST_FACTOR)
        rotation = rotation_of(width, c.seed, names[0], c.block_size)
        return InputTransform(width, [Scale(1 / m), Rotate(rotation)])

    def _trial(
        self, name: str, linear: nn.Linear, bits: int, activation_bits: int | None
    ) -> IntLinear:
        """A layer as it will be, but for scales, whose statistics are yet to come."""
        c, transform = self.config, None
        if c.balance == "static_dynamic":
            width = linear.in_features
            transform = InputTransform(
                width, [Rotate(rotation_of(width, c.seed, name, c.block_size))]
            )
        activation = c.activation
        if activation_bits is None or activation is None:
            return self._rounded(linear, bits, None, transform)
        return self._rounded(linear, bits, activation.with_bits(activation_bits), transform)

    def _rounded(
        self,
        linear: nn.Linear,
        bits: int,
        activation: TokenQuantizer | None,
        transform: InputTransform | None,
    ) -> IntLinear:
        return nearest_layer(linear, self.config.grid(bits), activation, transform)
