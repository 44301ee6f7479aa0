"""The quantized product ``Q_a(x) Q_w(W)^T`` as one autograd node.

Forward multiplies small integers and scales once, as the packed kernels do. For backward only the
input, the latent weight (a parameter) and the scales are kept, and codes are computed again: the
memory of ``nn.Linear``, where a chain of elementwise operations keeps twenty times as much.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dit_qat.layers.activation import ActivationQuantizer
from dit_qat.primitives.ternary import TERNARY_FITS, TernaryFit, ternarize

__all__ = ["TernaryWeight", "ternary_matmul"]


@dataclass(frozen=True)
class TernaryWeight:
    """Weight format: ternary codes times one scale per output channel, or per tensor.

    Raises:
        ValueError: for an unknown fit.
    """

    fit: TernaryFit = "absmean"
    per_channel: bool = True

    def __post_init__(self) -> None:
        if self.fit not in TERNARY_FITS:
            raise ValueError(f"ternary fit {self.fit!r} is unknown; use one of {TERNARY_FITS}")

    def quantize(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Codes (out, in) and scale (out, 1) or (1, 1)."""
        return ternarize(weight, self.fit, self.per_channel)

    def fake_quantize(self, weight: Tensor) -> Tensor:
        """Codes times scale, without gradient."""
        codes, scale = self.quantize(weight.detach())
        return codes * scale


def ternary_matmul(
    x: Tensor, weight: Tensor, activation: ActivationQuantizer | None, ternary: TernaryWeight
) -> Tensor:
    """Fake-quantized linear map with straight-through gradients to both operands.

    Args:
        x: (..., in), in the compute dtype.
        weight: (out, in), the float latent weight; identity straight-through.
        activation: Quantizer of ``x``, with its own gradient mask; None leaves ``x`` as it is.
        ternary: Format of the weight.

    Returns:
        (..., out) in the dtype of ``x``.
    """
    result: Tensor = _TernaryMatmul.apply(x, weight, activation, ternary)
    return result


class _TernaryMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        activation: ActivationQuantizer | None,
        ternary: TernaryWeight,
    ) -> Tensor:
        codes, scale = ternary.quantize(weight)
        codes = codes.to(x.dtype)
        step = low = None
        levels = x
        if activation is not None:
            step, low = activation.step_and_low(x)
            levels = activation.levels(x, step, low)
        y = levels @ codes.T
        if step is not None:
            y = y.mul_(step)
        if low is not None:
            y = y.add_(low * codes.sum(-1))
        ctx.save_for_backward(x, weight, step, low, scale)
        ctx.activation, ctx.ternary = activation, ternary
        return y.mul_(scale.squeeze(-1))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:  # type: ignore[override]
        x, weight, step, low, scale = ctx.saved_tensors
        activation: ActivationQuantizer | None = ctx.activation
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            codes = ctx.ternary.quantize(weight)[0].to(x.dtype)
            grad_x = (grad * scale.squeeze(-1)).to(x.dtype) @ codes
            mask = None if activation is None else activation.gradient_mask(x, step, low)
            if mask is not None:
                grad_x.mul_(mask)
        if ctx.needs_input_grad[1]:
            quantized = x
            if activation is not None:
                quantized = activation.levels(x, step, low) * step
                quantized = (quantized if low is None else quantized + low).to(x.dtype)
            flat = grad.reshape(-1, grad.shape[-1]).to(x.dtype)
            grad_weight = (flat.T @ quantized.reshape(-1, x.shape[-1])).to(weight.dtype)
        return grad_x, grad_weight, None, None
