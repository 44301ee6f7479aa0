"""Tokenizers as GGUF describes them: tokens, kinds, merges or scores, and how text is cut."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dit_qat.llm.data.byte_alphabet import byte_letters

__all__ = ["Vocabulary", "add_vocabulary", "vocabulary_of"]

_NORMAL, _UNKNOWN, _CONTROL, _DEFINED, _UNUSED, _BYTE = range(1, 7)  # gguf.TokenType

_ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_CUTS: Mapping[tuple[str, bool], str] = {
    (_ENGLISH + "{1,3}" + _REST, True): "llama-bpe",
    (_ENGLISH + "{1,3}" + _REST, False): "smaug-bpe",
    (_ENGLISH + _REST, False): "qwen2",
}
"""llama.cpp's name of a cut, by pattern and by whether whole tokens go before merges."""

_PLAIN = {"type": "ByteLevel", "add_prefix_space": False}
_HEX = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True)
class Vocabulary:
    """A tokenizer in GGUF's terms.

    Attributes:
        model: "gpt2" for byte-level merges, "llama" for those of SentencePiece.
        cut: llama.cpp's name of how text is cut before merging.
        tokens: By id.
        kinds: By id, gguf's TokenType.
        merges: Pairs, first to last; of "gpt2".
        scores: By id, higher merge first; of "llama".
        space: Whether a space comes before a text; of "llama".
        ids: Of the special tokens, by gguf's names.
        first: Whether the first token of a text is ``ids["bos"]``.
        last: Whether the last token of a text is ``ids["eos"]``.
        template: Of chats; None: none.
    """

    model: str
    cut: str
    tokens: list[str]
    kinds: list[int]
    merges: list[str]
    scores: list[float]
    space: bool
    ids: Mapping[str, int]
    first: bool
    last: bool
    template: str | None


def vocabulary_of(tokenizer: Any, rows: int) -> Vocabulary:
    """Describe a tokenizer.

    Args:
        tokenizer: Of transformers.
        rows: Of the model's embedding, each of which gets a token.

    Raises:
        ValueError: with the reason, for one that llama.cpp does not compute.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused(f"{type(tokenizer).__name__} has no tokenizer.json")
    plain = json.loads(backend.to_str())
    model = plain["model"]
    if model["type"] != "BPE":
        raise _refused(f"its model is {model['type']}, not pairwise merges (BPE)")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    by_pieces = bool(model.get("byte_fallback"))
    first, last = _ends(tokenizer)
    tokens = tokenizer.get_vocab()
    template = getattr(tokenizer, "chat_template", None)
    return Vocabulary(
        "llama" if by_pieces else "gpt2",
        "default" if by_pieces else _cut(plain, merges),
        _by_id(tokens, rows),
        _kinds(plain, tokens, rows),
        [] if by_pieces else merges or _no_merges(),
        _scores(merges, tokens, rows) if by_pieces else [],
        by_pieces and _has_space(plain),
        _special_ids(tokenizer),
        first,
        last,
        template if isinstance(template, str) else None,
    )


def add_vocabulary(writer: Any, vocabulary: Vocabulary) -> None:
    """Write it."""
    writer.add_tokenizer_model(vocabulary.model)
    writer.add_tokenizer_pre(vocabulary.cut)
    writer.add_token_list(vocabulary.tokens)
    writer.add_token_types(vocabulary.kinds)
    if vocabulary.model == "llama":
        writer.add_token_scores(vocabulary.scores)
        writer.add_add_space_prefix(vocabulary.space)
    else:
        writer.add_token_merges(vocabulary.merges)
    for name, index in vocabulary.ids.items():
        getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(vocabulary.first)
    writer.add_add_eos_token(vocabulary.last)
    if vocabulary.template is not None:
        writer.add_chat_template(vocabulary.template)


def _refused(reason: str) -> ValueError:
    return ValueError(
        f"the tokenizer cannot be written as GGUF: {reason}; export a folder (--format folder) "
        "instead, or convert with llama.cpp's own tool"
    )


def _cut(plain: Mapping[str, Any], merges: list[str]) -> str:
    """llama.cpp's name of how a byte-level tokenizer cuts text."""
    if (plain["normalizer"] or {"type": "NFC"})["type"] != "NFC":  # which llama.cpp leaves out
        raise _refused(f"it changes text first ({plain['normalizer']['type']})")
    steps = plain["pre_tokenizer"] or {"type": "none"}
    steps = steps.get("pretokenizers", [steps])
    if {key: steps[-1].get(key) for key in _PLAIN} != _PLAIN or len(steps) > 2:
        raise _refused(f"it cuts text by {', '.join(step['type'] for step in steps)}")
    if len(steps) == 1 and (steps[0]["use_regex"] or not merges):
        return "gpt-2"  # without merges, any cut gives the bytes
    pattern = steps[0].get("pattern", {}).get("Regex", "")
    found = _CUTS.get((pattern, bool(plain["model"].get("ignore_merges"))))
    if found is None or steps[-1]["use_regex"]:
        raise _refused(f"llama.cpp has no name for its cut {pattern!r}")
    return found


