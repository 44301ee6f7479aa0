"""What quantization does to one layer on one input: rates and normalised errors."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_qat.layers.linear import QuantLinear
from dit_qat.primitives.uniform import outer_edges, standardize

__all__ = ["LayerStatistics", "layer_statistics", "normalized_error"]


@dataclass(frozen=True)
class LayerStatistics:
    """Numbers of one layer; errors are mean squared error over mean square of the reference.

    Attributes:
        clip_rate: Share of activations beyond the outer edge of the grid.
        zero_fraction: Share of ternary codes that are zero.
        activation_error: Of the quantized rotated input.
        weight_error: Of the ternary residual.
        output_error: Of the layer's output against float arithmetic on the same latents.
        output_rms: Root mean square of the output (ternary adaLN can explode: TerDiT).
    """

    clip_rate: float
    zero_fraction: float
    activation_error: float
    weight_error: float
    output_error: float
    output_rms: float


def normalized_error(approximation: Tensor, reference: Tensor) -> float:
    """Mean squared error over mean square of the reference; 0 when both vanish."""
    reference = reference.float()
    power = reference.square().mean()
    error = (approximation.float() - reference).square().mean()
    return float(error / power) if power > 0 else float(error)


@torch.no_grad()
def layer_statistics(layer: QuantLinear, x: Tensor) -> LayerStatistics:
    """Measure a layer on the float input ``x`` (..., in_features) it receives."""
    rotated = x.to(layer.weight.dtype)
    if layer.rotation is not None:
        rotated = layer.rotation.apply(rotated)
    activation = layer.config.activation
    quantized, clip_rate = rotated, 0.0
    if activation is not None:
        step, low = activation.step_and_low(rotated)
        quantized = activation.fake_quantize(rotated)
        scaled = standardize(rotated, step, low)
        below, above = outer_edges(activation.grid)
        clip_rate = float(((scaled < below) | (scaled > above)).float().mean())
    codes, scale = layer.config.weight.quantize(layer.weight)
    branch: Tensor | float = 0.0
    if layer.low_rank_up is not None and layer.low_rank_down is not None:
        branch = F.linear(F.linear(rotated, layer.low_rank_down), layer.low_rank_up)
    exact = F.linear(rotated, layer.weight) + branch
    output = F.linear(quantized, (codes * scale).to(quantized.dtype)) + branch
    return LayerStatistics(
        clip_rate=clip_rate,
        zero_fraction=float((codes == 0).float().mean()),
        activation_error=normalized_error(quantized, rotated),
        weight_error=normalized_error(codes * scale, layer.weight),
        output_error=normalized_error(output, exact),
        output_rms=float(output.square().mean().sqrt()),
    )
