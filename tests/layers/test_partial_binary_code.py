"""Partial binary codes decode to the same bits, are as large as counted, and are checked."""

import pytest
import torch

from dit_qat.layers.partial_binary_code import (
    HIGH_GRID,
    PartialBinaryCode,
    PartialBlock,
    decode_partial_block,
)
from dit_qat.primitives.integer import encode, fit_scales


def parts(n: int = 16, widths: tuple[int, ...] = (128, 128, 40)):  # type: ignore[no-untyped-def]
    make = torch.Generator().manual_seed(0)
    W = torch.randn(n, sum(widths), generator=make)
    scales = fit_scales(W, HIGH_GRID)
    found = []
    for w in W.split(widths, 1):
        low = torch.rand(w.shape, generator=make) < 0.9
        found.append(
            PartialBlock(
                low,
                (w > 0) & low,
                encode(w, HIGH_GRID, scales, torch.arange(w.shape[1])) * ~low,
                torch.randn(n, 2, generator=make).half(),
            )
        )
    return found, scales


def test_storing_and_restoring_changes_no_bit() -> None:
    blocks, scales = parts()
    code = PartialBinaryCode.assemble(128, blocks, scales)
    weight = torch.cat([decode_partial_block(block, scales) for block in blocks], 1)
    assert torch.equal(code.decode(), weight)
    again = PartialBinaryCode.restore(code.settings(), code.tensors())
    assert torch.equal(again.decode(), weight)
    row, column = 3, 130
    mean, scale = blocks[1].rows[row].float()
    level = mean + scale if blocks[1].plus[row, 2] else mean - scale
    assert not blocks[1].low[row, 2] or weight[row, column] == level


def test_bits_are_the_honest_count() -> None:
    blocks, scales = parts(256, (128,) * 8)
    code = PartialBinaryCode.assemble(128, blocks, scales)
    assert code.nominal_bits == pytest.approx(1.7, abs=0.02)
    assert code.effective_bits == pytest.approx(code.nominal_bits + 1 + 0.25 + 24 / 1024, abs=1e-3)


@pytest.mark.parametrize("name", ["low", "signs", "codes", "rows", "scale", "zero"])
def test_damage_is_refused(name: str) -> None:
    code = PartialBinaryCode.assemble(128, *parts())
    short = code.tensors() | {name: code.tensors()[name][:-1]}
    with pytest.raises(ValueError, match=name):
        PartialBinaryCode.restore(code.settings(), short)
    with pytest.raises(ValueError, match="partial_binary"):
        PartialBinaryCode.restore(code.settings() | {"block_size": 0}, code.tensors())
