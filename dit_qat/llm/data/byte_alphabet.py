"""Byte-level tokenizers: the letter that stands for each byte in their vocabularies."""

from typing import Any

__all__ = ["byte_ids", "byte_letters"]

_SAMPLE = "A\u00e9 a\u0301\n"  # letters that normalizers change


def byte_letters() -> list[str]:
    """The letter of each of the 256 bytes: itself if it can be seen, else one from U+0100 on.

    Source: the byte-level pair encoding of GPT-2, which transformers' tokenizers follow.
    """
    shown = {*range(33, 127), *range(161, 173), *range(174, 256)}
    hidden = [byte for byte in range(256) if byte not in shown]
    replaced = {byte: chr(256 + index) for index, byte in enumerate(hidden)}
    return [replaced.get(byte, chr(byte)) for byte in range(256)]


def byte_ids(tokenizer: Any) -> list[int] | None:
    """The id of each of the 256 bytes, if a tokenizer makes bytes of a text and nothing else."""
    vocabulary = tokenizer.get_vocab()
    special = set(tokenizer.all_special_tokens)
    letters = byte_letters()
    if {*vocabulary} - special != {*letters}:
        return None
    ids = [vocabulary[letter] for letter in letters]
    # Some change a text first, or put a token or a space before it.
    plain = tokenizer(_SAMPLE)["input_ids"] == [ids[byte] for byte in _SAMPLE.encode()]
    return ids if plain else None
