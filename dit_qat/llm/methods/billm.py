"""BiLLM (arXiv:2402.04291): salient columns with two planes, the others in two groups with one."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dit_qat.layers.binary_code import BinaryCode, BinaryLayout
from dit_qat.llm.methods.binarizer import (
    Binarizer,
    CodingMethod,
    Metric,
    Recipe,
    SearchOn,
    binary_code,
    moment_of,
)
from dit_qat.llm.methods.binary_block import Plain
from dit_qat.llm.methods.settings import Preset, check_at_least, overridden, settled
from dit_qat.llm.methods.zones import Groups, ZoneSearch
from dit_qat.primitives.compensation import Update
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["PRESETS", "BiLLM", "BiLLMChoices", "BiLLMConfig", "quantize_weight"]


@dataclass(frozen=True)
class BiLLMChoices:
    """What the presets differ in.

    Attributes:
        update: Of the columns behind a block.
        search_on: The matrix on which zones are sought.
        search: Which.
        zeros_count: Quantiles count a zero for every entry of a salient column.
    """

    update: Update
    search_on: SearchOn
    search: ZoneSearch
    zeros_count: bool


PRESETS: dict[Preset, BiLLMChoices] = {
    "paper": BiLLMChoices("diagonal", "saliency", ZoneSearch(), True),
    "exact": BiLLMChoices("exact", "weight", ZoneSearch(49, 49, 0.02, 0.98), False),
}


@dataclass(frozen=True)
class BiLLMConfig:
    """Settings of :class:`BiLLM`.

    Attributes:
        preset: ``paper`` as released; ``exact``: zones sought on the weight over all quantiles, and
            the least-squares update.
        block_size: Columns per block.
        damping: Of the second moment, as a fraction of its mean diagonal.
        metric: Which columns are salient: by ``w^2 / U_jj^2``, or by ``|w|`` (the release's
            default, though every published command asks for the other).
        update: As in :class:`BiLLMChoices`; None: the preset's. So for those below.
        search_on: As ``update``.
        search: As ``update``.
        zeros_count: As ``update``.

    Raises:
        ValueError: for an unknown name or a number outside its range.
    """

    preset: Preset = "exact"
    block_size: int = 128
    damping: float = 0.01
    metric: Metric = "hessian"
    update: Update | None = None
    search_on: SearchOn | None = None
    search: ZoneSearch | None = None
    zeros_count: bool | None = None

    def __post_init__(self) -> None:
        check_at_least(self, block_size=1, damping=0)
        _ = self.recipe

    @property
    def choices(self) -> BiLLMChoices:
        """The preset's, with this configuration's own in their place."""
        return overridden(PRESETS, self)

    @property
    def recipe(self) -> Recipe:
        """What the binarizer is told."""
        own = self.choices
        return Recipe(
            BinaryLayout(2, 1, block_size=self.block_size),
            Groups(2, 1, zeros_count=own.zeros_count),
            own.search,
            own.search_on,
            self.metric,
            Plain(iterations=0),
        )


def quantize_weight(
    weight: Tensor, second_moment: Tensor | SecondMoment, config: BiLLMConfig
) -> BinaryCode:
    """Binarise a weight (out, in), given the second moment (in, in) of its inputs."""
    binarizer = Binarizer(config.recipe, moment_of(second_moment))
    return binary_code(weight, second_moment, binarizer, config.choices.update, config.damping)


class BiLLM(CodingMethod):
    """BiLLM.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`BiLLMConfig`.
    """

    name: ClassVar[str] = "billm"

    def __init__(self, config: BiLLMConfig | None = None, **fields: Any) -> None:
        self.config = settled(BiLLMConfig, config, fields)

    def code(self, name: str, weight: Tensor, second_moment: SecondMoment) -> BinaryCode:
        """Binarise one layer."""
        return quantize_weight(weight, second_moment, self.config)
