"""The model and the texts that come with the package."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_qat.llm.data import calibration_windows, evaluation_windows
from dit_qat.llm.evaluation import perplexity
from dit_qat.llm.models import load_llm, shipped, shipped_model, shipped_text, window_length

pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def loaded() -> Any:
    return load_llm("tiny")


def test_sizes() -> None:
    model = sum(path.stat().st_size for path in shipped_model().iterdir())
    assert model < 6_000_000
    texts = [shipped_text("calibration"), shipped_text("heldout")]
    assert sum(path.stat().st_size for path in texts) < 1_000_000


def test_the_package_takes_them_along() -> None:
    root = Path(__file__).resolve().parents[3] / "pyproject.toml"
    data = json.loads(
        next(
            line for line in root.read_text().splitlines() if line.startswith('"dit_qat.llm"')
        ).partition("=")[2]
    )
    folder = shipped_model().parent
    taken = {path for pattern in data for path in folder.parent.glob(pattern) if path.is_file()}
    assert taken == {path for path in folder.rglob("*") if path.is_file()}


def test_ids_are_bytes(loaded: Any) -> None:
    content = shipped_text("heldout").read_bytes()[:2048]
    assert loaded.tokenizer(content.decode())["input_ids"] == [*content]
    windows = evaluation_windows("tiny", loaded.tokenizer, 256, count=8)
    assert bytes(windows.flatten().tolist()) == content
    assert window_length(loaded.model) == 256


def test_it_has_learned(loaded: Any) -> None:
    windows = evaluation_windows("tiny", loaded.tokenizer, 256, count=16)
    bits = math.log2(perplexity(loaded.model, windows))
    about = json.loads((shipped_model().parent / "README.json").read_text())
    assert abs(bits - about["heldout_bits_per_byte"]["float16_weights"]) < 0.5
    assert bits < 2.6
    shuffled = windows[:, torch.randperm(256, generator=torch.Generator().manual_seed(0))]
    assert math.log2(perplexity(loaded.model, shuffled)) > bits + 2


def test_calibration_text_is_other_text(loaded: Any) -> None:
    heldout = shipped_text("heldout").read_bytes()
    windows = calibration_windows("tiny", loaded.tokenizer, length=256)
    assert windows.shape == (128, 256)
    assert not any(bytes(window.tolist()) in heldout for window in windows)


def test_it_generates(loaded: Any) -> None:
    ids = torch.tensor([[*b"import "]])
    written = loaded.model.generate(ids, max_new_tokens=8, do_sample=False)
    assert loaded.tokenizer.decode(written[0]).startswith("import ")
    assert loaded.model.generation_config.eos_token_id == 256


def test_an_incomplete_installation_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(shipped, "_ASSETS", tmp_path)
    with pytest.raises(FileNotFoundError, match="missing from this installation"):
        load_llm("tiny")
