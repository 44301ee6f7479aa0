"""RTN: round every weight to the nearest code; the floor of all methods."""

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Method, Needs
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.rounding import ClipSearch, Rounded, legal_group, nearest_layer, round_nearest
from dit_qat.llm.methods.settings import settled
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["RTN", "RTNConfig", "grid_of", "quantize_weight"]


@dataclass(frozen=True)
class RTNConfig:
    """Settings of :class:`RTN`.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale, the largest divisor of a width up to this; None: a
            scale per output.
        symmetric: Signed codes; otherwise with a zero point.
        clip: Search of the range; None: the full one.

    Raises:
        ValueError: for bits or a group outside their range.
    """

    bits: int = 2
    group_size: int | None = 128
    symmetric: bool = False
    clip: ClipSearch | None = None

    def __post_init__(self) -> None:
        IntegerGrid(self.bits, self.symmetric, self.group_size)


def grid_of(bits: int, symmetric: bool, group_size: int | None, width: int) -> IntegerGrid:
    """The grid of a weight of that width, its groups as large as they can be."""
    group = None if group_size is None else legal_group(width, group_size)
    return IntegerGrid(bits, symmetric, group)


def quantize_weight(weight: Tensor, config: RTNConfig) -> Rounded:
    """Round a weight (out, in); no data are needed."""
    grid = grid_of(config.bits, config.symmetric, config.group_size, weight.shape[1])
    return round_nearest(weight, grid, config.clip)


class RTN(Method):
    """Round to nearest.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`RTNConfig`.
    """

    name: ClassVar[str] = "rtn"

    def __init__(self, config: RTNConfig | None = None, **fields: Any) -> None:
        self.config = settled(RTNConfig, config, fields)

    @property
    def needs(self) -> Needs:
        """Nothing."""
        return Needs(ranges=False)

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        """Round one layer."""
        c = self.config
        grid = grid_of(c.bits, c.symmetric, c.group_size, linear.in_features)
        return nearest_layer(linear, grid, None, clip=c.clip)
