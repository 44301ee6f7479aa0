"""Quantized activation-by-activation products of attention, 8 bits by 8 bits."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from timm.models.vision_transformer import Attention
from torch import Tensor, nn

from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.scales import absmax, safe, widen
from dit_qat.primitives.uniform import encode

__all__ = [
    "AttentionConfig",
    "Operand",
    "QuantAttention",
    "quantize_dynamic",
    "quantize_probabilities",
    "quantized_matmul",
]

Dtype = torch.dtype | None

_CODE_UNIT = 256  # a power of two, so that nothing rounds


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


class Operand(NamedTuple):
    """One side of a quantized product.

    Attributes:
        value: The float tensor, which receives the gradient.
        codes: Its codes over 256, in the dtype of the product: exact, and small enough for sums of
            products to stay within float16.
        step: What codes are multiplied by; constant along the dimension that the product sums over.
    """

    value: Tensor
    codes: Tensor
    step: Tensor

    @property
    def transposed(self) -> "Operand":
        """The operand with its last two dimensions exchanged."""
        return Operand(self.value.mT, self.codes.mT, self.step.mT)


def _operand(x: Tensor, exact: Tensor, step: Tensor, grid: UniformGrid, dtype: Dtype) -> Operand:
    codes = encode(exact, step, grid).div_(_CODE_UNIT)
    return Operand(x, codes.to(x.dtype if dtype is None else dtype), step * _CODE_UNIT)


@torch.no_grad()
def quantize_dynamic(x: Tensor, bits: int, dim: int, dtype: Dtype = None) -> Operand:
    """Quantize symmetrically up to the largest magnitude along ``dim``, for products in dtype."""
    grid, exact = UniformGrid(bits, "symmetric"), widen(x)
    return _operand(x, exact, safe(absmax(exact, dim) / grid.code_max), grid, dtype)


@torch.no_grad()
def quantize_probabilities(p: Tensor, bits: int, dtype: Dtype = None) -> Operand:
    """Quantize softmax outputs on the fixed unsigned grid of [0, 1], for products in dtype."""
    grid, exact = UniformGrid(bits, "unsigned"), widen(p)
    return _operand(p, exact, exact.new_full((1, 1), 1 / grid.code_max), grid, dtype)


def quantized_matmul(a: Operand, b: Operand) -> Tensor:
    """Multiply codes, which half precision holds exactly, and scale the product once.

    Gradients pass straight through to both values.

    Args:
        a: (..., n, k) with steps (..., n, 1).
        b: (..., k, m) with steps (..., 1, m).

    Returns:
        (..., n, m) in float32 or finer.
    """
    result: Tensor = _QuantizedMatmul.apply(
        a.value, b.value, a.codes.detach(), b.codes.detach(), a.step, b.step
    )
    return result


class _QuantizedMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        a: Tensor,
        b: Tensor,
        a_codes: Tensor,
        b_codes: Tensor,
        a_step: Tensor,
        b_step: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(a_codes, b_codes, a_step, b_step)
        ctx.dtypes = a.dtype, b.dtype
        return widen(a_codes @ b_codes).mul_(a_step).mul_(b_step)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, None, None]:
        a_codes, b_codes, a_step, b_step = ctx.saved_tensors
        grad_a = grad_b = None
        # The steps go to the gradient while it is wide, so that codes stay exact here too.
        if ctx.needs_input_grad[0]:
            grad_a = ((grad * b_step).to(b_codes.dtype) @ b_codes.mT).to(ctx.dtypes[0])
        if ctx.needs_input_grad[1]:
            grad_b = (a_codes.mT @ (grad * a_step).to(a_codes.dtype)).to(ctx.dtypes[1])
        return grad_a, grad_b, None, None, None, None


class QuantAttention(nn.Module):
    """timm's attention with both products on quantized operands (RobuQ, arXiv:2509.23582).

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
        query = quantize_dynamic(self.q_norm(q), bits, dim=-1, dtype=v.dtype)
        key = quantize_dynamic(self.k_norm(k), bits, dim=-1, dtype=v.dtype)
        value = quantize_dynamic(v, bits, dim=-2)
        logits = quantized_matmul(query, key.transposed) * self.scale
        probabilities = quantize_probabilities(logits.softmax(-1), bits, dtype=v.dtype)
        heads = quantized_matmul(probabilities, value).to(v.dtype)
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
