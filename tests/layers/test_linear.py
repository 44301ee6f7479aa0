"""QuantLinear: the same map before quantization, the equation after it, and its state."""

import copy
import io
from typing import Any

import pytest
import torch
from kept_bytes import kept_for_backward
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.layers import (
    HadamardRotation,
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    QuantLinear,
    RobustQuantizer,
    TernaryWeight,
)

PLAIN = LayerConfig(rotation=None, low_rank=None)
CONFIGS = [
    LayerConfig(low_rank=LowRank(4)),
    LayerConfig(low_rank=None),
    LayerConfig(rotation=None, low_rank=LowRank(2)),
    LayerConfig(TernaryWeight("gaussian"), MinMaxQuantizer(3), HadamardRotation(False, 32), None),
    LayerConfig(activation=None, low_rank=LowRank(3, "alternating")),
    PLAIN,
]


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def float_layer(
    inputs: int = 96, outputs: int = 48, bias: bool = True, dtype: torch.dtype = torch.float32
) -> nn.Linear:
    linear = nn.Linear(inputs, outputs, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(normal(outputs, inputs, seed=1) / inputs**0.5)
        if bias:
            linear.bias.copy_(normal(outputs, seed=2))
    return linear


@pytest.mark.parametrize("width", [1152, 4608])
@pytest.mark.parametrize("signs", [True, False])
def test_rotation_and_split_leave_the_map_as_it_was(width: int, signs: bool) -> None:
    linear = float_layer(width, 24, dtype=torch.float64)
    config = LayerConfig(rotation=HadamardRotation(signs), low_rank=LowRank(16))
    layer = QuantLinear.from_float(linear, config)
    assert layer.rotation is not None
    assert layer.low_rank_up is not None
    assert layer.low_rank_down is not None
    x = normal(5, width, dtype=torch.float64)
    rotated = layer.rotation.apply(x)
    assert (rotated - x).abs().max() > 0.1
    split = F.linear(rotated, layer.weight) + rotated @ layer.low_rank_down.T @ layer.low_rank_up.T
    assert (split + layer.bias - linear(x)).abs().max() < 1e-10


def test_a_branch_of_full_rank_leaves_no_residual() -> None:
    linear = float_layer(96, 8, dtype=torch.float64)
    layer = QuantLinear.from_float(linear, LayerConfig(low_rank=LowRank(8)))
    assert layer.weight.abs().max() < 1e-12
    x = normal(5, 96, dtype=torch.float64)
    torch.testing.assert_close(layer(x), linear(x))


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 3)])
def test_the_forward_is_its_equation(
    config: LayerConfig, bias: bool, shape: tuple[int, ...]
) -> None:
    layer = QuantLinear.from_float(float_layer(bias=bias, dtype=torch.float64), config)
    x = normal(*shape, 96, dtype=torch.float64)
    h = x if layer.rotation is None else layer.rotation.apply(x)
    quantized = h if config.activation is None else config.activation.fake_quantize(h)
    expected = quantized @ config.weight.fake_quantize(layer.weight).T
    if layer.low_rank_up is not None and layer.low_rank_down is not None:
        expected = expected + h @ layer.low_rank_down.T @ layer.low_rank_up.T
    expected = expected if layer.bias is None else expected + layer.bias
    torch.testing.assert_close(layer(x), expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_every_parameter_and_the_input_get_gradient(config: LayerConfig) -> None:
    layer, x = QuantLinear.from_float(float_layer(), config), normal(7, 96).requires_grad_()
    layer(x).square().sum().backward()
    for tensor in (x, *layer.parameters()):
        assert tensor.grad is not None
        assert tensor.grad.isfinite().all()
        assert tensor.grad.any()
    assert x.grad is not None
    assert layer.bias is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("bias", [True, False])
def test_an_unrotated_unsplit_layer_returns_bit_for_bit(dtype: torch.dtype, bias: bool) -> None:
    linear = float_layer(50, 30, bias, dtype)  # a width without a Hadamard order
    weight = linear.weight.detach().clone()
    back = QuantLinear.from_float(linear, PLAIN).to_float()
    assert type(back) is nn.Linear
    assert (back.in_features, back.out_features) == (50, 30)
    assert torch.equal(back.weight, weight)
    assert torch.equal(back.bias, linear.bias) if bias else back.bias is None
    assert back.weight.data_ptr() != linear.weight.data_ptr()


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_other_layers_return_to_within_rounding(config: LayerConfig) -> None:
    for dtype, limit in ((torch.float32, 1e-6), (torch.float64, 1e-12), (torch.bfloat16, 0.02)):
        linear = float_layer(dtype=dtype)
        back = QuantLinear.from_float(linear, config).to_float()
        assert back.weight.dtype == dtype
        assert (back.weight - linear.weight).abs().max() <= limit
        assert torch.equal(back.bias, linear.bias)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_the_quantized_weight_computes_what_the_layer_does(config: LayerConfig) -> None:
    linear = float_layer(dtype=torch.float64)
    layer = QuantLinear.from_float(linear, LayerConfig(config.weight, None, config.rotation))
    x = normal(7, 96, dtype=torch.float64)
    torch.testing.assert_close(layer.to_float(quantized=True)(x), layer(x))
    assert (layer.to_float(quantized=True).weight - linear.weight).norm() > 0.1


def test_alternating_lowers_the_error_of_the_weight() -> None:
    linear = float_layer(96, 48)
    errors = []
    for start in ("svd", "alternating"):
        config = LayerConfig(TernaryWeight("least_squares"), low_rank=LowRank(8, start))
        layer = QuantLinear.from_float(linear, config)
        errors.append((layer.to_float(quantized=True).weight - linear.weight).norm())
    assert errors[1] < 0.995 * errors[0]


def test_parameter_names_and_shapes() -> None:
    layer = QuantLinear(96, 48, config=LayerConfig(low_rank=LowRank(4)))
    shapes = {name: tuple(p.shape) for name, p in layer.named_parameters()}
    assert shapes == {
        "weight": (48, 96),
        "bias": (48,),
        "low_rank_up": (48, 4),
        "low_rank_down": (4, 96),
    }
    assert set(dict(QuantLinear(96, 48, config=PLAIN).named_parameters())) == {"weight", "bias"}


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_a_state_dict_of_plain_types_restores_the_layer(config: LayerConfig) -> None:
    layer = QuantLinear.from_float(float_layer(), config, seed=3)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = QuantLinear.empty_like(float_layer(), config, seed=3)
    other.load_state_dict(torch.load(file, weights_only=True))
    x = normal(7, 96)
    assert torch.equal(other(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))


OTHERS: list[tuple[LayerConfig, int, str]] = [
    (LayerConfig(activation=RobustQuantizer(3)), 0, "activation: .*'bits': 4.*'bits': 3"),
    (LayerConfig(activation=MinMaxQuantizer(4)), 0, "RobustQuantizer.*saved, .*MinMaxQuantizer"),
    (LayerConfig(activation=None), 0, "activation: .* saved, None here"),
    (LayerConfig(rotation=None), 0, "rotation: .* saved, None here"),
    (LayerConfig(rotation=HadamardRotation(signs=False)), 0, "rotation: .*'signs': True"),
    (LayerConfig(weight=TernaryWeight("mse")), 0, "weight: .*absmean.*mse"),
    (LayerConfig(), 1, "seed: 0 saved, 1 here"),
]


@pytest.mark.parametrize(("config", "seed", "message"), OTHERS)
def test_state_of_another_configuration_is_refused(
    config: LayerConfig, seed: int, message: str
) -> None:
    state = QuantLinear.from_float(float_layer(), LayerConfig()).state_dict()
    with pytest.raises(ValueError, match=f"another configuration.*{message}"):
        QuantLinear(96, 48, config=config, seed=seed).load_state_dict(state)


@pytest.mark.parametrize("strict", [True, False])
def test_float_state_is_refused_with_the_cure(strict: bool) -> None:
    model = nn.Sequential(QuantLinear(96, 48))
    state = nn.Sequential(float_layer()).state_dict()
    with pytest.raises(ValueError, match=r"0\.weight is a float weight.*quantize_.*from_float"):
        model.load_state_dict(state, strict=strict)


def test_quantized_state_is_refused_by_a_plain_layer() -> None:
    state = QuantLinear.from_float(float_layer(), PLAIN).state_dict()
    with pytest.raises(RuntimeError, match="_extra_state"):
        float_layer().load_state_dict(state)


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_autocast_computes_in_bfloat16_and_keeps_float_masters(config: LayerConfig) -> None:
    layer, x = QuantLinear.from_float(float_layer(), config), normal(7, 96).requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in layer.parameters())
    error = (y.float() - layer(x)).norm() / y.float().norm()
    assert error < 0.1  # values near a threshold change their code


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
def test_zero_tokens_and_zero_weights_stay_finite(config: LayerConfig) -> None:
    linear = float_layer()
    for weight, x in ((linear.weight, torch.zeros(3, 96)), (0 * linear.weight, normal(3, 96))):
        layer = QuantLinear.from_float(linear, PLAIN)
        layer = QuantLinear.from_float(layer.to_float(), config)
        with torch.no_grad():
            layer.weight.copy_(weight)
        x.requires_grad_()
        y = layer(x)
        y.square().sum().backward()
        assert y.isfinite().all()
        assert all(t.grad is None or t.grad.isfinite().all() for t in (x, *layer.parameters()))


