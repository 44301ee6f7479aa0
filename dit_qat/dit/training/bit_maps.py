"""Bit maps and networks: giving layers their bits, and refusing a map of another model."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from torch import nn

from dit_qat.allocation import BitMap, average_bits
from dit_qat.dit.methods import AMPN, Method
from dit_qat.layers import QuantLinear

__all__ = ["read_bit_map", "saved_bits", "set_bits_", "settled"]

_SHOWN = 3
_CURE = "allocate for this model (dit-qat allocate), or leave bit_map out"


def read_bit_map(path: Path) -> BitMap:
    """Read the file that an allocation wrote.

    Raises:
        FileNotFoundError: if there is none.
        ValueError: if it is damaged or of another version.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"there is no bit map {path}; make one with dit-qat allocate, or leave bit_map out to "
            "have bits allocated after a warm-up"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged ({error}); make it again") from error
    return BitMap.from_dict(content, path)


def settled(
    method: Method | None, network: nn.Module, float_layers: Sequence[str] = ()
) -> Method | None:
    """A method whose bit map, if it names one, is read and belongs to the network.

    Args:
        method: Any; others than AMPN are returned as they are.
        network: The float network that is about to be quantized.
        float_layers: Globs of layers that stay float, for which a bit map has no bits.

    Raises:
        ValueError: for a bit map of another model, naming layers, or beyond the method's budget.
        OSError: if it cannot be read.
    """
    if not isinstance(method, AMPN) or method.config.bit_map is None:
        return method
    sizes = {
        name: module.weight.numel()
        for name, module in network.named_modules()
        if isinstance(module, nn.Linear)
        and any(fnmatchcase(name, pattern) for pattern in method.layers)
        and not any(fnmatchcase(name, pattern) for pattern in float_layers)
    }
    bits, source = method.config.bit_map, "method.bit_map"
    if not isinstance(bits, dict):
        source = str(bits)
        read = read_bit_map(Path(bits))
        bits = read.by_layer
        _check_sizes(dict(zip(read.layers, read.costs, strict=True)), sizes, source)
    _check_names(bits, sizes, source)
    average = average_bits([bits[name] for name in sizes], [*sizes.values()])
    if average > method.config.average_bits + 1e-9:
        raise ValueError(
            f"{source} takes {average:.4g} bits on average, beyond average_bits="
            f"{method.config.average_bits:g}; raise that, or allocate anew"
        )
    return method.with_bits(bits)


def saved_bits(checkpoint: Mapping[str, Any]) -> dict[str, int] | None:
    """The bit map among a checkpoint's hyper-parameters."""
    method = checkpoint.get("hyper_parameters", {}).get("method") or {}
    found = method.get("init_args", {}).get("bit_map")
    return found if isinstance(found, dict) else None


def set_bits_(network: nn.Module, bits: Mapping[str, int]) -> None:
    """Give quantized layers their activation bits, by module name.

    A layer's quantizer is a frozen value of its configuration, so this touches no tensor.

    Raises:
        ValueError: for bits of a layer that the network does not have, or does not quantize.
    """
    layers = {n: m for n, m in network.named_modules() if isinstance(m, QuantLinear)}
    foreign = [n for n in bits if n not in layers or layers[n].config.activation is None]
    if foreign:
        raise ValueError(
            "these are the bits of another model: this network quantizes no activations in "
            f"{_listed(foreign)}; build it as the one that they were allocated for"
        )
    for name, b in bits.items():
        layer = layers[name]
        assert layer.config.activation is not None
        layer.config = replace(layer.config, activation=replace(layer.config.activation, bits=b))


def _check_names(bits: Mapping[str, int], sizes: Mapping[str, int], source: str) -> None:
    foreign = [name for name in bits if name not in sizes]
    if foreign:
        raise ValueError(
            f"{source} is a bit map of another model: it has bits for {_listed(foreign)}, which is "
            f"no layer to quantize in this network; {_CURE}"
        )
    left_out = [name for name in sizes if name not in bits]
    if left_out:
        raise ValueError(
            f"{source} is a bit map of another model: it has none for {_listed(left_out)}; {_CURE}"
        )


def _check_sizes(costs: Mapping[str, int], sizes: Mapping[str, int], source: str) -> None:
    differing = [name for name in sizes if costs.get(name, sizes[name]) != sizes[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{source} is a bit map of another model: {_listed(differing)} differ in size "
            f"({costs[name]:,} weights there, {sizes[name]:,} here); {_CURE}"
        )


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
