"""Our own file of float weights: safetensors with the configuration in the header."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_qat.dit.models.dit import DiT
from dit_qat.export.files import written_whole
from dit_qat.export.folders import writing
from dit_qat.export.manifest import FORMAT

__all__ = ["float_state", "not_float", "read_native", "save_dit"]


def float_state(model: DiT) -> dict[str, Tensor]:
    """The tensors of a float DiT, on the CPU.

    Raises:
        ValueError: If the model has quantized layers, whose state is more than tensors.
    """
    state = model.state_dict()
    quantized = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if quantized:
        raise ValueError(
            f"{quantized[0]!r} belongs to a quantized layer, which this format cannot hold; export "
            "a packed folder, or turn the layers into float ones with to_float first"
        )
    return {key: value.detach().cpu().contiguous() for key, value in state.items()}


def save_dit(
    model: DiT, path: str | os.PathLike[str], metadata: Mapping[str, str] | None = None
) -> None:
    """Write weights and configuration to one safetensors file, at once or not at all.

    Args:
        model: A float DiT.
        path: Where to write; missing folders are made, an existing file is replaced.
        metadata: Further text for the file's header; the keys "config" and "sha256" (of
            the tensors) are ours.

    Raises:
        ValueError: If the model has quantized layers, whose state is more than tensors.
        OSError: If the file cannot be written.
    """
    path = Path(path)
    tensors = float_state(model)
    ours = {"config": json.dumps(model.config), "sha256": _digest(tensors)}
    header = {**(metadata or {}), **ours}
    with writing(path), written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        _sort_metadata(temporary)
        temporary.chmod(0o644)  # safetensors makes files that only their owner reads


def read_native(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the arguments of :class:`DiT` and the tensors from a file of :func:`save_dit`.

    Raises:
        ValueError: If the file is damaged, was changed, is packed, or is not one of ours.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") == FORMAT:
                raise not_float(path.parent)
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({error}); copy or download it again"
        ) from error
    written = metadata.get("sha256")  # which older files and those of others lack
    if written is not None and written != _digest(state):
        raise ValueError(
            f"{path}: the tensors are not those that were written (their sha256 differs from the "
            "header's), so the file is damaged or was changed; copy or download it again"
        )
    if "config" not in metadata:
        raise ValueError(
            f"{path}: no 'config' in the header, so the model's size is unknown; write the file "
            "with save_dit (diffusers' weights: give their folder, which has a config.json)"
        )
    try:
        return dict(json.loads(metadata["config"])), state
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: the 'config' in the header is not a JSON object ({error}); write the file "
            "again with save_dit"
        ) from error


def not_float(folder: Path) -> ValueError:
    """What to say about a packed folder where float weights are wanted."""
    return ValueError(
        f"{folder}: holds packed weights, codes that nothing can be trained on; to run them, call "
        "dit_qat.load_quantized, or DiT.from_pretrained; to train (model.float_weights), give the "
        "float weights that they started from, or go on from the run's own checkpoint (--ckpt_path)"
    )


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 over names, types, shapes and bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _sort_metadata(path: Path) -> None:
    """Give a file the same bytes every time: safetensors writes the metadata in random order."""
    with path.open("rb+") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
        header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
        text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size  # the same text in another order, before the padding
        file.seek(8)
        file.write(text.ljust(size))
