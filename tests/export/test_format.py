"""docs/format.md is enough: a reader in numpy, which imports nothing of ours, computes the same."""

import hashlib
import json
import struct
from collections.abc import Callable
from math import prod, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xxhash
from numpy.typing import NDArray

from dit_qat.dit.models import DiT
from dit_qat.export import write_packed
from dit_qat.layers import IntLinear, QuantLinear, timestep_scope
from dit_qat.primitives.packing import pack_base3, pack_ternary

Array = NDArray[Any]
DTYPES = {
    "U8": np.uint8,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "I32": np.int32,
}


def read_tensors(folder: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    config_bytes = (folder / "config.json").read_bytes()
    config = json.loads(config_bytes)
    data = (folder / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    assert header.pop("__metadata__") == {
        "format": "dit_qat.packed",
        "version": str(config["version"]),
        "config_sha256": hashlib.sha256(config_bytes).hexdigest(),
    }
    assert config["format"] == "dit_qat.packed"
    assert config["version"] == 4
    assert header.keys() == config["tensors"].keys()
    tensors = {}
    for name, entry in header.items():
        begin, end = (8 + length + offset for offset in entry["data_offsets"])
        digest = xxhash.xxh3_128(data[begin:end]).hexdigest()
        assert config["tensors"][name]["xxh3_128"] == digest
        values = np.frombuffer(data[begin:end], DTYPES[entry["dtype"]]).reshape(entry["shape"])
        if entry["dtype"] == "BF16":
            values = (values.astype(np.uint32) << 16).view(np.float32)
        tensors[name] = values
    return config, tensors


def ternary(storage: str, packed: Array, count: int) -> Array:
    rows, width = packed.shape
    codes = np.zeros((rows, 5 * width), np.int64)
    if storage == "ternary_2":
        for j in range(count):
            codes[:, j] = (packed[:, j // 4] >> (2 * (j % 4))) & 3
        return codes[:, :count] - 1
    for j in range(width):
        for i in range(4):
            codes[:, 4 * j + i] = packed[:, j] // 3**i % 3
        codes[:, 4 * width + j] = packed[:, j] // 81
    assert not codes[:, count:].any()
    return codes[:, :count] - 1


def twister(seed: int, count: int) -> Array:
    """MT19937 as published in 1998, with the seeding of 2002."""
    state = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    numbers: list[int] = []
    while len(numbers) < count:
        for i in range(624):
            y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7FFFFFFF)
            state[i] = state[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)
        for y in state:
            y ^= y >> 11
            y ^= (y << 7) & 0x9D2C5680
            y ^= (y << 15) & 0xEFC60000
            numbers.append(y ^ (y >> 18))
    return np.array(numbers[:count])


def is_prime(q: int) -> bool:
    return q > 1 and all(q % d for d in range(2, q))


def hadamard(m: int) -> Array | None:
    """The matrix of one order; of the Paley ones those over prime fields."""
    if m & (m - 1) == 0:
        return np.array([[(-1) ** (i & j).bit_count() for j in range(m)] for i in range(m)])
    for kind, q in ((1, m - 1), (2, m // 2 - 1)):
        if m % 4 == 0 and is_prime(q) and (kind == 1 or q % 4 == 1):
            squares = {a * a % q for a in range(1, q)}
            chi = [0, *(1 if a in squares else -1 for a in range(1, q))]
            s = np.ones((q + 1, q + 1), int)
            s[0, 0] = 0
            s[1:, 0] = -1 if kind == 1 else 1
            s[1:, 1:] = [[chi[(a - b) % q] for b in range(q)] for a in range(q)]
            if kind == 1:
                return np.eye(q + 1, dtype=int) + s
            pair, border = np.array([[1, 1], [1, -1]]), np.array([[1, -1], [-1, -1]])
            return np.kron(s, pair) + np.kron(np.eye(q + 1, dtype=int), border)
    for d in range(2, m):
        rest = hadamard(m // d) if m % d == 0 else None
        own = hadamard(d) if rest is not None else None
        if own is not None and rest is not None:
            return np.kron(own, rest)
    return None


def rotate(x: Array, rotation: dict[str, Any], seed: int | None) -> Array:
    signs = np.ones(x.shape[-1])
    if seed is not None:
        bits = twister(seed, x.shape[-1]) & 1
        plane = np.packbits(bits.astype(np.uint8), bitorder="little")
        assert rotation["signs_sha256"] == hashlib.sha256(plane.tobytes()).hexdigest()
        signs = 2.0 * bits - 1
    matrix = np.ones((1, 1))
    for order in rotation["factors"]:
        factor = hadamard(order)
        assert factor is not None
        matrix = np.kron(matrix, factor)
    n = prod(rotation["factors"])
    assert n == (rotation["block_size"] or x.shape[-1])
    blocks = (x * signs).reshape(*x.shape[:-1], -1, n)
    return (blocks @ matrix / sqrt(n)).reshape(x.shape)


STEPS = [1.595769, 0.995687, 0.586019, 0.335201, 0.188139, 0.104063, 0.056868, 0.030762]


def quantize(z: Array, activation: dict[str, Any]) -> tuple[Array, Array, Array]:
    """Levels, steps and lows."""
    bits = activation["bits"]
    if activation["kind"] == "RobustQuantizer":
        low = z.mean(-1, keepdims=True) * activation["center"]
        step = STEPS[bits - 1] * np.sqrt(((z - low) ** 2).mean(-1, keepdims=True))
        codes = np.floor((z - low) / step).clip(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return codes + 0.5, step, low
    assert activation["kind"] == "MinMaxQuantizer"
    low = z.min(-1, keepdims=True)
    step = (z.max(-1, keepdims=True) - low) / (2**bits - 1)
    return np.rint((z - low) / step).clip(0, 2**bits - 1), step, low


def linear(x: Array, name: str, config: dict[str, Any], tensors: dict[str, Array]) -> Array:
    module = config["modules"][name]
    assert module["kind"] == "ternary_linear"
    codes = ternary(module["codes"], tensors[f"{name}.codes"], module["in_features"])
    scale = tensors[f"{name}.scale"].astype(np.float64)[:, 0]
    z, rotation = x, module["rotation"]
    if rotation is not None:
        z = rotate(x, rotation, module["seed"] if rotation["signs"] else None)
    levels, step, low = quantize(z, module["activation"])
    y = scale * step * (levels @ codes.T) + scale * low * codes.sum(-1)
    if module["low_rank"] is not None:
        up, down = (tensors[f"{name}.low_rank_{side}"] for side in ("up", "down"))
        y = y + z @ down.T.astype(np.float64) @ up.T.astype(np.float64)
    return y + tensors[f"{name}.bias"] if module["bias"] else y


def integers(packed: Array, bits: int, count: int, signed: bool) -> Array:
    places = np.unpackbits(packed, axis=-1, bitorder="little")
    assert not places[:, count * bits :].any()
    fields = places[:, : count * bits].reshape(len(packed), count, bits).astype(np.int64)
    weights = 2 ** np.arange(bits)
    if signed:
        weights[-1] *= -1
    return fields @ weights


def transform(x: Array, name: str, config: dict[str, Any], tensors: dict[str, Array]) -> Array:
    for i, step in enumerate(config["modules"][name]["transform"]):
        if step["kind"] == "rotate":
            x = rotate(x, step, step["seed"])
        elif step["kind"] == "scale":
            x = x / tensors[f"{name}.transform.vector{i}"]
        else:
            assert step["kind"] == "permute"
            x = x[..., tensors[f"{name}.transform.vector{i}"]]
    return x


def round_tokens(z: Array, activation: dict[str, Any], bits: int) -> Array:
    groups = z.reshape(*z.shape[:-1], -1, activation["group_size"] or z.shape[-1])
    low, high = groups.min(-1, keepdims=True), groups.max(-1, keepdims=True)
    if activation["fixed_range"] is not None:
        low, high = (np.full_like(low, edge) for edge in activation["fixed_range"])
    if activation["symmetric"]:
        most = 2 ** (bits - 1) - 1
        step = np.maximum(-low, high) * activation["clip"][1] / most
        return (np.rint(groups / step).clip(-most, most) * step).reshape(z.shape)
    low = np.minimum(low, 0) * activation["clip"][0]
    high = np.maximum(high, 0) * activation["clip"][1]
    step = (high - low) / (2**bits - 1)
    zero = np.rint(-low / step)
    codes = (np.rint(groups / step) + zero).clip(0, 2**bits - 1)
    return ((codes - zero) * step).reshape(z.shape)


def int_linear(
    x: Array, timestep: float, name: str, config: dict[str, Any], tensors: dict[str, Array]
) -> Array:
    module = config["modules"][name]
    assert module["kind"] == "int_linear"
    grid, count = module["grid"], module["in_features"]
    codes = integers(tensors[f"{name}.codes"], grid["bits"], count, grid["symmetric"])
    groups = codes.reshape(len(codes), -1, grid["group_size"] or count)
    if not grid["symmetric"]:
        groups = groups - tensors[f"{name}.zero"][..., None].astype(np.int64)
    scale = tensors[f"{name}.scale"].astype(np.float64)
    weight = (groups * scale[..., None]).reshape(codes.shape)
    z, policy = transform(x, name, config, tensors), module["step_bits"]
    bits = module["activation"]["bits"]
    if policy is not None:
        bits = policy["bits"][np.abs(np.array(policy["timesteps"]) - timestep).argmin()]
    y = round_tokens(z, module["activation"], bits) @ weight.T
    if module["low_rank"] is not None:
        up, down = (tensors[f"{name}.low_rank_{side}"] for side in ("up", "down"))
        y = y + z @ down.T.astype(np.float64) @ up.T.astype(np.float64)
    return y + tensors[f"{name}.bias"] if module["bias"] else y


@pytest.mark.parametrize("timestep", [0.0, 300.0, 999.0])
def test_a_reader_in_numpy_computes_the_same_with_integers(
    int_model: DiT, int_folder: Path, timestep: float
) -> None:
    config, tensors = read_tensors(int_folder)
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"):
        layer = int_model.get_submodule(f"blocks.1.{name}")
        assert isinstance(layer, IntLinear)
        own = x[:, : layer.in_features]
        with timestep_scope(timestep):
            expected = layer(own).numpy()
        found = int_linear(own.double().numpy(), timestep, f"blocks.1.{name}", config, tensors)
        assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ({"activation_bits": 2}, {"storage": "ternary_1.6"}),
        ({"activation_bits": 4, "center": True, "seed": 7}, {"storage": "ternary_2"}),
        ({"block_size": 12, "signs": False, "per_channel": False}, {"float_dtype": "float16"}),
        ({"activation_bits": 1}, {"branch_dtype": "bfloat16", "float_dtype": "bfloat16"}),
    ],
)
def test_a_reader_in_numpy_computes_the_same(
    make_quantized: Callable[..., DiT],
    tmp_path: Path,
    method: dict[str, Any],
    options: dict[str, Any],
) -> None:
    model = make_quantized(**method)
    write_packed(model, tmp_path / "m", **options)
    config, tensors = read_tensors(tmp_path / "m")
    x = torch.randn(6, 96, generator=torch.Generator().manual_seed(1))
    for name in ("blocks.0.attn.qkv", "blocks.1.mlp.fc2", "blocks.1.adaLN_modulation.1"):
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantLinear)
        own = x[:, : layer.in_features]
        with torch.no_grad():
            expected = layer(own).numpy()
        found = linear(own.double().numpy(), name, config, tensors)
        limit = 1e-2 if "branch_dtype" in options else 1e-5
        assert np.linalg.norm(found - expected) < limit * np.linalg.norm(expected)
    bias = model.final_layer.linear.bias.detach().numpy()
    limit = {"bfloat16": 2**-8, "float16": 2**-11}.get(options.get("float_dtype", ""), 0)
    error = np.abs(tensors["final_layer.linear.bias"].astype(np.float32) - bias)
    assert (error <= limit * np.abs(bias)).all()


def test_the_examples_of_the_page() -> None:
    codes = [1, 0, -1, 1, 0]
    two = np.array([[0b10000110, 0b00000001]], np.uint8)
    assert ternary("ternary_2", two, 5)[0].tolist() == codes
    assert ternary("ternary_1.6", np.array([[140]], np.uint8), 5)[0].tolist() == codes
    assert pack_ternary(torch.tensor([codes])).tolist() == two.tolist()
    assert pack_base3(torch.tensor([codes])).tolist() == [[140]]
    three = np.array([[0b11100011, 0b00000000]], np.uint8)
    assert integers(three, 3, 3, signed=True).tolist() == [[3, -4, 3]]
    assert integers(three, 3, 3, signed=False).tolist() == [[3, 4, 3]]


def names_in(content: Any) -> list[str]:
    """All keys, however deep."""
    if isinstance(content, list):
        return [name for part in content for name in names_in(part)]
    if not isinstance(content, dict):
        return []
    return [*content, *(name for part in content.values() for name in names_in(part))]


def test_the_page_names_what_is_written(packed_folder: Path, int_folder: Path) -> None:
    page = (Path(__file__).parents[2] / "docs" / "format.md").read_text()
    for folder in (packed_folder, int_folder):
        config = json.loads((folder / "config.json").read_text())
        written = [*config, *names_in(config["modules"]["blocks.0.mlp.fc1"])]
        assert [name for name in written if name not in page] == []
