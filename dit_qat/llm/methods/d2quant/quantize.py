"""D2Quant on one weight: scales by the dual-scale fit, codes column by column."""

import torch
from torch import Tensor

from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.rounding import Rounded, legal_group, round_gptq
from dit_qat.layers.ternary_code import stored_half
from dit_qat.llm.methods.d2quant.config import D2QuantConfig
from dit_qat.llm.methods.d2quant.dual_scale import (
    DualScale,
    fit_dual_scale,
    fit_row_scales,
    nearest_planes,
)
from dit_qat.primitives.asymmetric import Asymmetric
from dit_qat.primitives.compensation import Block, column_by_column, compensate
from dit_qat.primitives.integer import IntegerGrid
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["quantize_weight", "round_integers"]

_LEAST_COLUMN = 2.0**-10  # of a group's geometric mean, so that another layer can take it over


def quantize_weight(
    weight: Tensor,
    second_moment: SecondMoment,
    config: D2QuantConfig,
    cross_moment: Tensor | None = None,
) -> PlaneCode:
    """Quantize a weight to sign planes with row and column scales.

    The scales of a group are fitted to its columns as compensated so far; then every column is
    rounded with them, the later ones making up for its error (GPTAQ).

    Args:
        weight: (out, in).
        second_moment: H (in, in) of the inputs.
        config: How.
        cross_moment: (X_fp - X)^T X (in, in); None: the asymmetric term is left out.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, or scales beyond
            float16.
    """
    weight = weight.detach().float()
    group = legal_group(weight.shape[1], config.group_size)
    rounder = _PlaneRounder(weight, group, config)
    compensate(
        weight,
        second_moment,
        rounder,
        group,
        order="group_activation" if config.ordered else None,
        group_size=group,
        damping=config.damping,
        asymmetric=_term(config, cross_moment),
    )
    return PlaneCode.build(rounder.planes, rounder.rows, group, rounder.columns)


def round_integers(
    weight: Tensor,
    second_moment: SecondMoment,
    config: D2QuantConfig,
    cross_moment: Tensor | None = None,
) -> tuple[IntegerGrid, Rounded]:
    """Quantize a weight to integers with zero points, as D2Quant does all but down_proj."""
    grid = IntegerGrid(config.bits, False, legal_group(weight.shape[1], config.group_size))
    rounded = round_gptq(
        weight,
        second_moment,
        grid,
        config.settings,
        config.recipe.clip,
        order="group_activation" if config.ordered else None,
        asymmetric=_term(config, cross_moment),
    )
    return grid, rounded


def _term(config: D2QuantConfig, cross_moment: Tensor | None) -> Asymmetric | None:
    if cross_moment is None or config.asymmetric == 0:
        return None
    return Asymmetric(cross_moment, config.asymmetric, config.recipe.multiplies)


class _PlaneRounder:
    """A block quantizer: fits a group, then rounds its columns; keeps planes and scales."""

    def __init__(self, weight: Tensor, group: int, config: D2QuantConfig) -> None:
        (rows, width), bits = weight.shape, config.bits
        self.config, self.group = config, group
        self.planes = torch.empty(bits, rows, width, dtype=torch.int8, device=weight.device)
        self.rows = torch.empty(rows, width // group, bits, device=weight.device)
        self.columns = torch.empty(width, device=weight.device)
        self._sweep = column_by_column(self._column)

    def __call__(self, W: Tensor, block: Block) -> Tensor:
        for start in range(0, W.shape[1], self.group):
            part = slice(start, start + self.group)
            columns = block.columns[part]
            fit = _stored(W[:, part], self._fit(W[:, part]))
            self.rows[:, int(columns[0]) // self.group] = fit.rows
            self.columns[columns] = fit.columns
        return self._sweep(W, block)

    def _fit(self, W: Tensor) -> DualScale:
        return fit_dual_scale(W, self.config.bits, self.config.iterations)

    def _column(self, w: Tensor, column: Tensor) -> Tensor:
        rows = self.rows[:, int(column) // self.group]
        planes = nearest_planes(w, rows, self.columns[column])
        self.planes[:, :, column] = planes.to(torch.int8)
        value = torch.zeros_like(w)  # in the order of PlaneCode.decode, for the same bits
        for number, plane in enumerate(planes):
            value += rows[:, number : number + 1] * plane
        return value.mul_(self.columns[column])


def _stored(weight: Tensor, fit: DualScale) -> DualScale:
    """Scales as float16, columns with a geometric mean of 1; rows are refitted to them."""
    used = fit.columns > 0
    mean = fit.columns[used].log().mean().exp() if bool(used.any()) else fit.columns.new_ones(())
    columns = (fit.columns / mean).clamp_min(_LEAST_COLUMN)
    columns = stored_half(columns[None], "a column scale")[0]
    fit = fit_row_scales(weight, fit._replace(columns=columns, rows=fit.rows * mean))
    return fit._replace(rows=stored_half(fit.rows, "a scale"))
