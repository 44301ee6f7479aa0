"""Which blocks a model has, and how the inputs of each derive from what came before."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_qat.calibration.calls import Call
from dit_qat.calibration.chain import Chain, Link, Source, State
from dit_qat.calibration.footprint import Footprint
from dit_qat.calibration.tracing import Tracer, Watcher
from dit_qat.calibration.trees import map_leaves, map_tensors, tensors_of

__all__ = ["BlockChain", "find_blocks"]

Blocks = Sequence[tuple[str, nn.Module]]

_VALUES = (bool, int, float, str)


def find_blocks(
    model: nn.Module, patterns: Iterable[str] | None = None, call: Call | None = None
) -> list[tuple[str, nn.Module]]:
    """Find the blocks of a model.

    Args:
        model: Any model.
        patterns: Globs over dotted names; ``*`` stays within its dots, so that ``blocks.*`` names
            the blocks and not what is in them. None: the items of the outermost lists of modules
            that hold linear layers.
        call: With it, blocks come in the order in which this call runs them; otherwise in that of
            their definition.

    Raises:
        ValueError: for a pattern that matches nothing, with near names, or a model without blocks.
    """
    modules = {name: module for name, module in model.named_modules() if name}
    patterns = _listed_blocks(modules) if patterns is None else list(patterns)
    found: dict[str, nn.Module] = {}
    for pattern in patterns:
        names = [name for name in modules if _matches(name, pattern)]
        if not names:
            near = get_close_matches(pattern, modules, n=3, cutoff=0.4) or list(modules)[:3]
            raise ValueError(
                f"pattern {pattern!r} matches no block of {type(model).__name__}; near names: "
                f"{', '.join(near)}"
            )
        found |= {name: modules[name] for name in names}
    if not found:
        raise ValueError(f"{type(model).__name__} has no list of blocks; give patterns for them")
    blocks = list(found.items())
    return blocks if call is None else _in_order(model, blocks, call)


class BlockChain:
    """How calls run through the blocks of a model.

    In one traced call per set of shapes, tensors are followed by their identity: an input of a
    block that is an output of an earlier block, or was an input of one, is chained; one that
    is neither starts a new segment, whose inputs are captured by running the model up to it.

    Args:
        model: Any model, in evaluation mode.
        blocks: Name and module, in any order.
        watch: Linear layers within the blocks, by full name.
        call: One call of the model; it decides the order of the blocks.

    Attributes:
        blocks: Name and module in the order of execution.
        device: Of the model.

    Raises:
        ValueError: if a block does not run exactly once in a call, blocks are nested, or a watched
            linear never runs.
    """

    def __init__(
        self, model: nn.Module, blocks: Blocks, watch: Mapping[str, nn.Linear], call: Call
    ) -> None:
        self.model, self.watch = model, dict(watch)
        self.blocks = _in_order(model, blocks, call)
        self.device = next(model.parameters()).device  # quantized layers have buffers alone
        self._chains: dict[str, Chain] = {}

    def of(self, call: Call) -> Chain:
        """The chain of a call, traced at the first of its shapes."""
        key = _signature(call)
        if key not in self._chains:
            self._chains[key] = self._trace(call)
        return self._chains[key]

    def run(self, chain: Chain, block: int, state: State) -> Any:
        """Call a block as it now is in the model."""
        args, kwargs = chain.links[block].inputs(state, self.device)
        with torch.no_grad():
            return self.model.get_submodule(self.blocks[block][0])(*args, **kwargs)

    def capture(self, call: Call, block: int) -> State:
        """Run the model up to a block, and return all that is live there."""
        wanted, link = self.of(call).live(block), self.of(call).links[block]
        state: State = {}

        def take(kind: Literal["in", "out"], at: int, tree: Any) -> None:
            for leaf, tensor in enumerate(tensors_of(tree)):
                if Source(kind, at, leaf) in wanted:
                    # A later block may change it in place.
                    state[Source(kind, at, leaf)] = tensor.detach().clone()

        def before(at: int, args: Any, kwargs: Any) -> None:
            take("in", at, (args, kwargs))
            if at == block:
                self._check_plain(block, link, (args, kwargs))
                raise _ReachedError

        try:
            with self._listening(before, lambda at, output: take("out", at, output)):
                _call(self.model, call, self.device)
        except _ReachedError:
            return state
        raise AssertionError(f"{self.blocks[block][0]} ran in one call and not in another")

    def _check_plain(self, block: int, link: Link, inputs: Any) -> None:
        """Refuse what is no tensor and differs between calls of equal shapes."""
        found: list[Any] = []
        map_leaves(lambda leaf: None if isinstance(leaf, Tensor) else found.append(leaf), inputs)
        for value, traced in zip(found, link.plain, strict=True):
            if value is not traced and not (isinstance(value, _VALUES) and value == traced):
                raise ValueError(
                    f"block {self.blocks[block][0]} is called with {_shown(value)}, and with "
                    f"{_shown(traced)} in another call of the same shapes; blocks must be called "
                    "with tensors and constants (a language model with use_cache=False)"
                )

    def _trace(self, call: Call) -> Chain:
        tracer = Tracer(len(self.blocks))
        seen = Watcher()
        given = tensors_of((call.args, call.kwargs))
        footprint = Footprint([*self.model.parameters(), *self.model.buffers(), *given])

        def after(at: int, output: Any) -> None:
            tracer.after(at, output)
            seen.end_block()

        with ExitStack() as stack:
            stack.enter_context(self._listening(tracer.before, after))
            for name, linear in self.watch.items():
                handle = linear.register_forward_pre_hook(seen.hook(name), with_kwargs=True)
                stack.callback(handle.remove)
            stack.enter_context(footprint)
            _call(self.model, call, self.device)
        idle = [name for name in self.watch if name not in seen.rows]
        if idle:
            raise ValueError(
                f"{len(idle)} linears never run in a call of {type(self.model).__name__}, such as "
                f"{', '.join(idle[:3])}; skip them"
            )
        links = tuple(link for link in tracer.links if link is not None)
        if len(links) < len(self.blocks):
            missing = [n for (n, _), x in zip(self.blocks, tracer.links, strict=True) if x is None]
            raise ValueError(f"{missing[0]} runs in one call and not in another; leave it out")
        return Chain(links, seen.rows, seen.groups(), tracer.sizes, footprint.peak)

    @contextmanager
    def _listening(
        self, before: Callable[[int, Any, Any], None], after: Callable[[int, Any], None]
    ) -> Iterator[None]:
        with ExitStack() as stack:
            for at, (_, block) in enumerate(self.blocks):
                handles = [
                    # Before all other hooks, which run again when the block does.
                    block.register_forward_pre_hook(
                        lambda _, args, kwargs, at=at: before(at, args, kwargs),
                        prepend=True,
                        with_kwargs=True,
                    ),
                    block.register_forward_hook(lambda _, __, output, at=at: after(at, output)),
                ]
                for handle in handles:
                    stack.callback(handle.remove)
            yield


class _ReachedError(Exception):
    """Ends a call at the block whose inputs were wanted."""


def _in_order(model: nn.Module, blocks: Blocks, call: Call) -> list[tuple[str, nn.Module]]:
    names = [name for name, _ in blocks]
    for outer in names:
        inner = next((name for name in names if name.startswith(f"{outer}.")), None)
        if inner is not None:
            raise ValueError(f"block {inner} lies within block {outer}; name one of them")
    ran: list[str] = []
    with ExitStack() as stack:
        for name, module in blocks:
            handle = module.register_forward_pre_hook(lambda *_, name=name: ran.append(name))
            stack.callback(handle.remove)
        _call(model, call, next(model.parameters()).device)
    wrong = next((name for name in names if ran.count(name) != 1), None)
    if wrong is not None:
        raise ValueError(
            f"block {wrong} runs {ran.count(wrong)} times in a call of {type(model).__name__}; "
            "blocks must run once, so name others"
        )
    modules = dict(blocks)
    return [(name, modules[name]) for name in ran]


def _call(model: nn.Module, call: Call, device: torch.device) -> None:
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (call.args, call.kwargs))
    with torch.no_grad():
        model(*args, **kwargs)


def _signature(call: Call) -> str:
    """Containers, plain values, and shapes: what a model's Python code may branch on."""

    def describe(leaf: Any) -> Any:
        return (leaf.dtype, tuple(leaf.shape)) if isinstance(leaf, Tensor) else leaf

    return repr(map_leaves(describe, (call.args, call.kwargs)))


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, _VALUES) else f"a {type(value).__name__}"


def _listed_blocks(modules: Mapping[str, nn.Module]) -> list[str]:
    """One pattern for each outermost list of modules in which there are linear layers."""
    lists = [
        name
        for name, module in modules.items()
        if isinstance(module, nn.ModuleList)
        and all(any(isinstance(m, nn.Linear) for m in item.modules()) for item in module)
    ]
    return [
        f"{name}.*"
        for name in lists
        if not any(name.startswith(f"{outer}.") for outer in lists) and len(modules[name])  # type: ignore[arg-type]
    ]


def _matches(name: str, pattern: str) -> bool:
    parts, globs = name.split("."), pattern.split(".")
    return len(parts) == len(globs) and all(map(fnmatchcase, parts, globs))
