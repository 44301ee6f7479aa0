"""Settings of D2Quant."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import get_args

from dit_qat.layers.rounding import ClipSearch, GPTQSettings
from dit_qat.llm.methods.settings import Preset, check_among, check_at_least, overridden
from dit_qat.primitives.asymmetric import Multiplied

__all__ = ["D2QuantConfig", "Recipe"]


@dataclass(frozen=True)
class Recipe:
    """What presets differ in; the fields are those of :class:`D2QuantConfig`."""

    multiplies: Multiplied
    rotation: bool
    final_correction: bool
    clip: ClipSearch


_PRESETS: Mapping[Preset, Recipe] = {
    "paper": Recipe("as_released", True, True, ClipSearch()),
    "exact": Recipe("pre_round", False, False, ClipSearch(41, 0.2, 2.0)),
}


@dataclass(frozen=True)
class D2QuantConfig:
    """Settings of :class:`~dit_qat.llm.methods.d2quant.D2Quant`.

    Fields that are None are as the preset has them; see :attr:`recipe`.

    Attributes:
        preset: ``paper`` is the release, ``exact`` ours.
        bits: 2 or 3.
        group_size: Inputs that share a scale, of integer layers the largest divisor of a width up
            to this.
        dual_scale: The dual-scale quantizer for down_proj (fc2); without it, integers as for the
            other layers.
        iterations: Of its fit.
        correction: Deviation-aware correction of what the MLP receives.
        final_correction: The same behind the last norm, as a bias of the head.
        asymmetric: Strength of GPTAQ's term; 0: none.
        multiplies: What that term multiplies in blocks behind.
        rotation: Rotate the residual stream by Hadamard matrices of ``group_size`` first.
        ordered: Groups, and columns within groups, of large second moment first.
        clip: Search of the range of integer layers; ``ClipSearch(values=1)`` is none.
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
    ordered: bool = True
    clip: ClipSearch | None = None
    damping: float = 0.01
    limit: float = 10.0
    staged: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 3):
            raise ValueError(f"bits={self.bits}: D2Quant is for 2 and 3 bits")
        check_at_least(self, group_size=8, iterations=1, asymmetric=0, limit=0)
        _ = self.settings
        check_among("multiplies", self.recipe.multiplies, get_args(Multiplied))

    @property
    def recipe(self) -> Recipe:
        """The preset, with the fields that are given."""
        return overridden(_PRESETS, self)

    @property
    def settings(self) -> GPTQSettings:
        """Of the solver."""
        return GPTQSettings(self.damping, self.group_size)
