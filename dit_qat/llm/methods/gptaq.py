"""GPTAQ (arXiv:2504.02692): GPTQ that aims at the float layer's output on float inputs."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.rounding import Rounded, round_gptq
from dit_qat.llm.methods.gptq import GPTQConfig
from dit_qat.llm.methods.rtn import grid_of
from dit_qat.llm.methods.settings import settled
from dit_qat.llm.methods.staged import Linears, StagedMethod
from dit_qat.primitives.asymmetric import Asymmetric, Multiplied, retarget
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["GPTAQ", "GPTAQConfig", "quantize_weight"]


@dataclass(frozen=True)
class GPTAQConfig(GPTQConfig):
    """Settings of :class:`GPTAQ`, beside those of GPTQ.

    Attributes:
        strength: Of the asymmetric term; 0.25 in the release, 0 is GPTQ.
        multiplies: What the term multiplies in blocks behind; see
            :class:`~dit_qat.primitives.asymmetric.Asymmetric`.
        retarget: Compensate the weight ``W + c W D H^-1`` instead, which is the optimum of the
            paper's objective for c = 1.

    Raises:
        ValueError: for values outside their range.
    """

    strength: float = 0.25
    multiplies: Multiplied = "pre_round"
    retarget: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        Asymmetric(torch.zeros(0, 0), self.strength, self.multiplies)


def quantize_weight(
    weight: Tensor, second_moment: SecondMoment, cross_moment: Tensor | None, config: GPTAQConfig
) -> Rounded:
    """Round a weight (out, in).

    Args:
        weight: (out, in).
        second_moment: X^T X (in, in) of the inputs.
        cross_moment: (X_fp - X)^T X (in, in); None: it is left out, which is GPTQ.
        config: How.

    Raises:
        ValueError: for shapes that do not fit or values that are not finite.
    """
    c = config
    grid = grid_of(c.bits, c.symmetric, c.group_size, weight.shape[1])
    term = None
    if cross_moment is not None and c.retarget:
        weight = retarget(weight, second_moment, cross_moment, c.strength, c.damping)
    elif cross_moment is not None:
        term = Asymmetric(cross_moment, c.strength, c.multiplies)
    return round_gptq(weight, second_moment, grid, c.settings, c.clip, asymmetric=term)


class GPTAQ(StagedMethod):
    """GPTAQ with weights only.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`GPTAQConfig`.
    """

    name: ClassVar[str] = "gptaq"

    def __init__(self, config: GPTAQConfig | None = None, **fields: Any) -> None:
        self.config = settled(GPTAQConfig, config, fields)

    @property
    def needs(self) -> Needs:
        """Second moments, and cross moments for the asymmetric term."""
        return Needs(second_moment=True, cross_moment=self.config.strength > 0, ranges=False)

    def quantize_group(
        self, linears: Linears, statistics: LinearStatistics
    ) -> Mapping[str, nn.Module]:
        """Solve each layer."""
        c, found = self.config, {}
        moment, cross = statistics.second_moment, statistics.cross_moment
        if moment is None:
            raise ValueError("GPTAQ needs second moments: ask for Needs(second_moment=True)")
        for name, linear in linears.items():
            codes, scales, _ = quantize_weight(linear.weight, moment, cross, c)
            grid = grid_of(c.bits, c.symmetric, c.group_size, linear.in_features)
            found[name] = IntLinear.build(
                linear, grid=grid, scales=scales, codes=codes, activation=None
            )
        return found
