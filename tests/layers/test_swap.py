"""Swapping: names and structure stay, failures change nothing, the way back is exact."""

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dit_qat.dit.models import DiT
from dit_qat.dit.randomness import generator_for
from dit_qat.layers import (
    AttentionConfig,
    LayerConfig,
    LowRank,
    QuantAttention,
    QuantConfig,
    QuantLinear,
    Rule,
    quantize_,
)
from dit_qat.layers.swap import to_float_

LINEAR = LayerConfig(low_rank=LowRank(4))
RULES = [
    Rule("blocks.*", LINEAR),
    Rule("blocks.*.attn", AttentionConfig()),
    Rule("blocks.1.mlp.fc2", None),
]


def small_dit() -> DiT:
    torch.manual_seed(0)
    model = DiT(8, 2, 1, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    for block in model.blocks:  # gates of zero would hide the blocks
        nn.init.normal_(block.adaLN_modulation[1].weight, std=0.1)
    nn.init.normal_(model.final_layer.linear.weight, std=0.1)
    return model.eval()


def predict(model: DiT) -> Tensor:
    x = torch.randn(2, 1, 8, 8, generator=generator_for(0, "swap"))
    with torch.no_grad():
        return model(x, torch.tensor([10, 900]), torch.tensor([0, 2]))


def kinds(model: nn.Module) -> dict[str, type[nn.Module]]:
    return {name: type(module) for name, module in model.named_modules()}


def test_only_what_the_rules_name_is_swapped_and_names_stay() -> None:
    model, float_model = small_dit(), small_dit()
    assert quantize_(model, QuantConfig(RULES)) is model
    assert set(dict(float_model.named_parameters())) <= set(dict(model.named_parameters()))
    before, after = kinds(float_model), kinds(model)
    changed = {name: kind for name, kind in after.items() if kind is not before.get(name)}
    linears = {name for name, kind in changed.items() if kind is QuantLinear}
    assert {name for name, kind in changed.items() if kind is QuantAttention} == {
        "blocks.0.attn",
        "blocks.1.attn",
    }
    assert len(linears) == len(changed) - 2 == 9
    assert after["blocks.1.mlp.fc2"] is after["final_layer.linear"] is nn.Linear
    for name in linears:
        assert model.get_parameter(f"{name}.bias") is not None


def test_unquantized_parts_leave_the_prediction_almost_as_it_was() -> None:
    model, config = small_dit(), LayerConfig(activation=None, low_rank=LowRank(32))
    exact = predict(model)
    predicted = predict(quantize_(model, [Rule("blocks.*.attn.*", config)]))
    torch.testing.assert_close(predicted, exact, rtol=1e-4, atol=1e-5)


def test_the_way_back_restores_the_model() -> None:
    model, float_model = small_dit(), small_dit()
    quantize_(model, RULES)
    assert (predict(model) - predict(float_model)).abs().max() > 1e-3
    to_float_(model)
    assert kinds(model) == kinds(float_model)
    for name, parameter in float_model.named_parameters():
        torch.testing.assert_close(model.get_parameter(name), parameter, rtol=0, atol=1e-6)
    float_model.load_state_dict(model.state_dict())


def test_merging_the_quantized_weights_keeps_them() -> None:
    model = small_dit()
    exact = model.get_parameter("blocks.0.mlp.fc1.weight").detach().clone()
    quantize_(model, [Rule("blocks.0.mlp.fc1", LINEAR)])
    layer = model.get_submodule("blocks.0.mlp.fc1")
    assert isinstance(layer, QuantLinear)
    expected = layer.to_float(quantized=True).weight
    merged = to_float_(model, quantized=True).get_parameter("blocks.0.mlp.fc1.weight")
    assert torch.equal(merged, expected)
    assert (merged - exact).norm() > 0.1 * exact.norm()


def test_without_initialization_the_structure_is_the_same() -> None:
    trained = quantize_(small_dit(), QuantConfig(RULES, seed=5))
    with torch.device("meta"):
        skeleton = DiT(8, 2, 1, hidden_size=32, depth=2, num_heads=2, num_classes=3)
    for model in (small_dit(), skeleton):
        quantize_(model, QuantConfig(RULES, seed=5), initialize=False)
        assert kinds(model) == kinds(trained)
        assert {n: p.shape for n, p in model.named_parameters()} == {
            n: p.shape for n, p in trained.named_parameters()
        }
        model.load_state_dict(trained.state_dict(), assign=True)
        assert torch.equal(predict(model.eval()), predict(trained))


def test_the_seed_decides_the_signs() -> None:
    weights = [
        quantize_(small_dit(), QuantConfig(RULES, seed)).get_parameter("blocks.0.mlp.fc1.weight")
        for seed in (0, 0, 1)
    ]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


def odd_model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(64, 1100), nn.GELU(), nn.Linear(1100, 64), nn.Linear(64, 64))


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([Rule("*", LINEAR)], r"layer '2': .*1100 has no Hadamard matrix.*1096 and 1104"),
        ([Rule("0", LINEAR), Rule("3", LayerConfig(low_rank=LowRank(65)))], "layer '3': rank=65"),
        ([Rule("0", LINEAR), Rule("4", LINEAR)], "pattern '4' matches no layer"),
        ([Rule("*", AttentionConfig())], "matches no attention to quantize; this model has none"),
    ],
)
@pytest.mark.parametrize("initialize", [True, False])
def test_a_refused_config_changes_nothing(
    rules: list[Rule], message: str, initialize: bool
) -> None:
    model = odd_model()
    modules, parameters = list(model.modules()), [p.clone() for p in model.parameters()]
    with pytest.raises(ValueError, match=message):
        quantize_(model, rules, initialize=initialize)
    assert all(a is b for a, b in zip(model.modules(), modules, strict=True))
    assert all(map(torch.equal, model.parameters(), parameters))


def test_weights_that_are_no_numbers_are_refused_in_time() -> None:
    model = odd_model()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="layer '3': the weight holds infinities or NaN"):
        quantize_(model, [Rule("0", LINEAR), Rule("3", LINEAR)])
    assert type(model[0]) is nn.Linear


def test_attention_that_does_not_fit_is_named() -> None:
    model = nn.Sequential(Attention(64, 4, proj_drop=0.5))
    with pytest.raises(ValueError, match="layer '0': attention dropout"):
        quantize_(model, [Rule("0", AttentionConfig())])
    assert type(model[0]) is Attention


def test_state_of_the_other_kind_is_refused_both_ways() -> None:
    model, float_model = quantize_(small_dit(), RULES), small_dit()
    with pytest.raises(RuntimeError, match=r"marks a quantized checkpoint.*quantize_"):
        float_model.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match=r"is a float weight, but blocks\.\d.* is a QuantLinear"):
        model.load_state_dict(float_model.state_dict())
