"""Settings of D2Quant."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, get_args

from dit_qat.layers.rounding import ClipSearch, GPTQSettings
from dit_qat.llm.methods.settings import Preset, check_among, check_at_least, overridden
from dit_qat.primitives.asymmetric import Multiplied

__all__ = ["ColumnOrder", "D2QuantConfig", "Recipe"]

ColumnOrder = Literal["columns", "groups", "none"]


@dataclass(frozen=True)
class Recipe:
    """What presets differ in; the fields are those of :class:`D2QuantConfig`."""

    multiplies: Multiplied
    rotation: bool
    final_correction: bool
    order: ColumnOrder
    headroom: tuple[float, ...]
    clips: tuple[ClipSearch, ...]


_PRESETS: Mapping[Preset, Recipe] = {
    "paper": Recipe("as_released", True, True, "groups", (1.0,), (ClipSearch(),)),
    # Levels fitted to the weights as they are have no room for what columns are to make up for.
    "exact": Recipe(
        "pre_round",
        False,
        False,
        "columns",
        (1.0, 1.25, 1.5, 2.0),
        (ClipSearch(values=1), ClipSearch(41, 0.2, 2.0)),
    ),
}


@dataclass(frozen=True)
class D2QuantConfig:
    """Settings of :class:`~dit_qat.llm.methods.d2quant.D2Quant`.

    Fields that are None are as the preset has them; see :attr:`recipe`.

    Attributes:
        preset: ``paper`` is the release, ``exact`` ours.
        bits: 2 or 3.
        group_size: Inputs that share a scale; it divides every width, or is no less: whole rows.
        dual_scale: The dual-scale quantizer for down_proj (fc2); without it, integers as for the
            other layers.
        iterations: Of its fit.
        correction: Deviation-aware correction of what the MLP receives.
        final_correction: The same behind the last norm, as a bias of the head.
        asymmetric: Strength of GPTAQ's term; 0: none.
        multiplies: What that term multiplies in blocks behind.
        rotation: Rotate the residual stream by Hadamard matrices of ``group_size`` first.
        order: What comes first: ``groups`` of large second moment, and columns within them, with
            scales of the weight as compensated by then; ``columns`` of it in integer layers, with
            scales of the weight as it was (layers with two scales go by groups then, too); or
            ``none``: as they are.
        headroom: Factors of the fitted row scales of layers with two scales, of which every row and
            group takes the one that leaves the least error once later columns have made up for it.
        clips: Searches of the range of integer layers, of which every row takes the one that leaves
            its outputs the least error; ``ClipSearch(values=1)`` is the full range.
        damping: Added to the diagonal of H, as a fraction of its mean.
        limit: Greatest magnitude of a correction.
        staged: Whether each group of layers sees what the quantized ones before it leave.

    Raises:
        ValueError: for values outside their range.
    """

    preset: Preset = "exact"
    bits: int = 2
    group_size: int = 128
    dual_scale: bool = True
    iterations: int = 15
    correction: bool = True
    final_correction: bool | None = None
    asymmetric: float = 0.25
    multiplies: Multiplied | None = None
    rotation: bool | None = None
    order: ColumnOrder | None = None
    headroom: tuple[float, ...] | None = None
    clips: tuple[ClipSearch, ...] | None = None
    damping: float = 0.01
    limit: float = 10.0
    staged: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 3):
            raise ValueError(f"bits={self.bits}: D2Quant is for 2 and 3 bits")
        check_at_least(self, group_size=8, iterations=1, asymmetric=0, limit=0)
        _ = self.settings
        check_among("multiplies", self.recipe.multiplies, get_args(Multiplied))
        check_among("order", self.recipe.order, get_args(ColumnOrder))
        if not self.recipe.clips:
            raise ValueError("clips=() leaves no range; ClipSearch(values=1) is the full one")
        if not self.recipe.headroom or min(self.recipe.headroom) <= 0:
            raise ValueError(f"headroom={self.recipe.headroom} must be factors above 0, such as 1")

    @property
    def recipe(self) -> Recipe:
        """The preset, with the fields that are given."""
        return overridden(_PRESETS, self)

    @property
    def settings(self) -> GPTQSettings:
        """Of the solver of integer layers."""
        static = self.recipe.order == "columns"
        return GPTQSettings(self.damping, self.group_size, act_order=static, static_groups=static)
