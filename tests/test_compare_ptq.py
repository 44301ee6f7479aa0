import json
import sys
from pathlib import Path

import compare_ptq
import ptq_cost
import pytest


def compare(out: Path, monkeypatch: pytest.MonkeyPatch, *more: str) -> None:
    command = ["compare_ptq", "--out", str(out), "--steps", "2", "--images", "4", "--samples", "0"]
    monkeypatch.setattr(sys, "argv", [*command, "--threads", "1", *more])
    compare_ptq.main()


def test_cells_are_kept_and_not_repeated(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wanted = ("--methods", "rtn", "quarot", "--bits", "w8a8", "w4a4")
    compare(tmp_path / "0", monkeypatch, *wanted)
    found = json.loads((tmp_path / "0" / "metrics.json").read_text())
    errors = {m: {c: run["trajectory_error"] for c, run in found[m].items()} for m in found}
    assert set(found) == {"rtn", "quarot"}
    assert 0 < errors["rtn"]["w8a8"] < errors["rtn"]["w4a4"]
    assert errors["quarot"]["w4a4"] < errors["rtn"]["w4a4"]
    assert found["rtn"]["w4a4"]["average_bits"] == 4 < found["rtn"]["w4a4"]["effective_weight_bits"]
    monkeypatch.setattr(compare_ptq, "run_cell", lambda *_: pytest.fail("repeated"))
    compare(tmp_path / "0", monkeypatch, *wanted)
    monkeypatch.undo()
    compare(tmp_path / "1", monkeypatch, "--seed", "1", *wanted)
    capsys.readouterr()
    compare(tmp_path / "0", monkeypatch, "--report", "--beside", str(tmp_path / "1"))
    first, seeds = capsys.readouterr().out.split("\n\n")[:2]
    other = json.loads((tmp_path / "1" / "metrics.json").read_text())["rtn"]["w4a4"]
    assert f"{errors['rtn']['w4a4']:.2g}, {other['trajectory_error']:.2g} |" in seeds
    rows = [line.split(" | ")[0] for line in first.splitlines()[2:]]
    assert rows == ["| quarot", "| rtn"]


def test_cost_of_a_block_is_told_with_its_memory() -> None:
    found = ptq_cost.cell("gptq", 64, 1024)
    assert found["seconds"] > 0
    if "peak_bytes" in found:
        assert found["planned_beyond"] < found["planned_bytes"]
    assert ptq_cost.exponent({1: 1.0, 2: 3.0, 4: 24.0}) == pytest.approx(3)
