"""What commands leave on disk: a folder that nobody's results are in, and JSON."""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_qat.dit.evaluation import image_grid, save_png

__all__ = ["claim", "save_grid", "write_json"]

_GRID_COLUMNS = 10
_GRID_IMAGES = 100
_GRID_CELL = 32


def claim(folder: Path, names: Sequence[str], overwrite: bool) -> None:
    """Make a folder for results, or make sure that it holds none.

    Args:
        folder: Where the results will go; made if it does not exist.
        names: Files and folders that the command is going to write there.
        overwrite: Remove those of an earlier run (and nothing else).

    Raises:
        FileExistsError: if there are some and ``overwrite`` is False.
        NotADirectoryError: if the folder is a file.
    """
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder} is a file; choose another --out")
    found = [folder / name for name in names if (folder / name).exists()]
    if found and not overwrite:
        raise FileExistsError(
            f"{folder} already holds results ({', '.join(path.name for path in found)}); choose "
            "another --out, or pass --overwrite true to replace them"
        )
    for path in found:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    folder.mkdir(parents=True, exist_ok=True)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write plain values, whole or not at all; missing folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def save_grid(path: Path, images: Sequence[Tensor]) -> None:
    """Write a picture of the first hundred images, given as batches (n, C, H, W), uint8."""
    shown = torch.cat(list(images))[:_GRID_IMAGES]
    scale = max(1, _GRID_CELL // shown.shape[-1])
    save_png(path, image_grid(shown, min(_GRID_COLUMNS, len(shown)), scale))
