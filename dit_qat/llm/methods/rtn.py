"""RTN: round every weight to the nearest code; the floor of all methods."""

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Method, Needs, Run
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.rounding import ClipSearch, Rounded, legal_group, nearest_layer, round_nearest
from dit_qat.layers.ternary_code import stored_half
from dit_qat.llm.methods.settings import check_groups, settled
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["RTN", "RTNConfig", "grid_of", "quantize_weight", "sign_code"]


@dataclass(frozen=True)
class RTNConfig:
    """Settings of :class:`RTN`.

    Attributes:
        bits: 2, 3, 4 or 8; or 1, which is signs times the mean magnitude of a group, the nearest
            of two opposite levels (two codes that reach from the least weight to the greatest
            would have one level at zero).
        group_size: Inputs that share a scale; it divides every width, or is no less, which is a
            scale per output, as None is.
        symmetric: Signed codes; otherwise with a zero point. One bit has none.
        clip: Search of the range; None: the full one. One bit has no range.

    Raises:
        ValueError: for bits or a group outside their range.
    """

    bits: int = 2
    group_size: int | None = 128
    symmetric: bool = False
    clip: ClipSearch | None = None

    def __post_init__(self) -> None:
        if self.bits not in (1, 2, 3, 4, 8):
            raise ValueError(f"bits={self.bits}: RTN is for 1, 2, 3, 4 and 8 bits")
        if self.bits > 1:
            IntegerGrid(self.bits, self.symmetric, self.group_size)
        elif self.clip is not None:
            raise ValueError("bits=1 has no range to clip; leave clip out")


def grid_of(bits: int, symmetric: bool, group_size: int | None, width: int) -> IntegerGrid:
    """The grid of a weight of that width, its groups as large as they can be."""
    group = None if group_size is None else legal_group(width, group_size)
    return IntegerGrid(bits, symmetric, group)


def quantize_weight(weight: Tensor, config: RTNConfig) -> Rounded:
    """Round a weight (out, in); no data are needed."""
    grid = grid_of(config.bits, config.symmetric, config.group_size, weight.shape[1])
    return round_nearest(weight, grid, config.clip)


def sign_code(weight: Tensor, group_size: int | None = 128) -> PlaneCode:
    """One bit per weight (out, in): its sign, and the mean magnitude of its group."""
    out, width = weight.shape
    group = width if group_size is None else legal_group(width, group_size)
    magnitudes = weight.detach().float().abs().view(out, -1, group).mean(-1, keepdim=True)
    signs = torch.where(weight.detach() < 0, -1.0, 1.0)
    return PlaneCode.build(signs[None], stored_half(magnitudes, "the mean magnitude"), group)


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

    def start(self, run: Run) -> None:
        """Refuse groups that do not fill a layer."""
        check_groups(run.target.linears(), self.config.group_size)

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear | CodedLinear:
        """Round one layer."""
        c = self.config
        if c.bits == 1:
            return CodedLinear.build(linear, sign_code(linear.weight, c.group_size))
        grid = grid_of(c.bits, c.symmetric, c.group_size, linear.in_features)
        return nearest_layer(linear, grid, None, clip=c.clip)
