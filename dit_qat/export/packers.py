"""How the quantized layers of a model become tensors of a file, by their class."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_qat.export.coded_entry import CodedEntry
from dit_qat.export.entry import ModuleEntry
from dit_qat.export.int_entry import IntEntry
from dit_qat.export.layer_entry import LayerEntry, Storage
from dit_qat.layers import CodedLinear, IntLinear, PackedLinear, QuantLinear
from dit_qat.layers.linear import BranchDtype
from dit_qat.primitives.integer import unpack_codes
from dit_qat.primitives.packing import count_ternary, pack_base3, unpack_ternary

__all__ = ["PACKERS", "PackOptions", "Packer", "quantized_layers"]

_ROWS = 1 << 20  # codes that are unpacked at a time


class PackOptions(NamedTuple):
    """What a writer was asked for; see :func:`~dit_qat.export.write_packed`."""

    branch_dtype: BranchDtype | None
    storage: Storage


@dataclass(frozen=True)
class Packer:
    """What is to be known of a class of quantized layers.

    Attributes:
        packed: The class that a reader makes of it.
        entry: From a layer to what ``config.json`` says of it.
        tensors: From a layer to its tensors as the file holds them, by their names in the layer.
    """

    packed: type[nn.Module]
    entry: Callable[[Any, PackOptions], ModuleEntry]
    tensors: Callable[[Any, PackOptions], Iterator[tuple[str, Tensor]]]


def quantized_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that have a packer, by name."""
    return {name: m for name, m in model.named_modules() if type(m) in PACKERS}


def _ternary_entry(layer: QuantLinear, options: PackOptions) -> ModuleEntry:
    return LayerEntry.of(PackedLinear.like(layer, options.branch_dtype), options.storage)


def _ternary_tensors(layer: QuantLinear, options: PackOptions) -> Iterator[tuple[str, Tensor]]:
    packed = PackedLinear.from_quantized(layer, options.branch_dtype)
    counts = count_ternary(packed.codes, packed.in_features)
    if max(counts) == sum(counts):
        raise _constant(sum(counts), counts.index(max(counts)) - 1, "training or initialization")
    for leaf, tensor in packed.named_buffers():
        if leaf == "codes" and options.storage == "ternary_1.6":
            tensor = pack_base3(unpack_ternary(tensor, layer.in_features))
        yield leaf, tensor


def _int_entry(layer: IntLinear, options: PackOptions) -> ModuleEntry:
    entry = IntEntry.of(layer, options.branch_dtype)
    return IntEntry.from_json(entry.as_json())  # refuses what no reader would take


def _int_tensors(layer: IntLinear, options: PackOptions) -> Iterator[tuple[str, Tensor]]:
    entry = IntEntry.of(layer, options.branch_dtype)
    branch: torch.dtype = getattr(torch, entry.config.branch_dtype)
    _check_int_levels(layer)
    for leaf, tensor in layer.named_buffers(remove_duplicate=False):
        stored = tensor.detach().cpu()
        if leaf.startswith("low_rank"):
            stored = stored.to(branch)
        try:
            yield leaf, entry.resident(leaf, stored)
        except ValueError as error:
            raise ValueError(f"{leaf} {error}") from error


def _coded_entry(layer: CodedLinear, options: PackOptions) -> ModuleEntry:
    return CodedEntry.from_json(CodedEntry.of(layer).as_json())


def _coded_tensors(layer: CodedLinear, options: PackOptions) -> Iterator[tuple[str, Tensor]]:
    weight = layer.dequantized()  # refuses buffers that hold no such code
    if not weight.isfinite().all():
        raise ValueError("its code decodes to NaN or infinite weights; quantize it again")
    entry = CodedEntry.of(layer)
    for leaf, tensor in layer.named_buffers(recurse=False):
        stored = tensor.detach().cpu()
        try:
            yield leaf, entry.resident(leaf, stored)
        except ValueError as error:
            raise ValueError(f"{leaf} {error}") from error


def _check_int_levels(layer: IntLinear) -> None:
    first = None
    for rows in torch.split(layer.codes, max(1, _ROWS // layer.in_features)):
        codes = unpack_codes(rows, layer.config.grid, layer.in_features)
        first = codes[0, 0] if first is None else first
        if bool((codes != first).any()):
            return
    assert first is not None
    count = layer.in_features * layer.out_features
    raise _constant(count, int(first), "calibration or the float weight")


def _constant(count: int, level: int, culprit: str) -> ValueError:
    """A layer whose codes are all the same has lost its weight."""
    return ValueError(
        f"all {count} codes are {level}: {culprit} went wrong here; take another checkpoint, or "
        "leave the layer float by a rule with None"
    )


PACKERS: Mapping[type[nn.Module], Packer] = {
    QuantLinear: Packer(PackedLinear, _ternary_entry, _ternary_tensors),
    IntLinear: Packer(IntLinear, _int_entry, _int_tensors),
    CodedLinear: Packer(CodedLinear, _coded_entry, _coded_tensors),
}
