"""A reader of the kinds of code after docs/format.md, in numpy and plain Python."""

from collections.abc import Callable
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch

from dit_qat.layers.mixed_code import MixedCode
from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.ternary_code import TernaryCode
from dit_qat.layers.weight_code import WeightCode
from dit_qat.llm.methods import arb, pb_llm, pbs2p
from dit_qat.primitives.second_moment import SecondMoment

Stored = dict[str, np.ndarray]


def fields(row: np.ndarray, bits: int, count: int) -> list[int]:
    number = int.from_bytes(row.tobytes(), "little")
    return [number >> bits * j & (1 << bits) - 1 for j in range(count)]


def base3(row: np.ndarray, count: int) -> list[int]:
    m, digits = len(row), [0] * (5 * len(row))
    for j, byte in enumerate(row.tolist()):
        for place in range(4):
            digits[4 * j + place] = byte // 3**place % 3
        digits[4 * m + j] = byte // 81
    return [d - 1 for d in digits[:count]]


def planes(own: dict[str, Any], at: Stored) -> np.ndarray:
    width, group = own["in_features"], own["group_size"]
    count, rows = at["planes"].shape[:2]
    weight = np.zeros((rows, width), np.float32)
    for p in range(count):
        for i in range(rows):
            for j, bit in enumerate(fields(at["planes"][p, i], 1, width)):
                scale = np.float32(at["row_scale"][i, j // group, p])
                weight[i, j] += scale if bit else -scale
    return weight * np.float32(at["column_scale"]) if own["scaled"] else weight


def ternary(own: dict[str, Any], at: Stored) -> np.ndarray:
    width, group = own["in_features"], own["group_size"]
    found = np.zeros((len(at["codes"]), width), np.float32)
    order = [int.from_bytes(row.tobytes(), "little") for row in at["order"]]
    for i, row in enumerate(at["codes"]):
        for j, code in enumerate(base3(row, width)):
            scale, offset = (np.float32(at[name][i, j // group]) for name in ("scale", "offset"))
            found[i, order[j]] = np.float32(scale * np.float32(code)) + offset
    return found


def mixed(own: dict[str, Any], at: Stored) -> np.ndarray:
    width, group, bits = own["in_features"], own["group_size"], own["bits"]
    tags = fields(at["tags"], 2, -(-width // group))
    found = np.zeros((len(at["codes"]), width), np.float32)
    for i, row in enumerate(at["codes"]):
        start = 0
        for tag in range(3):
            columns = [j for j in range(width) if tags[j // group] == tag]
            own_bits = bits - 1 + tag
            stop = start + -(-len(columns) * own_bits // 8)
            for j, code in zip(
                columns, fields(row[start:stop], own_bits, len(columns)), strict=True
            ):
                scale, offset = (np.float32(at[n][i, j // group]) for n in ("scale", "offset"))
                found[i, j] = np.float32(np.float32(code) * scale) + offset
            start = stop
        assert start == len(row)
    return found


def binary(own: dict[str, Any], at: Stored) -> np.ndarray:
    n, width, k = own["rows"], own["width"], own["block_size"]
    kept, of, plain, twice = own["kept"], own["of"], own["plain_groups"], own["salient_groups"]
    scales = own["column_scales"]
    salient = fields(at["salient"], 1, width)
    patterns = sorted(sum(1 << j for j in chosen) for chosen in combinations(range(of), kept))
    bits = (max(plain, twice) - 1).bit_length()
    found, seconds = np.zeros((n, width), np.float32), 0
    second = fields(at["second"], 1, 8 * len(at["second"]))
    place = [salient[:j].count(salient[j]) for j in range(width)]
    for i in range(n):
        columns = list(range(width))
        if kept < of:
            ranks = fields(at["keep"][i], (len(patterns) - 1).bit_length(), width // of)
            columns = [j for j in columns if patterns[ranks[j // of]] >> j % of & 1]
        signs = fields(at["signs"][i], 1, len(columns))
        groups = fields(at["groups"][i], bits, len(columns)) if bits else [0] * len(columns)
        for j, sign, group in zip(columns, signs, groups, strict=True):
            values = at["rows"][i, j // k].astype(np.float32)
            many = (2 if scales else 3) if salient[j] else (1 if scales else 2)
            start = plain * (1 if scales else 2) if salient[j] else 0
            own_values = values[start + group * many : start + (group + 1) * many]
            pair = [sign]
            if salient[j]:
                pair.append(second[seconds])
                seconds += 1
            if scales:
                name = "salient_columns" if salient[j] else "plain_columns"
                size = len(pair)
                more = at[name][place[j], group * size : (group + 1) * size].astype(np.float32)
                value, parts = np.float32(0), own_values * more
            else:
                value, parts = own_values[0], own_values[1:]
            for bit, part in zip(pair, parts, strict=True):
                value = value + part if bit else value - part
            found[i, j] = value
    assert seconds <= len(second) < seconds + 8
    return found


def partial_binary(own: dict[str, Any], at: Stored) -> np.ndarray:
    n, width, k = own["out_features"], own["in_features"], own["block_size"]
    found, ones, others = np.zeros((n, width), np.float32), 0, 0
    signs = fields(at["signs"], 1, 8 * len(at["signs"]))
    for i in range(n):
        for j, low in enumerate(fields(at["low"][i], 1, width)):
            if low:
                mean, scale = at["rows"][i, j // k].astype(np.float32)
                found[i, j] = mean + scale if signs[ones] else mean - scale
                ones += 1
            else:
                code = np.float32(at["codes"][others]) - np.float32(at["zero"][i])
                found[i, j] = code * np.float32(at["scale"][i])
                others += 1
    assert others == len(at["codes"])
    return found


READERS = {
    "planes": planes,
    "ternary": ternary,
    "mixed": mixed,
    "binary": binary,
    "partial_binary": partial_binary,
}


def drawn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def moment(width: int) -> SecondMoment:
    found = SecondMoment(width)
    found.add(drawn(4 * width, width))
    return found


def some_planes() -> WeightCode:
    signs = torch.where(drawn(3, 5, 22) < 0, -1.0, 1.0)
    scale, column = (x.abs().half().float() for x in (drawn(5, 3, 3), drawn(22)))
    return PlaneCode.build(signs, scale, 8, column)


def some_ternary() -> WeightCode:
    scale, offset = (x.half().float() for x in (drawn(5, 3).abs(), drawn(5, 3)))
    order = torch.randperm(22, generator=torch.Generator().manual_seed(0))
    return TernaryCode.build(drawn(5, 22).clamp(-1, 1).round(), scale, offset, 8, order)


def some_mixed() -> WeightCode:
    bits = torch.tensor([3, 1, 2])
    most = (1 << bits)[torch.arange(22) // 8]
    codes = (drawn(5, 22).abs() * 3).long() % most
    scale, offset = (x.half().float() for x in (drawn(5, 3).abs(), drawn(5, 3)))
    return MixedCode.build(codes.to(torch.uint8), bits, scale, offset, 8, 2)


def some_binary(**settings: Any) -> WeightCode:
    config = arb.ARBConfig(block_size=16, iterations=2, **settings)
    return arb.quantize_weight(drawn(12, 40), moment(40), config)


def some_sparse() -> WeightCode:
    config = pbs2p.PBS2PConfig(block_size=16, iterations=2)
    return pbs2p.quantize_weight(drawn(12, 40), moment(40), config, 5)


def some_partial() -> WeightCode:
    return pb_llm.quantize_weight(drawn(12, 40), moment(40), pb_llm.PBLLMConfig(block_size=16))


@pytest.mark.parametrize(
    "make",
    [
        some_planes,
        some_ternary,
        some_mixed,
        lambda: some_binary(variant="arb_x", cgb=False),
        lambda: some_binary(variant="arb_rc", groups=3),
        some_sparse,
        some_partial,
    ],
)
def test_the_page_is_enough_to_decode(make: Callable[[], WeightCode]) -> None:
    code = make()
    stored = {name: tensor.numpy() for name, tensor in code.tensors().items()}
    found = READERS[code.name](dict(code.settings()), stored)
    assert np.array_equal(found, code.decode().numpy())
