"""Data sets of the literature by the package datasets itself, from folders laid out as theirs."""

import gzip
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dit_qat.llm.data import calibration_windows, evaluation_windows, text, windows
from dit_qat.llm.models import load_llm

datasets = pytest.importorskip("datasets")

CARD = """---
configs:
- config_name: {name}
  data_files:
  - split: train
    path: {train}
  - split: {heldout}
    path: {other}
dataset_info:
- config_name: {name}
  features:
  - name: text
    dtype: string
  splits:
  - name: train
    num_bytes: 828589180707
    num_examples: 364868892
---
"""

Offer = Callable[[str], Path]


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return load_llm("tiny").tokenizer


@pytest.fixture
def offer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Offer:
    """Have a data set read from a folder; revisions are for the hub alone."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def put(name: str) -> Path:
        folder = tmp_path / name
        local = replace(text.DATASETS[name], path=str(folder), revision=None)
        monkeypatch.setitem(windows.DATASETS, name, local)
        return folder

    return put


def rows_of(split: str, count: int = 40) -> list[str]:
    return [f" {split} {index} \n" for index in range(count)]


def table(path: Path, column: str, rows: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.Dataset.from_dict({column: rows}).to_parquet(path)


def decoded(ids: Any) -> bytes:
    return bytes(ids.flatten().tolist())


def test_wikitext2(offer: Offer, tokenizer: Any) -> None:
    folder = offer("wikitext2")
    for split in ("train", "test"):
        table(folder / f"wikitext-2-raw-v1/{split}-0.parquet", "text", rows_of(split))
    parts = [f"wikitext-2-raw-v1/{split}-*" for split in ("train", "test")]
    card = CARD.format(name="wikitext-2-raw-v1", train=parts[0], heldout="test", other=parts[1])
    (folder / "README.md").write_text(card.partition("dataset_info")[0] + "---\n")
    found = decoded(evaluation_windows("wikitext2", tokenizer, 8))
    assert found == "\n\n".join(rows_of("test")).encode()[: len(found)]
    whole = "\n\n".join(rows_of("train")).encode()
    assert all(decoded(row) in whole for row in calibration_windows("wikitext2", tokenizer, 4, 16))


def test_ptb(offer: Offer, tokenizer: Any) -> None:
    folder = offer("ptb")
    for split in ("train", "test", "validation"):
        table(folder / f"penn_treebank/{split}/0000.parquet", "sentence", rows_of(split))
    found = decoded(evaluation_windows("ptb", tokenizer, 8))
    assert found == " ".join(rows_of("test")).encode()[: len(found)]
    whole = " ".join(rows_of("train")).encode()
    assert all(decoded(row) in whole for row in calibration_windows("ptb", tokenizer, 4, 16))


def test_c4_reads_one_file_of_many(offer: Offer, tokenizer: Any) -> None:
    folder = offer("c4")
    (folder / "en").mkdir(parents=True)
    for name in ("train.00000-of-01024", "train.00001-of-01024", "validation.00000-of-00008"):
        with gzip.open(folder / f"en/c4-{name}.json.gz", "wt") as file:
            for row in rows_of(name, 1200):
                file.write(json.dumps({"text": row, "url": "u"}) + "\n")
    card = CARD.format(
        name="en",
        train="en/c4-train.*.json.gz",
        heldout="validation",
        other="en/c4-validation.*.json.gz",
    )
    (folder / "README.md").write_text(card)
    found = decoded(evaluation_windows("c4", tokenizer, 16))
    assert found == " ".join(rows_of("validation.00000-of-00008", 1200)).encode()[: 256 * 16]
    documents = [row.encode() for row in rows_of("train.00000-of-01024", 1200)]
    for window in calibration_windows("c4", tokenizer, 8, 20):
        assert any(decoded(window) in document for document in documents)


def test_what_is_not_there(offer: Offer, tokenizer: Any, tmp_path: Path) -> None:
    folder = offer("c4")
    folder.mkdir()
    with pytest.raises(OSError, match=r"c4 \(train\) cannot be had .*give a text file"):
        calibration_windows("c4", tokenizer, 1, 8)
    (folder / "en").mkdir()
    (folder / "en/c4-train.00000-of-01024.json.gz").write_bytes(b"no gzip")
    with pytest.raises(OSError, match=r"c4 \(train\) cannot be had"):
        calibration_windows("c4", tokenizer, 1, 8)
