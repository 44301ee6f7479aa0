"""Activation quantizers: per token, dynamic, nothing learned and nothing calibrated.

A quantizer is a frozen value: changing a layer's bits means giving it another one. All of them
share one form, ``x ~ level * step + low`` with a ``step`` (and perhaps a ``low``) per token, so
that a matrix product can run on the small numbers ``level`` and be scaled once.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from math import sqrt
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.gaussian import gaussian_step
from dit_qat.primitives.scales import absmax, absmean, min_max, rms, safe, widen
from dit_qat.primitives.ste import clip_mask, straight_through
from dit_qat.primitives.uniform import affine_step, outer_edges, round_codes_, standardize

__all__ = [
    "AbsMaxQuantizer",
    "AbsMeanQuantizer",
    "ActivationQuantizer",
    "MinMaxQuantizer",
    "RobustQuantizer",
    "StraightThrough",
]

StraightThrough = Literal["identity", "clip", "soft_clip"]

_MARGIN = {"clip": 0.0, "soft_clip": 0.5}


@dataclass(frozen=True)
class ActivationQuantizer(ABC):
    """Base of the per-token quantizers.

    Attributes:
        bits: Nominal bits, 1..8 (2..8 where the grid has a zero level).
        straight_through: Which values receive gradient: all (``identity``), those inside the outer
            edge of the grid (``clip``; on a uniform grid the same as QuEST's trust mask), or those
            up to half a step beyond it (``soft_clip``).

    Raises:
        ValueError: for bits outside the range or an unknown straight-through.
    """

    bits: int = 4
    straight_through: StraightThrough = "soft_clip"

    def __post_init__(self) -> None:
        if not isinstance(self.bits, int) or not 1 <= self.bits <= 8:
            raise ValueError(f"bits={self.bits!r} is outside 1..8; choose whole activation bits")
        if self.straight_through not in get_args(StraightThrough):
            raise ValueError(
                f"straight_through={self.straight_through!r} is unknown; "
                f"use one of {get_args(StraightThrough)}"
            )
        _ = self.grid  # refuses bits that the grid cannot hold

    @property
    @abstractmethod
    def grid(self) -> UniformGrid:
        """The format of the codes."""

    @abstractmethod
    def step_and_low(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Per-token step and, for affine grids, the value of level zero: (..., 1), widened."""

    @property
    def gradient_limits(self) -> tuple[float, float] | None:
        """Between which values in steps the straight-through gradient passes; None: all."""
        if self.straight_through == "identity":
            return None
        margin = _MARGIN[self.straight_through]
        below, above = outer_edges(self.grid)
        return below - margin, above + margin

    def levels(self, x: Tensor, step: Tensor, low: Tensor | None) -> Tensor:
        """Nearest levels in steps, exact in the dtype of ``x`` (bfloat16 included)."""
        return self.levels_(standardize(x, step, low)).to(x.dtype)

    def levels_(self, scaled: Tensor) -> Tensor:
        """Nearest levels of values in steps, in place."""
        codes = round_codes_(scaled, self.grid)
        return codes.add_(self.grid.offset) if self.grid.offset else codes

    def gradient_mask(self, x: Tensor, step: Tensor, low: Tensor | None) -> Tensor | None:
        """Where the straight-through gradient passes; None means everywhere."""
        limits = self.gradient_limits
        return None if limits is None else clip_mask(standardize(x, step, low), *limits)

    def fake_quantize(self, x: Tensor) -> Tensor:
        """Quantize, dequantize, straight-through: (..., features) to the same shape and dtype."""
        with torch.no_grad():
            step, low = self.step_and_low(x)
            mask = self.gradient_mask(x, step, low)
            quantized = self.levels_(standardize(x, step, low)).mul_(step)
            quantized = (quantized if low is None else quantized.add_(low)).to(x.dtype)
        return straight_through(x, quantized, mask)


@dataclass(frozen=True)
class RobustQuantizer(ActivationQuantizer):
    """One fixed grid for N(0, 1) after per-token standardisation (RobuQ, arXiv:2509.23582).

    A full-width Hadamard rotation makes every token's coordinates nearly normal, so the token's
    RMS times the MSE-optimal step for N(0, 1) is the whole quantizer. Mid-rise: no zero level.

    Attributes:
        center: Subtract the token mean first (an affine grid; one more number per token).
    """

    center: bool = False

    @property
    def grid(self) -> UniformGrid:
        """Mid-rise, 2^bits levels."""
        return UniformGrid(self.bits, "mid_rise")

    def step_and_low(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``step = Delta_b * rms(x)``; ``low`` is the token mean when centring."""
        if not self.center:
            return safe(rms(widen(x), -1) * gaussian_step(self.bits)), None
        variance, mean = torch.var_mean(widen(x), -1, correction=0, keepdim=True)
        return safe(variance.sqrt() * gaussian_step(self.bits)), mean


@dataclass(frozen=True)
class MinMaxQuantizer(ActivationQuantizer):
    """Per-token min-max affine grid: the baselines' activation quantizer.

    Attributes:
        zero_point: ``float`` keeps the token minimum as a float offset; ``rounded`` moves it to a
            multiple of the step, as integer kernels do. They differ visibly at 1 and 2 bits.
    """

    zero_point: Literal["float", "rounded"] = "float"

    def __post_init__(self) -> None:
        if self.zero_point not in ("float", "rounded"):
            raise ValueError(f"zero_point={self.zero_point!r} is unknown; use float or rounded")
        super().__post_init__()

    @property
    def grid(self) -> UniformGrid:
        """Unsigned codes 0 .. 2^bits - 1."""
        return UniformGrid(self.bits, "unsigned")

    def step_and_low(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``step = (max - min) / (2^b - 1)``, ``low = min`` (rounded to steps when asked)."""
        low, high = min_max(widen(x), -1)
        step = safe(affine_step(low, high, self.bits))
        if self.zero_point == "float":
            return step, low
        # A token of (nearly) equal values has no step to speak of; its minimum in steps must
        # stay finite all the same.
        step = torch.maximum(step, low.abs() * torch.finfo(low.dtype).eps)
        return step, (low / step).round_() * step


@dataclass(frozen=True)
class AbsMaxQuantizer(ActivationQuantizer):
    """Per-token symmetric grid up to the largest magnitude (BitNet b1.58's 8-bit activations)."""

    @property
    def grid(self) -> UniformGrid:
        """Symmetric with zero, 2^bits - 1 levels."""
        return UniformGrid(self.bits, "symmetric")

    def step_and_low(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``step = max|x| / (2^(b-1) - 1)``."""
        return safe(absmax(widen(x), -1) / self.grid.code_max), None


@dataclass(frozen=True)
class AbsMeanQuantizer(ActivationQuantizer):
    """BitNet v2's 4-bit form: ``step = mean|x| / sqrt(7)`` (arXiv:2504.18415).

    Raises:
        ValueError: for bits other than 4, where the form is not defined.
    """

    def __post_init__(self) -> None:
        if self.bits != 4:
            raise ValueError(
                f"bits={self.bits} has no absmean form: BitNet v2 defines it at 4 bits only; "
                "use MinMaxQuantizer at other bit-widths"
            )
        super().__post_init__()

    @property
    def grid(self) -> UniformGrid:
        """Two's complement, -8 .. 7."""
        return UniformGrid(self.bits, "twos_complement")

    def step_and_low(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """``step = mean|x| / sqrt(7)``."""
        return safe(absmean(widen(x), -1) / sqrt(7)), None
