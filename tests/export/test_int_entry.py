"""One layer of integers in plain values: there and back, and nothing else."""

import json
from typing import Any

import pytest
import torch
from torch import Tensor

from dit_qat.export.int_entry import IntEntry, check_lowest
from dit_qat.layers import IntLinear, IntLinearConfig, StepBits, TokenQuantizer, TransformStep
from dit_qat.primitives.integer import IntegerGrid
from dit_qat.primitives.packing import pack_int

POLICY = StepBits((999.0, 0.5, 100.25), (2, 8, 3))
ROTATE = TransformStep("rotate", 7, 8)
CONFIGS = [
    IntLinearConfig(IntegerGrid()),
    IntLinearConfig(IntegerGrid(2, False, 8), TokenQuantizer(2, False, 24, (0.9, 0.25))),
    IntLinearConfig(IntegerGrid(8), TokenQuantizer(8, fixed_range=(-1e-3, 7.1)), POLICY),
    IntLinearConfig(
        IntegerGrid(3), None, None, (TransformStep("scale"), ROTATE, TransformStep("permute"))
    ),
    IntLinearConfig(IntegerGrid(4), steps=(TransformStep("rotate"),), rank=5),
    IntLinearConfig(IntegerGrid(4), rank=48, branch_dtype="bfloat16"),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("bias", [True, False])
def test_plain_values_and_back(config: IntLinearConfig, bias: bool) -> None:
    entry = IntEntry.of(IntLinear(96, 48, bias, config, "meta"))
    content = json.loads(json.dumps(entry.as_json()))
    assert IntEntry.from_json(content) == entry
    layer = entry.make("meta")
    assert isinstance(layer, IntLinear)
    assert layer.config == config
    assert IntEntry.of(layer) == entry


def test_the_dtype_of_no_branch_says_nothing() -> None:
    layers = [
        IntLinear(8, 8, True, IntLinearConfig(IntegerGrid(), branch_dtype=dtype), "meta")
        for dtype in ("float32", "bfloat16")
    ]
    assert IntEntry.of(layers[0]) == IntEntry.of(layers[1])


def test_activation_bits() -> None:
    bits = [IntEntry(96, 48, True, config).activation_bits for config in CONFIGS[:3]]
    assert bits == [None, 2, 13 / 3]


PATHS: list[tuple[list[Any], Any, str]] = [
    (["kind"], "other", "kind is 'other'"),
    (["in_features"], 0, "in_features=0 is outside"),
    (["in_features"], 1 << 40, "is outside"),
    (["in_features"], 92, "has no Hadamard|does not divide"),
    (["bias"], 1, "bias=1 is no bool"),
    (["grid"], None, "grid is None"),
    (["grid", "bits"], 5, "weight bits=5 are not among"),
    (["grid", "bits"], 4.0, "bits=4.0, which is no int"),
    (["grid", "symmetric"], 1, "symmetric=1, which is no bool"),
    (["grid", "group_size"], 7, "group_size=7 does not divide"),
    (["grid", "more"], 7, "grid has the settings"),
    (["activation", "bits"], 9, "activation bits=9 are outside"),
    (["activation", "bits"], True, "bits=True, which is no int"),
    (["activation", "clip"], [1.0], "has 1 numbers, not 2"),
    (["activation", "clip"], [1, 1], "not a list of float"),
    (["activation", "clip"], [1.0, 0.0], "two factors above 0"),
    (["activation", "fixed_range"], [2.0, 1.0], "no .minimum, maximum"),
    (["activation", "fixed_range"], [float("nan"), 1.0], "not finite"),
    (["activation", "group_size"], 36, "does not divide 96 inputs"),
    (["activation"], None, "step_bits without an activation"),
    (["step_bits", "bits"], [3, 4, 9], "activation bits=9 are outside"),
    (["step_bits", "bits"], [3, 4, 10**400], "are outside 2..8"),
    (["step_bits", "bits"], [3, 4], "3 timesteps with 2 bits"),
    (["step_bits", "bits"], [3.0, 4.0, 8.0], "not a list of int"),
    (["step_bits", "timesteps"], [0.0, 0.0, 1.0], "hold one twice"),
    (["step_bits", "timesteps"], [0.0, 1.0, float("inf")], "not finite"),
    (["step_bits", "more"], 1, "step_bits has the settings"),
    (["transform"], None, "transform=None is no list"),
    (["transform"], [{"kind": "scale"}] * 65, "65 steps, beyond 64"),
    (["transform", 0], "scale", "not a JSON object"),
    (["transform", 0, "kind"], "rotate", "a rotation without"),
    (["transform", 0, "kind"], "mirror", "step 'mirror' is unknown"),
    (["transform", 0, "seed"], 1, "a rotation has the settings"),
    (["transform", 1, "seed"], 8, "transform is .* which this version makes"),
    (["transform", 1, "seed"], -1, "seed=-1 is outside"),
    (["transform", 1, "factors"], [4, 2], "transform is .* which this version makes"),
    (["transform", 1, "block_size"], 7, "block_size=7 does not divide"),
    (["transform", 1, "kind"], "scale", "transform is .* which this version makes"),
    (["low_rank", "rank"], 0, "rank=0 is outside"),
    (["low_rank", "rank"], 49, "rank=49 is beyond 48"),
    (["low_rank", "dtype"], "int4", "branch_dtype='int4' is unknown"),
    (["low_rank", "dtype"], 16, "dtype=16, which is no str"),
    (["color"], "red", "color is 'red'"),
]


@pytest.mark.parametrize(("path", "value", "message"), PATHS)
def test_other_values_are_refused(path: list[Any], value: Any, message: str) -> None:
    steps = (TransformStep("scale"), ROTATE, TransformStep("permute"))
    config = IntLinearConfig(IntegerGrid(4), TokenQuantizer(), POLICY, steps, 3)
    content = IntEntry.of(IntLinear(96, 48, True, config, "meta")).as_json()
    content = json.loads(json.dumps(content))
    holder: Any = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        IntEntry.from_json(content)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("width", [1, 5, 24, 1000])
def test_the_lowest_code_is_found_wherever_it_is(bits: int, width: int) -> None:
    least = -(1 << (bits - 1))
    generator = torch.Generator().manual_seed(width)
    codes = torch.randint(least + 1, -least, (400, width), generator=generator)
    check_lowest(pack_int(codes, bits), bits)
    for row, column in ((0, 0), (399, width - 1), (201, width // 2)):
        bad = codes.clone()
        bad[row, column] = least
        with pytest.raises(ValueError, match=rf"the code {least}, which symmetric {bits}-bit"):
            check_lowest(pack_int(bad, bits), bits)


def _entry(**settings: Any) -> IntEntry:
    return IntEntry(6, 2, True, IntLinearConfig(IntegerGrid(**settings)))


@pytest.mark.parametrize(
    ("leaf", "stored", "message"),
    [
        ("codes", torch.tensor([[0, 0, 128], [0, 0, 0]], dtype=torch.uint8), "ends|zero"),
        ("codes", torch.tensor([[8, 0], [0, 0]], dtype=torch.uint8), "rows of 2 bytes"),
        ("scale", torch.tensor([[1.0], [0.0]]).half(), "scales down to 0.0"),
        ("scale", torch.tensor([[1.0], [torch.inf]]).half(), "NaN or infinite"),
        ("transform.vector0", torch.tensor([1.0] * 5 + [-1.0]), "scales down to -1.0"),
        ("transform.vector0", torch.tensor([0, 1, 2, 3, 4, 4], dtype=torch.int32), "permutation"),
        ("transform.vector0", torch.tensor([1, 2, 3, 4, 5, 6], dtype=torch.int32), "permutation"),
        ("transform.vector0", torch.tensor([-1, 1, 2, 3, 4, 5], dtype=torch.int32), "permutation"),
        ("low_rank_up", torch.tensor([[torch.nan]]).half(), "NaN or infinite"),
    ],
)
def test_values_that_no_writer_writes(leaf: str, stored: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _entry(bits=3).resident(leaf, stored)


def test_zero_points_beyond_the_codes() -> None:
    entry = _entry(bits=2, symmetric=False)
    entry.resident("zero", torch.tensor([[3], [0]], dtype=torch.uint8))
    with pytest.raises(ValueError, match="zero points up to 4, beyond 2-bit"):
        entry.resident("zero", torch.tensor([[3], [4]], dtype=torch.uint8))


def test_negative_scales_are_no_branch() -> None:
    branch = torch.tensor([[-1.0, 2.0]]).half()
    assert _entry().resident("low_rank_up", branch) is branch
