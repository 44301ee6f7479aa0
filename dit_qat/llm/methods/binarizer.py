"""The block quantizer that BiLLM, ARB-LLM, STBLLM and PBS2P share, and what they set of it."""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Method, Needs, Run
from dit_qat.layers.binary_code import BinaryBlock, BinaryCode, BinaryLayout, decode_block
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.weight_code import WeightCode
from dit_qat.llm.methods.binary_block import (
    BlockFit,
    Plain,
    best_rows,
    feed_back,
    fit_block,
    rounded,
    solve_jointly,
)
from dit_qat.llm.methods.settings import check_among, check_at_least
from dit_qat.llm.methods.zones import Groups, Zones, ZoneSearch, find_zones, saliency
from dit_qat.primitives.compensation import Block, Update, compensate
from dit_qat.primitives.second_moment import SecondMoment

__all__ = [
    "Binarizer",
    "CodingMethod",
    "Metric",
    "Recipe",
    "SearchOn",
    "binary_code",
    "error_left",
    "moment_of",
]

SearchOn = Literal["saliency", "weight"]
Metric = Literal["hessian", "magnitude"]


@dataclass(frozen=True)
class Recipe:
    """How a block is binarised.

    Attributes:
        layout: What is stored.
        groups: Of the zones.
        search: Which zones are tried.
        search_on: The matrix on which they are.
        metric: Saliency ``w^2 / U_jj^2``, or ``|w|``.
        plain: The fit of a zone alone.
        moment_score: Thresholds of plain columns by ``tr R S R^T``.
        joint: Then values of all zones of a row together, for what the block's error will be
            after the columns behind it have made up for it.
        feedback: Rounds of new signs with error feedback within the block, values after each.
    """

    layout: BinaryLayout
    groups: Groups
    search: ZoneSearch = field(default_factory=ZoneSearch)
    search_on: SearchOn = "saliency"
    metric: Metric = "hessian"
    plain: Plain = field(default_factory=Plain)
    moment_score: bool = False
    joint: bool = False
    feedback: int = 0

    def __post_init__(self) -> None:
        check_among("search_on", self.search_on, get_args(SearchOn))
        check_among("metric", self.metric, get_args(Metric))
        check_at_least(self, feedback=0)


class Binarizer:
    """Quantizes block after block and keeps their codes.

    Args:
        recipe: How.
        S: (in, in), the second moment, undamped, of any scale.
        keep: (out, in) bool, entries that are not pruned; None: all.
        matrix: (out, in) on which zones are tried, in place of ``recipe.search_on``.

    Attributes:
        blocks: Codes so far.
    """

    def __init__(
        self,
        recipe: Recipe,
        S: Tensor,
        keep: Tensor | None = None,
        matrix: Tensor | None = None,
    ) -> None:
        self.recipe, self.S, self.keep, self.matrix = recipe, S, keep, matrix
        self.blocks: list[BinaryBlock] = []

    def __call__(self, W: Tensor, block: Block) -> Tensor:
        """Quantized values (out, B) of the columns of a block."""
        columns = block.columns
        S = self.S[columns][:, columns].to(W.dtype)
        keep = None if self.keep is None else self.keep[:, columns]
        code = rounded(self.fit(W, self.zones(W, block, S, keep), block, S, keep))
        self.blocks.append(code)
        return decode_block(self.recipe.layout, code).to(W.dtype)

    def zones(self, W: Tensor, block: Block, S: Tensor, keep: Tensor | None) -> Zones:
        """Divide a block."""
        recipe = self.recipe
        score = saliency(W, block.factor) if recipe.metric == "hessian" else W.abs()
        matrix = score if recipe.search_on == "saliency" else W
        if self.matrix is not None:
            matrix = self.matrix[:, block.columns].to(W.dtype)
            score = matrix.abs()
        by_column = score.sum(0) if keep is None else (score * keep).sum(0)
        moment = S if recipe.moment_score else None
        return find_zones(matrix, by_column, recipe.search, recipe.groups, keep, moment)

    def fit(
        self, W: Tensor, zones: Zones, block: Block, S: Tensor, keep: Tensor | None
    ) -> BlockFit:
        """Fit a block whose zones are known."""
        fit = fit_block(W, zones, self.recipe.layout, self.recipe.plain, S, keep)
        return self.improve(W, fit, block)

    def improve(self, W: Tensor, fit: BlockFit, block: Block) -> BlockFit:
        """Joint values and error feedback, each row as long as it gets better."""
        if not self.recipe.joint:
            return fit
        left = error_left(block.factor)
        fit = best_rows(W, [fit, solve_jointly(W, fit, left)], left)
        for _ in range(self.recipe.feedback):
            again = solve_jointly(W, feed_back(W, fit, block.factor), left)
            fit = best_rows(W, [fit, again], left)
        return fit


def error_left(factor: Tensor) -> Tensor:
    """``(U_BB^T U_BB)^-1``: the second moment that is left of a block's error.

    That is, once all columns behind the block have made up for it as well as they can; the Schur
    complement of the (damped) second moment.
    """
    U = factor.double()
    inverse: Tensor = torch.linalg.solve_triangular(U, torch.eye(len(U)).to(U), upper=True)
    return (inverse @ inverse.T).to(factor.dtype)


def binary_code(
    weight: Tensor,
    second_moment: Tensor | SecondMoment,
    binarizer: Binarizer,
    update: Update,
    damping: float,
) -> BinaryCode:
    """Quantize a weight (out, in) through a binarizer, block by block with compensation."""
    layout = binarizer.recipe.layout
    layout.blocks(weight.shape[1])  # refuses widths before any work
    size = layout.block_size
    compensate(weight, second_moment, binarizer, size, update=update, damping=damping)
    return BinaryCode.assemble(layout, binarizer.blocks)


class CodingMethod(Method):
    """A method that codes every layer alone, given the second moment of its inputs."""

    @property
    def needs(self) -> Needs:
        """Second moments."""
        return Needs(second_moment=True, ranges=False)

    def start(self, run: Run) -> None:
        """Refuse layers whose shape cannot be coded.

        Raises:
            ValueError: naming the first.
        """
        for name, linear in run.target.linears().items():
            try:
                self.check_shape(linear.out_features, linear.in_features)
            except ValueError as error:
                raise ValueError(f"layer {name}: {error}") from error

    def check_shape(self, rows: int, width: int) -> None:
        """Refuse a weight (rows, width) that cannot be coded, whatever its values.

        Raises:
            ValueError: saying why; here never.
        """

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> CodedLinear:
        """Code one layer.

        Raises:
            ValueError: without a second moment, or for a weight that the method cannot code.
        """
        if statistics.second_moment is None:
            raise ValueError(f"{self.name} needs second moments: Needs(second_moment=True)")
        code = self.code(name, linear.weight.detach(), statistics.second_moment)
        return CodedLinear.build(linear, code)

    @abstractmethod
    def code(self, name: str, weight: Tensor, second_moment: SecondMoment) -> WeightCode:
        """The code of a layer's weight (out, in); ``name`` is the layer's full name."""


def moment_of(second_moment: Tensor | SecondMoment) -> Tensor:
    """The matrix (in, in) itself."""
    return second_moment.matrix if isinstance(second_moment, SecondMoment) else second_moment
