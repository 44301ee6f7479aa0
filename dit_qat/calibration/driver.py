"""The sequential block driver: statistics behind a quantized prefix, one block at a time."""

import logging
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from typing import Any, Literal, NamedTuple, get_args

from torch import Tensor, nn
from tqdm.auto import tqdm

from dit_qat.calibration.blocks import BlockChain
from dit_qat.calibration.calls import CallStore
from dit_qat.calibration.capture import evaluating
from dit_qat.calibration.chain import Chain, State
from dit_qat.calibration.memory import MemoryPlan, plan_memory
from dit_qat.calibration.state import ResumeState, fingerprint
from dit_qat.calibration.states import ChainStates
from dit_qat.calibration.statistics import LinearStatistics, Needs, step_scales
from dit_qat.calibration.trees import tensors_of
from dit_qat.calibration.view import BlockView, Probe, swapped
from dit_qat.layers.step_bits import timestep_scope

__all__ = ["Prefix", "check_store", "drive"]

Prefix = Literal["all", "previous", "none"]
Quantize = Callable[[BlockView], Mapping[str, nn.Module]]

_LOG = logging.getLogger(__name__)


def drive(
    model: nn.Module,
    store: CallStore,
    blocks: Sequence[tuple[str, nn.Module]],
    *,
    linears: Mapping[str, nn.Linear],
    needs: Needs,
    quantize: Quantize,
    prefix: Prefix = "all",
    state: ResumeState | None = None,
    step_weights: Mapping[str, Tensor] | None = None,
    limit_bytes: int | None = None,
    progress: bool = False,
) -> MemoryPlan:
    """Quantize the blocks of a model one after the other, in place.

    For each block, in the order of execution: the calls are brought up to it, statistics of its
    linears are gathered on them while everything inside the block is float, ``quantize`` replaces
    linears, and the calls go on through the quantized block.

    Args:
        model: A float model, that of the recorded calls.
        store: The calls.
        blocks: Name and module, in any order; of :func:`~dit_qat.calibration.blocks.find_blocks`.
        linears: What is quantized, by full name; each lies in a block.
        needs: What is gathered about each.
        quantize: From the view of a block to modules by full name; what is absent stays float.
        prefix: Which blocks before a block are quantized while its statistics are gathered: "all"
            of them, only the "previous" one, or "none".
        state: Where finished blocks are kept; those found there are taken over.
        step_weights: Weights by sampler step (steps,) of the second moment, by full name.
        limit_bytes: What the run may take.
        progress: Whether to show a bar.

    Returns:
        The estimate of the peak memory, which is also logged before the run.

    Raises:
        ValueError: before the run, for an empty store, one of another model, linears in no block or
            without input, step weights that do not fit, or a plan above the limit; within it, for
            inputs that are not finite (naming layer and timestep), when finished blocks are kept.
    """
    if prefix not in get_args(Prefix):
        raise ValueError(f"prefix={prefix!r} is unknown; use one of {get_args(Prefix)}")
    if not linears:
        raise ValueError("there are no linears to quantize; name some")
    check_store(model, store)
    with evaluating(model):
        chain = BlockChain(model, blocks, linears, store[0])
        run = _Drive(chain, store, needs, prefix, step_weights or {})
        plan = plan_memory(chain, run.shapes, store, run.groups, needs, prefix == "previous")
        plan.check(limit_bytes)
        run.warn_of_few_tokens()
        _LOG.info("calibration of %d blocks on %d calls: %s", len(blocks), len(store), plan)
        run.all_blocks(quantize, state, progress)
    return plan


