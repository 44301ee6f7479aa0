"""What commands leave on disk: a folder that nobody's results are in, and a picture."""

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from dit_qat.dit.evaluation import image_grid, save_png
from dit_qat.export.files import check_folder, claim_folder

__all__ = ["GRID_IMAGES", "check_claim", "claim", "save_grid"]

GRID_IMAGES = 100
"""How many images a picture of samples shows at most."""

_CURE = "choose another --out, or pass --overwrite true to replace them"
_GRID_COLUMNS = 10
_GRID_CELL = 32


def check_claim(out: Path, names: Sequence[str], overwrite: bool) -> None:
    """Raise what :func:`claim` would, and change nothing."""
    check_folder(out, names, overwrite, _CURE)


def claim(out: Path, names: Sequence[str], overwrite: bool) -> None:
    """Make the folder of ``--out``; raises FileExistsError if it holds results already."""
    claim_folder(out, names, overwrite, _CURE)


def save_grid(path: Path, images: Sequence[Tensor]) -> None:
    """Write a picture of the first hundred images, given as batches (n, C, H, W), uint8."""
    shown = torch.cat(list(images))[:GRID_IMAGES]
    scale = max(1, _GRID_CELL // shown.shape[-1])
    save_png(path, image_grid(shown, min(_GRID_COLUMNS, len(shown)), scale))
