"""Bounds by rules, and bit maps as plain types."""

import json

import pytest

from dit_qat.allocation import BitMap, bit_bounds, make_bit_map

LAYERS = tuple(
    f"blocks.{i}.{n}" for i in range(2) for n in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")
)
COSTS = (3, 1, 4, 4) * 2
SCORES = [[8.0 * (i + 1), 2.0 * (i + 1), 0.5, 0.1] for i in range(8)]


def bit_map(**changed):
    given = {"average": 2.0, "bounds": {}, "score": "output", "step": 7}
    return make_bit_map(LAYERS, COSTS, (1, 2, 3, 4), SCORES, **(given | changed))


def test_the_last_rule_that_matches_wins() -> None:
    rules = {"*.attn.*": (2, 3), "blocks.1.*": 4}
    bounds = bit_bounds(LAYERS, rules)
    assert bounds == {0: (2, 3), 1: (2, 3), 4: (4, 4), 5: (4, 4), 6: (4, 4), 7: (4, 4)}


def test_rules_bound_the_map() -> None:
    found = bit_map(bounds={"*.mlp.fc2": 1, "*.attn.proj": [3, 4]}).by_layer
    assert {bits for name, bits in found.items() if name.endswith("fc2")} == {1}
    assert {bits for name, bits in found.items() if name.endswith("proj")} <= {3, 4}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*.attn.prj": 2}, r"'\*\.attn\.prj' matches no layer; near names: .*attn\.proj"),
        ({"*": (4, 2)}, "at least 4 and at most 2 bits"),
        ({"*": (1, 2, 3)}, r"'\*' asks for \(1, 2, 3\); give fixed bits, such as 2, or"),
        ({"*": 2.5}, r"'\*' asks for 2\.5; give fixed bits"),
        ({"*": "23"}, r"'\*' asks for '23'; give fixed bits"),
        (
            {"*.mlp.*": (5, 8)},
            r"'\*\.mlp\.\*' asks for 5 to 8 bits, but the choices are 1, 2, 3, 4",
        ),
    ],
)
def test_rules_that_mean_nothing_are_refused(rules, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bit_map(bounds=rules)


def test_a_bit_map_survives_json() -> None:
    found = bit_map()
    content = json.loads(json.dumps(found.as_dict()))
    assert BitMap.from_dict(content, "here") == found
    assert content["average_bits"] == found.average_bits <= 2
    assert content["layers"][1] == {
        "name": LAYERS[1],
        "bits": found.bits[1],
        "cost": 1,
        "scores": SCORES[1],
    }


def test_means_by_type_are_over_blocks() -> None:
    found = BitMap(LAYERS, (1, 4, 2, 2, 2, 3, 2, 1), COSTS, (1, 2, 3, 4), (), "output", 2.0)
    expected = {"attn.proj": 3.5, "attn.qkv": 1.5, "mlp.fc1": 2.0, "mlp.fc2": 1.5}
    assert found.mean_by_type == expected
    assert found.average_bits == (3 * 3 + 7 + 4 * 4 + 4 * 3) / 24


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "no bit map of this version"),
        ({"layers": []}, "format None"),
        ({"format": "dit_qat.bit_map.1"}, "damaged bit map"),
        ({"format": "dit_qat.bit_map.1", "layers": [{"name": "a"}]}, "KeyError: 'bits'"),
    ],
)
def test_anything_else_is_refused(content, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BitMap.from_dict(content, "file.json")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 2.7}, r"2\.7 is no whole number"),
        ({"bits": "2"}, "'2' is no whole number"),
        ({"bits": True}, "True is no whole number"),
        ({"cost": 0}, "0 is no whole number from 1 up"),
        (
            {"bits": 8},
            r"blocks\.0\.attn\.qkv has 8 bits and 4 scores, with 4 choices \(1, 2, 3, 4\)",
        ),
        ({"scores": [1.0]}, "1 scores, with 4 choices"),
        ({"name": LAYERS[1]}, "one of them twice"),
    ],
)
def test_a_map_that_was_changed_by_hand_is_not_half_believed(changed, message: str) -> None:
    content = bit_map().as_dict()
    content["layers"][0] |= changed
    with pytest.raises(ValueError, match=message):
        BitMap.from_dict(content, "file.json")
