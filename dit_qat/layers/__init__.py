"""Quantized layers made of primitives, and the rules that put them into a model."""

from dit_qat.layers.activation import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    ActivationQuantizer,
    MinMaxQuantizer,
    RobustQuantizer,
)
from dit_qat.layers.attention import AttentionConfig, QuantAttention
from dit_qat.layers.coded_linear import CodedLinear
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
from dit_qat.layers.weight_code import WEIGHT_CODES, WeightCode

__all__ = [
    "WEIGHT_CODES",
    "AbsMaxQuantizer",
    "AbsMeanQuantizer",
    "ActivationQuantizer",
    "AttentionConfig",
    "CodedLinear",
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
    "WeightCode",
    "follow_timesteps_",
    "quantize_",
    "timestep_scope",
]
