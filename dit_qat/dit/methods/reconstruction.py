"""Learned rounding: up or down, weight by weight, so that a block's output stays (AdaRound)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.calibration import BlockView, swapped
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.layers import IntLinear
from dit_qat.primitives.integer import Scales

__all__ = ["LearnedRounding", "Reconstruction", "reconstruct_block"]

_LOW, _HIGH = -0.1, 1.1  # the stretched sigmoid reaches 0 and 1 at finite values
_SHARP, _SOFT = 2.0, 20.0


@dataclass(frozen=True)
class Reconstruction:
    """How rounding is learned.

    Attributes:
        steps: Of Adam, per block; the paper's 20,000 take an hour on a graphics card.
        learning_rate: Larger than the paper's 4e-4, as the steps are fewer.
        exponent: p of the output error ``mean |y' - y|^p``.
        regularizer: Weight of the pull towards 0 or 1, which sets in after a fifth of the steps.

    Raises:
        ValueError: for values that are not positive.
    """

    steps: int = 200
    learning_rate: float = 1e-2
    exponent: float = 2.4
    regularizer: float = 1e-2

    def __post_init__(self) -> None:
        if min(self.steps, self.learning_rate, self.exponent, self.regularizer) <= 0:
            raise ValueError(f"{self}: all values must be above 0; use None for no reconstruction")


class LearnedRounding(nn.Module):
    """An :class:`IntLinear` whose codes are ``floor(W / scale) + h(V)``, h between 0 and 1.

    AdaRound (arXiv:2004.10568), equations 21 to 24.

    Args:
        layer: Rounded to the nearest code.
        weight: (out, in) float, of the layer's transformed input.
    """

    def __init__(self, layer: IntLinear, weight: Tensor) -> None:
        super().__init__()
        self.layer = layer
        width = layer.in_features
        columns = torch.arange(width, device=layer.scale.device)
        scales = Scales(layer.scale.float(), layer.zero).of_columns(columns, width)
        self.scale, self.zero = scales.scale, 0 if scales.zero is None else scales.zero.float()
        levels = weight / self.scale + self.zero
        self.floor = levels.floor()
        share = (levels - self.floor).clamp(0.01, 0.99)
        self.V = nn.Parameter(torch.logit((share - _LOW) / (_HIGH - _LOW)))

    @property
    def h(self) -> Tensor:
        """Share of rounding up (out, in)."""
        return (torch.sigmoid(self.V) * (_HIGH - _LOW) + _LOW).clamp(0, 1)

    def codes(self, h: Tensor) -> Tensor:
        """Codes (out, in), not whole while h is between."""
        grid = self.layer.config.grid.format
        return (self.floor + h).clamp(grid.code_min, grid.code_max)

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in) to (..., out), differentiable in V."""
        layer = self.layer
        z = x if layer.transform is None else layer.transform(x)
        if layer.config.activation is not None:
            z = layer.config.activation.fake_quantize(z)
        weight = (self.codes(self.h) - self.zero) * self.scale
        bias = None if layer.bias is None else layer.bias.to(z.dtype)
        return F.linear(z, weight.to(z.dtype), bias)

    def pull(self, power: float) -> Tensor:
        """``mean 1 - |2 h - 1|^power`` (): zero where all have decided."""
        return (1 - (2 * self.h - 1).abs().pow(power)).mean()

    def decided(self, linear: nn.Linear) -> IntLinear:
        """The layer with every weight rounded as learned."""
        layer = self.layer
        dtype = torch.int8 if layer.config.grid.symmetric else torch.uint8
        return IntLinear.build(
            linear,
            grid=layer.config.grid,
            scales=Scales(layer.scale.float(), layer.zero),
            codes=self.codes((self.h.detach() >= 0.5).float()).to(dtype),
            activation=layer.config.activation,
            transform=layer.transform,
        )


def reconstruct_block(
    view: BlockView, layers: Mapping[str, IntLinear], config: Reconstruction
) -> Mapping[str, IntLinear]:
    """Learn the rounding of a block's layers on the view's calls; kept only if it helps.

    Args:
        view: Of the block.
        layers: Rounded to nearest, without low-rank branches, by full name.
        config: Steps and rates.
    """
    inputs, outputs = _block_calls(view)
    learned = {name: _learnable(layers[name], view.linears[name]) for name in layers}
    inner = {name.removeprefix(f"{view.name}."): module for name, module in learned.items()}
    parameters = [module.V for module in learned.values()]
    optimizer = torch.optim.Adam(parameters, config.learning_rate)
    with torch.enable_grad(), swapped(view.block, inner):
        for step in range(config.steps):
            at = step % len(inputs)
            args, kwargs = inputs[at]
            loss = _distance(view.block(*args, **kwargs), outputs[at], config.exponent)
            progress = step / config.steps
            if progress >= 0.2:
                power = _SOFT + (_SHARP - _SOFT) * (progress - 0.2) / 0.8
                loss = loss + config.regularizer * sum(m.pull(power) for m in learned.values())
            # Gradients of these alone: the float parameters of the block keep theirs.
            for parameter, grad in zip(
                parameters, torch.autograd.grad(loss, parameters), strict=True
            ):
                parameter.grad = grad
            optimizer.step()
    found = {name: module.decided(view.linears[name]) for name, module in learned.items()}
    return found if view.error(found) < view.error(layers) else layers


def _learnable(layer: IntLinear, linear: nn.Linear) -> LearnedRounding:
    weight = linear.weight.detach().float()
    return LearnedRounding(
        layer, weight if layer.transform is None else layer.transform.weight(weight)
    )


def _block_calls(view: BlockView) -> tuple[list[Any], list[Any]]:
    """Inputs and float outputs of the block on the view's calls."""
    inputs: list[Any] = []
    outputs: list[Any] = []

    def keep(_: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        inputs.append(map_tensors(Tensor.clone, (args, kwargs)))
        outputs.append(map_tensors(Tensor.clone, output))

    handle = view.block.register_forward_hook(keep, with_kwargs=True)
    try:
        view.ahead({}, 0, only=())
    finally:
        handle.remove()
    return inputs, outputs


def _distance(output: Any, reference: Any, exponent: float) -> Tensor:
    """``mean |y' - y|^p`` over all values, relative to the reference's."""
    pairs = [
        (y.float(), r.float())
        for y, r in zip(tensors_of(output), tensors_of(reference), strict=True)
        if y.is_floating_point()
    ]
    error = torch.stack([(y - r).abs().pow(exponent).sum() for y, r in pairs]).sum()
    power = torch.stack([r.abs().pow(exponent).sum() for _, r in pairs]).sum()
    return error / power.clamp_min(torch.finfo(power.dtype).tiny)
