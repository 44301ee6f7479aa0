"""Folders of diffusers' ``DiTTransformer2DModel``: a config.json and weights, whole or sharded."""

import json
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from dit_qat.dit.models.published import read_torch_file

__all__ = ["CONFIG_FILE", "WEIGHT_FILES", "Transformer", "read_transformer", "shards_of"]

CONFIG_FILE = "config.json"

# The order in which diffusers looks for them; what was published first is a .bin.
WEIGHT_FILES = (
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.safetensors.index.json",
    "diffusion_pytorch_model.bin",
    "diffusion_pytorch_model.bin.index.json",
)
_CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")  # the second until diffusers 0.28


@dataclass(frozen=True)
class Transformer:
    """What such a folder holds.

    Attributes:
        config: The content of its config.json.
        state: Tensors by diffusers' names.
    """

    config: dict[str, Any]
    state: dict[str, Tensor]

    def build(self) -> nn.Module:
        """The diffusers model itself, float32, in evaluation mode; draws no random numbers."""
        from diffusers import DiTTransformer2DModel  # seconds, which only this costs

        known = signature(DiTTransformer2DModel.__init__).parameters
        arguments = {name: value for name, value in self.config.items() if name in known}
        with torch.random.fork_rng(devices=[]):
            model: nn.Module = DiTTransformer2DModel(**arguments)
        # Files of old versions also hold the position table, which is computed now.
        model.load_state_dict({name: self.state[name] for name in model.state_dict()})
        return model.eval()


def read_transformer(folder: Path) -> Transformer:
    """Read the configuration and the tensors.

    Raises:
        FileNotFoundError: If there are no weights, or a shard is missing.
        ValueError: If it is another kind of model, or a file is damaged.
    """
    config = _read_json(folder / CONFIG_FILE)
    kind = config.get("_class_name")
    if kind not in _CLASSES:
        raise ValueError(
            f"{folder}: its {CONFIG_FILE} names {kind or 'no class'}, not a {_CLASSES[0]}; for a "
            "packed model of ours call load_quantized"
        )
    return Transformer(config, _read_weights(folder))


def shards_of(index: Path) -> list[str]:
    """The file names that an index lists.

    Raises:
        ValueError: If it is damaged, or names files elsewhere.
    """
    weight_map = _read_json(index).get("weight_map")
    names = set(weight_map.values()) if isinstance(weight_map, dict) else set()
    if not names or any(not isinstance(name, str) or Path(name).name != name for name in names):
        raise ValueError(f"{index}: lists no weight files of its folder; download it again")
    return sorted(names)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    found = next((folder / name for name in WEIGHT_FILES if (folder / name).is_file()), None)
    if found is None:
        raise FileNotFoundError(
            f"{folder}: no weights beside its {CONFIG_FILE} (looked for "
            f"{', '.join(WEIGHT_FILES)}); copy or download the whole folder"
        )
    if found.suffix != ".json":
        return _read_tensors(found)
    shards = [folder / name for name in shards_of(found)]
    for shard in shards:
        if not shard.is_file():
            raise FileNotFoundError(
                f"{shard}: no such file, but {found.name} lists it; download the folder again"
            )
    state: dict[str, Tensor] = {}
    for shard in shards:
        state |= _read_tensors(shard)
    return state


def _read_tensors(path: Path) -> dict[str, Tensor]:
    if path.suffix != ".safetensors":
        content = read_torch_file(path)
        if not isinstance(content, dict) or not all(
            isinstance(v, Tensor) for v in content.values()
        ):
            raise ValueError(f"{path}: holds no state dict of tensors; download it again")
        return content
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(
            f"{path}: truncated or not a safetensors file ({error}); copy or download it again"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); copy or download it again") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no JSON object; copy or download it again")
    return content
