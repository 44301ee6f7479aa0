"""Methods on small language models: what folds changes nothing, and every method runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from dit_qat.calibration import BlockView, Method, Run
from dit_qat.layers import CodedLinear, IntLinear
from dit_qat.layers.rounding import ClipSearch
from dit_qat.llm.hf.folder import save_quantized
from dit_qat.llm.methods import AWQ, GPTAQ, GPTQ, PT2, RTN, D2Quant, SliM
from dit_qat.llm.methods.d2quant.correction import Shifted, mean_deviation
from dit_qat.llm.methods.d2quant.rotation import rotate_residual_
from dit_qat.llm.models.roles import roles_of
from dit_qat.llm.quantize import quantize_llm

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


def unequal_(model: Any) -> Any:
    """Norms of one, biases of zero would hide what folds into them wrongly."""
    for parameter in model.parameters():
        if parameter.ndim == 1:
            nn.init.normal_(parameter, 1.0, 0.3)
        else:
            parameter.data.mul_(2)
    return model.eval()


def llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | {"intermediate_size": 48, "num_key_value_heads": 2} | changes
    return unequal_(LlamaForCausalLM(LlamaConfig(**sizes)))


def tied() -> LlamaForCausalLM:
    return llama(tie_word_embeddings=True)


def opt(**changes: Any) -> OPTForCausalLM:
    torch.manual_seed(0)
    sizes = SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32} | changes
    return unequal_(OPTForCausalLM(OPTConfig(**sizes)))


def windows(count: int = 8, length: int = 32, seed: int = 0) -> Tensor:
    return torch.randint(64, (count, length), generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(input_ids=windows(3, seed=9)).logits
    return found


def error(model: nn.Module, exact: Tensor) -> float:
    return float((logits(model) - exact).square().sum() / exact.square().sum())


FAST: dict[str, Any] = {"group_size": 16, "clips": (ClipSearch(values=6),), "iterations": 3}
METHODS: dict[str, Method] = {
    "rtn": RTN(bits=4, group_size=16),
    "gptq": GPTQ(bits=4, group_size=16),
    "gptaq": GPTAQ(bits=4, group_size=16),
    "awq": AWQ(bits=4, group_size=16, tokens=64),
    "slim": SliM(bits=3, group_size=8, range_steps=2, tokens=64),
    "d2quant": D2Quant(bits=3, **FAST),
    "pt2": PT2(group_size=8),
    "pt2_paper": PT2(preset="paper", group_size=8),
}


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize("make", [llama, opt])
def test_every_method_quantizes_every_layer(method: Method, make: Any) -> None:
    model = make()
    exact = logits(model)
    result = quantize_llm(model, method, windows(), batch_size=4)
    assert len(result.table) == len(roles_of(model).linears)
    assert all(
        isinstance(model.get_submodule(n), CodedLinear | IntLinear) for n in roles_of(model).linears
    )
    assert error(model, exact) < 0.9
    assert result.averages["effective_weight_bits"] > result.averages["weight_bits"]


@pytest.mark.parametrize(
    ("make", "method"),
    [
        (llama, PT2(group_size=8)),
        (opt, PT2(preset="paper", group_size=8)),
        (llama, D2Quant(bits=2, **FAST)),
        (tied, D2Quant(bits=3, preset="paper", **FAST)),
        (opt, D2Quant(bits=2, final_correction=True, **FAST)),
        (llama, AWQ(bits=2, group_size=16, tokens=64)),
        (opt, SliM(bits=2, group_size=8, range_steps=2, tokens=64)),
        (llama, GPTAQ(bits=3, group_size=16)),
    ],
    ids=lambda given: getattr(given, "name", None) or given.__name__,
)
def test_every_method_is_stored_and_comes_back_bit_for_bit(
    make: Any, method: Method, tmp_path: Path
) -> None:
    model = make()
    quantize_llm(model, method, windows(), batch_size=4)
    exact = logits(model)
    assert save_quantized(model, tmp_path / "ours", windows(2)).agreement.output == 0
    model.save_pretrained(tmp_path / "theirs")
    for folder in ("ours", "theirs"):
        assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / folder)), exact)


class Unfolded:
    """Keeps logits as they were before a method folded anything."""

    def __init__(self, method: Method) -> None:
        self.method, self.finish = method, method.finish
        self.logits = torch.zeros(())
        method.finish = self  # type: ignore[method-assign, assignment]

    def __call__(self, run: Run) -> None:
        self.logits = logits(run.model)
        self.finish(run)


@pytest.mark.parametrize("make", [llama, opt])
def test_orders_fold_into_the_layers_before(make: Any) -> None:
    model, method = make(), PT2(group_size=8)
    before = Unfolded(method)
    result = quantize_llm(model, method, windows(), batch_size=4)
    torch.testing.assert_close(logits(model), before.logits, rtol=1e-4, atol=1e-5)
    roles = roles_of(model)
    downs = [name for name in roles.linears if roles.feeders(name)]
    assert [result.layers[name]["order"] for name in downs] == ["folded"] * 2
    assert all(model.get_submodule(name).code.order is None for name in downs)


def test_layers_of_one_input_share_an_order_or_do_not() -> None:
    for shared in (True, False):
        model = llama()
        quantize_llm(model, PT2(group_size=8, shared_order=shared), windows(), batch_size=4)
        attention = model.model.layers[0].self_attn
        orders = [getattr(attention, name).code.order for name in ("q_proj", "k_proj", "v_proj")]
        assert torch.equal(orders[0], orders[1]) == shared


def test_a_column_scale_folds_into_up_proj_within_rounding() -> None:
    model, method = llama(), D2Quant(bits=3, **FAST)
    before = Unfolded(method)
    result = quantize_llm(model, method, windows(), batch_size=4)
    torch.testing.assert_close(logits(model), before.logits, rtol=1e-2, atol=1e-2)
    down = model.model.layers[1].mlp.down_proj
    assert down.code.column_scale is None
    assert result.layers["model.layers.1.mlp.down_proj"]["column_scale"] == "folded"
    assert model.model.layers[1].mlp.up_proj.bias is not None  # of the correction


def test_a_plain_mlp_keeps_its_column_scale() -> None:
    model = opt()
    quantize_llm(model, D2Quant(bits=3, **FAST), windows(), batch_size=4)
    assert model.model.decoder.layers[0].fc2.code.column_scale is not None


def test_input_scales_fold_into_norms_without_rounding_and_into_up_proj() -> None:
    for make in (llama, opt):
        model, method = make(), AWQ(bits=4, group_size=16, tokens=64)
        before = Unfolded(method)
        quantize_llm(model, method, windows(), batch_size=4)
        torch.testing.assert_close(logits(model), before.logits, rtol=1e-2, atol=1e-2)
        layers = [m for m in model.modules() if isinstance(m, IntLinear)]
        assert not any(layer.transform is not None for layer in layers)


def test_each_group_sees_what_the_quantized_ones_before_it_leave() -> None:
    errors = {}
    for staged in (True, False):
        model = llama()
        exact = logits(model)
        quantize_llm(model, GPTQ(bits=3, group_size=16, staged=staged), windows(), batch_size=4)
        errors[staged] = error(model, exact)
    assert errors[True] != errors[False]


@pytest.mark.parametrize("tied", [True, False])
def test_a_rotation_leaves_the_function_as_it_is(tied: bool) -> None:
    model = llama(tie_word_embeddings=tied)
    exact, weight = logits(model), model.model.layers[0].mlp.up_proj.weight.clone()
    rotate_residual_(model, roles_of(model), 16)
    torch.testing.assert_close(logits(model), exact, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.model.layers[0].mlp.up_proj.weight, weight)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    with pytest.raises(ValueError, match="LayerNorm"):
        rotate_residual_(opt(), roles_of(opt()), 16)


def test_the_release_s_whole_pipeline_runs() -> None:
    model = llama()
    exact = logits(model)
    method = D2Quant(preset="paper", bits=3, **FAST)
    result = quantize_llm(model, method, windows(), batch_size=4)
    assert error(model, exact) < 0.9
    assert model.lm_head.bias is not None
    last = "model.layers.1.mlp.down_proj"
    assert len(result.layers[last]["final_correction"]) == 32


class Watching(D2Quant):
    """Looks at the MLP's norm before and after the correction, in the first block."""

    def __init__(self) -> None:
        super().__init__(bits=2, **FAST)
        self.squares: list[Tensor] = []
        self.snr = torch.zeros(())

    def after_group(
        self, names: tuple[str, ...], found: Mapping[str, nn.Module], view: BlockView
    ) -> Mapping[str, nn.Module]:
        seen = super().after_group(names, found, view)
        if seen and not self.squares:
            ((norm, shifted),) = seen.items()
            outputs: list[Tensor] = []
            for replaced in ({}, found, {**found, norm: shifted}):
                rows: list[Tensor] = []
                view.listen(
                    {norm: lambda a, k, y, rows=rows: rows.append(y.flatten(0, 1))}, replaced
                )
                outputs.append(torch.cat(rows).double())
            moved = outputs[0] - outputs[1]
            self.snr = moved.mean(0).abs() / moved.std(0, correction=0)
            self.squares = [(outputs[0] - y).square().mean(0) for y in outputs[1:]]
            assert isinstance(shifted, Shifted)
            again = mean_deviation(view, norm, {}, {**found, norm: shifted})
            torch.testing.assert_close(again, 0 * again, rtol=0, atol=1e-5)
        return seen


