"""What a method sees of the block that is being quantized."""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from dit_qat.calibration.blocks import BlockChain
from dit_qat.calibration.chain import Chain, State
from dit_qat.calibration.statistics import LinearStatistics
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.layers.step_bits import timestep_scope

__all__ = ["BlockView", "Listener", "Probe", "Replay", "swapped"]

Replacements = Mapping[str, nn.Module]
Listener = Callable[[Any, Any, Any], None]
"""Told the arguments, the keyword arguments and the output of a module."""


class Replay(Protocol):
    """Runs the block on all calls again."""

    def statistics(
        self, names: Collection[str], replacements: Replacements
    ) -> dict[str, LinearStatistics]:
        """Statistics of some linears with modules replaced."""

    def listen(self, listeners: Mapping[str, Listener], replacements: Replacements) -> None:
        """Tell of modules with modules replaced."""


class Probe(NamedTuple):
    """A call on which errors are measured, as it stands before the block."""

    chain: Chain
    state: State
    timestep: float


class BlockView:
    """One block, float, with what its linear layers saw behind the quantized prefix.

    Attributes:
        index: Position of the block in the order of execution.
        name: Of the block in the model.
        block: The module.
        linears: Linear layers to quantize, by full name, in the order of the target.
        statistics: Of their inputs, by full name; layers of one shared input may share theirs.
        shared_inputs: Groups of two and more linears that received the very same tensor (q, k, v).
        timesteps: The model's timestep by sampler step.
    """

    def __init__(
        self,
        chain: BlockChain,
        index: int,
        linears: Mapping[str, nn.Linear],
        statistics: Mapping[str, LinearStatistics],
        probes: Sequence[Probe],
        timesteps: Mapping[int, float],
        replay: Replay,
    ) -> None:
        self.index, (self.name, self.block) = index, chain.blocks[index]
        self.linears, self.statistics = dict(linears), dict(statistics)
        self.timesteps = dict(timesteps)
        self._chain, self._probes, self._replay = chain, probes, replay
        groups = probes[0].chain.shared if probes else ()
        mine = [tuple(name for name in group if name in linears) for group in groups]
        self.shared_inputs = [group for group in mine if len(group) > 1]
        # Of one module at a time: those of all would add up to many times the block's inputs.
        self._references: tuple[str | None, list[Tensor]] | None = None
        self._inputs: list[Any] = []

    def check_replaceable(self, name: str) -> None:
        """Refuse to replace what is not this block's, and linears that are to stay float.

        Raises:
            ValueError: naming it.
        """
        inside = name.startswith(f"{self.name}.")
        if name in self.linears or (
            inside and not isinstance(self._chain.model.get_submodule(name), nn.Linear)
        ):
            return
        raise ValueError(
            f"the method replaced {name} in block {self.name}; it may replace "
            f"{', '.join(self.linears)}, and what is no linear layer"
        )

    @torch.no_grad()
    def statistics_behind(
        self, replacements: Replacements, names: Collection[str] | None = None
    ) -> dict[str, LinearStatistics]:
        """Gather the statistics of linears anew, on all calls, with modules of the block replaced.

        Methods that quantize a block in stages (q, k, v first, then what they feed) ask for it.

        Args:
            replacements: Modules by full name; the others stay float.
            names: Linears; None: all that are not replaced.

        Raises:
            ValueError: for linears that are replaced, or are none of the block's.
        """
        names = [n for n in self.linears if n not in replacements] if names is None else names
        wrong = [name for name in names if name not in self.linears or name in replacements]
        if wrong:
            raise ValueError(f"{wrong[0]} is replaced itself, or no linear of block {self.name}")
        found = self._replay.statistics(names, replacements)
        return {name: found[name] for name in names}

    @torch.no_grad()
    def listen(
        self, listeners: Mapping[str, Listener], replacements: Replacements | None = None
    ) -> None:
        """Run the block on all calls, and tell what some of its modules are given and give.

        Args:
            listeners: By full name of a module in the block; each is told the arguments, keyword
                arguments and output of every call, in the order of the calls.
            replacements: Modules by full name; the others stay float.
        """
        self._replay.listen(listeners, replacements or {})

    @torch.no_grad()
    def error(self, replacements: Replacements, submodule: str | None = None) -> float:
        """Relative squared error of an output with some linears replaced.

        ``sum ||y' - y||^2 / sum ||y||^2`` over the probe calls, y being the float output on the
        same inputs, which have passed the quantized prefix.

        Args:
            replacements: Modules by full name; the others stay float.
            submodule: Full name of a module in the block whose output counts (called alone, on the
                inputs that it has in the float block); None: the block's own.
        """
        error = power = 0.0
        references = self._reference(submodule)
        with swapped(self._chain.model, replacements):
            for at, reference in enumerate(references):
                output = _flat(self._output(at, submodule))
                error += float((output - reference).square().sum())
                power += float(reference.square().sum())
        return error / power if power > 0 else error

    @torch.no_grad()
    def linear_errors(self, replacements: Replacements) -> dict[str, float]:
        """Relative squared error of each replacement's own output, all else float."""
        sums = {name: [0.0, 0.0] for name in replacements}

        def compare(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
            found = replacements[name](*args, **kwargs)
            sums[name][0] += float((found.float() - output.float()).square().sum())
            sums[name][1] += float(output.float().square().sum())

        with ExitStack() as stack:
            for name in replacements:
                _hear(stack, self._chain.model.get_submodule(name), name, compare)
            for at in range(len(self._probes)):
                self._output(at, None)
        return {name: e / power if power > 0 else e for name, (e, power) in sums.items()}

    @torch.no_grad()
    def ahead(
        self,
        replacements: Replacements,
        blocks: int,
        only: Sequence[str] | None = None,
        rows: int | None = None,
    ) -> dict[str, Tensor]:
        """Outputs of linears in this block and the ``blocks`` behind it.

        What lies behind the block is float, this block is float but for the replacements; without
        any, the outputs are those to compare with. It ends early where something between blocks
        computes the inputs of the next (a new segment) and behind the last block.

        Args:
            replacements: Modules by full name.
            blocks: How many blocks behind this one.
            only: Full names of the linears whose outputs are returned; None: all watched.
            rows: First rows of each probe call that are used; None: all.

        Returns:
            (rows, out) over all probe calls, float32, by full name, in order of execution.
        """
        found: dict[str, list[Tensor]] = {}

        def keep(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
            found.setdefault(name, []).append(output.float().flatten(0, -2))

        reach = self._chain.blocks[self.index : self.index + blocks + 1]
        with swapped(self._chain.model, replacements), ExitStack() as stack:
            for name in self._chain.watch if only is None else only:
                if any(name.startswith(f"{block}.") for block, _ in reach):
                    _hear(stack, self._chain.model.get_submodule(name), name, keep)
            for probe in self._probes:
                self._go_on(probe if rows is None else _narrowed(probe, rows), len(reach))
        return {name: torch.cat(parts) for name, parts in found.items()}

    def _go_on(self, probe: Probe, count: int) -> None:
        chain, state = probe.chain, probe.state
        with timestep_scope(probe.timestep):
            for block in range(self.index, self.index + count):
                if block > self.index and chain.links[block].starts:
                    return
                state = chain.advance(block, state, self._chain.run(chain, block, state))

    def _reference(self, submodule: str | None) -> list[Tensor]:
        if self._references is None or self._references[0] != submodule:
            self._references, self._inputs = None, []
            if submodule is not None:
                self._inputs = self._inputs_of(submodule)
            outputs = [_flat(self._output(at, submodule)) for at in range(len(self._probes))]
            self._references = (submodule, outputs)
        return self._references[1]

    def _output(self, at: int, submodule: str | None) -> Any:
        """Output of the block, or of a submodule on its float inputs, on one probe."""
        probe = self._probes[at]
        with timestep_scope(probe.timestep):
            if submodule is None:
                return self._chain.run(probe.chain, self.index, probe.state)
            args, kwargs = self._inputs[at]
            return self._chain.model.get_submodule(submodule)(*args, **kwargs)

    def _inputs_of(self, submodule: str) -> list[Any]:
        """What a submodule is called with in the float block."""
        if not submodule.startswith(f"{self.name}."):
            raise ValueError(f"{submodule!r} is no module in block {self.name}; give its full name")
        module = self._chain.model.get_submodule(submodule)
        kept: list[Any] = []

        def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept.append(map_tensors(torch.Tensor.clone, (args, kwargs)))

        with ExitStack() as stack:
            handle = module.register_forward_pre_hook(keep, with_kwargs=True)
            stack.callback(handle.remove)
            for at in range(len(self._probes)):
                self._output(at, None)
        if len(kept) != len(self._probes):
            raise ValueError(f"{submodule} does not run exactly once in a call of {self.name}")
        return kept


@contextmanager
def swapped(model: nn.Module, replacements: Replacements) -> Iterator[None]:
    """Put modules into a model by full name, and the former ones back after."""
    former = {name: model.get_submodule(name) for name in replacements}
    try:
        for name, module in replacements.items():
            model.set_submodule(name, module)
        yield
    finally:
        for name, module in former.items():
            model.set_submodule(name, module)


def _narrowed(probe: Probe, rows: int) -> Probe:
    """The first rows of a probe; what has not as many rows as most of its tensors stays."""
    sizes = Counter(len(tensor) for tensor in probe.state.values() if tensor.ndim)
    batch = sizes.most_common(1)[0][0] if sizes else 0
    state = {
        source: tensor[:rows] if tensor.ndim and len(tensor) == batch else tensor
        for source, tensor in probe.state.items()
    }
    return probe._replace(state=state)


def _hear(
    stack: ExitStack,
    module: nn.Module,
    name: str,
    listen: Callable[[str, Any, Any, Tensor], None],
) -> None:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        listen(name, args, kwargs, output)

    handle = module.register_forward_hook(hook, with_kwargs=True)
    stack.callback(handle.remove)


def _flat(tree: Any) -> Tensor:
    """All floating-point values of an output, in one row."""
    parts = [t.float().flatten() for t in tensors_of(tree) if t.is_floating_point()]
    return torch.cat(parts)
