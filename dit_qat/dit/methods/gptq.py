"""GPTQ (arXiv:2210.17323): round column by column, later columns making up for earlier ones."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.layers import IntLinear, TokenQuantizer
from dit_qat.layers.rounding import ClipSearch, GPTQSettings, legal_group, round_gptq
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["GPTQ", "GPTQConfig"]


@dataclass(frozen=True)
class GPTQConfig:
    """Settings of :class:`GPTQ`.

    Attributes:
        weight_bits: 2, 3, 4 or 8.
        activation_bits: 2..8, symmetric, a scale per token; None: float, as in the paper.
        weight_symmetric: Signed codes; otherwise with a zero point.
        group_size: Inputs that share a weight scale, the largest divisor of a width up to this;
            None: a scale per output channel.
        gptq: Damping, blocks, order, and when scales of groups are fitted.
        clip: Search of the range; None: the full one.

    Raises:
        ValueError: for bits or a group outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    weight_symmetric: bool = True
    group_size: int | None = None
    gptq: GPTQSettings = field(default_factory=GPTQSettings)
    clip: ClipSearch | None = None

    def __post_init__(self) -> None:
        IntegerGrid(self.weight_bits, self.weight_symmetric, self.group_size)
        _ = self.activation

    @property
    def activation(self) -> TokenQuantizer | None:
        """Of the inputs."""
        return None if self.activation_bits is None else TokenQuantizer(self.activation_bits)


class GPTQ(PTQMethod):
    """GPTQ as it was published, with activations per token beside it.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`GPTQConfig`.
    """

    name: ClassVar[str] = "gptq"

    def __init__(self, config: GPTQConfig | None = None, **kwargs: Any) -> None:
        refuse_both("GPTQ", config, kwargs)
        self.config = GPTQConfig(**kwargs) if config is None else config

    @property
    def needs(self) -> Needs:
        """Second moments."""
        return Needs(second_moment=True, ranges=False)

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        """Solve one layer."""
        c, group = self.config, self.config.group_size
        if group is not None:
            group = legal_group(linear.in_features, group)
        grid = IntegerGrid(c.weight_bits, c.weight_symmetric, group)
        codes, scales, _ = round_gptq(linear.weight, statistics.second_moment, grid, c.gptq, c.clip)
        return IntLinear.build(
            linear, grid=grid, scales=scales, codes=codes, activation=c.activation
        )
