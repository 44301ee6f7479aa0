import json
import sys
from pathlib import Path

import bench_llm
import compare_llm
import pytest


def compare(out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    command = [
        "compare_llm",
        "--out",
        str(out),
        "--windows",
        "2",
        "--judged",
        "4",
        "--window",
        "64",
    ]
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", *more])
    compare_llm.main()


def test_cells_are_kept_averaged_and_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = ("--seeds", "0", "1", "--methods", "rtn_1bit", "rtn_2bit", "rtn_3bit")
    compare(tmp_path, monkeypatch, *wanted)
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert set(found) == {"float", "rtn_1bit", "rtn_2bit", "rtn_3bit"}
    names = ("float", "rtn_3bit", "rtn_2bit", "rtn_1bit")
    perplexities = [found[name]["perplexity"] for name in names]
    assert perplexities == sorted(perplexities)
    one = found["rtn_2bit"]
    assert set(one["perplexities"]) == {"0", "1"}
    assert one["nominal_bits"] == 2 < one["effective_bits"] < 2.5
    assert 0 < one["bytes"] < found["float"]["bytes"]
    assert one["reload_equal"]
    assert (tmp_path / "perplexity.png").stat().st_size > 10_000
    monkeypatch.setattr(compare_llm.Bench, "judged", lambda *_: pytest.fail("repeated"))
    compare(tmp_path, monkeypatch, *wanted)
    assert json.loads((tmp_path / "metrics.json").read_text()) == found
    with pytest.raises(ValueError, match=r"'judged': 4.*use another --out"):
        compare(tmp_path, monkeypatch, *wanted, "--judged", "5")


def test_an_order_is_counted_by_seed() -> None:
    found = {
        "a": {"perplexity": 5.0, "perplexities": {"0": 4.0, "1": 6.0}},
        "b": {"perplexity": 4.5, "perplexities": {"0": 4.0, "1": 5.0}},
    }
    strict = compare_llm.verdicts([("a", "b"), ("a", "absent")], found, allow_equal=False)
    assert strict.splitlines()[2:] == ["| a | b | 5, 4.5 | 1 of 2 |"]
    assert "2 of 2" in compare_llm.verdicts([("a", "b")], found, allow_equal=True)


def test_orders_are_of_methods_that_there_are() -> None:
    pairs = [*compare_llm.orderings(), *compare_llm.presets()]
    assert {name for pair in pairs for name in pair} <= {*compare_llm.METHODS}
    assert len({better for _, better in compare_llm.presets()}) == len(
        [name for name in compare_llm.METHODS if "_exact" in name]
    )


@pytest.mark.parametrize("name", sorted(bench_llm.solvers()))
def test_every_method_has_a_speed(name: str) -> None:
    bench_llm.solvers()[name](*bench_llm.weight_and_moment(256, 512))
