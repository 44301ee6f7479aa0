import io
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dit_qat.calibration import LayerRow
from dit_qat.llm.report import (
    LLMReport,
    Point,
    best_for_their_size,
    perplexity_plot,
    write_llm_report,
)
from dit_qat.report.style import COLOURS


def point(name: str, bits: float, perplexity: float, family: str = "ternary") -> Point:
    return Point(name, family, bits, perplexity)


def test_the_front_holds_what_nothing_smaller_beats() -> None:
    points = [point("c", 3, 5), point("a", 1, 9), point("b", 2, 9), point("d", 3, 4)]
    assert [p.name for p in best_for_their_size(points)] == ["a", "d"]


def test_each_family_has_its_colour() -> None:
    points = [point("a", 1, 9, "one bit"), point("b", 2, 900), point("c", 3, 5)]
    drawn = np.asarray(Image.open(io.BytesIO(perplexity_plot(points, 4.0))).convert("RGB"))
    for colour, seen in zip(COLOURS, (True, True, False), strict=False):
        wanted = [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
        assert (np.abs(drawn.astype(int) - wanted).sum(-1) < 6).any() == seen
    # One at the float model's perplexity or below it has no logarithm of what is above.
    assert len(perplexity_plot([point("a", 1, 9), point("b", 2, 4)], 4.0)) > 10_000
    with pytest.raises(ValueError, match="no models to draw"):
        perplexity_plot([])


def test_the_page_states_nominal_and_effective_bits(tmp_path: Path) -> None:
    rows = [
        LayerRow(f"model.layers.{i}.mlp.up_proj", 8, 16, 1.11, 2.85, 16, 5, 1e-3, 40)
        for i in range(2)
    ]
    averages = {"weight_bits": 1.11, "effective_weight_bits": 2.85}
    report = LLMReport("a <model>", "arb", "text", 3.0, averages, 10**6, rows)
    write_llm_report(tmp_path / "report.html", report)
    text = (tmp_path / "report.html").read_text()
    for part in ("a &lt;model&gt;", "1.110", "2.850", "1.00", "model.layers.1.mlp.up_proj"):
        assert part in text
    assert "<model>" not in text
