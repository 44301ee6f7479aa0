"""Small random language models with a byte-level tokenizer, quantized."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dit_qat.calibration import Method
from dit_qat.llm.methods.rtn import RTN
from dit_qat.llm.models import load_llm
from dit_qat.llm.quantize import quantize_llm

transformers = pytest.importorskip("transformers")

SIZES = {
    "vocab_size": 260,  # three rows without a token
    "hidden_size": 256,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WINDOWS = torch.arange(64).view(2, 32)


def small_model(kind: str, **overrides: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(**SIZES | overrides)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # norms of one, biases of zero would hide swaps
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
    return model


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    return load_llm("tiny").tokenizer


@pytest.fixture
def quantized() -> Callable[..., Any]:
    """Make a model and quantize it; by default to symmetric ternary in groups of 256."""

    def make(kind: str = "Llama", method: Method | None = None, **overrides: Any) -> Any:
        model = small_model(kind, **overrides)
        given = RTN(bits=2, symmetric=True, group_size=256) if method is None else method
        quantize_llm(model, given, WINDOWS)
        return model

    return make
