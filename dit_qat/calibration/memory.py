"""What a run of the block driver will take at most, said before it starts."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dit_qat.calibration.blocks import BlockChain
from dit_qat.calibration.calls import CallStore
from dit_qat.calibration.chain import Chain
from dit_qat.calibration.statistics import Needs
from dit_qat.primitives.compensation import compensation_bytes

__all__ = ["MemoryPlan", "plan_memory"]

_COPIES = 12  # of a weight in float32, while its scales, rotation or branch are looked for
_CROSSING = 3  # matrices of a layer's inputs by its inputs, while a cross moment is worked with
_CODED = 10  # bits of a quantized weight with its side information, at most
_READING = 10  # bytes per number while statistics of it are taken: float32, and which are finite


@dataclass(frozen=True)
class MemoryPlan:
    """Peak bytes by what they are for, host and device together; an estimate.

    It holds for the calls through the blocks and methods that work layer by layer; what a method
    does before or after (gradients, a search over the whole model) is its own.

    Attributes:
        calls: Recorded calls.
        states: What is known of all calls between two blocks.
        statistics: Of the linear layers of one block.
        weights: Of the float model and, at most as much as their float forms, of quantized layers
            beside it; who keeps no float layers needs less. Of a model whose blocks are on the meta
            device until they run: what is in memory then, and quantized layers at 10 bits.
        probes: Calls on which errors are measured: inputs and float outputs of one block.
        work: What comes and goes: one call on its way through the model (counted in a call of each
            shape), or statistics being taken, or a method at work on its largest layer.
    """

    calls: int
    states: int
    statistics: int
    weights: int
    probes: int
    work: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return sum(vars(self).values())

    def __str__(self) -> str:
        parts = ", ".join(f"{name} {_size(value)}" for name, value in vars(self).items())
        return f"{_size(self.total)} at most ({parts})"

    def check(self, limit_bytes: int | None) -> None:
        """Refuse a run above a limit.

        Raises:
            ValueError: with what takes how much, and what can be done.
        """
        if limit_bytes is not None and self.total > limit_bytes:
            raise ValueError(
                f"calibration would take {self}, above the limit of {_size(limit_bytes)}: record "
                "fewer calls or smaller batches, keep the calls in a folder on disk, keep fewer "
                "tokens, or raise the limit"
            )


def plan_memory(
    chain: BlockChain,
    shapes: Sequence[Chain],
    store: CallStore,
    groups: Sequence[Mapping[str, Sequence[str]]],
    needs: Needs,
    two_paths: bool,
) -> MemoryPlan:
    """Estimate the peak of :func:`~dit_qat.calibration.driver.drive`.

    Args:
        chain: Of the model.
        shapes: The chain of every call.
        store: The calls.
        groups: By block: the linear whose statistics are gathered, and those that share them.
        needs: What is gathered.
        two_paths: Whether calls are held behind float and behind quantized blocks.

    With cross moments, what the linears of a block receive on the float path is held for one call.
    """
    count = len(chain.blocks)
    sizes = {shape: [shape.bytes_at(k) for k in range(count)] for shape in set(shapes)}
    states = [sum(sizes[shape][k] for shape in shapes) for k in range(count)]
    widest = max(max(at) for at in sizes.values())
    on_disk = store.folder is not None
    copies = 2 if two_paths else 1
    statistics = [
        sum(needs.bytes(chain.watch[name].in_features, len(store)) for name in leaders)
        for leaders in groups
    ]
    return MemoryPlan(
        calls=0 if on_disk else store.bytes,
        states=(copies + 1) * widest if on_disk else copies * (max(states) + widest),
        statistics=max(statistics, default=0),
        weights=_weights(chain),
        probes=_probes(chain.model, min(needs.probe_calls, len(store)) * widest),
        work=max(_running(chain, set(shapes), groups, needs), _solving(chain, needs)),
    )


def _probes(model: nn.Module, inputs: int) -> int:
    """Inputs in the model's dtype, and outputs in float32."""
    return inputs + inputs * 4 // next(model.parameters()).element_size()


def _running(
    chain: BlockChain,
    shapes: Collection[Chain],
    groups: Sequence[Mapping[str, Sequence[str]]],
    needs: Needs,
) -> int:
    size = next(chain.model.parameters()).element_size()

    def reading(shape: Chain) -> int:
        numbers = (shape.rows[name] * linear.in_features for name, linear in chain.watch.items())
        return _READING * max(numbers)

    def inputs(shape: Chain, leaders: Iterable[str]) -> int:
        return size * sum(shape.rows[name] * chain.watch[name].in_features for name in leaders)

    def held(shape: Chain) -> int:
        return max(inputs(shape, leaders) for leaders in groups) if needs.cross_moment else 0

    return max(shape.work + reading(shape) + held(shape) for shape in shapes)


def _solving(chain: BlockChain, needs: Needs) -> int:
    sizes = {(linear.out_features, linear.in_features) for linear in chain.watch.values()}
    solver = max(compensation_bytes(*size) for size in sizes) if needs.second_moment else 0
    if needs.cross_moment:
        solver += 4 * _CROSSING * max(width * width for _, width in sizes)
    return solver + 4 * _COPIES * max(rows * width for rows, width in sizes)


def _weights(chain: BlockChain) -> int:
    """Of the float model as it stands behind a call, and of quantized layers beside it."""
    tensors = [*chain.model.parameters(), *chain.model.buffers()]
    held = sum(tensor.nbytes for tensor in tensors if not tensor.is_meta)
    watched = [linear.weight for linear in chain.watch.values()]
    if not any(tensor.is_meta for tensor in tensors):
        return held + sum(weight.nbytes for weight in watched)
    # Behind a call, the block that ran last is in memory; a larger one takes its place.
    sizes = [sum(p.nbytes for p in block.parameters()) for _, block in chain.blocks]
    coded = sum(weight.numel() for weight in watched) * _CODED // 8
    return held + max(sizes) - sizes[-1] + coded


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