def test_it_keeps_little_more_than_a_linear_layer() -> None:
    linear, x = float_layer(1152, 64), normal(512, 1152).requires_grad_()
    layer = QuantLinear.from_float(linear, LayerConfig(low_rank=LowRank(16)))
    totals = []
    for module in (linear, layer):
        with kept_for_backward(module) as kept:
            output = module(x)
        totals.append(sum(kept.values()))
        del output
    assert totals[0] == 512 * 1152 * 4
    assert totals[1] <= 1.5 * totals[0]


def test_it_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    layer = QuantLinear.from_float(float_layer(), LayerConfig(low_rank=LowRank(4)))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    results: list[list[Any]] = []
    for function in (layer, compiled):
        x = normal(2, 5, 96).requires_grad_()
        layer.zero_grad()
        y = function(x)
        y.square().sum().backward()
        results.append([y, x.grad, *(p.grad for p in layer.parameters())])
    for eager, traced in zip(*results, strict=True):
        torch.testing.assert_close(traced, eager)


def test_impossible_settings_are_refused() -> None:
    with pytest.raises(ValueError, match=r"1100 has no Hadamard matrix; nearest orders are 1096"):
        QuantLinear(1100, 8, config=LayerConfig(low_rank=None))
    with pytest.raises(ValueError, match="rank=16 is beyond 8 for a layer of 96 inputs and 8"):
        QuantLinear(96, 8)
    with pytest.raises(ValueError, match="rank=0 is below 1; use low_rank=None"):
        LowRank(0)
    with pytest.raises(ValueError, match="'qr' is unknown; use svd or alternating"):
        LowRank(4, "qr")  # type: ignore[arg-type]


