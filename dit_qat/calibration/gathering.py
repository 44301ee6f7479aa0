"""Running one block on all calls, and listening to what its linears receive."""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple

from torch import Tensor, nn

from dit_qat.calibration.blocks import BlockChain
from dit_qat.calibration.calls import CallStore
from dit_qat.calibration.chain import Chain, State
from dit_qat.calibration.states import ChainStates
from dit_qat.calibration.statistics import LinearStatistics, Needs, step_scales
from dit_qat.calibration.trees import tensors_of
from dit_qat.calibration.view import Listener, swapped
from dit_qat.layers.step_bits import timestep_scope

__all__ = ["BlockReplay", "Gatherer", "Paths", "grouped"]

Groups = Mapping[str, Sequence[str]]
"""Linears whose statistics are the same, by the one that listens for them."""


class Paths(NamedTuple):
    """The calls before a block: as its statistics see them, and as the float model has them.

    Attributes:
        inputs: Behind the quantized prefix.
        floats: Behind float blocks; None where nobody asks for them.
    """

    inputs: ChainStates
    floats: ChainStates | None


class Gatherer:
    """What is gathered about the linears of a block, on all calls.

    Args:
        chain: Of the model.
        store: The calls.
        needs: What to gather.
        step_weights: Weights by sampler step (steps,) of the moments, by full name.
    """

    def __init__(
        self,
        chain: BlockChain,
        store: CallStore,
        needs: Needs,
        step_weights: Mapping[str, Tensor],
    ) -> None:
        self.chain, self.store, self.needs = chain, store, needs
        self.step_weights = step_weights
        self.shapes = [chain.of(call) for call in store]

    def run(self, block: int, index: int, state: State) -> Any:
        """Call a block, as it now is in the model, on one call."""
        with timestep_scope(self.store.steps_and_timesteps[index][1]):
            return self.chain.run(self.shapes[index], block, state)

    def chained(self, block: int) -> bool:
        """Whether a block's inputs follow from what is known behind the one before."""
        return block < len(self.chain.blocks) and not any(
            chain.links[block].starts for chain in self.shapes
        )

    def capture(self, block: int, into: ChainStates, modules: Mapping[str, nn.Module]) -> None:
        """Run the model, some of its modules replaced, up to a block, on all calls."""
        into.begin(block)
        with swapped(self.chain.model, modules):
            for index, call in enumerate(self.store):
                with timestep_scope(call.timestep):
                    into.put(index, self.chain.capture(call, block))

    def push(self, block: int, source: ChainStates, into: ChainStates) -> None:
        """Run a block on all calls, and keep what is known behind it."""
        for index, chain in enumerate(self.shapes):
            state = source.get(index)
            output = self.run(block, index, state)
            into.put(index, chain.advance(block, state, output))

    def gather(
        self,
        block: int,
        groups: Groups,
        paths: Paths,
        replacements: Mapping[str, nn.Module] | None = None,
        each: Callable[[int, State], None] = lambda index, state: None,
    ) -> dict[str, LinearStatistics]:
        """Statistics of linears, with some modules of the block replaced.

        Args:
            block: Its number.
            groups: Which linears.
            paths: The calls before the block.
            replacements: Modules by full name; the others stay as they are.
            each: Told the number and the state of every call once it has run.

        Raises:
            ValueError: for inputs that are not finite, naming layer and timestep.
        """
        gathered = {leader: self._empty(leader) for leader in groups}
        scales = {leader: self._scales(leader) for leader in groups}
        for index, (step, timestep) in enumerate(self.store.steps_and_timesteps):
            exact = self._float_inputs(block, index, paths.floats, gathered)
            state = paths.inputs.get(index)
            with swapped(self.chain.model, replacements or {}), ExitStack() as stack:
                for name, statistics in gathered.items():
                    weight = scales[name].get(step, 1.0)
                    seen = _Seen(index, step, timestep, weight, exact.get(name))
                    hook = _adding(name, statistics, seen)
                    handle = self.chain.model.get_submodule(name).register_forward_pre_hook(
                        hook, with_kwargs=True
                    )
                    stack.callback(handle.remove)
                self.run(block, index, state)
            each(index, state)
        return {name: gathered[leader] for leader, names in groups.items() for name in names}

    def replay(
        self,
        block: int,
        inputs: ChainStates,
        listeners: Mapping[str, Listener],
        replacements: Mapping[str, nn.Module],
    ) -> None:
        """Run a block on all calls, and tell what some of its modules are given and give."""
        with swapped(self.chain.model, replacements), ExitStack() as stack:
            for name, listen in listeners.items():
                module = self.chain.model.get_submodule(name)
                handle = module.register_forward_hook(_telling(listen), with_kwargs=True)
                stack.callback(handle.remove)
            for index in range(len(self.store)):
                self.run(block, index, inputs.get(index))

    def _float_inputs(
        self, block: int, index: int, floats: ChainStates | None, names: Iterable[str]
    ) -> dict[str, Tensor]:
        """What linears receive on the float path."""
        found: dict[str, Tensor] = {}
        if floats is None:
            return found

        def keeping(name: str) -> Callable[[nn.Module, Any, Any], None]:
            def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
                (x,) = tensors_of((args, kwargs))
                found[name] = x.detach().clone()  # a later operation may change it in place

            return keep

        with ExitStack() as stack:
            for name in names:
                linear = self.chain.model.get_submodule(name)
                handle = linear.register_forward_pre_hook(keeping(name), with_kwargs=True)
                stack.callback(handle.remove)
            self.run(block, index, floats.get(index))
        return found

    def _empty(self, name: str) -> LinearStatistics:
        width = self.chain.watch[name].in_features
        return LinearStatistics(width, len(self.store), self.needs, self.chain.device)

    def _scales(self, name: str) -> Mapping[int, float]:
        rows = [chain.rows[name] for chain in self.shapes]
        return step_scales(self.step_weights.get(name), self.store.steps, rows)


