"""Quantization methods for diffusion transformers, one paper per file."""

from dit_qat.dit.methods.ampn import AMPN, AMPNConfig
from dit_qat.dit.methods.base import Method
from dit_qat.dit.methods.bitnet_v2 import BitNetV2, BitNetV2Config
from dit_qat.dit.methods.minmax import MinMax, MinMaxConfig
from dit_qat.dit.methods.robuq import RobuQ, RobuQConfig

__all__ = [
    "AMPN",
    "AMPNConfig",
    "BitNetV2",
    "BitNetV2Config",
    "Method",
    "MinMax",
    "MinMaxConfig",
    "RobuQ",
    "RobuQConfig",
]
