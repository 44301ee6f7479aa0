from typing import Any

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dit_qat.layers import CodedLinear, IntLinear
from dit_qat.llm import decoding
from dit_qat.llm.decoding import decode_
from dit_qat.llm.methods import ARB, RTN
from dit_qat.llm.quantize import quantize_llm

CONFIG = LlamaConfig(
    vocab_size=64,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=1,
    num_attention_heads=4,
    max_position_embeddings=64,
)
IDS = torch.arange(24)[None]


def _quantized(method: Any) -> Any:
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).eval()
    quantize_llm(model, method, IDS.repeat(2, 1))
    return model


def _packed(model: nn.Module) -> int:
    return sum(isinstance(module, CodedLinear | IntLinear) for module in model.modules())


def _logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits  # type: ignore[no-any-return]


@pytest.mark.parametrize("method", [ARB(block_size=32, iterations=1), RTN(bits=4, group_size=16)])
def test_a_decoded_model_gives_the_same_bits(method: Any) -> None:
    model = _quantized(method)
    expected = _logits(model)
    told = decode_(model, wanted=False)
    assert (told.done, _packed(model)) == (False, 7)
    numbers = 4 * 32 * 32 + 3 * 32 * 64
    assert told.decoded == 4 * numbers > 4 * told.packed > 0
    assert decode_(model).done
    assert _packed(model) == 0
    assert torch.equal(_logits(model), expected)
    assert decode_(model) == (0, 0, False)


def test_what_does_not_fit_stays_packed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _quantized(RTN(bits=4, group_size=16))
    needed = decode_(model, wanted=False).decoded
    monkeypatch.setattr(decoding, "free_bytes", lambda device: needed)
    assert not decode_(model).done
    monkeypatch.setattr(decoding, "free_bytes", lambda device: 2 * needed)
    assert decode_(model).done
