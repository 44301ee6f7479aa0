"""Windows of token ids by the protocols of the literature, or from a local file."""

import os
import random
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from dit_qat.llm.data.text import (
    DATASETS,
    TextDataset,
    encode,
    encode_file,
    joint_text,
    long_documents,
)
from dit_qat.llm.models.checks import DEFAULT_LENGTH
from dit_qat.llm.models.shipped import TINY, shipped_text

__all__ = ["calibration_windows", "evaluation_windows"]


def calibration_windows(
    source: str | os.PathLike[str],
    tokenizer: Any,
    count: int = 128,
    length: int = DEFAULT_LENGTH,
    seed: int = 0,
) -> Tensor:
    """Windows at random places of a text.

    Of WikiText-2, PTB and files, the text is joined and windows start anywhere in it; of C4
    (shard 0), each is cut from a random document that is longer than a window. Places are drawn as
    the loaders of GPTQ and its successors draw them, so that equal seeds give their windows.

    Args:
        source: "wikitext2", "c4", "ptb", "tiny" for the shipped text, or a file.
        tokenizer: That of the model.
        count: Windows.
        length: Tokens of each; :func:`~dit_qat.llm.models.checks.window_length` says what a model
            allows.
        seed: Of the places.

    Returns:
        Token ids (count, length).

    Raises:
        ValueError: if the text has fewer tokens than the windows, or is none.
        OSError: if it cannot be read.
    """
    _check_sizes(count, length)
    draw = random.Random(seed)
    dataset = DATASETS.get(os.fspath(source))
    if dataset is not None and dataset.whole_documents:
        documents = long_documents(dataset, tokenizer, length, draw)
        return torch.stack([_crop(ids, length, draw) for ids in islice(documents, count)])
    ids = _all_ids(source, dataset, tokenizer, "calibration")
    if len(ids) < count * length or len(ids) <= length:
        raise ValueError(
            f"{source} has {len(ids)} tokens; {count} windows of {length} tokens need "
            f"{max(count * length, length + 1)}: give more text, at most {len(ids) // length} "
            "windows, or shorter ones"
        )
    return torch.stack([_crop(ids, length, draw) for _ in range(count)])


def evaluation_windows(
    source: str | os.PathLike[str],
    tokenizer: Any,
    length: int = DEFAULT_LENGTH,
    count: int | None = None,
) -> Tensor:
    """The windows that a text consists of, from its start, side by side; a shorter rest is left.

    WikiText-2 and PTB: the joined test split; C4: 256 windows of the first 1100 documents of the
    validation split.

    Args:
        source: As for :func:`calibration_windows`.
        tokenizer: That of the model.
        length: Tokens of each.
        count: Windows at most; by default the protocol's, or all of a file.

    Returns:
        Token ids (count, length).

    Raises:
        ValueError: if the text is shorter than one window, or is none.
        OSError: if it cannot be read.
    """
    _check_sizes(1 if count is None else count, length)
    dataset = DATASETS.get(os.fspath(source))
    ids = _all_ids(source, dataset, tokenizer, "heldout")
    most = dataset.windows if count is None and dataset is not None else count
    found = len(ids) // length
    if not found:
        raise ValueError(
            f"{source} has {len(ids)} tokens, less than one window of {length}: give more text or "
            "use shorter windows"
        )
    kept = found if most is None else min(found, most)
    return ids[: kept * length].view(kept, length)


def _all_ids(
    source: str | os.PathLike[str],
    dataset: TextDataset | None,
    tokenizer: Any,
    part: Literal["calibration", "heldout"],
) -> Tensor:
    if dataset is not None:
        heldout = part == "heldout"
        split = dataset.evaluation if heldout else dataset.calibration
        return encode(joint_text(dataset, split, dataset.documents if heldout else None), tokenizer)
    path = shipped_text(part) if os.fspath(source) == TINY else Path(source)
    return encode_file(path, tokenizer)


def _crop(ids: Tensor, length: int, draw: random.Random) -> Tensor:
    start = draw.randint(0, len(ids) - length - 1)
    return ids[start : start + length]


def _check_sizes(count: int, length: int) -> None:
    if count < 1:
        raise ValueError(f"count={count} windows are none; use at least 1")
    if length < 2:
        raise ValueError(f"windows of {length} tokens predict nothing; use at least 2")