class BlockReplay:
    """Runs one block again; for methods that look at it in between."""

    def __init__(self, gatherer: Gatherer, block: int, groups: Groups, paths: Paths) -> None:
        self._gatherer, self._block = gatherer, block
        self._groups, self._paths = groups, paths

    def statistics(
        self, names: Collection[str], replacements: Mapping[str, nn.Module]
    ) -> dict[str, LinearStatistics]:
        """Statistics of some linears with modules replaced."""
        parts = [[n for n in group if n in names] for group in self._groups.values()]
        groups = {part[0]: part for part in parts if part}
        return self._gatherer.gather(self._block, groups, self._paths, replacements)

    def listen(
        self, listeners: Mapping[str, Listener], replacements: Mapping[str, nn.Module]
    ) -> None:
        """Tell of modules with modules replaced."""
        self._gatherer.replay(self._block, self._paths.inputs, listeners, replacements)


class _Seen(NamedTuple):
    """Which call a linear is in, and what the float model has in the place of its input."""

    call: int
    step: int
    timestep: float
    weight: float
    exact: Tensor | None


def _adding(
    name: str, statistics: LinearStatistics, seen: _Seen
) -> Callable[[nn.Module, Any, Any], None]:
    def hear(_: nn.Module, args: Any, kwargs: Any) -> None:
        (x,) = tensors_of((args, kwargs))
        try:
            statistics.add(x, seen.call, seen.step, seen.weight, seen.exact)
        except ValueError as error:
            raise ValueError(
                f"layer {name} at timestep {seen.timestep:g}: {error}; the weights are damaged or "
                "the dtype overflows (try float32 or bfloat16); finished blocks are kept if the "
                "run has a state folder"
            ) from error

    return hear


def _telling(listen: Listener) -> Callable[[nn.Module, Any, Any, Any], None]:
    return lambda _, args, kwargs, output: listen(args, kwargs, output)


def grouped(
    linears: Collection[str], shapes: Sequence[Chain], weights: Mapping[str, Tensor]
) -> dict[str, tuple[str, ...]]:
    """Linears whose statistics are the same, by the one that listens for them."""
    common = set(shapes[0].shared).intersection(*(chain.shared for chain in shapes))
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in linears}
    for group in common:
        mine = tuple(name for name in group if name in linears and name not in weights)
        groups |= dict.fromkeys(mine, mine)
    return {name: group for name, group in groups.items() if group[0] == name}
