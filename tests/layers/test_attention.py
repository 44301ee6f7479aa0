"""Quantized attention products against timm's attention."""

import pytest
import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dit_qat.layers.attention import (
    AttentionConfig,
    QuantAttention,
    quantize_dynamic,
    quantize_probabilities,
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
    quantized = quantize_dynamic(x, bits, dim)
    step = x.abs().amax(dim, keepdim=True) / (2 ** (bits - 1) - 1)
    assert ((quantized - x).abs() <= step / 2 + 1e-12).all()
    codes = quantized / step
    torch.testing.assert_close(codes, codes.round())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_probabilities_keep_zero_and_one(bits: int) -> None:
    p = torch.cat([torch.tensor([0.0, 1.0]), torch.linspace(0, 1, 1000)]).double()
    quantized = quantize_probabilities(p, bits)
    assert quantized[:2].tolist() == [0, 1]
    assert (quantized - p).abs().max() <= 0.5 / (2**bits - 1) + 1e-12
    assert len(quantized.unique()) == 2**bits


def test_both_pass_their_gradient_straight_through() -> None:
    x, grad = normal(2, 3, 5, 8).requires_grad_(), normal(2, 3, 5, 8).flip(0)
    for function in (lambda x: quantize_dynamic(x, 3, -1), lambda x: quantize_probabilities(x, 3)):
        x.grad = None
        function(x).backward(grad)
        assert torch.equal(x.grad, grad)


def test_zeros_and_bfloat16() -> None:
    assert not quantize_dynamic(torch.zeros(2, 3), 8, -1).any()
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
