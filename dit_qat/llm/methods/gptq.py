"""GPTQ (arXiv:2210.17323): round column by column, later columns making up for earlier ones."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.rounding import ClipSearch, GPTQSettings, Rounded, round_gptq
from dit_qat.llm.methods.rtn import grid_of
from dit_qat.llm.methods.settings import check_among, settled
from dit_qat.llm.methods.staged import Linears, StagedMethod
from dit_qat.primitives.integer import IntegerGrid
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["GPTQ", "ActOrder", "GPTQConfig", "quantize_weight"]

ActOrder = Literal["static", "group", "none"]


@dataclass(frozen=True)
class GPTQConfig:
    """Settings of :class:`GPTQ`.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; it divides every width, or is no less, which is a
            scale per output, as None is.
        symmetric: Signed codes; otherwise with a zero point.
        act_order: Columns of large second moment first: ``static`` with scales of the weight as it
            was, so that groups keep their members and nothing is gathered at inference; ``group``
            whole groups at a time; ``none`` as they are.
        damping: Added to the diagonal of H, as a fraction of its mean.
        block_size: Columns per block.
        clip: Search of the range; None: the full one.
        staged: Whether each group of layers sees what the quantized ones before it leave.

    Raises:
        ValueError: for values outside their range.
    """

    bits: int = 2
    group_size: int | None = 128
    symmetric: bool = False
    act_order: ActOrder = "static"
    damping: float = 0.01
    block_size: int = 128
    clip: ClipSearch | None = None
    staged: bool = True

    def __post_init__(self) -> None:
        IntegerGrid(self.bits, self.symmetric, self.group_size)
        check_among("act_order", self.act_order, get_args(ActOrder))
        _ = self.settings

    @property
    def settings(self) -> GPTQSettings:
        """Of the solver."""
        ordered, static = self.act_order != "none", self.act_order == "static"
        return GPTQSettings(self.damping, self.block_size, ordered, static)


def quantize_weight(weight: Tensor, second_moment: SecondMoment, config: GPTQConfig) -> Rounded:
    """Round a weight (out, in) with the second moment (in, in) of its inputs.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.
    """
    grid = grid_of(config.bits, config.symmetric, config.group_size, weight.shape[1])
    return round_gptq(weight, second_moment, grid, config.settings, config.clip)


class GPTQ(StagedMethod):
    """GPTQ with weights only.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`GPTQConfig`.
    """

    name: ClassVar[str] = "gptq"

    def __init__(self, config: GPTQConfig | None = None, **fields: Any) -> None:
        self.config = settled(GPTQConfig, config, fields)

    @property
    def needs(self) -> Needs:
        """Second moments."""
        return Needs(second_moment=True, ranges=False)

    def quantize_group(
        self, linears: Linears, statistics: LinearStatistics
    ) -> Mapping[str, nn.Module]:
        """Solve each layer."""
        c, found = self.config, {}
        for name, linear in linears.items():
            grid = grid_of(c.bits, c.symmetric, c.group_size, linear.in_features)
            codes, scales, _ = round_gptq(
                linear.weight, statistics.second_moment, grid, c.settings, c.clip
            )
            found[name] = IntLinear.build(
                linear, grid=grid, scales=scales, codes=codes, activation=None
            )
        return found
