"""TokenQuantizer: integers per token, or per token and group of inputs, for trained models."""

from dataclasses import dataclass, replace
from math import isfinite

import torch
from torch import Tensor

from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.integer import divisors
from dit_qat.primitives.scales import min_max, safe, widen
from dit_qat.primitives.ste import straight_through

__all__ = ["TokenQuantizer"]


@dataclass(frozen=True)
class TokenQuantizer:
    """Round each token to integers times its own step.

    Attributes:
        bits: 2..8.
        symmetric: Codes around zero up to the largest magnitude; otherwise between minimum and
            maximum, zero included, with a zero point rounded to an integer.
        group_size: Inputs that share a step; None: all of a token.
        clip: Factors on (minimum, maximum), in (0, 1]; a symmetric grid uses the second.
        fixed_range: (minimum, maximum) for all tokens (a static quantizer); None: each its own.

    Raises:
        ValueError: for values out of these ranges.
    """

    bits: int = 4
    symmetric: bool = True
    group_size: int | None = None
    clip: tuple[float, float] = (1.0, 1.0)
    fixed_range: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if isinstance(self.bits, bool) or self.bits not in range(2, 9):
            raise ValueError(f"activation bits={self.bits!r} are outside 2..8; choose whole bits")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"group_size={self.group_size} is below 1; use None for whole tokens")
        object.__setattr__(self, "clip", tuple(self.clip))  # a list, where a file was read
        if len(self.clip) != 2 or not all(0 < factor <= 1 for factor in self.clip):
            raise ValueError(f"clip={self.clip} must be two factors above 0 and up to 1")
        if self.fixed_range is not None:
            object.__setattr__(self, "fixed_range", tuple(self.fixed_range))
            low, high = self.fixed_range
            if not (isfinite(low) and isfinite(high) and low <= high):
                raise ValueError(f"fixed_range={self.fixed_range} is no (minimum, maximum)")

    def with_bits(self, bits: int) -> "TokenQuantizer":
        """The same at other bits."""
        return self if bits == self.bits else replace(self, bits=bits)

    def check_width(self, width: int) -> None:
        """Refuse a width that groups do not divide.

        Raises:
            ValueError: with sizes that do.
        """
        if self.group_size is not None and width % self.group_size:
            raise ValueError(
                f"activation group_size={self.group_size} does not divide {width} inputs; use None "
                f"or one of {', '.join(map(str, divisors(width)))}"
            )

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantize, dequantize, straight-through: (..., in) to the same shape and dtype."""
        with torch.no_grad():
            levels, step = self.levels_and_step(x)
            _grouped(levels, step.shape[-1]).mul_(step[..., None])
            quantized = levels.to(x.dtype)
        return straight_through(x, quantized) if x.requires_grad else quantized

    @torch.no_grad()
    def levels_and_step(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Whole numbers (..., in) between -255 and 255, and their step (..., groups), widened."""
        self.check_width(x.shape[-1])
        groups = _grouped(widen(x), x.shape[-1] // (self.group_size or x.shape[-1]))
        step, zero = self._step_and_zero(groups)
        levels = groups / step
        levels.round_()
        grid = self._grid
        if zero is None:
            levels.clamp_(grid.code_min, grid.code_max)
        else:
            levels.add_(zero).clamp_(grid.code_min, grid.code_max).sub_(zero)
        return levels.flatten(-2), step.squeeze(-1)

    @property
    def _grid(self) -> UniformGrid:
        return UniformGrid(self.bits, "symmetric" if self.symmetric else "unsigned")

    def _step_and_zero(self, groups: Tensor) -> tuple[Tensor, Tensor | None]:
        """Step and zero point (..., groups, 1)."""
        low, high = self._range(groups)
        if self.symmetric:
            return safe(torch.maximum(-low, high) * (self.clip[1] / self._grid.code_max)), None
        low, high = low.clamp_max(0) * self.clip[0], high.clamp_min(0) * self.clip[1]
        step = safe((high - low) / self._grid.code_max)
        return step, (-low / step).round_()

    def _range(self, groups: Tensor) -> tuple[Tensor, Tensor]:
        if self.fixed_range is None:
            return min_max(groups, -1)
        shape = (*groups.shape[:-1], 1)
        return groups.new_full(shape, self.fixed_range[0]), groups.new_full(
            shape, self.fixed_range[1]
        )


def _grouped(x: Tensor, groups: int) -> Tensor:
    """(..., in) as (..., groups, in / groups)."""
    return x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
