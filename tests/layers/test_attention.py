"""Quantized attention products against timm's attention."""

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dit_qat.layers.attention import (
    AttentionConfig,
    Operand,
    QuantAttention,
    quantize_dynamic,
    quantize_probabilities,
    quantized_matmul,
)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def attention(**kwargs: object) -> Attention:
    torch.manual_seed(0)
    module = Attention(64, num_heads=4, qkv_bias=True, **kwargs)
    with torch.no_grad():
        module.qkv.weight.mul_(3)  # scores that differ
    return module


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.detach() - b.detach()).norm() / b.detach().norm())


def dequantized(operand: Operand) -> Tensor:
    return operand.codes.double() * operand.step.double()


@pytest.mark.parametrize("fused", [True, False])
def test_eight_bits_are_close_and_fewer_are_worse(fused: bool) -> None:
    exact, x = attention(), normal(3, 10, 64)
    exact.fused_attn = fused
    errors = [
        distance(QuantAttention(exact, AttentionConfig(b))(x), exact(x)) for b in range(8, 1, -1)
    ]
    assert 0 < errors[0] < 0.01
    assert errors == sorted(errors)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_are_close_to_the_float_ones(norm: bool) -> None:
    exact = attention(qk_norm=norm, norm_layer=nn.LayerNorm)
    gradients = []
    for module in (exact, QuantAttention(exact, AttentionConfig())):
        exact.zero_grad()
        x = normal(3, 10, 64).requires_grad_()
        (module(x) * normal(3, 10, 64)).sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in exact.parameters())])
    together = [torch.cat([g.flatten() for g in group]) for group in gradients]
    assert 0 < distance(together[1], together[0]) < 0.02
    assert all(gradient.any() for gradient in gradients[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("dim", [-1, -2])
def test_dynamic_quantization_is_off_by_half_a_step(bits: int, dim: int) -> None:
    x = normal(2, 4, 10, 16, dtype=torch.float64)
    quantized = dequantized(quantize_dynamic(x, bits, dim))
    step = x.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((quantized - x).abs() <= step / 2 + 1e-12).all()
    codes = quantized / step
    torch.testing.assert_close(codes, codes.round())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_probabilities_keep_zero_and_one(bits: int) -> None:
    p = torch.cat([torch.tensor([0.0, 1.0]), torch.linspace(0, 1, 1000)]).double()
    quantized = dequantized(quantize_probabilities(p, bits)).squeeze(0)
    assert quantized[:2].tolist() == pytest.approx([0, 1], abs=1e-12)
    assert (quantized - p).abs().max() <= 0.5 / (2**bits - 1) + 1e-12
    assert len(quantized.unique()) == 2**bits


def operands(bits: int, dtype: torch.dtype) -> list[tuple[Operand, Operand]]:
    """Operands of both products of attention, as attention builds them."""
    x = normal(3, 2, 50, 72, dtype=dtype).requires_grad_()
    q, k, v = x.unbind(0)
    p = normal(2, 50, 50).mul(3).softmax(-1).requires_grad_()
    return [
        (quantize_dynamic(q, bits, -1), quantize_dynamic(k, bits, -1).transposed),
        (quantize_probabilities(p, bits, dtype), quantize_dynamic(v, bits, -2)),
    ]


@pytest.mark.parametrize("bits", [2, 8])
@pytest.mark.parametrize(
    ("dtype", "rounding"),
    [(torch.float32, 1e-6), (torch.float16, 2**-11), (torch.bfloat16, 2**-8)],
)
def test_products_are_those_of_the_quantized_operands(
    bits: int, dtype: torch.dtype, rounding: float
) -> None:
    for a, b in operands(bits, dtype):
        exact = dequantized(a) @ dequantized(b)
        product = quantized_matmul(a, b)
        assert product.dtype == torch.float32
        floor = exact.abs().max() * 1e-6
        assert ((product.double() - exact).abs() <= rounding * exact.abs() + floor).all()
        units = (a.codes * 256, b.codes * 256)
        assert all(torch.equal(codes, codes.round()) for codes in units)


@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float32, 1e-6), (torch.float16, 2e-3), (torch.bfloat16, 5e-3)]
)
def test_gradients_pass_straight_through(dtype: torch.dtype, rounding: float) -> None:
    for a, b in operands(3, dtype):
        grad = normal(2, 50, b.codes.shape[-1])
        got = torch.autograd.grad(quantized_matmul(a, b), (a.value, b.value), grad)
        expected = (grad.double() @ dequantized(b).mT, dequantized(a).mT @ grad.double())
        for gradient, value, reference in zip(got, (a.value, b.value), expected, strict=True):
            assert gradient.dtype == value.dtype
            assert distance(gradient.double(), reference) < rounding


