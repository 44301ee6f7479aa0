"""Windows from local files and stand-ins for the data sets of the literature."""

import random
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dit_qat.llm.data import calibration_windows, encode_file, evaluation_windows, text
from dit_qat.llm.data.byte_alphabet import byte_ids, byte_letters

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def make_bytes(order: list[int], **keywords: Any) -> Any:
    vocabulary = {letter: order[byte] for byte, letter in enumerate(byte_letters())}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=[]))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **keywords)


@pytest.fixture(scope="module")
def by_bytes() -> Any:
    return make_bytes(list(range(256)))


@pytest.fixture(scope="module")
def by_words() -> Any:
    """Ids are numbers of words; a 0 stands before every text."""
    vocabulary = {"<s>": 0} | {f"w{index}": index for index in range(1, 2000)}
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<s>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, unk_token="<s>", model_max_length=8
    )


@pytest.fixture
def counting(tmp_path: Path) -> Path:
    path = tmp_path / "counting.txt"
    path.write_text(" ".join(f"w{index}" for index in range(1, 1000)))
    return path


def test_letters_are_those_of_the_tokenizers() -> None:
    assert set(byte_letters()) == set(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    order = random.Random(0).sample(range(256), 256)
    tokenizer = make_bytes(order)
    sample = "x = 'é√'\t\x00\x7f\n"
    assert tokenizer(sample)["input_ids"] == [order[byte] for byte in sample.encode()]
    assert byte_ids(tokenizer) == order


def test_only_byte_tokenizers_take_bytes(by_words: Any) -> None:
    assert byte_ids(by_words) is None
    assert byte_ids(make_bytes(list(range(256)), eos_token="<end>")) == list(range(256))
    longer = make_bytes(list(range(256)))
    longer.add_tokens(["ab"])
    assert byte_ids(longer) is None


def test_bytes_that_are_changed_or_led_are_no_bytes() -> None:
    """What a file's bytes would become must be what the tokenizer makes of its text."""
    led = make_bytes(list(range(256)), bos_token="<s>")
    led.backend_tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 256)]
    )
    spaced = make_bytes(list(range(256)))
    spaced.backend_tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=True, use_regex=False
    )
    composed = make_bytes(list(range(256)))
    composed.backend_tokenizer.normalizer = tokenizers.normalizers.NFC()
    assert [byte_ids(tokenizer) for tokenizer in (led, spaced, composed)] == [None] * 3


def test_any_file_is_bytes(tmp_path: Path, by_bytes: Any, by_words: Any) -> None:
    content = bytes(range(256)) * 2
    path = tmp_path / "any.bin"
    path.write_bytes(content)
    assert encode_file(path, by_bytes).tolist() == [*content]
    with pytest.raises(ValueError, match=r"not text in UTF-8 \(byte 0x80 at 128\)"):
        encode_file(path, by_words)


def test_text_is_tokenized_as_a_whole(
    counting: Path, by_words: Any, capfd: pytest.CaptureFixture[str]
) -> None:
    assert encode_file(counting, by_words).tolist() == list(range(1000))
    assert "longer than" not in capfd.readouterr().err


def test_calibration_windows_are_pieces_of_the_text(counting: Path, by_words: Any) -> None:
    windows = calibration_windows(counting, by_words, count=12, length=32, seed=3)
    assert windows.shape == (12, 32)
    assert windows.dtype == torch.long
    assert bool((windows.diff(dim=1) == 1).all())
    assert len(windows[:, 0].unique()) > 6
    assert torch.equal(windows, calibration_windows(str(counting), by_words, 12, 32, seed=3))
    assert not torch.equal(windows, calibration_windows(counting, by_words, 12, 32, seed=4))


def test_windows_are_those_of_the_loaders_of_the_literature(counting: Path, by_words: Any) -> None:
    draw = random.Random(0)
    starts = [draw.randint(0, 1000 - 16 - 1) for _ in range(5)]
    assert calibration_windows(counting, by_words, 5, 16)[:, 0].tolist() == starts


def test_evaluation_windows_stand_side_by_side(counting: Path, by_words: Any) -> None:
    windows = evaluation_windows(counting, by_words, length=300)
    assert torch.equal(windows, torch.arange(900).view(3, 300))
    assert torch.equal(evaluation_windows(counting, by_words, 300, count=2), windows[:2])
    assert len(evaluation_windows(counting, by_words, 300, count=9)) == 3