def test_the_correction_removes_the_mean_and_nothing_else() -> None:
    """The share of a channel's squared error that goes is snr^2 / (1 + snr^2)."""
    method = Watching()
    quantize_llm(llama(), method, windows(), batch_size=4)
    before, after = method.squares
    share = method.snr.square() / (1 + method.snr.square())
    torch.testing.assert_close(1 - after / before, share, rtol=1e-3, atol=1e-5)
    assert float(share.max()) > 0.05


@pytest.mark.parametrize(
    ("changes", "settings", "message"),
    [
        ({}, {"rotation": True}, "LayerNorm.* set rotation=False"),
        ({"do_layer_norm_before": False}, {}, "set final_correction=False"),
        ({"word_embed_proj_dim": 16}, {}, "set final_correction=False"),
    ],
)
def test_what_a_plain_mlp_cannot_have_is_refused_before_the_run(
    changes: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    model = opt(**changes)
    exact = logits(model)
    method = D2Quant(**{"final_correction": True, **FAST, **settings})
    with pytest.raises(ValueError, match=message):
        quantize_llm(model, method, windows(), batch_size=4)
    assert torch.equal(logits(model), exact)


def test_a_model_of_unknown_parts_is_refused_before_the_run() -> None:
    with pytest.raises(RuntimeError, match="has not been started"):
        PT2().known_roles()
