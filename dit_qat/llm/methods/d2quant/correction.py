"""D2Quant's deviation-aware correction: give activations back the mean that quantization moved."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView

__all__ = ["Shifted", "mean_deviation", "with_bias"]


class Shifted(nn.Module):
    """A module whose output is moved by a vector (out,); it stands in while data are gathered."""

    def __init__(self, module: nn.Module, shift: Tensor) -> None:
        super().__init__()
        self.module, self.shift = module, shift

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The module's output, moved, in its dtype."""
        output: Tensor = self.module(*args, **kwargs)
        return output + self.shift.to(output)


def mean_deviation(
    view: BlockView,
    name: str,
    teacher: Mapping[str, nn.Module],
    student: Mapping[str, nn.Module],
    then: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Mean over all tokens of what a module gives with some modules, less that with others.

    It takes ``snr^2 / (1 + snr^2)`` off a channel's squared error, snr being its ``|mean| / std``.

    Args:
        view: Of the block, whose inputs are those behind the quantized prefix.
        name: Of the module in the block (or the block).
        teacher: Modules by full name; the others are float.
        student: The same.
        then: What the output passes; None: nothing.
    """
    means = []
    for replacements in (teacher, student):
        total = _Mean(then)
        view.listen({name: total}, replacements)
        means.append(total.sum / max(total.tokens, 1))
    difference: Tensor = (means[0] - means[1]).float()
    return difference


def with_bias(linear: nn.Linear, more: Tensor) -> nn.Linear:
    """A linear with the same weight, and ``more`` (out,) added to its bias."""
    twin = nn.Linear(linear.in_features, linear.out_features, device="meta").train(linear.training)
    twin.weight = linear.weight
    before = 0 if linear.bias is None else linear.bias.detach().float()
    twin.bias = nn.Parameter(before + more.to(linear.weight.device).float(), requires_grad=False)
    return twin


class _Mean:
    """Sums what a module gives, over tokens."""

    def __init__(self, then: Callable[[Tensor], Tensor] | None) -> None:
        self.then, self.tokens = then, 0
        self.sum = torch.zeros(())

    def __call__(self, args: Any, kwargs: Any, output: Any) -> None:
        hidden = output[0] if isinstance(output, tuple) else output
        hidden = hidden if self.then is None else self.then(hidden)
        rows = hidden.detach().flatten(0, -2)
        self.sum = self.sum.to(rows.device) + rows.double().sum(0)
        self.tokens += len(rows)
