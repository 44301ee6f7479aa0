"""PackedLinear: the outputs of the quantized layer, from buffers of codes."""

import copy
import io

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    HadamardRotation,
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    PackedLinear,
    QuantLinear,
    RobustQuantizer,
    TernaryWeight,
)
from dit_qat.primitives.packing import unpack_ternary

CONFIGS = [
    LayerConfig(low_rank=LowRank(4)),
    LayerConfig(low_rank=LowRank(4, dtype="float16"), activation=RobustQuantizer(1)),
    LayerConfig(low_rank=LowRank(4, dtype="bfloat16"), activation=RobustQuantizer(8, center=True)),
    LayerConfig(TernaryWeight("gaussian"), MinMaxQuantizer(3), HadamardRotation(False, 32), None),
    LayerConfig(TernaryWeight("mse", per_channel=False), MinMaxQuantizer(8), None, None),
    LayerConfig(activation=MinMaxQuantizer(2, zero_point="rounded"), low_rank=None),
    LayerConfig(activation=AbsMaxQuantizer(8), low_rank=LowRank(2)),
    LayerConfig(activation=AbsMeanQuantizer(4)),
    LayerConfig(activation=None, low_rank=LowRank(3)),
]
EACH = pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def quantized(config: LayerConfig, bias: bool = True, inputs: int = 96) -> QuantLinear:
    linear = nn.Linear(inputs, 44, bias)
    with torch.no_grad():
        for number, parameter in enumerate(linear.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number + 1) / inputs**0.5)
    return QuantLinear.from_float(linear, config, seed=3)


@EACH
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(7,), (2, 40), (0,)])
def test_outputs_are_those_of_the_quantized_layer(
    config: LayerConfig, bias: bool, shape: tuple[int, ...]
) -> None:
    layer = quantized(config, bias)
    x = 3 * normal(*shape, 96) + 0.5
    y = PackedLinear.from_quantized(layer)(x)
    assert y.shape == (*shape, 44)
    # The integer part is equal bit for bit; a float product may sum in another order.
    torch.testing.assert_close(y, layer(x), rtol=1e-6, atol=1e-6)
    if config.activation is not None:
        assert torch.equal(y, layer(x))


@EACH
def test_double_and_half_precision_inputs(config: LayerConfig) -> None:
    layer = quantized(config)
    packed, x = PackedLinear.from_quantized(layer), normal(9, 96)
    assert packed(x.bfloat16()).dtype == torch.bfloat16
    expected = layer.double()(x.double())
    assert (packed(x.double()) - expected).norm() <= 1e-5 * expected.norm()
    with torch.autocast("cpu", torch.bfloat16):
        y = packed(x)
        reference = layer.float()(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - reference.float()).norm() < 0.02 * reference.float().norm()


def test_a_width_that_fills_no_byte() -> None:
    config = LayerConfig(rotation=None, low_rank=None)
    layer, x = quantized(config, inputs=30), normal(5, 30)
    packed = PackedLinear.from_quantized(layer)
    assert packed.codes.shape == (44, 8)
    assert torch.equal(packed(x), layer(x))


def test_it_holds_codes_and_no_parameters() -> None:
    layer = quantized(LayerConfig(low_rank=LowRank(4, dtype="float16")))
    packed = PackedLinear.from_quantized(layer)
    assert not list(packed.parameters())
    held = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in packed.named_buffers()}
    assert held == {
        "codes": (torch.uint8, (44, 24)),
        "scale": (torch.float32, (44, 1)),
        "bias": (torch.float32, (44,)),
        "low_rank_up": (torch.float16, (44, 4)),
        "low_rank_down": (torch.float16, (4, 96)),
    }
    codes, scale = layer.config.weight.quantize(layer.weight.detach())
    assert torch.equal(unpack_ternary(packed.codes, 96).float(), codes)
    assert torch.equal(packed.scale, scale)


