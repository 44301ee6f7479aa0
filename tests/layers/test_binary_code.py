"""Binary codes: what is stored decodes to the same bits, is as large as counted, and is checked."""

import pytest
import torch
from torch import Tensor

from dit_qat.layers.binary_code import BinaryBlock, BinaryCode, BinaryLayout, decode_block
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.weight_code import WEIGHT_CODES

LAYOUTS = [
    BinaryLayout(2, 1),
    BinaryLayout(2, 2),
    BinaryLayout(1, 1),
    BinaryLayout(4, 4),
    BinaryLayout(3, 1),
    BinaryLayout(2, 1, column_scales=True),
    BinaryLayout(2, 2, column_scales=True),
    BinaryLayout(2, 1, kept=4, of=8),
    BinaryLayout(3, 1, kept=5, of=8),
    BinaryLayout(2, 2, kept=6, of=8, column_scales=True),
    BinaryLayout(2, 1, kept=2, of=4),
]


def pattern(n: int, k: int, kept: int, of: int, make: torch.Generator) -> Tensor:
    order = torch.rand(n, k // of, of, generator=make).argsort(-1)
    return (order < kept).view(n, k)


def block(layout: BinaryLayout, n: int, k: int, salient: int, seed: int) -> BinaryBlock:
    make = torch.Generator().manual_seed(seed)
    columns = torch.zeros(k, dtype=torch.bool)
    columns[torch.randperm(k, generator=make)[:salient]] = True
    plain = torch.randint(layout.plain_groups, (n, k), generator=make)
    twice = torch.randint(layout.salient_groups, (n, k), generator=make)
    keep = None
    if layout.kept < layout.of:
        keep = pattern(n, k, layout.kept, layout.of, make)
    scales = None
    if layout.column_scales:
        scales = (
            torch.rand(k - salient, layout.plain_groups, generator=make).half(),
            torch.rand(salient, 2 * layout.salient_groups, generator=make).half(),
        )
    return BinaryBlock(
        columns,
        torch.where(columns, twice, plain).to(torch.uint8),
        torch.rand(n, k, generator=make) < 0.5,
        torch.rand(n, salient, generator=make) < 0.5,
        torch.randn(n, layout.row_values, generator=make).half(),
        scales,
        keep,
    )


def blocks(layout: BinaryLayout, n: int = 7) -> list[BinaryBlock]:
    """Two whole blocks, one without salient columns, and a short one."""
    return [
        block(layout, n, 128, 11, 0),
        block(layout, n, 128, 0, 1),
        block(layout, n, 40, 5, 2),
    ]


def slowly(layout: BinaryLayout, one: BinaryBlock) -> Tensor:
    """The definition, entry by entry."""
    n, k = one.group.shape
    rows, start = one.rows.float(), layout.plain_groups * layout.widths[0]
    weight, seen = torch.zeros(n, k), [0, 0]
    for j in range(k):
        part = int(one.salient[j])
        for i in range(n):
            g, width = int(one.group[i, j]), layout.widths[part]
            values = rows[i, part * start + g * width :][:width]
            planes = [one.first[i, j]]
            if part:
                planes.append(one.second[i, seen[1]])
            scales = values[1:]
            if one.columns is not None:
                own = one.columns[part][seen[part]].float()
                scales = values * own[g * (1 + part) :][: 1 + part]
            made = torch.tensor(0.0) if one.columns is not None else values[0]
            for scale, plane in zip(scales, planes, strict=True):
                made = made + (scale if plane else -scale)
            if one.keep is None or one.keep[i, j]:
                weight[i, j] = made
        seen[part] += 1
    return weight


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_decoding_is_the_definition(layout: BinaryLayout) -> None:
    one = block(layout, 5, 24, 5, 3)
    assert torch.equal(decode_block(layout, one), slowly(layout, one))


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_storing_and_restoring_changes_no_bit(layout: BinaryLayout) -> None:
    parts = blocks(layout)
    weight = torch.cat([decode_block(layout, part) for part in parts], 1)
    code = BinaryCode.assemble(layout, parts)
    assert torch.equal(code.decode(), weight)
    again = WEIGHT_CODES["binary"].restore(code.settings(), code.tensors())
    assert torch.equal(again.decode(), weight)
    assert again.tensors().keys() == code.tensors().keys()
    assert CodedLinear(code).bytes_stored == sum(t.nbytes for t in code.tensors().values())
    kept = weight.count_nonzero() if layout.kept < layout.of else weight.numel()
    assert code.nominal_bits == pytest.approx(layout.kept / layout.of * (1 + 16 / 296))
    assert int(kept) <= weight.numel() * layout.kept // layout.of


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_bits_are_counted_as_stored(layout: BinaryLayout) -> None:
    parts = [block(layout, 64, 128, 16, seed) for seed in range(2)]
    code = BinaryCode.assemble(layout, parts)
    assert code.effective_bits == pytest.approx(layout.bits(64, 256, 16 / 128), abs=0.03)


@pytest.mark.parametrize(
    ("layout", "published"),
    [
        (BinaryLayout(2, 1), 2.97),
        (BinaryLayout(2, 2), 3.34),
        (BinaryLayout(2, 1, column_scales=True), 2.60),
        (BinaryLayout(2, 2, column_scales=True), 2.85),
        (BinaryLayout(2, 1, kept=4, of=8), 2.80),
        (BinaryLayout(3, 1, kept=4, of=8), 3.55),
        (BinaryLayout(2, 1, kept=5, of=8), 2.93),
        (BinaryLayout(3, 1, kept=5, of=8), 3.81),
        (BinaryLayout(2, 1, kept=6, of=8), 3.07),
        (BinaryLayout(3, 1, kept=6, of=8), 4.07),
    ],
    ids=str,
)
def test_bits_of_a_large_layer_are_the_honest_count(layout: BinaryLayout, published: float) -> None:
    assert layout.bits(4096, 4096, 0.09) == pytest.approx(published, abs=0.012)


def test_size_of_llama_7b_is_the_published_one() -> None:
    """Gigabytes of the paper's table 6, from parameters of linears and fp16 embeddings."""
    linears, tables = 32 * (4 * 4096**2 + 3 * 4096 * 11008), 2 * 32000 * 4096
    for layout, gigabytes in [
        (BinaryLayout(2, 1), 2.93),
        (BinaryLayout(2, 2), 3.23),
        (BinaryLayout(2, 1, column_scales=True), 2.63),
        (BinaryLayout(2, 2, column_scales=True), 2.83),
    ]:
        bits = layout.bits(4096, 4096, 0.09)
        assert (bits * linears / 8 + 2 * tables) / 1e9 == pytest.approx(gigabytes, abs=0.012)


@pytest.mark.parametrize("kept", range(1, 9))
def test_every_pattern_survives(kept: int) -> None:
    layout = BinaryLayout(1, 1, kept=kept, of=8, block_size=8)
    masks = torch.tensor([[m >> j & 1 for j in range(8)] for m in range(256)], dtype=torch.bool)
    masks = masks[masks.sum(1) == kept]
    n = len(masks)
    rows = torch.ones(n, 5).half()
    part = BinaryBlock(
        torch.zeros(8, dtype=torch.bool),
        torch.zeros(n, 8, dtype=torch.uint8),
        masks,
        torch.zeros(n, 0, dtype=torch.bool),
        rows,
        keep=masks,
    )
    code = BinaryCode.assemble(layout, [part])
    assert torch.equal(code.decode() != 0, masks)


def damaged(change: str) -> tuple[dict, dict]:  # type: ignore[type-arg]
    layout = BinaryLayout(3, 1, kept=5, of=8)
    code = BinaryCode.assemble(layout, blocks(layout))
    settings, tensors = code.settings(), {k: v.clone() for k, v in code.tensors().items()}
    if change == "pattern":
        tensors["keep"].fill_(255)
    elif change == "group":
        tensors["groups"].fill_(255)
    elif change == "finite":
        tensors["rows"][0, 0, 0] = torch.inf
    elif change == "salient":
        tensors["salient"][0] ^= 1
    elif change == "second":
        tensors["second"] = tensors["second"][:-1]
    elif change == "missing":
        del tensors["signs"]
    elif change == "layout":
        settings["kept"] = 9
    elif change == "type":
        settings["column_scales"] = 1
    elif change == "width":
        settings["width"] = 100
    return settings, tensors


@pytest.mark.parametrize(
    "change",
    ["pattern", "group", "finite", "salient", "second", "missing", "layout", "type", "width"],
)
def test_damage_is_refused(change: str) -> None:
    settings, tensors = damaged("none")
    BinaryCode.restore(settings, tensors)
    settings, tensors = damaged(change)
    with pytest.raises(ValueError, match=r"."):
        BinaryCode.restore(settings, tensors)


@pytest.mark.parametrize(
    "values",
    [
        {"plain_groups": 0},
        {"salient_groups": 17},
        {"kept": 5, "of": 4},
        {"kept": 0, "of": 4},
        {"kept": 4, "of": 16},
        {"kept": 1, "of": 3},
        {"block_size": 0},
    ],
)
def test_impossible_layouts_are_refused(values: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"groups|pattern|block_size"):
        BinaryLayout(**values)


def test_a_width_that_patterns_do_not_fill_is_refused() -> None:
    with pytest.raises(ValueError, match="not a multiple"):
        BinaryLayout(kept=4, of=8).blocks(100)
