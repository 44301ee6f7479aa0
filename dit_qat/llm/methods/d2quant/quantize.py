"""D2Quant on one weight: scales by the dual-scale fit, codes column by column."""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.rounding import Rounded, legal_group, round_gptq
from dit_qat.layers.ternary_code import stored_half
from dit_qat.llm.methods.d2quant.config import ColumnOrder, D2QuantConfig
from dit_qat.llm.methods.d2quant.dual_scale import (
    DualScale,
    Levels,
    fit_dual_scale,
    fit_row_scales,
)
from dit_qat.primitives.asymmetric import Asymmetric
from dit_qat.primitives.column_order import Order
from dit_qat.primitives.compensation import Block, column_by_column, compensate
from dit_qat.primitives.integer import IntegerGrid
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["output_errors", "quantize_weight", "round_integers"]

_SOLVER_ORDER: Mapping[ColumnOrder, Order | None] = {
    "columns": "activation",
    "groups": "group_activation",
    "none": None,
}
_LEAST_COLUMN = 2.0**-8  # of a group's mean, so that another layer can take it over in float16


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
        order=None if config.recipe.order == "none" else "group_activation",
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
    order, term, found = _SOLVER_ORDER[config.recipe.order], _term(config, cross_moment), None
    for clip in config.recipe.clips:
        trial = round_gptq(
            weight, second_moment, grid, config.settings, clip, order=order, asymmetric=term
        )
        found = trial if found is None else _better_rows(weight, second_moment, term, found, trial)
    assert found is not None
    return grid, found


def _better_rows(
    weight: Tensor, second_moment: SecondMoment, term: Asymmetric | None, a: Rounded, b: Rounded
) -> Rounded:
    """Of each row, the rounding of less error."""
    W = weight.detach().float()
    first, second = (output_errors(W, r.values, second_moment.matrix, term) for r in (a, b))
    parts = ((r.codes, r.values, *(s for s in r.scales if s is not None)) for r in (a, b))
    _take(second < first, *parts)
    return a


def output_errors(
    weight: Tensor, rounded: Tensor, H: Tensor, term: Asymmetric | None = None
) -> Tensor:
    """``||q X_q - w X_fp||^2`` of every row (out,), less what no rounding changes.

    With E = Q - W that is ``E H E^T - 2 c E D^T W^T`` on the diagonal, for the strength c and the
    cross moment D of an asymmetric term.

    Args:
        weight: W (out, in).
        rounded: Q (out, in).
        H: Second moment (in, in).
        term: None: as if inputs were exact.
    """
    error = rounded - weight
    gradient = error @ H.to(error)
    if term is not None:
        moved = weight @ term.cross_moment.to(weight)
        gradient.sub_(moved, alpha=2 * term.strength)
    return gradient.mul_(error).sum(1)


def _term(config: D2QuantConfig, cross_moment: Tensor | None) -> Asymmetric | None:
    if cross_moment is None or config.asymmetric == 0:
        return None
    return Asymmetric(cross_moment, config.asymmetric, config.recipe.multiplies)


class _Swept(NamedTuple):
    """One group rounded column by column; the rows of all tensors come first.

    Attributes:
        values: (out, k), quantized.
        before: (out, k), the weights just before they were rounded.
        numbers: (out, k), which levels.
        rows: (out, planes), row scales.
        loss: (out,), squared error that is left once later columns have made up for this group.
    """

    values: Tensor
    before: Tensor
    numbers: Tensor
    rows: Tensor
    loss: Tensor


class _PlaneRounder:
    """A block quantizer of one group: fits it, then rounds its columns; keeps planes and scales."""

    def __init__(self, weight: Tensor, group: int, config: D2QuantConfig) -> None:
        (rows, width), bits = weight.shape, config.bits
        self.config, self.group = config, group
        self.planes = torch.empty(bits, rows, width, dtype=torch.int8, device=weight.device)
        self.rows = torch.empty(rows, width // group, bits, device=weight.device)
        self.columns = torch.empty(width, device=weight.device)

    def __call__(self, W: Tensor, block: Block) -> Tensor:
        fit = _stored(W, fit_dual_scale(W, self.config.bits, self.config.iterations))
        best: _Swept | None = None
        for factor in self.config.recipe.headroom:
            rows = stored_half(fit.rows * factor, "a scale")
            trial = _sweep(W.clone(), block, rows, fit.columns)
            if best is not None:
                _take(trial.loss < best.loss, best, trial)
            best = trial if best is None else best
        assert best is not None
        signs = Levels.of(best.rows).planes(best.numbers)
        self.planes[:, :, block.columns] = signs.to(torch.int8)
        self.rows[:, int(block.columns[0]) // self.group] = best.rows
        self.columns[block.columns] = fit.columns
        W.copy_(best.before)
        return best.values


def _sweep(W: Tensor, block: Block, rows: Tensor, columns: Tensor) -> _Swept:
    """Round the columns of a group (out, k), written to, with given scales."""
    levels, loss, places = Levels.of(rows), W.new_zeros(len(W)), iter(range(W.shape[1]))
    numbers = torch.empty_like(W, dtype=torch.long)

    def column(w: Tensor, _: Tensor) -> Tensor:
        at = next(places)
        nearest = levels.nearest(w / columns[at])
        value = levels.values.gather(1, nearest).mul_(columns[at])
        numbers[:, at] = nearest[:, 0]
        loss.add_((w - value).div_(block.factor[at, at]).square_()[:, 0])
        return value

    values = column_by_column(column)(W, block)
    return _Swept(values, W, numbers, rows, loss)


def _take(these: Tensor, into: Iterable[Tensor], of: Iterable[Tensor]) -> None:
    """Overwrite rows of tensors, for nothing ties the rows of a weight to each other."""
    for old, new in zip(into, of, strict=True):
        old[these] = new[these]


def _stored(weight: Tensor, fit: DualScale) -> DualScale:
    """Scales as float16, columns with a geometric mean of 1; rows are refitted to them.

    Columns of next to no weight do not count in that mean, which they would draw to zero.
    """
    used = fit.columns > _LEAST_COLUMN * fit.columns.mean()
    mean = fit.columns[used].log().mean().exp() if bool(used.any()) else fit.columns.new_ones(())
    columns = (fit.columns / mean).clamp_min(_LEAST_COLUMN)
    columns = stored_half(columns[None], "a column scale")[0]
    fit = fit_row_scales(weight, fit._replace(columns=columns, rows=fit.rows * mean))
    return fit._replace(rows=stored_half(fit.rows, "a scale"))