@EACH
def test_state_dict_and_copies_compute_the_same(config: LayerConfig) -> None:
    packed, x = PackedLinear.from_quantized(quantized(config)), normal(5, 96)
    expected = packed(x)
    file = io.BytesIO()
    torch.save(packed.state_dict(), file)
    file.seek(0)
    other = PackedLinear(96, 44, config=config, seed=3)
    other(x)  # whatever it has derived from its old codes must go
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), expected)
    assert torch.equal(copy.deepcopy(packed)(x), expected)


def test_16_bit_casts_leave_the_scale() -> None:
    packed, x = PackedLinear.from_quantized(quantized(CONFIGS[0])), normal(5, 96)
    expected, scale = packed(x), packed.scale.clone()
    model = nn.Sequential(packed).to(torch.bfloat16)
    assert torch.equal(packed.scale, scale)
    assert packed.codes.dtype == torch.uint8
    y = model(x.bfloat16()).float()
    assert (y - expected).norm() < 0.2 * expected.norm()


def test_the_meta_device_makes_room_only() -> None:
    layer = quantized(CONFIGS[0])
    packed = PackedLinear.like(layer)
    assert all(buffer.is_meta for buffer in packed.buffers())
    filled = packed.to_empty(device="cpu")
    filled.load_state_dict(PackedLinear.from_quantized(layer).state_dict())
    assert torch.equal(filled(normal(5, 96)), layer(normal(5, 96)))


def test_another_branch_dtype_is_rounded_and_said() -> None:
    layer = quantized(LayerConfig(low_rank=LowRank(4)))
    packed = PackedLinear.from_quantized(layer, "bfloat16")
    assert packed.config.low_rank == LowRank(4, dtype="bfloat16")
    assert packed.low_rank_up is not None
    assert packed.low_rank_up.dtype == torch.bfloat16
    assert not torch.equal(packed(normal(5, 96)), layer(normal(5, 96)))


def test_no_gradient_passes() -> None:
    x = normal(5, 96).requires_grad_()
    assert not PackedLinear.from_quantized(quantized(CONFIGS[0]))(x).requires_grad


def test_what_is_not_finite_is_refused() -> None:
    for name in ("weight", "bias", "low_rank_up"):
        layer = quantized(LayerConfig(low_rank=LowRank(4)))
        with torch.no_grad():
            layer.get_parameter(name).view(-1)[3] = float("nan")
        with pytest.raises(ValueError, match=f"{name} holds NaN"):
            PackedLinear.from_quantized(layer)
    layer = quantized(LayerConfig(low_rank=LowRank(4)))
    with torch.no_grad():
        layer.low_rank_up.mul_(1e7)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"low_rank_up holds .* larger ones than torch.float16"):
        PackedLinear.from_quantized(layer, "float16")


def test_state_of_another_kind_or_configuration_is_refused() -> None:
    layer = quantized(CONFIGS[0])
    packed = PackedLinear.from_quantized(layer)
    with pytest.raises(ValueError, match=r"weight is a float weight.*PackedLinear"):
        packed.load_state_dict(layer.state_dict())
    other = PackedLinear(96, 44, config=LayerConfig(low_rank=LowRank(4)), seed=4)
    with pytest.raises(ValueError, match=r"another configuration \(seed: 3 saved, 4 here\)"):
        other.load_state_dict(packed.state_dict())
    with pytest.raises(RuntimeError, match="Unexpected key"):
        nn.Linear(96, 44).load_state_dict(packed.state_dict())


def test_it_compiles_without_breaks() -> None:
    packed, x = PackedLinear.from_quantized(quantized(CONFIGS[0])), normal(5, 96)
    expected = packed(x)
    compiled = torch.compile(packed, fullgraph=True, backend="eager")
    assert torch.equal(compiled(x), expected)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@EACH
def test_cuda_agrees(config: LayerConfig) -> None:
    layer = quantized(config).cuda()
    packed, x = PackedLinear.from_quantized(layer), normal(40, 96).cuda()
    assert (packed(x) - layer(x)).norm() <= 1e-5 * layer(x).norm()
