"""Packed DiTs by the names that float weights go by: folders and repositories of the hub."""

import os
from pathlib import Path
from typing import NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError

from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.hub import HTTP_ERROR
from dit_qat.dit.models.locate import locate
from dit_qat.export.loader import load_quantized
from dit_qat.export.manifest import (
    CONFIG_FILE,
    FORMAT,
    QUANT_METHOD,
    TENSOR_FILE,
    is_packed_folder,
    read_manifest,
)
from dit_qat.export.tensor_file import open_tensors

__all__ = ["Located", "load_packed_dit", "locate_weights"]


class Located(NamedTuple):
    """Where weights are: a packed folder, or float weights as ``locate`` finds them."""

    path: Path
    packed: bool


def locate_weights(source: str | os.PathLike[str]) -> Located:
    """Find float or packed weights; download them if the source is a hub id.

    Args:
        source: A packed folder, a hub id of one, or a source of
            :func:`~dit_qat.dit.models.load_dit`.

    Raises:
        FileNotFoundError: if there are none.
        OSError: if a download breaks off.
        ValueError: if it is a folder of something else.
    """
    name, path = os.fspath(source), Path(source)
    if path.is_dir() and is_packed_folder(path):
        return Located(path, packed=True)
    found = locate(source)
    # By the tensors as well: config.json may be damaged, or not have come yet.
    if found.name != TENSOR_FILE or not _holds_packed(found):
        return Located(found, packed=False)
    if not path.exists():
        _fetch_config(name, found)
    return Located(found.parent, packed=True)


def load_packed_dit(folder: Path, device: torch.device | str = "cpu") -> DiT:
    """Load a packed folder that must hold a DiT.

    Raises:
        ValueError: if it holds something else; errors of
            :func:`~dit_qat.export.loader.load_quantized`.
    """
    architecture = read_manifest(folder).architecture
    model = load_quantized(folder, device)
    if not isinstance(model, DiT):
        raise ValueError(
            f"{folder} holds a {architecture!r}, not a DiT; load it by dit_qat.load_quantized, or "
            "for a pipeline by dit_qat.dit.pipelines.packed_transformer"
        )
    return model


def _holds_packed(path: Path) -> bool:
    """Whether a tensor file says that it is of a packed folder."""
    try:
        with open_tensors(path) as file:
            ours, theirs = (file.metadata.get(key) for key in ("format", "quant_method"))
            return ours == FORMAT or theirs == QUANT_METHOD  # the latter within transformers' own
    except ValueError:
        return False


def _fetch_config(name: str, weights: Path) -> None:
    """Download the other file, of the commit of the weights, to where they are."""
    try:
        hf_hub_download(name, CONFIG_FILE, revision=weights.parent.name)
    except (OSError, HTTP_ERROR, EntryNotFoundError) as error:
        raise OSError(
            f"{name}: holds packed weights, whose {CONFIG_FILE} could not be downloaded "
            f"({type(error).__name__}: {error}); check the connection, and repeat the command"
        ) from error
