"""One layer in plain values: there and back, and nothing else."""

import json
from typing import Any

import pytest
import torch

from dit_qat.export.layer_entry import LayerEntry
from dit_qat.layers import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    HadamardRotation,
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    PackedLinear,
    QuantLinear,
    RobustQuantizer,
    TernaryWeight,
)

CONFIGS = [
    LayerConfig(),
    LayerConfig(TernaryWeight("mse", False), MinMaxQuantizer(3, zero_point="rounded"), None, None),
    LayerConfig(activation=None, rotation=HadamardRotation(False, 24)),
    LayerConfig(activation=AbsMaxQuantizer(8), low_rank=LowRank(2, "alternating", 3, "bfloat16")),
    LayerConfig(activation=AbsMeanQuantizer(straight_through="clip")),
    LayerConfig(activation=RobustQuantizer(1, center=True)),
]


@pytest.mark.parametrize("config", CONFIGS, ids=range(len(CONFIGS)))
@pytest.mark.parametrize("bias", [True, False])
def test_plain_values_and_back(config: LayerConfig, bias: bool) -> None:
    entry = LayerEntry.of(QuantLinear(96, 48, bias, config, 5, device="meta"), "ternary_1.6")
    content = json.loads(json.dumps(entry.as_json()))
    assert LayerEntry.from_json(content) == entry
    layer = entry.make("meta")
    assert LayerEntry.of(layer, "ternary_1.6") == entry
    assert layer.config == config


def test_stored_widths() -> None:
    layer = PackedLinear(96, 48, config=LayerConfig(), device="meta")
    assert LayerEntry.of(layer, "ternary_1.6").stored_width == 20
    assert LayerEntry.of(layer, "ternary_2").stored_width == 24


def test_rotations_can_be_checked() -> None:
    content = LayerEntry.of(QuantLinear(1152, 8, config=LayerConfig(low_rank=None)), "ternary_2")
    rotation = content.as_json()["rotation"]
    assert rotation["factors"] == [36, 32]
    assert len(rotation["signs_sha256"]) == 64
    assert all(torch.tensor(rotation["factors"]) > 1)


PATHS: list[tuple[list[str], Any, str]] = [
    (["in_features"], 0, "in_features=0 is outside"),
    (["in_features"], 1 << 40, "is outside"),
    (["in_features"], 92, "width=92 has no Hadamard matrix"),
    (["in_features"], True, "in_features=True is no int"),
    (["bias"], 1, "bias=1 is no bool"),
    (["codes"], "ternary", "codes='ternary' is unknown"),
    (["codes"], [], "codes=\\[\\] is unknown"),
    (["weight"], None, "weight is None, not a JSON object"),
    (["weight", "fit"], "best", "ternary fit 'best' is unknown"),
    (["weight", "per_channel"], 1, "per_channel=1, which is no bool"),
    (["activation", "kind"], {}, "activation kind"),
    (["activation", "bits"], 9, "bits=9 is outside"),
    (["activation", "bits"], 2.0, "bits=2.0, which is no int"),
    (["activation", "more"], 1, "has the settings"),
    (["rotation", "factors"], [48, 2], "rotation is .* which this version makes"),
    (["rotation", "signs_sha256"], None, "rotation is .* which this version makes"),
    (["rotation", "block_size"], "8", "block_size='8', which is no int"),
    (["rotation", "block_size"], 7, "block_size=7 does not divide"),
    (["low_rank", "rank"], 0, "rank=0 is below 1"),
    (["low_rank", "dtype"], "int4", "dtype='int4' is unknown"),
    (["kind"], "other", "kind is 'other'"),
    (["seed"], 1 << 63, "is outside"),
]


@pytest.mark.parametrize(("path", "value", "message"), PATHS)
def test_other_values_are_refused(path: list[str], value: Any, message: str) -> None:
    content = LayerEntry.of(QuantLinear(96, 48, config=LayerConfig()), "ternary_2").as_json()
    content = json.loads(json.dumps(content))
    holder = content
    for key in path[:-1]:
        holder = holder[key]
    holder[path[-1]] = value
    with pytest.raises(ValueError, match=message):
        LayerEntry.from_json(content)