class _Drive:
    """One run: the calls stand before a block, and go on from it to the next."""

    def __init__(
        self,
        chain: BlockChain,
        store: CallStore,
        needs: Needs,
        prefix: Prefix,
        step_weights: Mapping[str, Tensor],
    ) -> None:
        self.chain, self.store, self.needs, self.prefix = chain, store, needs, prefix
        self.step_weights = step_weights
        _check_weights(step_weights, chain.watch, store.steps)
        self.shapes = [chain.of(call) for call in store]
        self.linears = [_within(name, chain.watch) for name, _ in chain.blocks]
        outside = set(chain.watch) - {name for part in self.linears for name in part}
        if outside:
            raise ValueError(
                f"{len(outside)} linears to quantize lie in no block, such as {min(outside)}; skip "
                "them, or name the blocks around them"
            )
        self.groups = [_grouped(part, self.shapes, step_weights) for part in self.linears]
        scratch = None if store.folder is None else store.folder / "states"
        self.states = ChainStates(scratch)
        # With prefix "previous": the calls as a quantized block leaves them behind float ones.
        self.behind = ChainStates(None if scratch is None else scratch / "previous")
        self.quantized: list[Mapping[str, nn.Module]] = []

    def warn_of_few_tokens(self) -> None:
        """Say where a second moment cannot have full rank."""
        limit = self.needs.moment_tokens
        rows = {
            name: sum(min(chain.rows[name], limit or chain.rows[name]) for chain in self.shapes)
            for name in self.chain.watch
        }
        short = {n: x.in_features for n, x in self.chain.watch.items() if rows[n] < x.in_features}
        if short and self.needs.second_moment:
            name, width = next(iter(short.items()))
            warnings.warn(
                f"{len(short)} layers see fewer tokens than they have inputs, such as {name} "
                f"({rows[name]} tokens, {width} inputs): their second moments are rank-deficient "
                "and damping will be raised; record more calls for better weights",
                stacklevel=3,
            )

    def all_blocks(self, quantize: Quantize, kept: ResumeState | None, progress: bool) -> None:
        """Quantize every block that is not kept."""
        try:
            self._all_blocks(quantize, kept, progress)
        finally:
            self.behind.clear()
            self.states.clear()

    def _all_blocks(self, quantize: Quantize, kept: ResumeState | None, progress: bool) -> None:
        total = 2 * len(self.chain.blocks) * len(self.store)
        # Without smoothing, what a method takes between calls counts in the ETA.
        with tqdm(total=total, disable=not progress, unit="call", smoothing=0) as bar:
            for block, (name, _) in enumerate(self.chain.blocks):
                bar.set_description(name, refresh=False)
                done = None if kept is None else kept.load(block)
                modules = self._one_block(block, quantize, bar) if done is None else done
                if done is None and kept is not None:
                    kept.save(block, modules)
                self._enter(modules)
                if self.states.block == block:
                    self._go_on(block)
                bar.n = 2 * (block + 1) * len(self.store)
                bar.refresh()
        for late in self.quantized:
            self._put(late)

    def _one_block(self, block: int, quantize: Quantize, bar: "tqdm[Any]") -> dict[str, nn.Module]:
        self._bring_up(block)
        view = self._view(block, bar)
        modules = dict(quantize(view))
        unknown = modules.keys() - view.linears.keys()
        if unknown:
            raise ValueError(
                f"the method replaced {min(unknown)} in block {view.name}; it may replace "
                f"{', '.join(view.linears)}"
            )
        return {name: module.to(self.chain.device).eval() for name, module in modules.items()}

    def _enter(self, modules: Mapping[str, nn.Module]) -> None:
        """Use quantized modules from here on, or at the end if later blocks see float ones."""
        if self.prefix == "all":
            self._put(modules)
        else:
            self.quantized.append(modules)

    def _put(self, modules: Mapping[str, nn.Module]) -> None:
        for name, module in modules.items():
            self.chain.model.set_submodule(name, module.to(self.chain.device).eval())

    def _bring_up(self, block: int) -> None:
        """Have the calls before a block, by running the model up to it unless they are there."""
        if self.states.block != block:
            self._capture(block, self.states, {})
        if self.prefix == "previous" and block and self.behind.block != block:
            self._capture(block, self.behind, self.quantized[block - 1])

    def _capture(self, block: int, into: ChainStates, modules: Mapping[str, nn.Module]) -> None:
        into.begin(block)
        with swapped(self.chain.model, modules):
            for index, call in enumerate(self.store):
                with timestep_scope(call.timestep):
                    into.put(index, self.chain.capture(call, block))

    def _view(self, block: int, bar: "tqdm[Any]") -> BlockView:
        """Run the float block on all calls and gather what its linears receive."""
        groups, linears = self.groups[block], self.linears[block]
        gathered = {name: self._empty(name) for name in groups}
        scales = {name: self._scales(name) for name in groups}
        inputs = self.behind if self.behind.block == block else self.states
        wanted, probes = _spread(len(self.store), self.needs.probe_calls), []
        for index, (step, timestep) in enumerate(self.store.steps_and_timesteps):
            state = inputs.get(index)
            with ExitStack() as stack:
                for name, statistics in gathered.items():
                    seen = _Seen(index, step, timestep, scales[name].get(step, 1.0))
                    hook = _listener(name, statistics, seen)
                    linear = self.chain.watch[name]
                    handle = linear.register_forward_pre_hook(hook, with_kwargs=True)
                    stack.callback(handle.remove)
                self._run(block, index, state)
            if index in wanted:
                probes.append(Probe(self.shapes[index], state, timestep))
            bar.update()
        found = {name: gathered[leader] for leader, names in groups.items() for name in names}
        ordered = {name: found[name] for name in linears}
        return BlockView(self.chain, block, linears, ordered, probes, self.store.timesteps)

    def _go_on(self, block: int) -> None:
        """Push the calls through a block, unless the next one's inputs are computed elsewhere."""
        following = block + 1
        if following == len(self.shapes[0].links) or any(
            chain.links[following].starts for chain in self.shapes
        ):
            self.states.clear()
            self.behind.clear()
            return
        if self.prefix == "previous":
            self.behind.begin(following)
            with swapped(self.chain.model, self.quantized[block]):
                self._push(block, self.behind)
        self._push(block, self.states)
        self.states.block = following

    def _push(self, block: int, into: ChainStates) -> None:
        for index, chain in enumerate(self.shapes):
            state = self.states.get(index)
            output = self._run(block, index, state)
            into.put(index, chain.advance(block, state, output))

    def _run(self, block: int, index: int, state: State) -> Any:
        with timestep_scope(self.store.steps_and_timesteps[index][1]):
            return self.chain.run(self.shapes[index], block, state)

    def _empty(self, name: str) -> LinearStatistics:
        width = self.chain.watch[name].in_features
        return LinearStatistics(width, len(self.store), self.needs, self.chain.device)

    def _scales(self, name: str) -> Mapping[int, float]:
        rows = [chain.rows[name] for chain in self.shapes]
        return step_scales(self.step_weights.get(name), self.store.steps, rows)


