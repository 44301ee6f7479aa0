"""BiLLM (arXiv:2402.04291): salient columns with two planes, the others in two groups with one."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from dit_qat.layers.binary_code import BinaryCode, BinaryLayout
from dit_qat.llm.methods.binarizer import (
    Binarizer,
    CodingMethod,
    Recipe,
    binary_code,
    moment_of,
)
from dit_qat.llm.methods.binary_block import Plain
from dit_qat.llm.methods.binary_config import FULL_RANGE, BinaryChoices, BinaryConfig
from dit_qat.llm.methods.settings import Preset, overridden, settled
from dit_qat.llm.methods.zones import Groups
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["PRESETS", "BiLLM", "BiLLMChoices", "BiLLMConfig", "quantize_weight"]


@dataclass(frozen=True)
class BiLLMChoices(BinaryChoices):
    """What the presets differ in, with the release's values.

    Attributes:
        zeros_count: Quantiles count a zero for every entry of a salient column.
    """

    zeros_count: bool = True


PRESETS: dict[Preset, BiLLMChoices] = {
    "paper": BiLLMChoices(),
    "exact": BiLLMChoices("exact", "weight", FULL_RANGE, zeros_count=False),
}


@dataclass(frozen=True)
class BiLLMConfig(BinaryConfig):
    """Settings of :class:`BiLLM` beside those of :class:`BinaryConfig`.

    Attributes:
        zeros_count: As in :class:`BiLLMChoices`; None: the preset's.

    Raises:
        ValueError: for an unknown name or a number outside its range.
    """

    zeros_count: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
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
