"""The weight of a quantized layer as whole numbers times scales, as GGUF's types hold weights."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dit_qat.layers import CodedLinear, IntLinear
from dit_qat.layers.mixed_code import MixedCode
from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.ternary_code import TernaryCode
from dit_qat.primitives.integer import unpack_codes
from dit_qat.primitives.packing import unpack_signs

__all__ = ["BLOCK", "Lattice", "lattice_of"]

BLOCK = 32
"""Columns of the smallest block that any type of GGUF has."""


class Lattice(NamedTuple):
    """A weight ``scale * codes + offset``, exactly as its layer decodes it.

    Attributes:
        codes: (out, in) int16, columns in their original order.
        scale: (out, in / 32) float16; of either sign.
        offset: (out, in / 32) float16; None: 0.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None

    def take_rows(self, order: Tensor) -> "Lattice":
        """The lattice of ``weight[order]``."""
        offset = None if self.offset is None else self.offset[order]
        return Lattice(self.codes[order], self.scale[order], offset)


@torch.no_grad()
def lattice_of(layer: nn.Module) -> Lattice:
    """Take a quantized layer apart.

    Raises:
        ValueError: with the reason, if its weight is none, or its scales change within 32 columns.
    """
    reader = _LAYERS.get(type(layer))
    if reader is None:
        raise ValueError(f"a {type(layer).__name__} has no whole codes")
    return reader(layer)


def _of_integers(layer: IntLinear) -> Lattice:
    config, width = layer.config, layer.in_features
    if config.activation is not None:
        raise ValueError("it rounds its inputs to integers, which GGUF does not say")
    if config.rank:
        raise ValueError(f"it has a low-rank branch (rank {config.rank}) beside its codes")
    if config.steps:
        kinds = ", ".join(step.kind for step in config.steps)
        raise ValueError(
            f"its inputs pass a transform first ({kinds}), which GGUF has no place for"
        )
    codes = unpack_codes(layer.codes, config.grid, width).short()
    size = width // layer.scale.shape[1]
    if layer.zero is not None:
        codes = codes - layer.zero.short().repeat_interleave(size, 1)
    return Lattice(codes.cpu(), _by_block(layer.scale.repeat_interleave(size, 1)))


def _of_code(layer: CodedLinear) -> Lattice:
    code: Any = layer.code
    reader = _CODES.get(type(code))
    if reader is None:
        raise ValueError(
            f"its code {code.name!r} (signs, bitmaps, masks) is no whole numbers times a scale"
        )
    return reader(code)


def _of_ternary(code: TernaryCode) -> Lattice:
    if bool((code.offset != 0).any()):
        raise ValueError(
            "its ternary code is asymmetric (levels offset - scale, offset, offset + scale), and "
            "the ternary types have no offset"
        )
    scale = _columns(code.scale, code)
    if code.columns is not None:
        scale = scale[:, code.columns.argsort()]
    return Lattice(_integers(code), _by_block(scale))


def _of_mixed(code: MixedCode) -> Lattice:
    parts = _by_block(_columns(code.scale, code)), _by_block(_columns(code.offset, code))
    return Lattice(_integers(code), *parts)


def _of_planes(code: PlaneCode) -> Lattice:
    if len(code.planes) > 1 or code.column_scale is not None:
        raise ValueError(
            f"its code {code.name!r} is {len(code.planes)} sign planes with scales of their own, "
            "or scales of columns, and no whole numbers times a scale"
        )
    signs = unpack_signs(code.planes[0], code.in_features)
    return Lattice(signs.short().cpu(), _by_block(_columns(code.row_scale[..., 0], code)))


def _integers(code: TernaryCode | MixedCode) -> Tensor:
    """What a code multiplies its scales by (out, in), in the original order of columns."""
    scale, offset = torch.ones_like(code.scale), torch.zeros_like(code.offset)
    return replace(code, scale=scale, offset=offset).decode().short().cpu()


def _columns(values: Tensor, code: TernaryCode | MixedCode | PlaneCode) -> Tensor:
    """Values of groups (out, groups) as those of stored columns (out, in)."""
    groups = torch.arange(code.in_features, device=values.device) // code.group_size
    return values[:, groups]


def _by_block(values: Tensor) -> Tensor:
    """Values of columns (out, in) as those of blocks of 32 (out, in / 32)."""
    rows, width = values.shape
    if width % BLOCK:
        raise ValueError(f"its {width} columns are no multiple of {BLOCK}")
    blocks = values.view(rows, -1, BLOCK)
    if bool((blocks != blocks[..., :1]).any()):
        raise ValueError(f"its scales change within {BLOCK} neighbouring columns")
    return blocks[..., 0].contiguous().cpu()


_LAYERS: Mapping[type[nn.Module], Callable[[Any], Lattice]] = {
    IntLinear: _of_integers,
    CodedLinear: _of_code,
}
_CODES: Mapping[type, Callable[[Any], Lattice]] = {
    TernaryCode: _of_ternary,
    MixedCode: _of_mixed,
    PlaneCode: _of_planes,
}