class _Seen(NamedTuple):
    """Which call a linear is in."""

    call: int
    step: int
    timestep: float
    weight: float


def _listener(
    name: str, statistics: LinearStatistics, seen: _Seen
) -> Callable[[nn.Module, Any, Any], None]:
    def hear(_: nn.Module, args: Any, kwargs: Any) -> None:
        (x,) = tensors_of((args, kwargs))
        try:
            statistics.add(x, seen.call, seen.step, seen.weight)
        except ValueError as error:
            raise ValueError(
                f"layer {name} at timestep {seen.timestep:g}: {error}; the weights are damaged or "
                "the dtype overflows (try float32 or bfloat16); finished blocks are kept if the "
                "run has a state folder"
            ) from error

    return hear


def check_store(model: nn.Module, store: CallStore) -> None:
    """Refuse calls that a model cannot be calibrated on.

    Raises:
        ValueError: if there are none, or they were recorded from another model.
    """
    if not len(store):
        raise ValueError("there are no recorded calls to calibrate on; record at least one")
    if store.model and store.model != fingerprint(model):
        raise ValueError(
            f"the calls were recorded from another {type(model).__name__} than the one to "
            "quantize (its weights or shapes differ); record them again"
        )


def _check_weights(
    weights: Mapping[str, Tensor], linears: Mapping[str, nn.Linear], steps: Sequence[int]
) -> None:
    for name, weight in weights.items():
        if name not in linears:
            raise ValueError(
                f"step weights are for {name}, which is not to be quantized; drop them"
            )
        if weight.ndim != 1 or len(weight) <= max(steps):
            raise ValueError(
                f"step weights of {name} have shape {tuple(weight.shape)}; the calls reach step "
                f"{max(steps)}, so give {max(steps) + 1} numbers"
            )
        if not bool((weight.isfinite() & (weight >= 0)).all()):
            raise ValueError(f"step weights of {name} must be finite and at least 0")


def _within(block: str, linears: Mapping[str, nn.Linear]) -> dict[str, nn.Linear]:
    return {n: x for n, x in linears.items() if n == block or n.startswith(f"{block}.")}


def _grouped(
    linears: Mapping[str, nn.Linear], shapes: Sequence[Chain], weights: Mapping[str, Tensor]
) -> dict[str, tuple[str, ...]]:
    """Linears whose statistics are the same, by the one that listens for them."""
    common = set(shapes[0].shared).intersection(*(chain.shared for chain in shapes))
    groups: dict[str, tuple[str, ...]] = {name: (name,) for name in linears}
    for group in common:
        mine = tuple(name for name in group if name in linears and name not in weights)
        groups |= dict.fromkeys(mine, mine)
    return {name: group for name, group in groups.items() if group[0] == name}


def _spread(total: int, count: int) -> set[int]:
    """``count`` positions among ``total``, evenly."""
    count = min(count, total)
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}
