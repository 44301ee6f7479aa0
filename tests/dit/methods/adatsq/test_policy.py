import copy
import json
from pathlib import Path

import pytest

from dit_qat.dit.methods.adatsq import Policy


@pytest.fixture
def policy() -> Policy:
    return Policy(
        layers=("a", "b"),
        timesteps=(900.0, 500.0, 100.0),
        bits=((3, 8), (3, 3), (4, 3)),
        operations=(100, 300),
        scores=((0.1, 0.9), (0.2, 0.2), (0.5, 0.1)),
        average_asked=4.0,
    )


def test_both_averages(policy: Policy) -> None:
    assert policy.average_bits == 4
    assert policy.average_bits_by_operations == pytest.approx((6.75 + 3 + 3.25) / 3)


def test_bits_by_layer_for_any_number_of_steps(policy: Policy) -> None:
    bits = policy.step_bits("b")
    assert [bits.at(t) for t in (950, 720, 680, 400, 0)] == [8, 8, 3, 3, 3]
    policy.check_schedule([999.0, 30.0])
    with pytest.raises(ValueError, match="timestep 1400"):
        policy.check_schedule([1400.0])


def test_constant(policy: Policy) -> None:
    constant = Policy.constant(policy, 3)
    assert constant.average_bits == constant.average_bits_by_operations == 3
    assert constant.layers == policy.layers


def test_a_file_and_back(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    policy.save(path)
    assert Policy.load(path) == policy
    content = json.loads(path.read_text())
    assert content["average_bits"] == 4
    assert content["bits"] == [[3, 8], [3, 3], [4, 3]]


def test_damaged_files_are_refused(policy: Policy, tmp_path: Path) -> None:
    path = tmp_path / "policy.json"
    path.write_text("[1]")
    with pytest.raises(ValueError, match="no bit policy"):
        Policy.load(path)
    path.write_text("{")
    with pytest.raises(ValueError, match="no JSON"):
        Policy.load(path)
    with pytest.raises(FileNotFoundError):
        Policy.load(tmp_path / "absent.json")
    for change in (
        {"layers": ["a", "a"]},
        {"bits": [[3, 8]]},
        {"bits": [[3, 9]] * 3},
        {"bits": [[3, 3.5]] * 3},
        {"operations": [0, 1]},
        {"scores": None},
        {"timesteps": [1.0, 1.0, 2.0]},
    ):
        content = copy.deepcopy(policy.as_dict()) | change
        with pytest.raises(ValueError, match="damaged"):
            Policy.from_dict(content, "here")
