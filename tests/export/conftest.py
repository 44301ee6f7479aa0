"""A small quantized DiT and its packed folder."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.export import write_packed
from dit_qat.layers import quantize_

SIZES: dict[str, Any] = {
    "input_size": 4,
    "patch_size": 2,
    "in_channels": 1,
    "hidden_size": 24,
    "depth": 2,
    "num_heads": 2,
    "num_classes": 3,
}


def random_dit(seed: int = 0, **overrides: Any) -> DiT:
    """A float DiT whose every parameter is random: a fresh one computes zero."""
    model = DiT(**(SIZES | overrides))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    return model.eval()


@pytest.fixture(scope="session")
def make_quantized() -> Callable[..., DiT]:
    """A quantized DiT, with arguments of RobuQ."""

    def make(seed: int = 0, **method: Any) -> DiT:
        settings = {"activation_bits": 3, "rank": 2, "adaln_bits": 4} | method
        return quantize_(random_dit(seed), RobuQ(**settings).quant_config())

    return make


@pytest.fixture(scope="session")
def quantized(make_quantized: Callable[..., DiT]) -> DiT:
    """One of them; not to be changed."""
    return make_quantized()


@pytest.fixture(scope="session")
def packed_folder(quantized: DiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its packed folder; not to be changed."""
    folder = tmp_path_factory.mktemp("packed") / "model"
    write_packed(quantized, folder, provenance={"data": "none", "steps": 0})
    return folder


@pytest.fixture(scope="session")
def inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Images, timesteps and labels for these models."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 1, 4, 4, generator=generator)
    return x, torch.tensor([1, 400, 999]), torch.tensor([0, 2, 3])


@pytest.fixture(scope="session")
def resigned() -> Callable[[Path, Callable[[dict[str, Any]], None]], None]:
    """Change config.json and enter its new sha256 in the other file, as a forger would."""

    def resign(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
        path, tensors = folder / "config.json", folder / "model.safetensors"
        old = hashlib.sha256(path.read_bytes()).hexdigest()
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))
        new = hashlib.sha256(path.read_bytes()).hexdigest()
        tensors.write_bytes(tensors.read_bytes().replace(old.encode(), new.encode(), 1))

    return resign
