"""PT2-LLM (arXiv:2510.03267): asymmetric ternary weights."""

from dit_qat.llm.methods.pt2.config import PT2Config
from dit_qat.llm.methods.pt2.method import PT2
from dit_qat.llm.methods.pt2.quantize import quantize_weight

__all__ = ["PT2", "PT2Config", "quantize_weight"]
