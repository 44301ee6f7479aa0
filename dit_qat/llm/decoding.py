"""Packed models for many calls of few tokens: weights decoded once, not at every call."""

from typing import Any, NamedTuple

from torch import nn

from dit_qat.export.packers import quantized_layers
from dit_qat.llm.models.room import free_bytes

__all__ = ["Decoded", "decode_"]

_SHARE = 0.8  # of free memory that decoded weights may take


class Decoded(NamedTuple):
    """What decoding takes.

    Attributes:
        packed: Bytes of the quantized layers as they are stored.
        decoded: Bytes of the same weights and biases in the model's dtype.
        done: Whether the model holds the latter now.
    """

    packed: int
    decoded: int
    done: bool


def decode_(model: Any, wanted: bool | None = None) -> Decoded:
    """Put float linear layers in the place of packed ones, with the values that those decode to.

    A packed layer decodes its weight at every call, which costs as much for one token as for a
    thousand. The model gives the same bits then (layers that transform their inputs: up to
    rounding), takes the memory of a float one, and is a float one to transformers.

    Args:
        model: Of transformers, packed and loaded; changed in place. A float one stays as it is.
        wanted: Whether to; None: if it takes at most 0.8 of the memory that is free.
    """
    layers = quantized_layers(model)
    packed = sum(buffer.nbytes for layer in layers.values() for buffer in layer.buffers())
    decoded = model.dtype.itemsize * sum(_numbers(layer) for layer in layers.values())
    if wanted is None:
        free = free_bytes(model.device)
        wanted = free is None or decoded <= _SHARE * free
    done = wanted and bool(layers)
    if done:
        model.dequantize(model.dtype)
    return Decoded(packed, decoded, done)


def _numbers(layer: Any) -> int:
    bias: nn.Parameter | None = layer.bias
    return int(layer.out_features * (layer.in_features + (bias is not None)))
