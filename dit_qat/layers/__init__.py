"""Quantized layers made of primitives, and the rules that put them into a model."""

from dit_qat.layers.activation import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    ActivationQuantizer,
    MinMaxQuantizer,
    RobustQuantizer,
)
from dit_qat.layers.attention import AttentionConfig, QuantAttention
from dit_qat.layers.input_transform import InputTransform, Permute, Rotate, Scale, TransformStep
from dit_qat.layers.int_linear import IntLinear, IntLinearConfig
from dit_qat.layers.linear import (
    HadamardRotation,
    LayerConfig,
    LowRank,
    QuantLinear,
    TernaryWeight,
)
from dit_qat.layers.packed import PackedLinear
from dit_qat.layers.rules import QuantConfig, Rule
from dit_qat.layers.step_bits import StepBits, follow_timesteps_, timestep_scope
from dit_qat.layers.swap import quantize_
from dit_qat.layers.token_quantizer import TokenQuantizer

__all__ = [
    "AbsMaxQuantizer",
    "AbsMeanQuantizer",
    "ActivationQuantizer",
    "AttentionConfig",
    "HadamardRotation",
    "InputTransform",
    "IntLinear",
    "IntLinearConfig",
    "LayerConfig",
    "LowRank",
    "MinMaxQuantizer",
    "PackedLinear",
    "Permute",
    "QuantAttention",
    "QuantConfig",
    "QuantLinear",
    "RobustQuantizer",
    "Rotate",
    "Rule",
    "Scale",
    "StepBits",
    "TernaryWeight",
    "TokenQuantizer",
    "TransformStep",
    "follow_timesteps_",
    "quantize_",
    "timestep_scope",
]
