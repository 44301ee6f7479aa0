"""Methods that quantize a block group by group: linears that read the same input together."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import ClassVar

from torch import nn

from dit_qat.calibration import BlockView, LinearStatistics, Method, Run
from dit_qat.llm.methods.settings import check_groups
from dit_qat.llm.models.roles import Roles, roles_of

__all__ = ["Linears", "StagedMethod"]

Linears = Mapping[str, nn.Linear]


class StagedMethod(Method):
    """Quantizes q, k, v; then o; then gate, up; then down.

    Subclasses override :meth:`quantize_group`. If their configuration says ``staged``, each group
    sees the inputs that the quantized groups before it leave, as the releases of GPTQ, GPTAQ,
    PT2-LLM and D2Quant have it, at the cost of further runs of every block.
    """

    roles: Roles | None = None
    even_groups: ClassVar[bool] = True
    """Whether the groups of its configuration must fill the inputs of every layer."""

    @property
    def staged(self) -> bool:
        """Whether statistics are gathered anew for each group."""
        return bool(self.config.staged)

    def start(self, run: Run) -> None:
        """Learn which layers feed which; refuse a model of unknown parts, and uneven groups."""
        self.roles = roles_of(run.model)
        if self.even_groups:
            check_groups(run.target.linears(), self.config.group_size)

    def quantize_block(self, view: BlockView) -> Mapping[str, nn.Module]:
        """Quantize the groups of one block in the order in which they run."""
        found: dict[str, nn.Module] = {}
        seen: dict[str, nn.Module] = {}
        for names in self._groups(view):
            linears = {name: view.linears[name] for name in names}
            try:
                made = self.quantize_group(linears, self._statistics(names, seen, view))
            except ValueError as error:
                raise ValueError(f"layer {', '.join(names)}: {error}") from error
            found |= made
            seen |= {**made, **self.after_group(names, found, view)}
        return found

    @abstractmethod
    def quantize_group(
        self, linears: Linears, statistics: LinearStatistics
    ) -> Mapping[str, nn.Module]:
        """Quantize linears of one input, by full name."""

    def after_group(
        self, names: tuple[str, ...], found: Mapping[str, nn.Module], view: BlockView
    ) -> Mapping[str, nn.Module]:
        """Modules that groups behind this one shall see in the block, but that do not stay."""
        return {}

    def known_roles(self) -> Roles:
        """The roles of the model of the run.

        Raises:
            RuntimeError: before a run has started.
        """
        if self.roles is None:
            raise RuntimeError(f"{type(self).__name__} has not been started on a model")
        return self.roles

    def _statistics(
        self, names: tuple[str, ...], seen: Mapping[str, nn.Module], view: BlockView
    ) -> LinearStatistics:
        if self.staged and seen:
            return view.statistics_behind(seen, names)[names[0]]
        return view.statistics[names[0]]

    def _groups(self, view: BlockView) -> list[tuple[str, ...]]:
        """Those linears of each group that are to be quantized."""
        groups = self.known_roles().groups(view.name)
        wanted = [tuple(name for name in group if name in view.linears) for group in groups]
        return [group for group in wanted if group]
