"""The language model and the texts that come with the package."""

from pathlib import Path
from typing import Literal

__all__ = ["TINY", "shipped_model", "shipped_text"]

TINY = "tiny"
"""What stands for the shipped model and its texts where a model or a text is named."""

_ASSETS = Path(__file__).resolve().parent.parent / "assets"


def shipped_model() -> Path:
    """Folder of a byte-level Llama of 2.8 million parameters, window 256.

    ``README.json`` beside it says how ``tools/build_llm_assets.py`` made it.

    Raises:
        FileNotFoundError: if the installation lacks it.
    """
    return _existing("model")


def shipped_text(part: Literal["calibration", "heldout"]) -> Path:
    """A text of Python's standard library that the shipped model was not trained on.

    Raises:
        FileNotFoundError: if the installation lacks it.
    """
    return _existing(f"{part}.txt")


def _existing(name: str) -> Path:
    path = _ASSETS / name
    if not path.exists():
        raise FileNotFoundError(
            f"{path} is missing from this installation; install the package again, or rebuild it "
            "with tools/build_llm_assets.py"
        )
    return path
