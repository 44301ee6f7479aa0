from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from dit_qat.calibration.table import LayerRow
from dit_qat.dit.ptq.report import PTQReport, Score, write_ptq_report

SAMPLES, POLICY = b"\x89PNG samples", b"\x89PNG policy"


def row(name: str, error: float = 0.01) -> LayerRow:
    return LayerRow(name, 128, 384, 4, 4.125, 4.0, 100, error, 25_000)


REPORT = PTQReport(
    title="clq on digits, W4A4",
    model="digits",
    method="clq",
    calibration="128 images at 25 of 50 steps",
    sampling="DDIM, 50 steps, no guidance",
    seed=3,
    seconds={"calibration": 10.0, "quantization": 200.0},
    hardware="2 CPU cores",
    versions={"torch": "2.11.0"},
    averages={
        "weight_bits": 4.0,
        "effective_weight_bits": 4.094,
        "activation_bits": 3.1,
        "activation_bits_by_macs": 3.25,
    },
    output_error=0.0871,
    trajectory_error=0.002,
    scores=[Score("FD-digits, lower is better", 3.5, 7.0, ".2f")],
    layers=[row("blocks.0.attn.qkv")],
    by_timestep=b"\x89PNG steps",
    by_layer=b"\x89PNG layers",
)


class Page(HTMLParser):
    """Visible text, table rows, headings and pictures; fails on tags that do not match."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: list[list[str]] = []
        self.headings: list[str] = []
        self.pictures: list[str] = []
        self.text, self.tags, self._open = "", set[str](), list[str]()
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        if tag == "tr":
            self.rows.append([])
        if tag == "img":
            self.pictures.append(dict(attrs)["alt"])
        if tag not in ("img", "meta"):
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1].append(data)
        if self._open and self._open[-1] in ("h1", "h2"):
            self.headings.append(data)


def read(tmp_path: Path, report: PTQReport) -> Page:
    write_ptq_report(tmp_path / "report.html", report)
    return Page((tmp_path / "report.html").read_text(encoding="utf-8"))


def test_scores_stand_beside_those_of_the_float_model(tmp_path: Path) -> None:
    rows = read(tmp_path, REPORT).rows
    assert ["FD-digits, lower is better", "3.50", "7.00", "2"] in rows
    assert ["Trajectory error, lower is better", "–", "0.002", "–"] in rows
    assert ["Activation bits, weighted by operations", "–", "3.250", "–"] in rows
    assert ["blocks.0.attn.qkv", "128", "384", "4", "4.12", "4", "0.01"] in rows


def test_pictures_are_shown_where_there_are_some(tmp_path: Path) -> None:
    plain = read(tmp_path, REPORT)
    assert plain.pictures == ["Error by timestep", "Error of layers"]
    full = read(tmp_path, replace(REPORT, samples=SAMPLES, policy=POLICY))
    assert full.pictures == [
        "Samples",
        "Error by timestep",
        "Error of layers",
        "Activation bits by layer and timestep",
    ]
    assert "Policy, 3.100 activation bits on average" in full.headings


def test_the_page_holds_everything_and_says_what_is_simulated(tmp_path: Path) -> None:
    page = read(tmp_path, replace(REPORT, notes=["One thing more."]))
    assert not page.tags & {"script", "link", "iframe"}
    assert "Arithmetic is simulated" in page.text
    assert "One thing more." in page.text
    assert "quantization 3 min" in page.text


def test_text_is_escaped(tmp_path: Path) -> None:
    hostile = '<script>alert("x")</script>'
    report = replace(
        REPORT,
        title=hostile,
        model=hostile,
        notes=[hostile],
        layers=[row(hostile)],
        scores=[Score(hostile, None, 1.0)],
    )
    page = read(tmp_path, report)
    assert "script" not in page.tags
    assert page.headings[0] == hostile


def test_a_model_of_hundreds_of_layers_has_one_row_for_each_kind(tmp_path: Path) -> None:
    layers = [row(f"blocks.{i}.{k}", i + 1.0) for i in range(99) for k in ("attn.qkv", "mlp.fc1")]
    page = read(tmp_path, replace(REPORT, layers=layers))
    assert [cells for cells in page.rows if cells[0].startswith("*.")] == [
        ["*.attn.qkv (99)", "128", "384", "4", "4.12", "4", "50"],
        ["*.mlp.fc1 (99)", "128", "384", "4", "4.12", "4", "50"],
    ]
    assert "metrics.json has every layer" in page.text


def test_without_a_trajectory_the_line_is_left_out(tmp_path: Path) -> None:
    page = read(tmp_path, replace(REPORT, trajectory_error=None))
    assert "Trajectory error, lower" not in page.text


def test_a_page_that_cannot_be_made_leaves_the_earlier_one(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    path.write_text("earlier")
    with pytest.raises(KeyError, match="weight_bits"):
        write_ptq_report(path, replace(REPORT, averages={}))
    assert path.read_text() == "earlier"
    assert [found.name for found in tmp_path.iterdir()] == ["report.html"]
