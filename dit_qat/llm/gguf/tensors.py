"""Which tensors a GGUF file gets, in which types, and what must be read back from each."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from dit_qat.export.packers import quantized_layers
from dit_qat.llm.gguf.architecture import (
    GGUFArchitecture,
    TensorNames,
    rope_factors,
    row_order,
)
from dit_qat.llm.gguf.block_types import Ternary, type_for
from dit_qat.llm.gguf.lattice import lattice_of
from dit_qat.llm.models.roles import Roles, roles_of

__all__ = ["FloatType", "Options", "Stored", "plan_tensors"]

FloatType = Literal["float32", "bfloat16", "float16"]

_FLOATS: Mapping[FloatType, str] = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_CURES = (
    "Quantize it to codes that one holds (rtn or gptq with bits=2, symmetric=true and "
    "group_size=256 for the ternary types; integers in groups of 32 or more for the others), "
    "export a folder (--format folder), or have such layers written as floats (--dequantize)"
)


@dataclass(frozen=True)
class Options:
    """How tensors are stored; see :func:`~dit_qat.llm.gguf.write_gguf`."""

    dtype: FloatType = "float16"
    ternary: Ternary = "tq2_0"
    dequantize: bool = False


@dataclass(frozen=True)
class Stored:
    """A tensor of the file.

    Attributes:
        name: As GGUF has it.
        type: As GGUF has it, such as TQ2_0 or F16.
        shape: As torch has it.
        quantized: Whether it is the weight of a quantized layer.
        packed: Makes its bytes (..., bytes of a row) uint8.
        values: Makes what they stand for, float32.
    """

    name: str
    type: str
    shape: tuple[int, ...]
    quantized: bool
    packed: Callable[[], Tensor]
    values: Callable[[], Tensor]


def plan_tensors(model: nn.Module, found: GGUFArchitecture, options: Options) -> list[Stored]:
    """Choose a type for every tensor; nothing is kept of what was looked at.

    Raises:
        ValueError: for a layer that no type holds, naming it, its code and the reason; for a
            tensor that has no place in the architecture, or that the float type does not reach.
    """
    return list(_Plan(model, found, options).tensors())


class _Plan:
    def __init__(self, model: nn.Module, found: GGUFArchitecture, options: Options) -> None:
        self.model, self.found, self.options = model, found, options
        self.roles: Roles = roles_of(model)
        self._names = TensorNames(model, found)
        self._linears = set(self.roles.linears)

    def tensors(self) -> Iterator[Stored]:
        factors = rope_factors(self.model)
        if factors is not None:
            yield self._float("rope_freqs.weight", "F32", partial(_numbers, factors))
        for name, parameter in self.model.named_parameters():  # what is tied comes once
            module, _, leaf = name.rpartition(".")
            yield self._plain(module, leaf, partial(_numbers, parameter))
        refused: dict[str, str] = {}
        layers: Mapping[str, Any] = quantized_layers(self.model)
        for name, layer in layers.items():
            try:
                yield self._quantized(name, layer)
            except ValueError as error:
                refused[name] = str(error)
            if layer.bias is not None:
                yield self._plain(name, "bias", partial(_numbers, layer.bias))
        if refused:
            raise _unheld(refused, len(self._linears))

    def _quantized(self, name: str, layer: Any) -> Stored:
        """A quantized weight, in the smallest type that holds it."""
        try:
            lattice = lattice_of(layer)
            kind = type_for(lattice, self.options.ternary)
        except ValueError:
            if not self.options.dequantize:
                raise
            return self._plain(name, "weight", lambda: _decoded(layer), quantized=True)
        order = self._order(name)

        def values() -> Tensor:
            return _ordered(_decoded(layer), order)

        def packed() -> Tensor:
            rows = lattice_of(layer)
            return kind.packed(rows if order is None else rows.take_rows(order))

        shape = tuple(lattice.codes.shape)
        return Stored(self._names(name, "weight"), kind.name, shape, True, packed, values)

    def _plain(
        self, module: str, leaf: str, tensor: Callable[[], Tensor], quantized: bool = False
    ) -> Stored:
        """A tensor that stays, or becomes, float."""
        order = self._order(module)
        role = self.roles.role(module) if module in self._linears else None
        if leaf == "bias" and role is not None and role not in self.found.biases:
            raise ValueError(
                f"{module} has a bias, which llama.cpp does not read there in {self.found.name} "
                "models; quantize with a method that adds none, or export a folder"
            )

        def values() -> Tensor:
            return _ordered(tensor(), order)

        flat = tensor().ndim == 1  # norms and biases are float32 in all readers
        kind = "F32" if flat else _FLOATS[self.options.dtype]
        return self._float(self._names(module, leaf), kind, values, quantized)

    def _float(
        self, name: str, kind: str, values: Callable[[], Tensor], quantized: bool = False
    ) -> Stored:
        dtype = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[kind]

        def rounded() -> Tensor:
            return values().to(dtype).contiguous()

        first = rounded()
        if not bool(first.isfinite().all()):
            raise ValueError(f"{name} holds numbers beyond {kind}; use another --dtype")
        shape = tuple(first.shape)
        return Stored(
            name,
            kind,
            shape,
            quantized,
            lambda: rounded().view(torch.uint8),
            lambda: rounded().float(),
        )

    def _order(self, name: str) -> Tensor | None:
        if name not in self._linears:
            return None
        return row_order(name, self.roles, self.model, self.found)


def _numbers(tensor: Tensor) -> Tensor:
    return tensor.detach().float().cpu()


def _decoded(layer: Any) -> Tensor:
    return _numbers(layer.to_float().weight)


def _ordered(tensor: Tensor, order: Tensor | None) -> Tensor:
    return tensor if order is None else tensor[order]


def _unheld(refused: Mapping[str, str], count: int) -> ValueError:
    name, reason = next(iter(refused.items()))
    return ValueError(
        f"GGUF holds {len(refused)} of {count} quantized layers not exactly; {name}: {reason}. "
        f"{_CURES}"
    )
