"""PT2-LLM as a method: which layers share an order, and where orders fold."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Needs, Run
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.ternary_code import TernaryCode
from dit_qat.llm.methods.folding import fold_order
from dit_qat.llm.methods.pt2.config import PT2Config
from dit_qat.llm.methods.pt2.quantize import quantize_weight
from dit_qat.llm.methods.settings import settled
from dit_qat.llm.methods.staged import Linears, StagedMethod

__all__ = ["PT2"]


class PT2(StagedMethod):
    """PT2-LLM (arXiv:2510.03267): asymmetric ternary weights without training.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`PT2Config`.
    """

    name: ClassVar[str] = "pt2"
    even_groups: ClassVar[bool] = False  # the last may be short

    def __init__(self, config: PT2Config | None = None, **fields: Any) -> None:
        self.config = settled(PT2Config, config, fields)

    @property
    def needs(self) -> Needs:
        """Second moments, and cross moments for the asymmetric term."""
        return Needs(second_moment=True, cross_moment=self.config.crossed, ranges=False)

    def quantize_group(
        self, linears: Linears, statistics: LinearStatistics
    ) -> Mapping[str, nn.Module]:
        """Quantize layers of one input, together if they share an order."""
        if self.config.recipe.shared_order:
            return self._together(linears, statistics)
        found: dict[str, nn.Module] = {}
        for name, linear in linears.items():
            found |= self._together({name: linear}, statistics)
        return found

    def finish(self, run: Run) -> None:
        """Fold the orders of down_proj (fc2) into the rows of the layers before."""
        roles = self.known_roles()
        for name in run.names:
            feeders = roles.feeders(name)
            if feeders and fold_order(run.model, name, feeders):
                run.note(name, order="folded")

    def _together(self, linears: Linears, statistics: LinearStatistics) -> dict[str, nn.Module]:
        """Quantize layers under one order, stacked: their rows are fitted apart anyway."""
        weight = torch.cat([linear.weight.detach().float() for linear in linears.values()])
        code = self._code(next(iter(linears)), weight, statistics)
        sizes = [linear.out_features for linear in linears.values()]
        parts = torch.split(torch.arange(sum(sizes), device=code.codes.device), sizes)
        return {
            name: CodedLinear.build(linear, code.take_rows(rows))
            for (name, linear), rows in zip(linears.items(), parts, strict=True)
        }

    def _code(self, name: str, weight: Tensor, statistics: LinearStatistics) -> TernaryCode:
        if statistics.second_moment is None:
            raise ValueError("PT2-LLM needs second moments: ask for Needs(second_moment=True)")
        fed = bool(self.known_roles().feeders(name))
        ordered = self.config.recipe.order_down or not fed
        return quantize_weight(
            weight, statistics.second_moment, self.config, statistics.cross_moment, ordered
        )
