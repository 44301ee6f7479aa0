"""Bytes, measured: of real files on disk and of real tensors in memory, by layer and by part."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from dit_qat.export.inspect import PER_IMAGE
from dit_qat.export.manifest import CONFIG_FILE, TENSOR_FILE
from dit_qat.export.tensor_file import open_tensors
from dit_qat.layers import CodedLinear, InputTransform, IntLinear, PackedLinear, QuantLinear

__all__ = ["Disk", "Size", "Sizes", "TensorSize", "measure", "packed_disk"]

_PARTS = {
    "codes": "ternary codes",
    "weight": "float latents of ternary weights",
    "scale": "scales",
    "zero": "zero points",
    "transform": "vectors of input transforms",
    "low_rank_up": "low-rank branches",
    "low_rank_down": "low-rank branches",
    "bias": "biases",
    "row_sums": "sums over rows of codes",
}
"""Of a quantized layer's tensors."""

_QUANTIZED = (PackedLinear, QuantLinear, IntLinear, CodedLinear)

_SIDE = {"scale", "zero", "transform", "low_rank_up", "low_rank_down"}
_OF_THE_WEIGHT = {"codes", "weight", *_SIDE}
_DERIVED = {"row_sums", *_SIDE}  # which the float model has not


@dataclass(frozen=True)
class Disk:
    """What a model takes on disk.

    Attributes:
        tensors: Bytes by tensor name.
        other: Bytes of what is no tensor of the model, by what it is.
    """

    tensors: Mapping[str, int]
    other: Mapping[str, int]


class TensorSize(NamedTuple):
    """One tensor of a model.

    ``disk`` is zero where the file does not hold it; ``numbers`` counts codes, not their bytes;
    ``quantized`` is the layer that it belongs to; ``leaf`` is its name there, ``transform`` for
    all vectors of an input's transform.
    """

    layer: str
    leaf: str
    quantized: bool
    part: str
    numbers: int
    disk: int
    resident: int


class Size(NamedTuple):
    """The sum over some tensors."""

    numbers: int
    disk: int
    resident: int


@dataclass(frozen=True)
class Sizes:
    """All tensors of a model, and what else the files hold.

    Attributes:
        tensors: In the order of the model.
        other: Bytes on disk that are no tensor of the model, by what they are.
    """

    tensors: tuple[TensorSize, ...]
    other: Mapping[str, int]

    @property
    def disk_bytes(self) -> int:
        """Of all files."""
        return sum(tensor.disk for tensor in self.tensors) + sum(self.other.values())

    @property
    def resident_bytes(self) -> int:
        """Of all tensors in memory."""
        return sum(tensor.resident for tensor in self.tensors)

    @property
    def float_numbers(self) -> int:
        """Parameters of the float model of the same architecture."""
        return sum(t.numbers for t in self.tensors if not (t.quantized and t.leaf in _DERIVED))

    @property
    def by_part(self) -> dict[str, Size]:
        """Sums by part, the largest on disk first."""
        found = _sums(self.tensors, lambda tensor: tensor.part)
        return dict(sorted(found.items(), key=lambda item: -item[1].disk))

    @property
    def by_layer(self) -> dict[str, Size]:
        """Sums by the module that holds the tensors."""
        return _sums(self.tensors, lambda tensor: tensor.layer)

    @property
    def effective_bits(self) -> dict[str, tuple[float, float]]:
        """Codes, scales and branch in bits per weight, by packed layer: on disk and resident."""
        return self._effective_bits(lambda tensor: tensor.layer)

    @property
    def mean_effective_bits(self) -> tuple[float, float] | None:
        """The same over all packed layers; None without any."""
        return self._effective_bits(lambda tensor: "").get("")

    def as_dict(self) -> dict[str, Any]:
        """Plain types."""
        disk, resident = self.disk_bytes, self.resident_bytes
        numbers = sum(tensor.numbers for tensor in self.tensors)
        parts = {
            part: size._asdict()
            | {
                "numbers_share": size.numbers / numbers,
                "disk_share": size.disk / disk if disk else None,
                "resident_share": size.resident / resident,
            }
            for part, size in self.by_part.items()
        }
        mean = self.mean_effective_bits
        return {
            "disk_bytes": disk,
            "resident_bytes": resident,
            "float32_bytes": 4 * self.float_numbers,
            "bfloat16_bytes": 2 * self.float_numbers,
            "effective_weight_bits_disk": None if mean is None else mean[0],
            "effective_weight_bits_resident": None if mean is None else mean[1],
            "parts": parts,
            "other_on_disk": dict(self.other),
            "layers": {name: size._asdict() for name, size in self.by_layer.items()},
        }

    def _effective_bits(self, key: Callable[[TensorSize], str]) -> dict[str, tuple[float, float]]:
        packed = {tensor.layer for tensor in self.tensors if tensor.leaf == "codes"}
        own = [t for t in self.tensors if t.layer in packed and t.leaf in _OF_THE_WEIGHT]
        weights, sums = _sums((t for t in own if t.leaf == "codes"), key), _sums(own, key)
        return {
            name: (8 * sums[name].disk / size.numbers, 8 * sums[name].resident / size.numbers)
            for name, size in weights.items()
        }


