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
from dit_qat.layers import (
    InputTransform,
    IntLinear,
    Permute,
    Rotate,
    Scale,
    StepBits,
    TokenQuantizer,
    follow_timesteps_,
    quantize_,
)
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest

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


POLICY = StepBits((0.0, 250.0, 500.0, 750.0, 999.0), (3, 4, 8, 4, 2))
MADE: dict[str, dict[str, Any]] = {
    "attn.qkv": {"grid": IntegerGrid(2, group_size=8), "steps": "spr", "policy": POLICY},
    "attn.proj": {"grid": IntegerGrid(3, False), "activation": TokenQuantizer(4, False, 8)},
    "mlp.fc1": {"grid": IntegerGrid(4), "rank": 3, "steps": "rpR", "policy": POLICY},
    "mlp.fc2": {
        "grid": IntegerGrid(8, False, 24),
        "activation": TokenQuantizer(8, False, fixed_range=(-3.0, 2.5)),
        "steps": "s",
        "rank": 2,
        "branch_dtype": "float32",
    },
}
"""Settings of integer layers that between them use all of the format."""


def int_linear(
    linear: torch.nn.Linear,
    grid: IntegerGrid,
    activation: TokenQuantizer | None = None,
    steps: str = "",
    rank: int = 0,
    policy: StepBits | None = None,
    branch_dtype: Any = "float16",
) -> IntLinear:
    """A float layer rounded; ``steps`` name scale, permutation, rotation and rotation in blocks."""
    width, generator = linear.in_features, torch.Generator().manual_seed(linear.out_features)
    make: dict[str, Callable[[], Any]] = {
        "s": lambda: Scale(torch.rand(width, generator=generator) + 0.5),
        "p": lambda: Permute(torch.randperm(width, generator=generator)),
        "r": lambda: Rotate(Rotation(width, 5)),
        "R": lambda: Rotate(Rotation(width, None, 8)),
    }
    transform = InputTransform(width, [make[step]() for step in steps])
    up = torch.randn(linear.out_features, rank, generator=generator) / 8
    down = torch.randn(rank, width, generator=generator) / 8
    codes, scales = round_to_nearest(transform.weight(linear.weight.detach()) - up @ down, grid)
    return IntLinear.build(
        linear,
        grid=grid,
        scales=scales,
        codes=codes,
        activation=activation or TokenQuantizer(4),
        transform=transform,
        branch=(up, down) if rank else None,
        step_bits=policy,
        branch_dtype=branch_dtype,
    )


@pytest.fixture(scope="session")
def make_int() -> Callable[..., DiT]:
    """A DiT whose block linears hold integers, of all the kinds that there are."""

    def make(seed: int = 0) -> DiT:
        model = random_dit(seed)
        for block in range(2):
            for name, settings in MADE.items():
                full = f"blocks.{block}.{name}"
                linear = model.get_submodule(full)
                assert isinstance(linear, torch.nn.Linear)
                model.set_submodule(full, int_linear(linear, **settings))
        follow_timesteps_(model, "t")
        return model

    return make


@pytest.fixture(scope="session")
def int_model(make_int: Callable[..., DiT]) -> DiT:
    """One of them; not to be changed."""
    return make_int()


@pytest.fixture(scope="session")
def int_folder(int_model: DiT, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its packed folder; not to be changed."""
    folder = tmp_path_factory.mktemp("int") / "model"
    write_packed(int_model, folder, provenance={"data": "none", "steps": 0})
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


@pytest.fixture(scope="session")
def as_version(
    resigned: Callable[[Path, Callable[[dict[str, Any]], None]], None],
) -> Callable[[Path, int], None]:
    """Make a folder of version 4 one of an earlier version, which had sha256 digests."""

    def rewrite(folder: Path, version: int) -> None:
        path = folder / "model.safetensors"
        data = path.read_bytes()
        start = 8 + int.from_bytes(data[:8], "little")
        header = json.loads(data[8:start])

        def change(content: dict[str, Any]) -> None:
            content["version"] = version
            for name, entry in content["tensors"].items():
                del entry["xxh3_128"]
                begin, end = header[name]["data_offsets"]
                entry["sha256"] = hashlib.sha256(data[start + begin : start + end]).hexdigest()

        resigned(folder, change)
        written = path.read_bytes()
        path.write_bytes(written.replace(b'"version":"4"', f'"version":"{version}"'.encode(), 1))

    return rewrite
