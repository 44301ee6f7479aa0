"""Tokenizers in GGUF's terms, and those that have none."""

from typing import Any

import pytest
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from dit_qat.llm.data.byte_alphabet import byte_letters
from dit_qat.llm.gguf.vocabulary import vocabulary_of

transformers = pytest.importorskip("transformers")

QWEN = transformers.models.qwen2.tokenization_qwen2.PRETOKENIZE_REGEX
LLAMA = QWEN.replace(r"|\p{N}|", r"|\p{N}{1,3}|")
MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "abc")]
NORMAL, UNKNOWN, CONTROL, DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6


def by_bytes(cut: Any, merges: Any = MERGES, **keywords: Any) -> Any:
    letters = [*byte_letters(), *(first + second for first, second in merges)]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    inner = Tokenizer(models.BPE(vocab=vocabulary, merges=list(merges), **keywords))
    inner.pre_tokenizer = cut
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<end>")


def split(pattern: str) -> Any:
    whole = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), whole])


def by_pieces(prepend: str = "first", **keywords: Any) -> Any:
    merges = [("a", "b"), ("▁", "ab"), ("a", "ba"), ("ab", "a")]
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces += ["ab", "▁ab", "aba", "▁", "a", "b"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    inner = Tokenizer(
        models.BPE(
            vocab=vocabulary,
            merges=[*merges[:2], ("ab", "a")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme=prepend, split=False)
    inner.decoder = decoders.ByteFallback()
    inner.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", **keywords
    )


def test_bytes_and_merges() -> None:
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer = by_bytes(cut)
    tokenizer.add_tokens(["added"])
    tokenizer.chat_template = "{{ messages }}"
    found = vocabulary_of(tokenizer, rows=264)
    assert (found.model, found.cut, found.space) == ("gpt2", "gpt-2", False)
    assert found.merges == ["a b", "ab c", "Ġ abc"]
    assert found.tokens[97] == "a"
    assert found.tokens[256:] == [
        "ab",
        "abc",
        "Ġabc",
        "<end>",
        "added",
        "[PAD261]",
        "[PAD262]",
        "[PAD263]",
    ]
    assert found.kinds == [NORMAL] * 259 + [CONTROL, DEFINED] + [UNUSED] * 3
    assert found.ids == {"eos": 259}
    assert (found.first, found.last) == (False, False)
    assert found.template == "{{ messages }}"


@pytest.mark.parametrize(
    ("pattern", "whole", "name"),
    [(LLAMA, True, "llama-bpe"), (LLAMA, False, "smaug-bpe"), (QWEN, False, "qwen2")],
)
def test_cuts(pattern: str, whole: bool, name: str) -> None:
    assert vocabulary_of(by_bytes(split(pattern), ignore_merges=whole), 260).cut == name


def test_bytes_alone_need_a_merge_that_never_happens() -> None:
    cut = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    found = vocabulary_of(by_bytes(cut, merges=[]), rows=257)
    (pair,) = found.merges
    letters = byte_letters()
    assert [letters.index(letter) for letter in pair.split()] == [0xC0, 0xC1]
    assert found.cut == "gpt-2"


def test_pieces_with_scores() -> None:
    found = vocabulary_of(by_pieces(), rows=266)
    assert (found.model, found.cut, found.space, found.merges) == ("llama", "default", True, [])
    assert found.kinds == [UNKNOWN, CONTROL, CONTROL] + [BYTE] * 256 + [NORMAL] * 6 + [UNUSED]
    assert found.scores[259:262] == [0.0, -1.0, -2.0]
    assert set(found.scores[:259] + found.scores[262:]) == {-3.0}
    assert found.ids == {"bos": 1, "eos": 2, "unk": 0}
    assert (found.first, found.last) == (True, False)
    assert not vocabulary_of(by_pieces("never"), rows=266).space


def test_what_llama_cpp_does_not_compute() -> None:
    changed = by_bytes(split(QWEN))
    changed.backend_tokenizer.normalizer = normalizers.Lowercase()
    words = Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))
    framed = by_bytes(split(QWEN))
    framed.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="$A <end> <end>", special_tokens=[("<end>", 259)]
    )
    lower = by_pieces()
    lower.backend_tokenizer.normalizer = normalizers.Lowercase()
    cases = {
        "it changes text first": changed,
        r"has no name for its cut '\\\\w\+'": by_bytes(split(r"\w+")),
        "its model is WordLevel": transformers.PreTrainedTokenizerFast(tokenizer_object=words),
        "it puts other tokens than": framed,
        "it cuts text by Whitespace": by_bytes(pre_tokenizers.Whitespace()),
        "it changes text by Lowercase": lower,
        "object has no tokenizer.json": object(),
    }
    for message, tokenizer in cases.items():
        with pytest.raises(ValueError, match=message):
            vocabulary_of(tokenizer, 300)