def _has_space(plain: Mapping[str, Any]) -> bool:
    """Whether a tokenizer with pieces puts a space before a text."""
    normalizer = plain["normalizer"] or {}
    steps = normalizer.get("normalizers", [normalizer] if normalizer else [])
    kinds = [step["type"] for step in steps]
    before = plain["pre_tokenizer"]
    if before is not None and before["type"] == "Metaspace" and not kinds:
        return bool(before["prepend_scheme"] != "never")
    if before is not None or not set(kinds) <= {"Prepend", "Replace"} or "Replace" not in kinds:
        raise _refused(f"it changes text by {', '.join(kinds) or 'nothing'} before it is cut")
    return "Prepend" in kinds


def _by_id(tokens: Mapping[str, int], rows: int) -> list[str]:
    named = {index: token for token, index in tokens.items()}
    return [named.get(index, f"[PAD{index}]") for index in range(rows)]


def _kinds(plain: Mapping[str, Any], tokens: Mapping[str, int], rows: int) -> list[int]:
    """Normal, unless they are something else; rows without a token are unused."""
    found = [_UNUSED] * rows
    by_pieces = bool(plain["model"].get("byte_fallback"))
    for token, index in tokens.items():
        found[index] = _BYTE if by_pieces and _HEX.fullmatch(token) else _NORMAL
    for added in plain["added_tokens"]:
        found[added["id"]] = _CONTROL if added["special"] else _DEFINED
    unknown = plain["model"].get("unk_token")
    if unknown is not None and by_pieces:
        found[tokens[unknown]] = _UNKNOWN
    return found


def _scores(merges: list[str], tokens: Mapping[str, int], rows: int) -> list[float]:
    """Minus the place of the first merge that makes a token: llama.cpp merges the highest."""
    found = [-float(len(merges))] * rows
    for place, pair in reversed(list(enumerate(merges))):
        found[tokens[pair.replace(" ", "", 1)]] = -float(place)
    return found


def _no_merges() -> list[str]:
    """A pair that never occurs, for readers want some: bytes that UTF-8 does not have."""
    letters = byte_letters()
    return [f"{letters[0xC0]} {letters[0xC1]}"]


def _special_ids(tokenizer: Any) -> dict[str, int]:
    known = {name: getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "unk", "pad")}
    return {name: index for name, index in known.items() if index is not None}


def _ends(tokenizer: Any) -> tuple[bool, bool]:
    """Whether a text gets a first and a last token."""
    text = "a b"
    bare = tokenizer(text, add_special_tokens=False)["input_ids"]
    ids = tokenizer(text)["input_ids"]
    first, last = [tokenizer.bos_token_id], [tokenizer.eos_token_id]
    for before, after in ((False, False), (True, False), (False, True), (True, True)):
        if ids == before * first + bare + after * last:
            return before, after
    raise _refused("it puts other tokens than begin and end around a text")
