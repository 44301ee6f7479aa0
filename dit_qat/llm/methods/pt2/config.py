"""Settings of PT2-LLM."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dit_qat.llm.methods.settings import Preset, check_among, check_at_least, overridden
from dit_qat.primitives.compensation import Update

__all__ = ["ColumnOrder", "PT2Config", "Recipe", "Reference"]

ColumnOrder = Literal["similarity", "activation", "random", "none"]
Reference = Literal["normalised", "raw"]


@dataclass(frozen=True)
class Recipe:
    """What presets differ in; the fields are those of :class:`PT2Config`."""

    update: Update
    asymmetric: float
    order_down: bool
    shared_order: bool


_PRESETS: Mapping[Preset, Recipe] = {
    "paper": Recipe("diagonal", 0.25, order_down=False, shared_order=False),
    "exact": Recipe("exact", 0.25, order_down=True, shared_order=True),
}


@dataclass(frozen=True)
class PT2Config:
    """Settings of :class:`~dit_qat.llm.methods.pt2.PT2`.

    Fields that are None are as the preset has them; see :attr:`recipe`.

    Attributes:
        preset: ``paper`` is the release, ``exact`` ours.
        group_size: Columns of a block, which share a scale and an offset per row.
        fitting: Iterative ternary fitting; without it, the quantizer it begins with.
        alignment: Activation-aware grid alignment.
        compensated: Columns to come make up for the errors of a block, and for those of the inputs;
            without all three, this is rounding to asymmetric ternary.
        order: Which columns share a block: those alike (structural-similarity reordering), those of
            large second moment first, random ones, or neighbours.
        update: How a block's error moves the columns to come.
        asymmetric: Strength of GPTAQ's term, which makes up for the error of the inputs; 0: none.
        retarget: Take its closed form in place of the term.
        order_down: Order the columns of down_proj (fc2), too: their order folds into the rows of
            the layers before and costs nothing.
        shared_order: One order for layers that read the same input (q, k, v; gate, up), so that the
            input can come in that order.
        reference: What columns are compared with: the mean of normalised columns, or of columns.
        sweeps: Most changes of codes in the fitting.
        damping: Added to the diagonal of H, as a fraction of its mean.
        seed: Of random orders.
        staged: Whether each group of layers sees what the quantized ones before it leave.

    Raises:
        ValueError: for values outside their range.
    """

    preset: Preset = "exact"
    group_size: int = 128
    fitting: bool = True
    alignment: bool = True
    compensated: bool = True
    order: ColumnOrder = "similarity"
    update: Update | None = None
    asymmetric: float | None = None
    retarget: bool = False
    order_down: bool | None = None
    shared_order: bool | None = None
    reference: Reference = "normalised"
    sweeps: int = 50
    damping: float = 0.01
    seed: int = 0
    staged: bool = True

    def __post_init__(self) -> None:
        check_at_least(self, group_size=1, sweeps=1, damping=0)
        check_at_least(self.recipe, asymmetric=0)
        check_among("order", self.order, get_args(ColumnOrder))
        check_among("update", self.recipe.update, get_args(Update))
        check_among("reference", self.reference, get_args(Reference))

    @property
    def recipe(self) -> Recipe:
        """The preset, with the fields that are given."""
        return overridden(_PRESETS, self)

    @property
    def crossed(self) -> bool:
        """Whether cross moments are made use of."""
        return self.compensated and self.recipe.asymmetric > 0