def test_too_little_text_is_refused(counting: Path, by_words: Any, tmp_path: Path) -> None:
    assert calibration_windows(counting, by_words, 10, 100).shape == (10, 100)
    with pytest.raises(
        ValueError, match=r"has 1000 tokens; 11 windows of 100 tokens need 1100.*10 w"
    ):
        calibration_windows(counting, by_words, 11, 100)
    with pytest.raises(ValueError, match=r"1 windows of 1000 tokens need 1001"):
        calibration_windows(counting, by_words, 1, 1000)
    assert evaluation_windows(counting, by_words, 1000).shape == (1, 1000)
    with pytest.raises(ValueError, match="has 1000 tokens, less than one window of 1001"):
        evaluation_windows(counting, by_words, 1001)
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(ValueError, match="is empty"):
        calibration_windows(empty, by_words)
    with pytest.raises(FileNotFoundError, match=r"no text file nowhere; .* wikitext2, c4, ptb"):
        calibration_windows("nowhere", by_words)


def test_sizes_are_checked(counting: Path, by_words: Any) -> None:
    with pytest.raises(ValueError, match="count=0"):
        calibration_windows(counting, by_words, 0, 8)
    with pytest.raises(ValueError, match="count=0"):
        evaluation_windows(counting, by_words, 8, 0)
    with pytest.raises(ValueError, match="1 tokens predict nothing"):
        calibration_windows(counting, by_words, 8, 1)


class Rows:
    """A split as the package datasets gives it."""

    def __init__(self, column: str, lines: list[str]) -> None:
        self.column, self.lines = column, lines

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, at: Any) -> Any:
        return {self.column: self.lines[at]}


Offer = Callable[[Callable[..., Any]], None]


@pytest.fixture
def offer(monkeypatch: pytest.MonkeyPatch) -> Offer:
    def put(load: Callable[..., Any]) -> None:
        errors = SimpleNamespace(DatasetsError=type("DatasetsError", (Exception,), {}))
        module = SimpleNamespace(load_dataset=load, exceptions=errors)
        monkeypatch.setattr(text, "import_extra", lambda *_: module)

    return put


@pytest.mark.parametrize(
    ("source", "column", "joint", "asked"),
    [
        ("wikitext2", "text", "\n\n", ("Salesforce/wikitext", "wikitext-2-raw-v1", None)),
        (
            "ptb",
            "sentence",
            " ",
            ("ptb-text-only/ptb_text_only", None, "refs/convert/parquet"),
        ),
    ],
)
def test_joined_data_sets(
    offer: Offer,
    by_bytes: Any,
    source: str,
    column: str,
    joint: str,
    asked: tuple[str, str | None, str | None],
) -> None:
    calls: list[Any] = []

    def load(path: str, name: str | None, **keywords: Any) -> Rows:
        calls.append((path, name, keywords["revision"]))
        assert (keywords["data_files"] is None) == (name is not None)
        return Rows(column, [f"{keywords['split']} {index}" for index in range(60)])

    offer(load)
    found = evaluation_windows(source, by_bytes, length=10)
    expected = joint.join(f"test {index}" for index in range(60)).encode()
    assert bytes(found.flatten().tolist()) == expected[: found.numel()]
    windows = calibration_windows(source, by_bytes, 4, 20)
    whole = joint.join(f"train {index}" for index in range(60)).encode()
    assert all(bytes(window.tolist()) in whole for window in windows)
    assert calls == [asked, asked]


def test_c4_is_cut_from_single_documents(
    offer: Offer, by_bytes: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = ["a" * 40, "b" * 21, "c" * 20, "d" * 5]

    def load(path: str, name: str | None, **keywords: Any) -> Rows:
        split = keywords["split"]
        assert (path, name) == ("allenai/c4", None)
        assert list(keywords["data_files"]) == [split]
        assert f"c4-{split}.00000" in keywords["data_files"][split]
        return Rows("text", documents * (1 if split == "train" else 400))

    offer(load)
    windows = calibration_windows("c4", by_bytes, 30, 20)
    assert {bytes(row.unique().tolist()) for row in windows} == {b"a", b"b"}
    monkeypatch.setattr(text, "_MOST_DOCUMENTS", 5)
    with pytest.raises(ValueError, match="none of 5 documents of allenai/c4 has more than 40"):
        calibration_windows("c4", by_bytes, 1, 40)
    # 1100 of 1600 documents, of which 90 bytes with their spaces make 4.
    assert len(evaluation_windows("c4", by_bytes, 20)) == 256
    assert len(evaluation_windows("c4", by_bytes, 20, count=2000)) == 275 * 90 // 20


def test_a_hub_that_does_not_answer(offer: Offer, by_bytes: Any) -> None:
    def load(*_: Any, **__: Any) -> Rows:
        raise ConnectionError("no route")

    offer(load)
    with pytest.raises(OSError, match=r"Salesforce/wikitext \(train\) cannot be had .*no route"):
        calibration_windows("wikitext2", by_bytes)
