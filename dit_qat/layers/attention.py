"""Quantized activation-by-activation products of attention, 8 bits by 8 bits."""

from dataclasses import dataclass

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.scales import absmax, safe, widen
from dit_qat.primitives.ste import straight_through
from dit_qat.primitives.uniform import decode, encode

__all__ = ["AttentionConfig", "QuantAttention", "quantize_dynamic", "quantize_probabilities"]


@dataclass(frozen=True)
class AttentionConfig:
    """Bits of the products Q K^T and P V.

    Raises:
        ValueError: for bits outside 2..8.
    """

    bits: int = 8

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ValueError(f"attention bits={self.bits} is outside 2..8; choose bits in it")


def quantize_dynamic(x: Tensor, bits: int, dim: int) -> Tensor:
    """Fake-quantize symmetrically up to the largest magnitude along ``dim``, straight-through."""
    grid = UniformGrid(bits, "symmetric")
    with torch.no_grad():
        exact = widen(x)
        step = safe(absmax(exact, dim) / grid.code_max)
        quantized = decode(encode(exact, step, grid), step, grid).to(x.dtype)
    return straight_through(x, quantized)


def quantize_probabilities(p: Tensor, bits: int) -> Tensor:
    """Fake-quantize softmax outputs on the fixed unsigned grid of [0, 1], straight-through."""
    grid = UniformGrid(bits, "unsigned")
    with torch.no_grad():
        exact = widen(p)
        step = exact.new_full((), 1 / grid.code_max)
        quantized = decode(encode(exact, step, grid), step, grid).to(p.dtype)
    return straight_through(p, quantized)


class QuantAttention(nn.Module):
    """timm's attention with both products on quantized operands (RobuQ, section 4: A-A at 8/8).

    Queries and keys carry one scale per token and head; softmax outputs use the fixed grid of
    [0, 1]; values carry one scale per head and channel, because the second product sums over
    tokens and a scale per token could not leave the integer sum.

    The submodules (``qkv``, ``proj``, norms) are those of the attention it replaces.

    Raises:
        ValueError: for attention with a gate, an output norm, dropout or a width of its own, which
            DiTs do not have.
    """

    def __init__(self, attention: Attention, config: AttentionConfig) -> None:
        super().__init__()
        if attention.attn_drop.p or attention.proj_drop.p:
            raise ValueError(
                f"attention dropout {attention.attn_drop.p}, {attention.proj_drop.p} is not "
                "supported under quantization; set it to 0"
            )
        gated = getattr(attention, "gate", None) is not None
        normed = not isinstance(getattr(attention, "norm", nn.Identity()), nn.Identity)
        inner, outer = attention.proj.in_features, attention.proj.out_features
        if gated or normed or not inner == outer == attention.qkv.in_features:
            raise ValueError(
                f"attention with a gate ({gated}), an output norm ({normed}) or widths that differ "
                f"({attention.qkv.in_features}, {inner}, {outer}) has no quantized form; skip it "
                "by a rule with None"
            )
        self.config = config
        self.num_heads, self.scale = attention.num_heads, attention.scale
        self.qkv, self.proj = attention.qkv, attention.proj
        self.q_norm, self.k_norm = attention.q_norm, attention.k_norm

    def forward(self, x: Tensor) -> Tensor:
        """Map (images, tokens, features) to the same shape."""
        images, tokens, _ = x.shape
        qkv = self.qkv(x).reshape(images, tokens, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        bits = self.config.bits
        q = quantize_dynamic(self.q_norm(q), bits, dim=-1)
        k = quantize_dynamic(self.k_norm(k), bits, dim=-1)
        v = quantize_dynamic(v, bits, dim=-2)
        p = quantize_probabilities((q @ k.mT * self.scale).softmax(-1), bits)
        heads = p.to(v.dtype) @ v
        result: Tensor = self.proj(heads.transpose(1, 2).reshape(images, tokens, -1))
        return result

    def to_float(self) -> Attention:
        """Return timm's attention around the same submodules."""
        with torch.device("meta"):
            attention = Attention(self.qkv.in_features, self.num_heads)
        attention.qkv, attention.proj = self.qkv, self.proj
        attention.q_norm, attention.k_norm = self.q_norm, self.k_norm
        return attention.train(self.training)

    def extra_repr(self) -> str:
        """Bits of the products."""
        return f"bits={self.config.bits}"
