"""D2Quant (arXiv:2602.02546): 2 and 3 bits with a second scale and corrected means."""

from dit_qat.llm.methods.d2quant.config import D2QuantConfig
from dit_qat.llm.methods.d2quant.method import D2Quant
from dit_qat.llm.methods.d2quant.quantize import quantize_weight
from dit_qat.llm.methods.d2quant.rotation import rotate_residual_

__all__ = ["D2Quant", "D2QuantConfig", "quantize_weight", "rotate_residual_"]
