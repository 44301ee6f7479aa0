"""Quantization methods for diffusion transformers, one paper per file.

Quantization-aware: RobuQ, AMPN, BitNet v2, min-max. After training: the others.
"""

from dit_qat.dit.methods.adatsq import AdaTSQ, AdaTSQConfig
from dit_qat.dit.methods.ampn import AMPN, AMPNConfig
from dit_qat.dit.methods.base import Method
from dit_qat.dit.methods.bitnet_v2 import BitNetV2, BitNetV2Config
from dit_qat.dit.methods.clq import CLQ, CLQConfig
from dit_qat.dit.methods.duquant import DuQuant, DuQuantConfig
from dit_qat.dit.methods.gptq import GPTQ, GPTQConfig
from dit_qat.dit.methods.minmax import MinMax, MinMaxConfig
from dit_qat.dit.methods.ptq4dit import PTQ4DiT, PTQ4DiTConfig
from dit_qat.dit.methods.q_dit import QDiT, QDiTConfig
from dit_qat.dit.methods.quarot import QuaRot, QuaRotConfig
from dit_qat.dit.methods.robuq import RobuQ, RobuQConfig
from dit_qat.dit.methods.rtn import RTN, RTNConfig
from dit_qat.dit.methods.smoothquant import SmoothQuant, SmoothQuantConfig
from dit_qat.dit.methods.svdquant import SVDQuant, SVDQuantConfig
from dit_qat.dit.methods.vidit_q import ViDiTQ, ViDiTQConfig

__all__ = [
    "AMPN",
    "CLQ",
    "GPTQ",
    "RTN",
    "AMPNConfig",
    "AdaTSQ",
    "AdaTSQConfig",
    "BitNetV2",
    "BitNetV2Config",
    "CLQConfig",
    "DuQuant",
    "DuQuantConfig",
    "GPTQConfig",
    "Method",
    "MinMax",
    "MinMaxConfig",
    "PTQ4DiT",
    "PTQ4DiTConfig",
    "QDiT",
    "QDiTConfig",
    "QuaRot",
    "QuaRotConfig",
    "RTNConfig",
    "RobuQ",
    "RobuQConfig",
    "SVDQuant",
    "SVDQuantConfig",
    "SmoothQuant",
    "SmoothQuantConfig",
    "ViDiTQ",
    "ViDiTQConfig",
]
