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
from dit_qat.primitives.scales import widen
from dit_qat.primitives.ste import clip_gradient
from dit_qat.primitives.ternary import (
    TERNARY_FITS,
    TernaryFit,
    fit_ternary,
    ternarize,
    ternary_codes,
)
from dit_qat.primitives.uniform import standardize

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
    x: Tensor,
    weight: Tensor,
    activation: ActivationQuantizer | None,
    ternary: TernaryWeight,
    addend: Tensor | None = None,
) -> Tensor:
    """Fake-quantized linear map with straight-through gradients to both operands.

    Args:
        x: (..., in), in the compute dtype.
        weight: (out, in), the float latent weight; identity straight-through.
        activation: Quantizer of ``x``, with its own gradient mask; None leaves ``x`` as it is.
        ternary: Format of the weight.
        addend: (..., out), added to the product before that is rounded to the dtype of ``x``.

    Returns:
        (..., out) in the dtype of ``x``.
    """
    result: Tensor = _TernaryMatmul.apply(x, weight, activation, ternary, addend)
    return result


class _TernaryMatmul(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        activation: ActivationQuantizer | None,
        ternary: TernaryWeight,
        addend: Tensor | None,
    ) -> Tensor:
        codes, scale, threshold = fit_ternary(weight, ternary.fit, ternary.per_channel)
        ctx.activation = activation
        if activation is None:
            ctx.save_for_backward(x, weight, scale, threshold, None, None)
            y = widen(x @ codes.to(x.dtype).T).mul_(scale.squeeze(-1))
        else:
            exact = widen(x)
            step, low = activation.step_and_low(exact)
            ctx.save_for_backward(x, weight, scale, threshold, step, low)
            levels = activation.levels(exact, step, low).to(x.dtype)
            y = widen(levels @ codes.to(x.dtype).T).mul_(scale.squeeze(-1)).mul_(step)
            if low is not None:
                y.addcmul_(low, codes.sum(-1, dtype=y.dtype) * scale.squeeze(-1))
        return (y if addend is None else y.add_(addend)).to(x.dtype)

    @staticmethod
    def backward(
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor | None, Tensor | None, None, None, Tensor | None]:
        x, weight, scale, threshold, step, low = ctx.saved_tensors
        activation: ActivationQuantizer | None = ctx.activation
        scaled = x if activation is None else standardize(x, step, low)
        grad_x = grad_weight = None
        if ctx.needs_input_grad[0]:
            quantized = ternary_codes(weight, threshold).mul_(scale)
            grad_x = grad @ quantized.to(x.dtype)
            if activation is not None and activation.gradient_limits is not None:
                grad_x = clip_gradient(grad_x, scaled, *activation.gradient_limits).to(x.dtype)
        if ctx.needs_input_grad[1]:
            quantized = x
            if activation is not None:
                quantized = activation.levels_(scaled).mul_(step)
                quantized = (quantized if low is None else quantized.add_(low)).to(x.dtype)
            columns = grad.reshape(-1, grad.shape[-1]).T
            grad_weight = (columns @ quantized.reshape(-1, x.shape[-1])).to(weight.dtype)
        return grad_x, grad_weight, None, None, grad if ctx.needs_input_grad[4] else None
