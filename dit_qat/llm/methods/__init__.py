"""Methods that quantize the weights of language models; each has a configuration by its name."""

from dit_qat.llm.methods.arb import ARB, ARBConfig
from dit_qat.llm.methods.awq import AWQ, AWQConfig
from dit_qat.llm.methods.billm import BiLLM, BiLLMConfig
from dit_qat.llm.methods.d2quant import D2Quant, D2QuantConfig
from dit_qat.llm.methods.gptaq import GPTAQ, GPTAQConfig
from dit_qat.llm.methods.gptq import GPTQ, GPTQConfig
from dit_qat.llm.methods.pb_llm import PBLLM, PBLLMConfig
from dit_qat.llm.methods.pbs2p import PBS2P, PBS2PConfig
from dit_qat.llm.methods.pt2 import PT2, PT2Config
from dit_qat.llm.methods.rtn import RTN, RTNConfig
from dit_qat.llm.methods.slim import SliM, SliMConfig
from dit_qat.llm.methods.stbllm import STBLLM, STBLLMConfig

__all__ = [
    "ARB",
    "AWQ",
    "GPTAQ",
    "GPTQ",
    "PBLLM",
    "PBS2P",
    "PT2",
    "RTN",
    "STBLLM",
    "ARBConfig",
    "AWQConfig",
    "BiLLM",
    "BiLLMConfig",
    "D2Quant",
    "D2QuantConfig",
    "GPTAQConfig",
    "GPTQConfig",
    "PBLLMConfig",
    "PBS2PConfig",
    "PT2Config",
    "RTNConfig",
    "STBLLMConfig",
    "SliM",
    "SliMConfig",
]
