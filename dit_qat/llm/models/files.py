"""The folder of a model: found here or on the hub, with weights in safetensors."""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dit_qat.llm.models.shipped import TINY, shipped_model

__all__ = ["StoredTensors", "locate_model"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Weights in other forms would double the download, and pickles are never read.
_WANTED = ["model*.safetensors", _INDEX, "*.json", "*.model", "merges.txt", "vocab.txt", "*.jinja"]


def locate_model(source: str | os.PathLike[str], revision: str | None = None) -> Path:
    """The folder of a model, downloaded if it is on the hub.

    Args:
        source: A folder, a hub id "org/name", or "tiny" for the shipped model.
        revision: Branch, tag or commit of the hub's repository.

    Raises:
        FileNotFoundError: if there is no such folder, or it lacks config.json or weights.
        OSError: if the hub cannot be reached or has no such model.
    """
    path = Path(source)
    if path.is_dir():
        return _checked(path)
    name = os.fspath(source)
    if name == TINY:
        return shipped_model()
    if path.exists() or path.is_absolute() or name.count("/") != 1 or name.startswith((".", "~")):
        raise FileNotFoundError(
            f"{name} is no folder and no hub id; give a folder with config.json and "
            f"{_SINGLE}, a hub id 'org/name', or {TINY!r}"
        )
    try:
        found = snapshot_download(name, revision=revision, allow_patterns=_WANTED)
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise OSError(
            f"there is no folder {name}, and the hub did not give it ({type(error).__name__}: "
            f"{error}); check the name, the connection, HF_HUB_OFFLINE, and for a gated model "
            "'hf auth login'"
        ) from error
    return _checked(Path(found))


def _checked(folder: Path) -> Path:
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give the folder of a model")
    if not any((folder / name).is_file() for name in (_SINGLE, _INDEX)):
        raise FileNotFoundError(
            f"{folder} has no {_SINGLE} (nor {_INDEX}); other weights are not read, for they can "
            "run code: convert them with save_pretrained where you trust them"
        )
    return folder


class StoredTensors:
    """The tensors of a folder by name, read when asked for.

    Args:
        folder: With one safetensors file, or shards and their index.

    Raises:
        ValueError: if the index or a file is damaged.
        FileNotFoundError: if a shard is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._files: dict[str, Path] = {}
        for path in _shards(folder):
            with _opened(path) as file:
                for name in file.keys():  # noqa: SIM118 (it is no mapping)
                    self._files[name] = path
                    self.shapes[name] = tuple(file.get_slice(name).get_shape())

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def read(self, names: Sequence[str]) -> Iterator[tuple[str, Tensor]]:
        """Tensors by name, mapped from their files: no memory before they are copied.

        Raises:
            ValueError: if a file was damaged since.
        """
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._files[name], []).append(name)
        for path, held in by_file.items():
            with _opened(path) as file:
                for name in held:
                    yield name, file.get_tensor(name)


def _shards(folder: Path) -> list[Path]:
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return [folder / _SINGLE]
    try:
        places: Mapping[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(places.values()))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{index} is damaged ({error!r}); download the model again") from error
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {len(missing)} of {len(names)} shards, such as {missing[0]}; download "
            "the model again"
        )
    return [folder / name for name in names]


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged ({error}); download the model again") from error
