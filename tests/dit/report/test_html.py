import base64
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from dit_qat.dit.report import Comparison, ComparisonRow, Report, write_report

VOID = {"meta", "img"}
LOSS, SAMPLES, SENSITIVITY = b"\x89PNG loss", b"\x89PNG samples", b"\x89PNG sensitivity"
BIT_MAP = b"\x89PNG bit map"

REPORT = Report(
    title="RobuQ on digits",
    method="RobuQ",
    bits=2,
    steps=1600,
    seed=5,
    seconds=431.0,
    hardware="2 CPU cores",
    versions={"dit_qat": "0.1.0", "torch": "2.11.0"},
    sampling="DDIM, 50 steps",
    float_scores={
        "fd_digits": 3.4,
        "precision": 0.9531,
        "recall": 0.961,
        "class_accuracy": 0.99,
        "num_samples": 1797,
    },
    quantized_scores={
        "fd_digits": 8.5,
        "precision": 0.8812,
        "recall": 0.9,
        "class_accuracy": 0.97,
        "num_samples": 1797,
    },
    average_bits=2.125,
    effective_weight_bits=2.37,
    packed={"bytes": 640_000, "float32_bytes": 5_120_000, "pixels_equal": 0.99995},
    samples=SAMPLES,
    loss=LOSS,
)
ABLATION = Comparison(
    (ComparisonRow("min-max", 2, (14.0, 15.0, 16.0)), ComparisonRow("RobuQ", 2, (8.54,))), 3.4
)


class Page(HTMLParser):
    """Elements, attributes, visible text and table rows; fails on tags that do not match."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.links, self.images, self.rows, self.text = [], [], [], [], ""
        self._open = []
        self.feed(text)
        self.close()
        assert not self._open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag not in VOID:
            self._open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        for name, value in attrs:
            if name in ("src", "href"):
                self.links.append(value)
            assert not name.startswith("on")
        if tag == "img":
            self.images.append(dict(attrs))

    def handle_endtag(self, tag):
        assert self._open.pop() == tag

    def handle_data(self, data):
        if "style" in self._open:
            assert "url(" not in data
            assert "@import" not in data
            return
        self.text += data
        if self._open and self._open[-1] in ("td", "th"):
            self.rows[-1][-1] += data


@pytest.fixture
def page(tmp_path):
    def write(report):
        write_report(tmp_path / "report.html", report)
        return Page((tmp_path / "report.html").read_text(encoding="utf-8"))

    return write


def test_the_page_needs_nothing_from_elsewhere(page):
    written = page(replace(REPORT, sensitivity=SENSITIVITY, ablation=ABLATION))
    assert written.links
    assert all(link.startswith("data:image/png;base64,") for link in written.links)
    assert not {"script", "link", "iframe", "object", "a"} & set(written.tags)


def test_pictures_are_the_bytes_given_and_have_a_description(page):
    images = page(replace(REPORT, sensitivity=SENSITIVITY, bit_map=BIT_MAP)).images
    contents = [base64.b64decode(image["src"].partition(",")[2]) for image in images]
    assert contents == [SAMPLES, LOSS, BIT_MAP, SENSITIVITY]
    assert all(image["alt"] for image in images)


def test_a_bit_map_stands_under_its_achieved_average(page):
    assert "Bit map, 2.125 bits on average" in page(replace(REPORT, bit_map=BIT_MAP)).text
    assert "Bit map" not in page(REPORT).text


def test_scores_stand_beside_each_other_with_their_ratio(page):
    rows = {row[0]: row[1:] for row in page(REPORT).rows}
    assert rows["FD-digits, lower is better"] == ["3.4", "8.5", "2.50"]
    assert rows["Precision"] == ["0.953", "0.881", "0.92"]
    assert rows["Recall"] == ["0.961", "0.900", "0.94"]
    assert rows["Class accuracy"] == ["0.990", "0.970", "0.98"]
    assert rows["Average activation bits"] == ["32", "2.12", "0.07"]
    assert rows["Effective weight bits"] == ["32", "2.37", "0.07"]
    assert rows["Size of the file, MB"] == ["5.12", "0.64", "0.12"]
    assert "99.9950% of the pixels" in page(REPORT).text


def test_a_model_that_was_not_packed_has_no_size(page):
    found = page(replace(REPORT, packed=None))
    assert "Size of the file, MB" not in {row[0] for row in found.rows}
    assert "packed model, which" not in found.text


def test_scores_that_were_not_computed_have_no_row(page):
    few = {"fd_digits": 0.0, "num_samples": 700}
    rows = {row[0]: row[1:] for row in page(replace(REPORT, float_scores=few)).rows}
    assert rows["FD-digits, lower is better"] == ["0.0", "8.5", "–"]
    assert "Precision" not in rows


def test_the_summary_says_what_was_run(page):
    text = page(REPORT).text
    for fact in (
        "RobuQ: ternary weights and 2-bit activations",
        "1,600 steps",
        "seed 5",
        "1,797 samples per model (DDIM, 50 steps)",
        "7 min on 2 CPU cores with dit_qat 0.1.0, torch 2.11.0",
    ):
        assert fact in text


@pytest.mark.parametrize(("seconds", "words"), [(59.6, "60 s on"), (7300, "2.0 h on")])
def test_durations_are_in_the_unit_that_fits(page, seconds, words):
    assert words in page(replace(REPORT, seconds=seconds)).text


def test_the_reader_is_told_what_the_numbers_are_not(page):
    text = page(replace(REPORT, fd_floor=(4.25, 5.0))).text
    for statement in (
        "FD-digits is no FID",
        "score 4.2 to 5.0",
        "Differences of 1 to 2 are noise",
        "Arithmetic is simulated",
        "float latents",
    ):
        assert statement in text


def test_baselines_come_with_picture_and_table(page):
    written = page(replace(REPORT, ablation=ABLATION))
    assert ["min-max", "2", "15.0", "1.0", "3"] in written.rows
    assert ["RobuQ", "2", "8.5", "–", "1"] in written.rows
    assert len(written.images) == 3
    assert "Baselines" in written.text
    assert "Baselines" not in page(REPORT).text


def test_text_is_escaped_everywhere(page):
    evil = "<script>alert('&')</script>"
    written = page(
        replace(
            REPORT,
            title=evil,
            method=evil,
            hardware=evil,
            sampling=evil,
            versions={evil: evil},
            ablation=Comparison((ComparisonRow(evil, 2, (8.0,)),)),
        )
    )
    assert "script" not in written.tags
    assert written.text.count(evil) == 8  # the title is also the page's


def test_an_earlier_report_is_replaced_and_nothing_else_is_left(page, tmp_path):
    page(REPORT)
    assert "Another" in page(replace(REPORT, title="Another")).text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


def test_a_report_that_cannot_be_made_leaves_the_earlier_one(page, tmp_path):
    page(REPORT)
    before = (tmp_path / "report.html").read_bytes()
    with pytest.raises(ValueError, match="no 'fd_digits', only precision"):
        page(replace(REPORT, float_scores={"precision": 1.0}))
    with pytest.raises(ValueError, match="no rows"):
        page(replace(REPORT, ablation=Comparison(())))
    assert (tmp_path / "report.html").read_bytes() == before
