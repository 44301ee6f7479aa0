import json
from collections import OrderedDict
from math import log2

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import nn

from dit_qat import LayerConfig, Rule, quantize_
from dit_qat.export import describe
from dit_qat.layers import (
    AttentionConfig,
    HadamardRotation,
    InputTransform,
    IntLinear,
    LowRank,
    Permute,
    RobustQuantizer,
    Rotate,
    Scale,
    StepBits,
    TernaryWeight,
    TokenQuantizer,
)
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest


def two_layers() -> nn.Module:
    """Linear 64 -> 32 with bias, and 32 -> 128 without."""
    return nn.Sequential(
        OrderedDict(fc1=nn.Linear(64, 32), act=nn.GELU(), fc2=nn.Linear(32, 128, bias=False))
    )


def quantized() -> nn.Module:
    first = LayerConfig(activation=RobustQuantizer(3), low_rank=LowRank(4))
    second = LayerConfig(
        activation=RobustQuantizer(2),
        low_rank=None,
        rotation=HadamardRotation(signs=False, block_size=16),
    )
    return quantize_(two_layers(), [Rule("fc1", first), Rule("fc2", second)])


def test_one_layer_by_hand():
    layer = describe(quantized()).layers[0]
    # 64 * 32 codes, 32 scales, a branch of 4 * (64 + 32) and 32 biases.
    assert (layer.name, layer.kind, layer.shape, layer.rank) == ("fc1", "ternary", (32, 64), 4)
    assert (layer.weights, layer.scales, layer.branch_parameters) == (2048, 32, 384)
    assert (layer.parameters, layer.float_parameters) == (2048 + 384 + 32, 384 + 32)
    assert layer.effective_weight_bits == pytest.approx(log2(3) + 32 * (32 + 384) / 2048)
    assert layer.stored_bits == pytest.approx(2048 * log2(3) + 32 * (32 + 384 + 32))


def test_rotations():
    first, second = describe(quantized()).layers
    assert first.rotation is not None
    assert second.rotation is not None
    assert (first.rotation.orders, first.rotation.signs) == ((64,), True)
    assert (second.rotation.orders, second.rotation.signs) == ((16,), False)
    assert (first.rotation.block_size, second.rotation.block_size) == (None, 16)


def test_wide_layers_name_every_factor():
    model = nn.Sequential(nn.Linear(1152, 4, bias=False))
    layer = describe(quantize_(model, [Rule("0", LayerConfig(low_rank=None))])).layers[0]
    assert layer.rotation is not None
    assert sorted(layer.rotation.orders) == [32, 36]


def test_totals_by_hand():
    model = describe(quantized())
    first, second = 2048, 4096
    assert model.average_activation_bits == pytest.approx((3 * first + 2 * second) / 6144)
    side = 32 * (32 + 384) + 32 * 128
    assert model.weight_bits == pytest.approx(log2(3))
    assert model.effective_weight_bits == pytest.approx(log2(3) + side / 6144)
    assert model.parameters == 6144 + 384 + 32
    assert model.float_parameter_share == pytest.approx(416 / 6560)
    assert model.packed_bytes == pytest.approx((6144 * log2(3) + side + 32 * 32) / 8)


def test_one_scale_per_tensor_costs_less():
    model = two_layers()
    config = LayerConfig(weight=TernaryWeight(per_channel=False), low_rank=None)
    layer = describe(quantize_(model, [Rule("fc1", config)])).layers[0]
    assert layer.effective_weight_bits == pytest.approx(log2(3) + 32 / 2048)


def test_zero_fraction_counts_codes():
    model = quantized()
    with torch.no_grad():
        # Row means are 1/2 and 3/4: ones become +1, and zeros stay.
        model.fc1.weight.copy_(torch.arange(64).remainder(2).expand(32, 64))
        model.fc2.weight.copy_((torch.arange(32) % 4 > 0).float().expand(128, 32))
    described = describe(model)
    assert [layer.zero_fraction for layer in described.layers] == [0.5, 0.25]
    assert described.zero_fraction == pytest.approx((0.5 * 2048 + 0.25 * 4096) / 6144)


def test_layers_that_see_one_token_per_image_count_apart():
    model = nn.ModuleDict(
        {"mlp": nn.Linear(64, 64), "adaLN_modulation": nn.Linear(64, 384), "head": nn.Linear(64, 8)}
    )
    config = LayerConfig(activation=RobustQuantizer(2))
    adaln = LayerConfig(activation=RobustQuantizer(4))
    quantize_(model, [Rule("mlp", config), Rule("adaLN_modulation", adaln)])
    described = describe(model)
    assert described.average_activation_bits == 2.0
    assert described.per_image_activation_bits == 4.0
    assert describe(model, per_image=()).average_activation_bits == pytest.approx((2 + 4 * 6) / 7)


