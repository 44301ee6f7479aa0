"""Quantized layers made of primitives, and the rules that put them into a model."""

from dit_qat.layers.activation import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    ActivationQuantizer,
    MinMaxQuantizer,
    RobustQuantizer,
)
from dit_qat.layers.attention import AttentionConfig, QuantAttention
from dit_qat.layers.linear import (
    HadamardRotation,
    LayerConfig,
    LowRank,
    QuantLinear,
    TernaryWeight,
)
from dit_qat.layers.packed import PackedLinear
from dit_qat.layers.rules import QuantConfig, Rule
from dit_qat.layers.swap import quantize_

__all__ = [
    "AbsMaxQuantizer",
    "AbsMeanQuantizer",
    "ActivationQuantizer",
    "AttentionConfig",
    "HadamardRotation",
    "LayerConfig",
    "LowRank",
    "MinMaxQuantizer",
    "PackedLinear",
    "QuantAttention",
    "QuantConfig",
    "QuantLinear",
    "RobustQuantizer",
    "Rule",
    "TernaryWeight",
    "quantize_",
]
