"""Float weights on disk: our safetensors files, the published checkpoints, and the hub."""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dit_qat.dit.models.dit import DiT
from dit_qat.export.files import written_whole

__all__ = ["EMBEDDED_WEIGHTS", "load_dit", "load_weights_", "save_dit"]

EMBEDDED_WEIGHTS = {"digits": "digits_dit.safetensors"}

_PUBLISHED_SUFFIXES = (".pt", ".pth")
_HUB_FILE = "model.safetensors"


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
    """
    path = Path(path)
    state = model.state_dict()
    quantized = [key for key, value in state.items() if not isinstance(value, Tensor)]
    if quantized:
        raise ValueError(
            f"{quantized[0]!r} belongs to a quantized layer, which this format cannot hold; export "
            "a packed folder, or turn the layers into float ones with to_float first"
        )
    tensors = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    ours = {"config": json.dumps(model.config), "sha256": _digest(tensors)}
    header = {**(metadata or {}), **ours}
    with written_whole(path) as temporary:
        save_file(tensors, temporary, metadata=header)
        _sort_metadata(temporary)
        temporary.chmod(0o644)  # safetensors makes files that only their owner reads


def load_dit(source: str | os.PathLike[str], device: torch.device | str = "cpu") -> DiT:
    """Load a float DiT, in float32 and training mode.

    Args:
        source: An embedded name ("digits"), a .safetensors file of :func:`save_dit`, a published
            .pt checkpoint (configuration inferred from shapes; "ema" is preferred to "model"), or
            a hub id "org/name" whose model.safetensors is one of ours.
        device: Where the weights go.

    Raises:
        FileNotFoundError: If the file is nowhere to be found.
        ValueError: If the file is damaged or was changed (files of ours carry a sha256 of their
            tensors), is of another format, or does not fit its configuration.
    """
    path = _resolve(source)
    config, state = _read(path)
    return _build(config, state, path).to(device)


def load_weights_(model: DiT, source: str | os.PathLike[str]) -> None:
    """Put float weights into an existing DiT of the same architecture.

    Args:
        model: A float DiT; its parameters are replaced, so that no second copy stays.
        source: As for :func:`load_dit`.

    Raises:
        FileNotFoundError: If the file is nowhere to be found.
        ValueError: As for :func:`load_dit`, or for weights of another architecture.
    """
    path = _resolve(source)
    config, state = _read(path)
    own = model.config
    differing = [
        f"{key}={value} in the file, {own.get(key)} here"
        for key, value in config.items()
        if own.get(key) != value
    ]
    if differing:
        raise ValueError(
            f"{path}: weights of another architecture ({'; '.join(differing)}); set the network's "
            "arguments to those of the file"
        )
    _check_state(model.state_dict(), state, path)
    device = model.pos_embed.device
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    floats = {key: value.to(device, torch.float32) for key, value in state.items()}
    model.load_state_dict(floats, assign=True)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trained)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    if path.suffix == ".safetensors":
        return _read_ours(path)
    if path.suffix in _PUBLISHED_SUFFIXES:
        state = _read_published(path)
        return _infer_config(state, path), state
    raise ValueError(
        f"{path}: unknown format {path.suffix!r}; give a .safetensors file written by save_dit "
        f"or a published checkpoint ({', '.join(_PUBLISHED_SUFFIXES)})"
    )


def _resolve(source: str | os.PathLike[str]) -> Path:
    name = os.fspath(source)
    path = Path(source)
    if name in EMBEDDED_WEIGHTS:
        # The package is installed as plain files, so that a resource is a path.
        path = Path(str(resources.files("dit_qat.dit") / "assets" / EMBEDDED_WEIGHTS[name]))
    if path.is_dir():
        raise ValueError(
            f"{path}: is a folder; give the file inside, or call load_quantized for a packed model"
        )
    if path.is_file():
        return path
    if re.fullmatch(r"[\w.-]+/[\w.-]+", name) and path.suffix not in (
        ".safetensors",
        *_PUBLISHED_SUFFIXES,
    ):
        return _download(name)
    raise FileNotFoundError(
        f"{path}: no such file; give an existing file, a hub id 'org/name', or an embedded name "
        f"({', '.join(EMBEDDED_WEIGHTS)})"
    )


def _download(repo: str) -> Path:
    try:
        return Path(hf_hub_download(repo, _HUB_FILE))
    except (OSError, EntryNotFoundError, HFValidationError) as error:
        raise FileNotFoundError(
            f"{repo}: no such file, and no {_HUB_FILE} could be had from the hub repository of "
            f"that name ({type(error).__name__}); check the name and the connection, or download "
            "the file and give its path"
        ) from error


def _read_ours(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
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
            "with save_dit (for diffusers' weights: dit_from_diffusers, then save_dit)"
        )
    try:
        return dict(json.loads(metadata["config"])), state
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: the 'config' in the header is not a JSON object ({error}); write the file "
            "again with save_dit"
        ) from error


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


def _read_published(path: Path) -> dict[str, Tensor]:
    try:
        # Training checkpoints of the original code carry their arguments along.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, EOFError, UnpicklingError, ValueError, KeyError) as error:
        raise ValueError(
            f"{path}: truncated or not a checkpoint of tensors ({type(error).__name__}); copy or "
            "download it again"
        ) from error
    if isinstance(content, dict):
        for name in ("ema", "model"):
            content = content.get(name, content)
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(
            f"{path}: holds no state dict of tensors, neither at the top nor under 'ema' or "
            "'model'; is it a DiT checkpoint?"
        )
    return content


def _infer_config(state: Mapping[str, Tensor], path: Path) -> dict[str, Any]:
    """Derive the constructor's arguments from the shapes of a published checkpoint."""
    try:
        hidden, channels, patch, _ = state["x_embedder.proj.weight"].shape
        grid = round(state["pos_embed"].shape[1] ** 0.5)
        out_features = state["final_layer.linear.weight"].shape[0]
        mlp_ratio = state["blocks.0.mlp.fc1.weight"].shape[0] / hidden
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"{path}: not a DiT checkpoint (stopped at {error}); for diffusers' weights call "
            "dit_from_diffusers"
        ) from error
    if hidden != 1152 and hidden % 64:
        raise ValueError(
            f"{path}: the number of heads does not show in the shapes, and hidden_size={hidden} is "
            "no multiple of 64; load it into a DiT of your own and write that with save_dit"
        )
    table = state.get("y_embedder.embedding_table.weight")
    return {
        "input_size": grid * patch,
        "patch_size": patch,
        "in_channels": channels,
        "hidden_size": hidden,
        "depth": len({key.split(".")[1] for key in state if key.startswith("blocks.")}),
        "num_heads": 16 if hidden == 1152 else hidden // 64,
        "mlp_ratio": mlp_ratio,
        "num_classes": 0 if table is None else table.shape[0] - 1,
        "learn_sigma": out_features == 2 * channels * patch**2,
    }


def _build(config: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> DiT:
    try:
        # Without storage: every tensor is about to be replaced.
        with torch.device("meta"):
            model = DiT(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: its configuration does not build a DiT ({error})") from error
    _check_state(model.state_dict(), state, path)
    model.load_state_dict({key: value.float() for key, value in state.items()}, assign=True)
    return model


def _check_state(expected: Mapping[str, Tensor], state: Mapping[str, Tensor], path: Path) -> None:
    for keys, what in ((expected.keys() - state, "lacks"), (state.keys() - expected, "also holds")):
        if keys:
            shown = ", ".join(sorted(keys)[:3])
            raise ValueError(
                f"{path}: {what} {len(keys)} tensors, such as {shown}; the weights belong to "
                "another model than the configuration describes"
            )
    for key, tensor in state.items():
        if tensor.shape != expected[key].shape:
            raise ValueError(
                f"{path}: {key} has shape {tuple(tensor.shape)}, but the configuration asks for "
                f"{tuple(expected[key].shape)}; the two belong to different models"
            )
        if not tensor.isfinite().all():
            raise ValueError(
                f"{path}: {key} holds NaN or infinite values; the training that wrote it diverged "
                "or the file is damaged, so take an earlier checkpoint"
            )
