"""Texts as token ids: local files, and the data sets of the literature."""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_qat.export.extras import import_extra
from dit_qat.llm.data.byte_alphabet import byte_ids

__all__ = [
    "DATASETS",
    "TextDataset",
    "encode",
    "encode_file",
    "joint_text",
    "long_documents",
    "open_dataset",
]

_MOST_DOCUMENTS = 100_000  # looked at until enough are long enough


@dataclass(frozen=True)
class TextDataset:
    """Where a data set of the literature is, and how its lines make one text.

    Attributes:
        path: On the hub.
        name: Of its configuration, if it has several.
        column: That of the text.
        joint: What stands between lines (or documents) of one text.
        calibration: Split to calibrate on.
        evaluation: Split to evaluate on.
        revision: Branch on the hub.
        files: By split, the files to read; None: all.
        documents: Of the evaluation split, how many make the text; None: all.
        windows: To evaluate on, at most; None: all.
        whole_documents: Calibration windows are cut from single documents, not from the joint text.
    """

    path: str
    name: str | None
    column: str
    joint: str
    calibration: str = "train"
    evaluation: str = "test"
    revision: str | None = None
    files: dict[str, str] | None = None
    documents: int | None = None
    windows: int | None = None
    whole_documents: bool = False


DATASETS: dict[str, TextDataset] = {
    "wikitext2": TextDataset("Salesforce/wikitext", "wikitext-2-raw-v1", "text", "\n\n"),
    "c4": TextDataset(
        "allenai/c4",
        None,
        "text",
        " ",
        evaluation="validation",
        files={
            "train": "en/c4-train.00000-of-01024.json.gz",
            "validation": "en/c4-validation.00000-of-00008.json.gz",
        },
        documents=1100,
        windows=256,
        whole_documents=True,
    ),
    # Published as a script, which is not run; this branch holds the hub's conversion to tables,
    # and no card that would tell of configurations: the files are named.
    "ptb": TextDataset(
        "ptb-text-only/ptb_text_only",
        None,
        "sentence",
        " ",
        revision="refs/convert/parquet",
        files={split: f"penn_treebank/{split}/*.parquet" for split in ("train", "test")},
    ),
}
"""By the name that a user gives."""


def open_dataset(dataset: TextDataset, split: str) -> Any:
    """One split of a data set, from the hub or its cache.

    Raises:
        ValueError: if the package datasets is not installed.
        OSError: if the hub cannot be reached, or does not have what is wanted.
    """
    datasets = import_extra("datasets", "llm")
    files = None if dataset.files is None else {split: dataset.files[split]}
    try:
        return datasets.load_dataset(
            dataset.path,
            dataset.name,
            data_files=files,
            split=split,
            revision=dataset.revision,
            # Of a part, the card's count of rows is wrong; elsewhere it stands.
            verification_mode="no_checks" if files else None,
        )
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        raise OSError(
            f"{dataset.path} ({split}) cannot be had ({type(error).__name__}: {error}); check the "
            "connection and HF_HUB_OFFLINE, or give a text file instead"
        ) from error


def joint_text(dataset: TextDataset, split: str, documents: int | None = None) -> str:
    """The lines of a split as one text."""
    rows = open_dataset(dataset, split)
    lines: Sequence[str] = rows[: documents if documents is not None else len(rows)][dataset.column]
    return dataset.joint.join(lines)


def long_documents(
    dataset: TextDataset, tokenizer: Any, length: int, draw: random.Random
) -> Iterator[Tensor]:
    """Ids of random documents of more than ``length`` tokens, without end.

    Raises:
        ValueError: if among 100,000 documents in a row none is that long.
    """
    rows = open_dataset(dataset, dataset.calibration)
    while True:
        for _ in range(_MOST_DOCUMENTS):
            document = rows[draw.randint(0, len(rows) - 1)][dataset.column]
            ids = encode(document, tokenizer)
            if len(ids) > length:
                yield ids
                break
        else:
            raise ValueError(
                f"none of {_MOST_DOCUMENTS} documents of {dataset.path} has more than {length} "
                "tokens; use shorter windows or another text"
            )


def encode(text: str, tokenizer: Any) -> Tensor:
    """Token ids (n,) of a text, with what the tokenizer puts before it."""
    # Not verbose: it would warn of a text longer than the model's window.
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.long)


def encode_file(path: Path, tokenizer: Any) -> Tensor:
    """Token ids (n,) of a file of text in UTF-8; for a byte-level tokenizer, of any file.

    Raises:
        OSError: if it cannot be read.
        ValueError: if it is no such text, or empty.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no text file {path}; give one, or {', '.join(DATASETS)} or tiny"
        )
    content = path.read_bytes()
    if not content:
        raise ValueError(f"{path} is empty; give a file with text")
    ids = byte_ids(tokenizer)
    if ids is not None:
        return torch.tensor(ids)[torch.frombuffer(bytearray(content), dtype=torch.uint8).long()]
    try:
        return encode(content.decode("utf-8"), tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not text in UTF-8 (byte {content[error.start]:#04x} at {error.start}), and "
            "the tokenizer does not take bytes; convert the file"
        ) from error
