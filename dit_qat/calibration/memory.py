"""What a run of the block driver will take at most, said before it starts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import nn

from dit_qat.calibration.blocks import BlockChain
from dit_qat.calibration.calls import CallStore
from dit_qat.calibration.chain import Chain
from dit_qat.calibration.statistics import Needs

__all__ = ["MemoryPlan", "plan_memory"]


@dataclass(frozen=True)
class MemoryPlan:
    """Peak bytes by what they are for; an estimate from shapes.

    Attributes:
        calls: Recorded calls.
        states: What is known of all calls between two blocks.
        statistics: Of the linear layers of one block.
        weights: Of the float model and, at most as much as their float forms, of quantized layers
            beside it; who keeps no float layers needs less.
        probes: Calls on which errors are measured: inputs and float outputs of one block.
    """

    calls: int
    states: int
    statistics: int
    weights: int
    probes: int

    @property
    def total(self) -> int:
        """Sum of all parts."""
        return self.calls + self.states + self.statistics + self.weights + self.probes

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
    linears = sum(linear.weight.nbytes for linear in chain.watch.values())
    return MemoryPlan(
        calls=0 if on_disk else store.bytes,
        states=(copies + 1) * widest if on_disk else copies * (max(states) + widest),
        statistics=max(statistics, default=0),
        weights=_weights(chain.model) + linears,
        probes=2 * min(needs.probe_calls, len(store)) * widest,
    )


def _weights(model: nn.Module) -> int:
    return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.3g} {unit}" if unit != "bytes" else f"{count} bytes"
        count /= 1000  # type: ignore[assignment]
    return f"{count:.3g} GB"