def test_unquantized_activations_count_as_floats():
    model = quantize_(two_layers(), [Rule("fc1", LayerConfig(activation=None))])
    assert describe(model).average_activation_bits == 16.0


def integers(policy=None) -> nn.Module:
    """Linear 64 -> 32 of 4 bits, and 32 -> 128 of 2 bits with all side information."""
    model, vector = two_layers(), torch.rand(32) + 0.5
    steps = [Scale(vector), Permute(torch.randperm(32)), Rotate(Rotation(32, 3, 8))]
    codes, scales = round_to_nearest(model.fc1.weight.detach(), IntegerGrid(4))
    first = IntLinear.build(
        model.fc1,
        grid=IntegerGrid(4),
        scales=scales,
        codes=codes,
        activation=TokenQuantizer(8),
        step_bits=policy,
    )
    grid = IntegerGrid(2, symmetric=False, group_size=8)
    codes, scales = round_to_nearest(model.fc2.weight.detach(), grid)
    second = IntLinear.build(
        model.fc2,
        grid=grid,
        scales=scales,
        codes=codes,
        activation=TokenQuantizer(4),
        transform=InputTransform(32, steps),
        branch=(torch.randn(128, 3), torch.randn(3, 32)),
    )
    model.fc1, model.fc2 = first, second
    return model


def test_integer_layers_by_hand():
    model = integers()
    first, second = describe(model).layers
    assert (first.kind, first.weight_bits, first.activation_bits) == ("int", 4, 8)
    assert (first.weights, first.parameters, first.float_parameters) == (2048, 2080, 32)
    assert first.effective_weight_bits == pytest.approx(4 + 16 * 32 / 2048)
    # 128 x 4 scales of 16 bits and zero points of 8, two vectors of 32 and a branch of rank 3.
    side = 24 * 128 * 4 + 2 * 32 * 32 + 16 * 3 * (128 + 32)
    assert second.effective_weight_bits == pytest.approx(2 + side / 4096)
    assert second.effective_weight_bits == pytest.approx(model.fc2.effective_weight_bits)
    assert second.transform == ("scale", "permute", "rotate")
    assert second.rotation is not None
    assert (second.rotation.orders, second.rotation.block_size) == ((8,), 8)
    described = describe(model)
    assert described.weight_bits == pytest.approx((4 * 2048 + 2 * 4096) / 6144)
    assert described.average_activation_bits == pytest.approx((8 * 2048 + 4 * 4096) / 6144)
    assert described.mean_activation_bits == 6
    assert described.zero_fraction is None
    assert described.packed_bytes == model.fc1.bytes_stored + model.fc2.bytes_stored


def test_bits_by_timestep_are_averaged():
    described = describe(integers(StepBits((0.0, 500.0, 900.0), (3, 4, 8))))
    assert [layer.policy for layer in described.layers] == [True, False]
    assert described.layers[0].activation_bits == 5
    assert described.mean_activation_bits == 4.5
    assert described.average_activation_bits == pytest.approx((5 * 2048 + 4 * 4096) / 6144)
    assert json.loads(json.dumps(described.as_dict()))["mean_activation_bits"] == 4.5


def test_attention_products():
    model = nn.ModuleDict({"attn": Attention(32, num_heads=2)})
    assert describe(model).attention_bits == {}
    quantize_(model, [Rule("attn", AttentionConfig(bits=6))])
    assert describe(model).attention_bits == {"attn": 6}


def test_float_model():
    described = describe(two_layers())
    assert (described.effective_weight_bits, described.average_activation_bits) == (32, 16)
    assert described.float_parameter_share == 1.0
    assert described.zero_fraction is None
    assert described.packed_bytes == 4 * described.parameters
    half = describe(two_layers().bfloat16())
    assert half.effective_weight_bits == half.weight_bits == 16
    assert half.packed_bytes == 2 * half.parameters


def test_describing_changes_nothing():
    model = quantized()
    before = {name: value.clone() for name, value in model.named_parameters()}
    describe(model)
    assert all(torch.equal(before[name], value) for name, value in model.named_parameters())


def test_dictionary_is_plain():
    content = json.loads(json.dumps(describe(quantized()).as_dict()))
    assert content["layers"][0]["effective_weight_bits"] == pytest.approx(log2(3) + 6.5)
    assert content["average_activation_bits"] == pytest.approx(7 / 3)


def test_model_without_parameters():
    with pytest.raises(ValueError, match="GELU has no parameters"):
        describe(nn.GELU())
