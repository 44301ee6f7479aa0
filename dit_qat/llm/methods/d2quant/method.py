"""D2Quant as a method: which layers get what, and what moves into the layers before."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, LinearStatistics, Needs, Run, fingerprint
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.int_linear import IntLinear
from dit_qat.llm.methods.d2quant.config import D2QuantConfig
from dit_qat.llm.methods.d2quant.correction import Shifted, mean_deviation, with_bias
from dit_qat.llm.methods.d2quant.quantize import quantize_weight, round_integers
from dit_qat.llm.methods.d2quant.rotation import rotate_residual_
from dit_qat.llm.methods.folding import fold_column_scale
from dit_qat.llm.methods.settings import settled
from dit_qat.llm.methods.staged import Linears, StagedMethod
from dit_qat.llm.models.roles import Roles, roles_of

__all__ = ["D2Quant"]

_FINAL = "final_correction"  # the note in which a finished last block keeps it


class D2Quant(StagedMethod):
    """D2Quant (arXiv:2602.02546): a second scale for down_proj, and means put right.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`D2QuantConfig`.
    """

    name: ClassVar[str] = "d2quant"

    def __init__(self, config: D2QuantConfig | None = None, **fields: Any) -> None:
        self.config = settled(D2QuantConfig, config, fields)
        self._run: Run | None = None
        self._shifts: dict[str, Tensor] = {}  # by the norm that is moved

    @property
    def needs(self) -> Needs:
        """Second moments, and cross moments for the asymmetric term."""
        crossed = self.config.asymmetric > 0
        return Needs(second_moment=True, cross_moment=crossed, ranges=False)

    def start(self, run: Run) -> None:
        """Rotate the float model if asked to, which leaves its function as it is."""
        super().start(run)
        if self.config.recipe.final_correction:
            _check_head(run.model, self.known_roles())
        self._run, self._shifts = run, {}
        if self.config.recipe.rotation:
            rotate_residual_(run.model, roles_of(run.model), self.config.group_size, run.seed)
            # The calls are token ids: they fit the model as before.
            run.store.model = fingerprint(run.model)

    def quantize_block(self, view: BlockView) -> Mapping[str, nn.Module]:
        """Quantize one block; behind the last one, correct what the last norm gives."""
        found = super().quantize_block(view)
        roles = self.known_roles()
        if self.config.recipe.final_correction and view.name == roles.block_names[-1]:
            self._correct_head(view, found)
        return found

    def quantize_group(
        self, linears: Linears, statistics: LinearStatistics
    ) -> Mapping[str, nn.Module]:
        """Planes for layers that others feed channel by channel, integers for the rest."""
        moment, cross = statistics.second_moment, statistics.cross_moment
        if moment is None:
            raise ValueError("D2Quant needs second moments: ask for Needs(second_moment=True)")
        found: dict[str, nn.Module] = {}
        for name, linear in linears.items():
            if self.config.dual_scale and self.known_roles().feeders(name):
                code = quantize_weight(linear.weight, moment, self.config, cross)
                found[name] = CodedLinear.build(linear, code)
                continue
            grid, rounded = round_integers(linear.weight, moment, self.config, cross)
            shift = self._shifts.get(self.known_roles().norm_before(name) or "")
            if shift is not None:
                linear = with_bias(linear, rounded.values @ shift.to(rounded.values))
            codes, scales, _ = rounded
            found[name] = IntLinear.build(
                linear, grid=grid, scales=scales, codes=codes, activation=None
            )
        return found

    def after_group(
        self, names: tuple[str, ...], found: Mapping[str, nn.Module], view: BlockView
    ) -> Mapping[str, nn.Module]:
        """Once attention is quantized, correct what the MLP's norm gives."""
        roles = self.known_roles()
        if not self.config.correction or "o" not in {roles.role(name) for name in names}:
            return {}
        readers = roles.groups(view.name)[2]
        norm = roles.norm_before(readers[0])
        if norm is None or not set(readers) <= view.linears.keys():
            return {}
        limit = self.config.limit
        shift = mean_deviation(view, norm, {}, found).clamp_(-limit, limit)
        self._shifts[norm] = shift
        return {norm: Shifted(_within(view, norm), shift)}

    def finish(self, run: Run) -> None:
        """Let up_proj take over column scales, and the head the last correction."""
        roles = self.known_roles()
        for name in run.names:
            up = [feeder for feeder in roles.feeders(name) if roles.role(feeder) == "up"]
            if up and fold_column_scale(run.model, name, up[0]):
                run.note(name, column_scale="folded")
        kept = run.layers.get(self._last_linear(), {}).get(_FINAL)
        if kept is not None:
            _give_head_bias(run.model, torch.tensor(kept))

    def _correct_head(self, view: BlockView, found: Mapping[str, nn.Module]) -> None:
        roles = self.known_roles()
        if self._run is None or roles.final_norm is None:
            return
        mlp = {name for group in roles.groups(view.name)[2:] for name in group}
        teacher = {name: module for name, module in found.items() if name not in mlp}
        # The shift of the MLP's norm is in the biases of the quantized gate and up only.
        norm = roles.norm_before(roles.groups(view.name)[2][0]) or ""
        if norm in self._shifts:
            teacher[norm] = Shifted(_within(view, norm), self._shifts[norm])
        last = self._run.model.get_submodule(roles.final_norm)
        shift = mean_deviation(view, view.name, teacher, found, last)
        shift = shift.clamp_(-self.config.limit, self.config.limit)
        self._run.note(self._last_linear(), **{_FINAL: shift.tolist()})

    def _last_linear(self) -> str:
        return self.known_roles().linears[-1]


def _within(view: BlockView, name: str) -> nn.Module:
    return view.block.get_submodule(name.removeprefix(f"{view.name}."))


def _check_head(model: Any, roles: Roles) -> None:
    head = model.get_output_embeddings()
    last = None if roles.final_norm is None else model.get_submodule(roles.final_norm)
    if last is None or last.weight is None or len(last.weight) != head.in_features:
        raise ValueError(
            f"in {type(model).__name__}, no norm stands right before the head, so that there is "
            "nothing to correct; set final_correction=False"
        )


def _give_head_bias(model: nn.Module, shift: Tensor) -> None:
    """Move what the last norm gives, by a bias of the head, which it has none of."""
    whole: Any = model
    head = whole.get_output_embeddings()
    weight = head.weight.detach().float()
    moved = with_bias(head, weight @ shift.to(weight))
    moved.bias.data = moved.bias.data.to(head.weight.dtype)
    whole.set_output_embeddings(moved)
