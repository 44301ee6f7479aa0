"""Bytes of every type against the dequantizers of the package gguf, and how types are chosen."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dit_qat.llm.gguf.block_types import type_for
from dit_qat.llm.gguf.lattice import Lattice

gguf = pytest.importorskip("gguf")


def make(low: int, high: int, group: int, width: int = 512, offset: bool = False) -> Lattice:
    """Random codes of which every group has the lowest and the highest; scales of either sign."""
    draw = torch.Generator().manual_seed(low + 31 * high)
    codes = torch.randint(low, high + 1, (5, width), generator=draw).short()
    codes.view(5, -1, min(group, width))[..., :2] = torch.tensor([low, high]).short()
    scale = torch.randn(5, width // group, generator=draw).half().repeat_interleave(group // 32, 1)
    return Lattice(codes, scale, scale.flip(0) if offset else None)


def values(lattice: Lattice) -> Tensor:
    scale, offset = (
        None if part is None else part.float().repeat_interleave(32, 1) for part in lattice[1:]
    )
    assert scale is not None
    product = lattice.codes.float() * scale
    return product if offset is None else product + offset


@pytest.mark.parametrize(
    ("lattice", "name"),
    [
        (make(-1, 1, 256), "TQ2_0"),
        (make(-1, 1, 512), "TQ2_0"),
        (make(-1, 1, 128), "Q4_0"),
        (make(0, 3, 256), "Q2_K"),
        (make(-3, 0, 256), "Q2_K"),
        (make(-4, 3, 256), "Q3_K"),
        (make(-8, 7, 32), "Q4_0"),
        (make(-8, 7, 32, width=96), "Q4_0"),
        (make(-15, 0, 256), "Q4_K"),
        (make(0, 15, 256), "Q4_K"),
        (make(-16, 15, 64), "Q5_0"),
        (make(-128, 127, 32), "Q8_0"),
        (make(0, 15, 32, offset=True), "Q4_1"),
    ],
)
def test_the_smallest_exact_type_reads_back_bit_for_bit(lattice: Lattice, name: str) -> None:
    kind = type_for(lattice)
    assert kind.name == name
    packed = kind.packed(lattice)
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(torch.from_numpy(found), values(lattice))


def test_the_other_ternary_type() -> None:
    lattice = make(-1, 1, 256)
    kind = type_for(lattice, "tq1_0")
    packed = kind.packed(lattice)
    assert packed.shape == (5, 2 * 54)
    found = gguf.quants.dequantize(packed.numpy(), gguf.GGMLQuantizationType.TQ1_0)
    assert torch.equal(torch.from_numpy(found), values(lattice))


def test_blocks_are_those_that_the_package_writes() -> None:
    """Where a type's own rounding is free of loss, it makes the same bytes."""
    lattice = make(-1, 1, 256)
    lattice = lattice._replace(scale=lattice.scale.abs())
    for name in ("tq1_0", "tq2_0"):
        kind: Any = type_for(lattice, name)  # type: ignore[arg-type]
        theirs = gguf.quants.quantize(values(lattice).numpy(), gguf.GGMLQuantizationType[kind.name])
        assert torch.equal(kind.packed(lattice), torch.from_numpy(theirs))


@pytest.mark.parametrize(
    ("lattice", "message"),
    [
        (make(-200, 55, 32), r"Q8_0 holds its codes from -200 to 55 with their scales"),
        (make(-1, 15, 32, offset=True), "from -1 to 15 with their scales and offsets"),
    ],
)
def test_codes_that_no_type_holds(lattice: Lattice, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        type_for(lattice)
