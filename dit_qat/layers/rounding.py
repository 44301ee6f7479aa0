"""How a method rounds a weight: to the nearest code, or with error feedback as GPTQ does."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from dit_qat.layers.input_transform import InputTransform
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.asymmetric import Asymmetric
from dit_qat.primitives.column_order import Order
from dit_qat.primitives.compensation import Block, column_by_column, compensate
from dit_qat.primitives.integer import IntegerGrid, Scales, decode, divisors, encode, fit_scales
from dit_qat.primitives.second_moment import SecondMoment

__all__ = [
    "ClipSearch",
    "GPTQSettings",
    "Rounded",
    "Rounding",
    "choose_scales",
    "legal_group",
    "nearest_layer",
    "round_gptq",
    "round_nearest",
    "transformed_moment",
]

Rounding = Literal["nearest", "gptq"]


class Rounded(NamedTuple):
    """A weight in codes.

    Attributes:
        codes: (out, in), as :func:`~dit_qat.primitives.integer.encode` makes them.
        scales: Of the codes.
        values: (out, in) float32, what the codes stand for.
    """

    codes: Tensor
    scales: Scales
    values: Tensor


@dataclass(frozen=True)
class ClipSearch:
    """Shrink the range of every row or group to the least error ``sum |w - Q(w)|^p``.

    Attributes:
        values: How many factors are tried, evenly from 1 down.
        least: The smallest factor.
        exponent: p; 2.4 in GPTQ's and QuaRot's releases.

    Raises:
        ValueError: for values outside their range.
    """

    values: int = 100
    least: float = 0.2
    exponent: float = 2.4

    def __post_init__(self) -> None:
        if self.values < 1 or not 0 < self.least <= 1 or self.exponent <= 0:
            raise ValueError(
                f"{self} searches nothing; use values >= 1, 0 < least <= 1 and exponent > 0"
            )

    @property
    def factors(self) -> Sequence[float]:
        """From 1 down to ``least``."""
        return torch.linspace(1.0, self.least, self.values).tolist()


@dataclass(frozen=True)
class GPTQSettings:
    """GPTQ's knobs, with the release's values (https://github.com/IST-DASLab/gptq).

    Attributes:
        damping: Added to the diagonal of H, as a fraction of its mean.
        block_size: Columns per block.
        act_order: Columns (whole groups, unless they are static) of large second moment first.
        static_groups: Scales of groups from the weight as it was, not as compensated when its
            block begins.

    Raises:
        ValueError: for damping or blocks outside their range.
    """

    damping: float = 0.01
    block_size: int = 128
    act_order: bool = False
    static_groups: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.damping <= 10:
            raise ValueError(f"damping={self.damping} is outside 0..10; 0.01 is usual")
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} is below 1; 128 is usual")


def legal_group(width: int, wanted: int) -> int:
    """The largest group of 8 to ``wanted`` that divides a width; the width if none does."""
    return max((size for size in divisors(width) if size <= wanted), default=width)


def choose_scales(weight: Tensor, grid: IntegerGrid, clip: ClipSearch | None = None) -> Scales:
    """Scales of a weight (out, in): of its full range, or of the best shrunk one."""
    best = fit_scales(weight, grid)
    if clip is None:
        return best
    least = _power_error(weight, grid, best, clip.exponent)
    for factor in clip.factors:
        # The range is linear in the weight: that of a shrunk weight is the shrunk range.
        trial = fit_scales(weight * factor, grid)
        error = _power_error(weight, grid, trial, clip.exponent)
        better = error < least
        least = torch.where(better, error, least)
        best = Scales(
            torch.where(better, trial.scale, best.scale),
            None
            if best.zero is None or trial.zero is None
            else torch.where(better, trial.zero, best.zero),
        )
    return best


def round_nearest(weight: Tensor, grid: IntegerGrid, clip: ClipSearch | None = None) -> Rounded:
    """Round a weight (out, in) to the nearest codes."""
    weight = weight.detach().float()
    scales = choose_scales(weight, grid, clip)
    codes = encode(weight, grid, scales)
    return Rounded(codes, scales, decode(codes, grid, scales))


def nearest_layer(
    linear: nn.Linear,
    grid: IntegerGrid,
    activation: TokenQuantizer | None,
    transform: InputTransform | None = None,
    clip: ClipSearch | None = None,
) -> IntLinear:
    """Quantize a linear, its weight transformed and rounded to the nearest codes.

    Args:
        linear: Float.
        grid: Of the transformed weight.
        activation: Of the transformed inputs.
        transform: Of the inputs.
        clip: Search of the weight's range; None: the full one.
    """
    weight = linear.weight if transform is None else transform.weight(linear.weight)
    codes, scales, _ = round_nearest(weight, grid, clip)
    return IntLinear.build(
        linear, grid=grid, scales=scales, codes=codes, activation=activation, transform=transform
    )


def round_gptq(
    weight: Tensor,
    second_moment: SecondMoment | None,
    grid: IntegerGrid,
    settings: GPTQSettings,
    clip: ClipSearch | None = None,
    transform: InputTransform | None = None,
    order: Order | None = None,
    asymmetric: Asymmetric | None = None,
) -> Rounded:
    """Round a weight column by column, later columns making up for the error of earlier ones.

    GPTQ, arXiv:2210.17323, algorithm 1; GPTAQ, arXiv:2504.02692, with its asymmetric term.

    Args:
        weight: (out, in), of transformed inputs.
        second_moment: Of the inputs before the transform.
        grid: Bits and group.
        settings: Damping, blocks and order.
        clip: How scales are found; None: from the full range.
        transform: What the inputs pass before they meet the weight.
        order: Of the columns; None: as the settings have it.
        asymmetric: Makes up for the error of the (transformed) inputs as well.

    Raises:
        ValueError: without a second moment, or for shapes that do not fit.
    """
    if second_moment is None:
        raise ValueError("GPTQ needs second moments: ask for Needs(second_moment=True)")
    weight = weight.detach().float()
    rounder = _ColumnRounder(weight, grid, clip, settings)
    whole_groups = None if settings.static_groups else grid.group_size
    compensated = compensate(
        weight,
        second_moment if transform is None else transformed_moment(second_moment, transform),
        rounder,
        settings.block_size,
        order="activation" if order is None and settings.act_order else order,
        group_size=whole_groups,
        damping=settings.damping,
        asymmetric=asymmetric,
    )
    return Rounded(rounder.codes, rounder.scales, compensated.weight)


def transformed_moment(second_moment: SecondMoment, transform: InputTransform) -> SecondMoment:
    """``T^T H T``, the second moment of ``x T``, in float64 so that it stays definite."""
    half = transform(second_moment.matrix.double())
    full = transform(half.T)
    tokens = torch.tensor(second_moment.tokens)
    return SecondMoment.from_state({"matrix": (full + full.T) / 2, "tokens": tokens})


class _ColumnRounder:
    """A block quantizer that rounds column by column and keeps codes and scales."""

    def __init__(
        self, weight: Tensor, grid: IntegerGrid, clip: ClipSearch | None, settings: GPTQSettings
    ) -> None:
        self.grid, self.clip = grid, clip
        self._refits = grid.group_size is not None and not settings.static_groups
        # Refitted scales only need room here, which the full range makes cheaply.
        self.scales = choose_scales(weight, grid, None if self._refits else clip)
        dtype = torch.int8 if grid.symmetric else torch.uint8
        self.codes = torch.empty(weight.shape, dtype=dtype, device=weight.device)
        self._sweep = column_by_column(self._column)

    def __call__(self, W: Tensor, block: Block) -> Tensor:
        if self._refits:
            self._refit(W, block.columns)
        return self._sweep(W, block)

    def _refit(self, W: Tensor, columns: Tensor) -> None:
        """Fit the scales of the groups that begin here to the weight as compensated so far."""
        assert self.grid.group_size is not None
        groups = columns[:: self.grid.group_size] // self.grid.group_size
        fresh = choose_scales(W, self.grid, self.clip)
        self.scales.scale[:, groups] = fresh.scale
        if self.scales.zero is not None and fresh.zero is not None:
            self.scales.zero[:, groups] = fresh.zero

    def _column(self, w: Tensor, column: Tensor) -> Tensor:
        codes = encode(w, self.grid, self.scales, column)
        self.codes[:, column] = codes
        return decode(codes, self.grid, self.scales, column)


def _power_error(weight: Tensor, grid: IntegerGrid, scales: Scales, exponent: float) -> Tensor:
    """``sum |w - Q(w)|^p`` of every row and group (out, groups)."""
    values = decode(encode(weight, grid, scales), grid, scales)
    error: Tensor = (weight - values).abs_().pow_(exponent)
    return error.view(*scales.scale.shape, -1).sum(-1)