def measure(model: nn.Module, disk: Disk) -> Sizes:
    """Measure every parameter and buffer of a model.

    Args:
        model: Float, quantized or packed. What it makes at its first call (sums over codes) counts
            once it is there.
        disk: What its files hold.
    """
    return Sizes(tuple(_measured(model, disk.tensors)), disk.other)


def packed_disk(folder: Path) -> Disk:
    """What the files of a packed folder hold.

    Raises:
        OSError: if a file is missing.
        ValueError: if the tensor file is damaged.
    """
    path = folder / TENSOR_FILE
    with open_tensors(path) as file:
        tensors = {name: place.end - place.begin for name, place in file.places.items()}
    header = path.stat().st_size - sum(tensors.values())
    return Disk(
        tensors,
        {
            f"header of {TENSOR_FILE}": header,
            CONFIG_FILE: (folder / CONFIG_FILE).stat().st_size,
        },
    )


def _measured(model: nn.Module, disk: Mapping[str, int]) -> Iterator[TensorSize]:
    seen: set[int] = set()
    mixed = _mixed(model)
    for layer, module in model.named_modules():
        if isinstance(module, InputTransform):
            continue  # counted with the layer, each of which has its own in the file
        quantized = isinstance(module, _QUANTIZED)
        for leaf, inner, tensor in _own_tensors(module):
            name = f"{layer}.{inner}" if layer else inner
            if id(tensor) in seen and name not in disk:
                continue  # a head tied to the embedding
            seen.add(id(tensor))
            numbers = tensor.numel()
            if leaf == "codes" and isinstance(module, PackedLinear | IntLinear):
                numbers = module.out_features * module.in_features
            elif leaf == "codes" and isinstance(module, CodedLinear):
                first = inner == module.code_names[0]  # of several tensors that are one code
                numbers = module.out_features * module.in_features if first else 0
            part = _of_layer(layer, leaf, module) if quantized else _of_float(layer or leaf, mixed)
            on_disk = disk.get(name, 0)
            yield TensorSize(layer, leaf, quantized, part, numbers, on_disk, tensor.nbytes)


def _own_tensors(module: nn.Module) -> Iterator[tuple[str, str, Tensor]]:
    """Tensors with the name of their part and that within the layer."""
    for name, tensor in chain(
        module.named_parameters(recurse=False), module.named_buffers(recurse=False)
    ):
        of_code = isinstance(module, CodedLinear) and name in module.code_names
        yield "codes" if of_code else name, name, tensor
    if isinstance(module, IntLinear) and module.transform is not None:
        for name, tensor in module.transform.named_buffers(remove_duplicate=False):
            yield "transform", f"transform.{name}", tensor


def _mixed(model: nn.Module) -> set[str]:
    """Modules that hold quantized layers, and what is float beside them."""
    names = (name.split(".") for name, m in model.named_modules() if isinstance(m, _QUANTIZED))
    return {".".join(name[:depth]) for name in names for depth in range(1, len(name))}


def _of_float(layer: str, mixed: set[str]) -> str:
    """The outermost module that is all float, the same one of every block together."""
    words = layer.split(".")
    depth = 1
    while depth < len(words) and ".".join(words[:depth]) in mixed:
        depth += 1
    return "float: " + ".".join("*" if word.isdecimal() else word for word in words[:depth])


def _of_layer(layer: str, leaf: str, quantized: nn.Module) -> str:
    per_image = any(fnmatchcase(layer, glob) for glob in PER_IMAGE)
    part = _PARTS[leaf]
    if leaf == "codes" and isinstance(quantized, IntLinear):
        part = f"{quantized.config.grid.bits}-bit codes"
    elif leaf == "codes" and isinstance(quantized, CodedLinear):
        part = f"{quantized.kind.name} codes"
    return part + (" (adaLN)" if per_image else "")


def _sums(tensors: Iterable[TensorSize], key: Callable[[TensorSize], str]) -> dict[str, Size]:
    found: dict[str, Size] = {}
    for tensor in tensors:
        old = found.get(key(tensor), Size(0, 0, 0))
        new = (tensor.numbers, tensor.disk, tensor.resident)
        found[key(tensor)] = Size(*map(sum, zip(old, new, strict=True)))
    return found
