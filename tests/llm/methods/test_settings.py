import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from dit_qat.calibration import Method
from dit_qat.llm.methods import AWQ, GPTAQ, GPTQ, PT2, RTN, D2Quant, SliM
from dit_qat.llm.methods.settings import check_groups
from dit_qat.llm.quantize import quantize_llm


@pytest.mark.parametrize("size", [None, 16, 48, 96, 128])
def test_groups_that_fill_a_layer_pass(size: int | None) -> None:
    check_groups({"a": nn.Linear(96, 2), "b": nn.Linear(48, 2)}, size)


def test_the_first_layer_that_groups_do_not_fill_is_named() -> None:
    with pytest.raises(ValueError, match=r"does not divide the 48 inputs of b.*16, 24"):
        check_groups({"a": nn.Linear(96, 2), "b": nn.Linear(48, 2)}, 32)


def tiny() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=16,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=32,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    "method",
    [
        RTN(group_size=32),
        GPTQ(group_size=32),
        GPTAQ(group_size=32),
        AWQ(group_size=32),
        SliM(group_size=32),
        D2Quant(group_size=32),
    ],
    ids=lambda method: method.name,
)
def test_uneven_groups_are_refused_before_the_model_runs(method: Method) -> None:
    model = tiny()
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model ran"))
    with pytest.raises(ValueError, match="group_size=32 does not divide the 48 inputs of model"):
        quantize_llm(model, method, torch.zeros(2, 8, dtype=torch.long))


def test_ternary_blocks_may_leave_a_shorter_last_one() -> None:
    windows = torch.randint(16, (4, 16), generator=torch.Generator().manual_seed(0))
    result = quantize_llm(tiny(), PT2(group_size=32), windows)
    assert all(row.error < 1 for row in result.table)
