"""Moving magnitude between an input channel and its weights: ``x / s`` and ``W * s``."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dit_qat.calibration.view import BlockView

__all__ = ["LEAST", "SharedInput", "balance", "shared_inputs", "stacked_weight", "weight_maxima"]

LEAST = 1e-5
"""Floor of maxima and scales, as in SmoothQuant's release."""


SharedInput = tuple[str, ...]
"""Full names of linears that read the very same tensor."""


def shared_inputs(view: BlockView) -> list[SharedInput]:
    """All linears of a block, those of one input together, in the order of the block."""
    group_of = {name: group for group in view.shared_inputs for name in group}
    return list(dict.fromkeys(group_of.get(name, (name,)) for name in view.linears))


def stacked_weight(linears: Iterable[nn.Linear]) -> Tensor:
    """Weights of layers of one input along ``out``: (sum of out, in), float32."""
    return torch.cat([linear.weight.detach().float() for linear in linears])


def weight_maxima(weight: Tensor) -> Tensor:
    """``max_out |W|`` (in,) of a weight (out, in)."""
    return weight.abs().amax(0)


def balance(
    x_max: Tensor, w_max: Tensor, x_power: float, w_power: float, floor: float = LEAST
) -> Tensor:
    """``s = max|X|^a / max|W|^b`` per input channel.

    SmoothQuant (arXiv:2211.10438, equation 4) has ``b = 1 - a``; SVDQuant (arXiv:2411.05007)
    searches both; PTQ4DiT's balance (arXiv:2405.16005) has ``a = b = 1/2``.

    Args:
        x_max: (in,), not negative.
        w_max: (in,), not negative.
        x_power: a.
        w_power: b.
        floor: Least maximum and least s, so that silent channels stay finite.

    Returns:
        (in,) positive; all ones where both powers are 0.
    """
    s = x_max.clamp_min(floor) ** x_power / w_max.clamp_min(floor) ** w_power
    return s.clamp_min(floor)
