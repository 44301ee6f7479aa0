from pathlib import Path

import build_llm_assets as tool
import pytest
from transformers import AutoConfig, AutoTokenizer

from dit_qat.llm.models import shipped_model, shipped_text


def test_the_shipped_model_is_the_one_that_the_tool_makes() -> None:
    shipped, made = AutoConfig.from_pretrained(shipped_model()), tool.model_config()
    for name in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"):
        assert getattr(shipped, name) == getattr(made, name)
    assert shipped.max_position_embeddings == made.max_position_embeddings
    text = "naïve(x)\n\t€" + tool.END
    ids = [*text.removesuffix(tool.END).encode(), tool.END_ID]
    for tokenizer in (tool.byte_tokenizer(), AutoTokenizer.from_pretrained(shipped_model())):
        assert tokenizer(text)["input_ids"] == ids
        assert tokenizer.decode(ids) == text


def test_what_ships_is_as_large_as_the_tool_says() -> None:
    for part, limit in (
        ("calibration", tool.CALIBRATION_BYTES),
        ("heldout", tool.HELDOUT_BYTES),
    ):
        size = shipped_text(part).stat().st_size
        assert limit - 1024 < size <= limit
    assert tool.CALIBRATION_BYTES + tool.HELDOUT_BYTES <= 10**6
    assert (shipped_model() / "model.safetensors").stat().st_size <= 6 * 10**6


def test_files_are_for_one_purpose_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(12):
        (tmp_path / f"m{index:02}.py").write_text(f"# {index:02} {'x' * 100}\n" * 10)
    for name in ("test/t.py", "config-3/c.py", "_sysconfigdata_x.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("# skipped\n" * 100)
    monkeypatch.setattr(tool, "CALIBRATION_BYTES", 1500)
    monkeypatch.setattr(tool, "HELDOUT_BYTES", 1500)
    found = tool.read_texts(tmp_path)
    assert found.files == {"training": 8, "calibration": 2, "heldout": 2}
    training = bytes(i for i in found.training.tolist() if i != tool.END_ID).decode()
    texts = (found.calibration, found.heldout, training)
    lines = [{*text.splitlines()} for text in texts]
    assert len(set.union(*lines)) == sum(map(len, lines)) == 12
    assert all(len(text.encode()) <= 1500 and text.endswith("\n") for text in texts[:2])
    assert int((found.training == tool.END_ID).sum()) == 8


def test_the_rate_rises_and_falls_to_its_last() -> None:
    training = tool.Training(steps=400)
    rates = [training.rate_at(step) for step in range(401)]
    assert rates.index(max(rates)) in (99, 100)
    assert max(rates) == training.rate
    assert rates[100:] == sorted(rates[100:], reverse=True)
    assert rates[-1] == pytest.approx(training.last_rate)