def test_its_line_in_a_printed_model() -> None:
    line = repr(QuantLinear(96, 48, config=LayerConfig(low_rank=LowRank(4))))
    assert "in_features=96, out_features=48, bias=True, weight=absmean ternary" in line
    assert "RobustQuantizer(bits=4" in line
    assert "rank=4" in line


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_16_bit_branch_computes_rounded_and_trains_its_float_factors(dtype: Any) -> None:
    config = LayerConfig(activation=None, low_rank=LowRank(4, dtype=dtype))
    layer, x = QuantLinear.from_float(float_layer(), config), normal(7, 96)
    assert layer.low_rank_up is not None
    assert layer.low_rank_down is not None
    with torch.no_grad():
        layer.low_rank_up.mul_(1.003)  # off the 16-bit grid, as training leaves it
    rounded = copy.deepcopy(layer)
    assert rounded.low_rank_up is not None
    with torch.no_grad():
        rounded.low_rank_up.copy_(layer.low_rank_up.to(getattr(torch, dtype)))
    assert not torch.equal(rounded.low_rank_up, layer.low_rank_up)
    assert torch.equal(layer(x), rounded(x))
    layer(x).square().sum().backward()
    rounded(x).square().sum().backward()
    assert layer.low_rank_up.grad is not None
    assert torch.equal(layer.low_rank_up.grad, rounded.low_rank_up.grad)
    assert layer.to_float().weight.equal(rounded.to_float().weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_the_residual_makes_up_for_the_rounding_of_the_branch(dtype: Any) -> None:
    linear = float_layer(dtype=torch.float64)
    layer = QuantLinear.from_float(linear, LayerConfig(low_rank=LowRank(4, dtype=dtype)))
    assert (layer.to_float().weight - linear.weight).abs().max() < 1e-12


def test_markers_from_before_the_branch_had_a_dtype() -> None:
    layer = QuantLinear.from_float(float_layer(), LayerConfig(low_rank=LowRank(4)))
    old = layer.get_extra_state()
    assert old["low_rank"] == {"rank": 4, "start": "svd", "iterations": 5}
    layer.set_extra_state(old)
    other = QuantLinear(96, 48, config=LayerConfig(low_rank=LowRank(4, dtype="float16")))
    with pytest.raises(ValueError, match=r"low_rank: .* saved, .*'dtype': 'float16'"):
        other.set_extra_state(old)
    with pytest.raises(ValueError, match="dtype='float8' is unknown"):
        LowRank(4, dtype="float8")  # type: ignore[arg-type]
