"""``dit-qat demo``: what it leaves behind, and what it refuses."""

import json
from pathlib import Path

import pytest

from dit_qat.cli.demo import RESULTS
from dit_qat.cli.main import main

SHORT = ["--steps", "2", "--samples", "8", "--sampling_steps", "1"]


@pytest.mark.filterwarnings("ignore:FD-digits from")
def test_demo_leaves_everything_and_does_not_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--bits", "2", "--seed", "3", *SHORT]) == 0
    printed = capsys.readouterr().out
    left_out = {"baselines", "bit_map.json", "bit_map.png"}
    assert {path.name for path in out.iterdir()} == set(RESULTS) - left_out
    metrics = json.loads((out / "metrics.json").read_text())
    packed = metrics["packed"]
    assert packed["pixels_equal"] >= 0.999
    assert packed["bytes"] == sum(
        (out / "packed" / name).stat().st_size for name in ("config.json", "model.safetensors")
    )
    assert 4 * packed["bytes"] < packed["float32_bytes"]
    assert metrics["baselines"] == {}
    assert metrics["seconds"] > 0
    quantized = metrics["quantized"]
    assert (quantized["method"], quantized["bits"], quantized["average_bits"]) == ("robuq", 2, 2)
    assert 1.58 < quantized["effective_weight_bits"] < 8
    for scores in (metrics["float"], quantized):
        assert scores["fd_digits"] > 0
    assert f"{quantized['fd_digits']:.2f}" in printed
    report = (out / "report.html").read_text()
    assert "W1.58A2" in report
    assert report.count("data:image/png;base64,") == 3
    before = (out / "metrics.json").read_bytes()
    assert main(["demo", "--out", str(out), *SHORT]) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (out / "metrics.json").read_bytes() == before


@pytest.mark.filterwarnings("ignore:FD-digits from")
def test_ampn_leaves_its_map_and_shows_it(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), "--bits", "2", "--ampn", *SHORT]) == 0
    assert {path.name for path in out.iterdir()} == set(RESULTS) - {"baselines"}
    metrics = json.loads((out / "metrics.json").read_text())
    saved = json.loads((out / "bit_map.json").read_text())
    quantized = metrics["quantized"]
    assert quantized["method"] == "ampn"
    assert quantized["average_bits"] == saved["average_bits"] <= 2
    assert quantized["bit_map"] == {row["name"]: row["bits"] for row in saved["layers"]}
    report = (out / "report.html").read_text()
    assert "AMPN on digits" in report
    assert f"Bit map, {saved['average_bits']:.3f} bits on average" in report
    assert report.count("data:image/png;base64,") == 4


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--bits", "5"], "5"),
        (["--steps", "0"], "steps=0"),
        (["--steps", "1", "--ampn"], "at least 2 steps"),
        (["--samples", "3"], "samples=3"),
        (["--rank", "4000"], "rank=4000"),
        (["--preset", "best"], "best"),
        (["--bit", "2"], "--bit"),
    ],
)
def test_demo_refuses_bad_settings_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], named: str
) -> None:
    out = tmp_path / "demo"
    assert main(["demo", "--out", str(out), *arguments]) == 2
    assert named in capsys.readouterr().err
    assert not out.exists()
