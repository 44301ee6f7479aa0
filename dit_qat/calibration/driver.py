"""The sequential block driver: statistics behind a quantized prefix, one block at a time."""

import logging
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, Literal, get_args

from torch import Tensor, nn
from tqdm.auto import tqdm

from dit_qat.calibration.blocks import BlockChain
from dit_qat.calibration.calls import CallStore
from dit_qat.calibration.capture import evaluating
from dit_qat.calibration.chain import State
from dit_qat.calibration.gathering import BlockReplay, Gatherer, Paths, grouped
from dit_qat.calibration.memory import MemoryPlan, plan_memory
from dit_qat.calibration.state import ResumeState, fingerprint
from dit_qat.calibration.states import ChainStates
from dit_qat.calibration.statistics import Needs
from dit_qat.calibration.view import BlockView, Probe, swapped

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
        quantize: From the view of a block to modules by full name, linears of the block that are to
            be quantized, or other modules in it (norms); what is absent stays as it is.
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
        plan = plan_memory(chain, run.shapes, store, run.groups, needs, run.two_paths)
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
        _check_weights(step_weights, chain.watch, store.steps)
        self.gatherer = Gatherer(chain, store, needs, step_weights)
        self.shapes = self.gatherer.shapes
        self.linears = [_within(name, chain.watch) for name, _ in chain.blocks]
        outside = set(chain.watch) - {name for part in self.linears for name in part}
        if outside:
            raise ValueError(
                f"{len(outside)} linears to quantize lie in no block, such as {min(outside)}; skip "
                "them, or name the blocks around them"
            )
        self.groups = [grouped(part, self.shapes, step_weights) for part in self.linears]
        scratch = None if store.folder is None else store.folder / "states"
        self.states = ChainStates(scratch)
        # With prefix "previous": the calls as a quantized block leaves them behind float ones.
        self.behind = ChainStates(None if scratch is None else scratch / "previous")
        self.floats = _FloatPath(self.gatherer) if needs.cross_moment and prefix == "all" else None
        self.quantized: list[Mapping[str, nn.Module]] = []

    @property
    def two_paths(self) -> bool:
        """Whether calls are held twice."""
        return self.prefix == "previous" or self.floats is not None

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
            if self.floats is not None:
                self.floats.states.clear()

    def _all_blocks(self, quantize: Quantize, kept: ResumeState | None, progress: bool) -> None:
        total = 2 * len(self.chain.blocks) * len(self.store)
        # Without smoothing, what a method takes between calls counts in the ETA.
        with tqdm(total=total, disable=not progress, unit="call", smoothing=0) as bar:
            for block, (name, _) in enumerate(self.chain.blocks):
                bar.set_description(name, refresh=False)
                done = None if kept is None else kept.load(block, self.chain.model)
                if self.floats is not None:
                    self.floats.bring_up(block)
                modules = self._one_block(block, quantize, bar) if done is None else done
                if done is None and kept is not None:
                    kept.save(block, modules, self.chain.model)
                if self.floats is not None:
                    self.floats.go_on(block, modules)
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
        for name in modules:
            view.check_replaceable(name)
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
            self.gatherer.capture(block, self.states, {})
        if self.prefix == "previous" and block and self.behind.block != block:
            self.gatherer.capture(block, self.behind, self.quantized[block - 1])

    def _view(self, block: int, bar: "tqdm[Any]") -> BlockView:
        """Run the float block on all calls and gather what its linears receive."""
        wanted, probes = _spread(len(self.store), self.needs.probe_calls), []

        def note(index: int, state: State) -> None:
            if index in wanted:
                timestep = self.store.steps_and_timesteps[index][1]
                probes.append(Probe(self.shapes[index], state, timestep))
            bar.update()

        paths, linears = self._paths(block), self.linears[block]
        found = self.gatherer.gather(block, self.groups[block], paths, each=note)
        ordered = {name: found[name] for name in linears}
        replay = BlockReplay(self.gatherer, block, self.groups[block], paths)
        return BlockView(self.chain, block, linears, ordered, probes, self.store.timesteps, replay)

    def _paths(self, block: int) -> Paths:
        inputs = self.behind if self.behind.block == block else self.states
        if not self.needs.cross_moment:
            return Paths(inputs, None)
        return Paths(inputs, self.states if self.floats is None else self.floats.states)

    def _go_on(self, block: int) -> None:
        """Push the calls through a block, unless the next one's inputs are computed elsewhere."""
        if not self.gatherer.chained(block + 1):
            self.states.clear()
            self.behind.clear()
            return
        if self.prefix == "previous":
            self.behind.begin(block + 1)
            with swapped(self.chain.model, self.quantized[block]):
                self.gatherer.push(block, self.states, self.behind)
        self.gatherer.push(block, self.states, self.states)
        self.states.block = block + 1


class _FloatPath:
    """The calls on their way through float blocks, beside those behind quantized ones.

    A block is passed before it is quantized; where the next one's inputs are computed anew, they
    are captured from the model with its float modules put back, which are kept for that.
    """

    def __init__(self, gatherer: Gatherer) -> None:
        self.gatherer = gatherer
        folder = gatherer.store.folder
        # Beside the other states, which clear their folder with all that is in it.
        self.states = ChainStates(None if folder is None else folder / "float_states")
        self.segments = any(link.starts for chain in gatherer.shapes for link in chain.links[1:])
        self.originals: dict[str, nn.Module] = {}

    def bring_up(self, block: int) -> None:
        """Have the calls before a block."""
        if self.states.block != block:
            self.gatherer.capture(block, self.states, self.originals)

    def go_on(self, block: int, replaced: Collection[str]) -> None:
        """Push the calls through a block that is float still, some modules of which go now."""
        if self.segments:
            model = self.gatherer.chain.model
            self.originals |= {name: model.get_submodule(name) for name in replaced}
        if self.gatherer.chained(block + 1):
            self.gatherer.push(block, self.states, self.states)
            self.states.block = block + 1
        else:
            self.states.clear()


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


def _spread(total: int, count: int) -> set[int]:
    """``count`` positions among ``total``, evenly."""
    count = min(count, total)
    return {(2 * i + 1) * total // (2 * count) for i in range(count)}