def test_attention_in_bfloat16_stays_on_its_grid() -> None:
    """Queries equal keys equal 0: every p is 1/k, and the output the exact mean on the grid."""
    tokens, grid = 12, 255
    exact = attention().bfloat16()
    with torch.no_grad():
        exact.qkv.weight[:128] = 0
        exact.qkv.bias.zero_()
        exact.proj.weight.copy_(torch.eye(64))
        exact.proj.bias.zero_()
    x = normal(1, tokens, 64, dtype=torch.bfloat16)
    v = (x @ exact.qkv.weight[128:].T).double()
    step = v.abs().amax(1, keepdim=True) / 127
    expected = round(grid / tokens) / grid * ((v / step).round() * step).sum(1, keepdim=True)
    y = QuantAttention(exact, AttentionConfig())(x).double()
    assert ((y - expected).abs() <= 2**-7 * expected.abs() + 1e-6).all()


def test_zeros_and_bfloat16() -> None:
    assert not dequantized(quantize_dynamic(torch.zeros(2, 3), 8, -1)).any()
    module = QuantAttention(attention(), AttentionConfig())
    assert module(torch.zeros(1, 4, 64)).isfinite().all()
    x = normal(3, 10, 64)
    with torch.autocast("cpu", torch.bfloat16):
        y = module(x)
    assert y.dtype == torch.bfloat16
    assert distance(y.float(), module(x)) < 0.03


def test_it_compiles_without_graph_breaks() -> None:
    torch.compiler.reset()
    module, x = QuantAttention(attention(), AttentionConfig()), normal(2, 5, 64)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), module(x))
    gradients = [torch.autograd.grad(f(x).sum(), module.qkv.weight)[0] for f in (compiled, module)]
    torch.testing.assert_close(*gradients)


def test_names_stay_and_the_way_back_is_exact() -> None:
    exact = attention(qk_norm=True, norm_layer=nn.LayerNorm).eval()
    module = QuantAttention(exact, AttentionConfig(6))
    assert set(module.state_dict()) == set(exact.state_dict())
    back, x = module.train(False).to_float(), normal(3, 10, 64)
    assert type(back) is Attention
    assert not back.training
    assert torch.equal(back(x), exact(x))
    assert repr(module).startswith("QuantAttention(\n  bits=6")


@pytest.mark.parametrize("bits", [1, 9])
def test_other_bits_are_refused(bits: int) -> None:
    with pytest.raises(ValueError, match=rf"attention bits={bits} is outside 2\.\.8"):
        AttentionConfig(bits)


def test_attention_of_another_kind_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dropout 0\.1, 0\.0 is not supported"):
        QuantAttention(attention(attn_drop=0.1), AttentionConfig())
    with pytest.raises(ValueError, match=r"an output norm \(True\)"):
        QuantAttention(attention(scale_norm=True, norm_layer=nn.LayerNorm), AttentionConfig())
    wide = attention()
    wide.proj = nn.Linear(64, 32)
    with pytest.raises(
        ValueError, match=r"\(64, 64, 32\) has no quantized form; skip it by a rule"
    ):
        QuantAttention(wide, AttentionConfig())
