"""ARB-LLM (arXiv:2410.03129): alternating refined binarisation, at about 1.1 nominal bits."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, get_args

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
from dit_qat.llm.methods.settings import (
    Preset,
    check_among,
    check_at_least,
    overridden,
    settled,
)
from dit_qat.llm.methods.zones import Groups
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["ARB", "PRESETS", "ARBChoices", "ARBConfig", "Variant", "quantize_weight"]

Variant = Literal["arb", "arb_x", "arb_rc"]


@dataclass(frozen=True)
class ARBChoices(BinaryChoices):
    """What the presets differ in, with the release's values.

    Attributes:
        closed: Mean and scales of a zone by their joint optimum instead of in turn.
        joint: Values of all zones of a row solved together; never for ``arb``.
        feedback: Rounds of new signs with error feedback within a block; never for ``arb``.
    """

    closed: bool = False
    joint: bool = False
    feedback: int = 0


PRESETS: dict[Preset, ARBChoices] = {
    "paper": ARBChoices(),
    "exact": ARBChoices("exact", "weight", FULL_RANGE, closed=True, joint=True, feedback=1),
}


@dataclass(frozen=True)
class ARBConfig(BinaryConfig):
    """Settings of :class:`ARB` beside those of :class:`BinaryConfig`.

    Attributes:
        variant: ``arb``: mean, scale and signs for the weight itself; ``arb_x``: then mean and
            scale for the second moment; ``arb_rc``: row and column scales.
        cgb: Column-group bitmap: salient columns have magnitude groups, too.
        groups: Magnitude groups.
        iterations: Of every alternation.
        budget: Effective bits that no layer exceeds, by fewer groups and then fewer salient
            columns; None: any.
        closed: As in :class:`ARBChoices`; None: the preset's. So for those below.
        joint: As ``closed``.
        feedback: As ``closed``.

    Raises:
        ValueError: for an unknown name or a number outside its range.
    """

    variant: Variant = "arb_rc"
    cgb: bool = True
    groups: int = 2
    iterations: int = 15
    budget: float | None = None
    closed: bool | None = None
    joint: bool | None = None
    feedback: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        check_among("variant", self.variant, get_args(Variant))
        check_at_least(self, groups=1, iterations=0)
        _ = self.recipe()

    @property
    def choices(self) -> ARBChoices:
        """The preset's, with this configuration's own in their place."""
        return overridden(PRESETS, self)

    def recipe(self, groups: int | None = None, most_salient: int | None = None) -> Recipe:
        """What the binarizer is told, with fewer groups or salient columns if asked for."""
        groups = self.groups if groups is None else groups
        own = self.choices
        search = own.search
        if most_salient is not None:
            search = replace(search, most_salient=most_salient)
        salient = groups if self.cgb else 1
        arb, x, rc = (self.variant == variant for variant in get_args(Variant))
        return Recipe(
            BinaryLayout(groups, salient, rc, block_size=self.block_size),
            Groups(groups, salient),
            search,
            own.search_on,
            self.metric,
            Plain(self.iterations, own.closed, x, None if own.closed else self.iterations),
            moment_score=x and own.search_on == "saliency",
            joint=own.joint and not arb,
            feedback=0 if arb else own.feedback,
        )

    def within_budget(self, rows: int, width: int) -> Recipe:
        """The recipe for a layer of that size.

        Raises:
            ValueError: for a budget below one group and no salient column.
        """
        if self.budget is None:
            return self.recipe()
        sizes = [min(self.block_size, width - at) for at in range(0, width, self.block_size)]
        usual = FULL_RANGE.most_salient * sizes[0] // 128
        for groups in range(self.groups, 0, -1):
            recipe = self.recipe(groups)
            least = 0 if groups == 1 else min(usual, recipe.search.most_salient)
            for most in range(recipe.search.most_salient, least - 1, -1):
                share = sum(min(most, size - 1) for size in sizes) / width
                if recipe.layout.bits(rows, width, share) <= self.budget:
                    return self.recipe(groups, most)
        floor = self.recipe(1).layout.bits(rows, width, 0)
        raise ValueError(
            f"budget={self.budget} bits per weight is below the {floor:.3f} of one group without "
            f"salient columns in blocks of {self.block_size}; raise it, or take larger blocks"
        )


def quantize_weight(
    weight: Tensor, second_moment: Tensor | SecondMoment, config: ARBConfig
) -> BinaryCode:
    """Binarise a weight (out, in), given the second moment (in, in) of its inputs."""
    recipe = config.within_budget(*weight.shape)
    binarizer = Binarizer(recipe, moment_of(second_moment))
    return binary_code(weight, second_moment, binarizer, config.choices.update, config.damping)


class ARB(CodingMethod):
    """ARB-LLM: ARB, ARB-X and ARB-RC.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`ARBConfig`.
    """

    name: ClassVar[str] = "arb"

    def __init__(self, config: ARBConfig | None = None, **fields: Any) -> None:
        self.config = settled(ARBConfig, config, fields)

    def check_shape(self, rows: int, width: int) -> None:
        """Refuse a layer that the budget does not reach."""
        self.config.within_budget(rows, width)

    def code(self, name: str, weight: Tensor, second_moment: SecondMoment) -> BinaryCode:
        """Binarise one layer."""
        return quantize_weight(weight, second_moment, self.config)
