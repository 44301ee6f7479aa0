"""The truth about bits: what every layer stores and computes with, side information included."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

import torch
from torch import nn

from dit_qat.export.int_entry import IntEntry
from dit_qat.layers import CodedLinear, IntLinear, PackedLinear, QuantAttention, QuantLinear
from dit_qat.primitives.formats import Ternary
from dit_qat.primitives.hadamard import Rotation, hadamard_factors
from dit_qat.primitives.packing import count_ternary

__all__ = [
    "FLOAT_INPUT_BITS",
    "PER_IMAGE",
    "LayerDescription",
    "ModelDescription",
    "RotationDescription",
    "describe",
]

PER_IMAGE = ("*adaLN_modulation*", "*t_embedder*", "*y_embedder*")
"""Layers of a diffusion transformer that see one token per image."""

FLOAT_INPUT_BITS = 16
"""What counts for an input that stays float: what such layers compute in where they are served."""

_FLOAT_BITS = 32


@dataclass(frozen=True)
class RotationDescription:
    """The rotation in front of a layer.

    Attributes:
        orders: Hadamard orders of the Kronecker factors; of one block, if it is blockwise.
        signs: Whether random signs come first.
        block_size: Width of the rotated blocks; None: the full width.
    """

    orders: tuple[int, ...]
    signs: bool
    block_size: int | None


@dataclass(frozen=True)
class LayerDescription:
    """One module that holds parameters of its own.

    Attributes:
        name: Dotted name in the model.
        kind: "ternary", "int", the name of a weight's code or, for what stays float, the name of
            the module's class.
        shape: Of the weight; (out, in) for linear layers.
        weights: Numbers in the weight.
        parameters: Numbers in weight, bias and branch.
        float_parameters: The part of ``parameters`` that is no code.
        scales: Float scales of the weight.
        side_bits: Of scales, zero points, and vectors of the input's transform, together; of a
            weight's code, all that it stores beyond its nominal bits.
        weight_bits: Nominal bits per weight.
        activation_bits: Nominal bits of the input, the mean over the timesteps of a policy; 16
            where it stays float, as in the tables of quantization after training.
        rank: Of the float branch; 0: none.
        branch_bits: Of a number of that branch.
        float_bits: Of a number of what else is no code.
        rotation: Of the input, the first of several; None: none.
        transform: What is done to the input, by kind, in order.
        policy: Whether activation bits depend on the timestep.
        zero_fraction: Share of zeros among the ternary codes; None for other layers.
        per_image: Whether the layer sees one token per image, rather than every token.
        quantized: Whether the weight is stored in few bits.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    weights: int
    parameters: int
    float_parameters: int
    scales: int = 0
    side_bits: int = 0
    weight_bits: float = _FLOAT_BITS
    activation_bits: float = FLOAT_INPUT_BITS
    rank: int = 0
    branch_bits: int = _FLOAT_BITS
    float_bits: int = _FLOAT_BITS
    rotation: RotationDescription | None = None
    transform: tuple[str, ...] = ()
    policy: bool = False
    zero_fraction: float | None = None
    per_image: bool = False
    quantized: bool = False

    @property
    def stored_bits(self) -> float:
        """All bits of the layer: codes, scales and the like, branch, and bias."""
        codes, branch = self.parameters - self.float_parameters, self.branch_parameters
        floats = self.float_bits * (self.float_parameters - branch)
        return codes * self.weight_bits + branch * self.branch_bits + self.side_bits + floats

    @property
    def branch_parameters(self) -> int:
        """Numbers in the float branch: rank * (out + in)."""
        return self.rank * sum(self.shape) if self.rank else 0

    @property
    def effective_weight_bits(self) -> float:
        """Codes, scales, transform and branch, in bits per weight; the bias is no part of it."""
        side = self.side_bits + self.branch_bits * self.branch_parameters
        return self.weight_bits + side / self.weights

    @property
    def multiply_adds(self) -> int:
        """Of the (quantized) product with the weight, per token; 0 for other than linear layers."""
        is_linear = self.quantized or self.kind == nn.Linear.__name__
        return self.weights if is_linear else 0


@dataclass(frozen=True)
class ModelDescription:
    """All layers of a model, and its totals.

    Attributes:
        layers: In the order of the model.
        attention_bits: Bits of the attention products, by module name; float ones are absent.
    """

    layers: tuple[LayerDescription, ...]
    attention_bits: dict[str, int]

    @cached_property
    def quantized_layers(self) -> tuple[LayerDescription, ...]:
        """The layers with weights in few bits."""
        return tuple(layer for layer in self.layers if layer.quantized)

    @property
    def parameters(self) -> int:
        """Numbers in the model."""
        return sum(layer.parameters for layer in self.layers)

    @property
    def float_parameter_share(self) -> float:
        """Share of the parameters that are no codes: embedders, biases, branches."""
        return sum(layer.float_parameters for layer in self.layers) / self.parameters

    @property
    def weight_bits(self) -> float:
        """Nominal bits per weight of the quantized layers; of all linear layers without one."""
        return _mean(self._counted, lambda layer: layer.weight_bits, lambda layer: layer.weights)

    @property
    def effective_weight_bits(self) -> float:
        """As :attr:`weight_bits`, with scales, zero points, transforms and branches."""
        return _mean(
            self._counted,
            lambda layer: layer.effective_weight_bits,
            lambda layer: layer.weights,
        )

    @property
    def average_activation_bits(self) -> float:
        """Input bits of the layers that see every token, weighted by multiply-adds."""
        return self._activation_bits(per_image=False)

    @property
    def mean_activation_bits(self) -> float:
        """The plain mean over those layers, as budgets of post-training methods have it."""
        seen = [layer for layer in self._counted if not layer.per_image]
        return _mean(seen, lambda layer: layer.activation_bits, lambda layer: 1)

    @property
    def per_image_activation_bits(self) -> float:
        """The same over the layers that see one token per image (adaLN)."""
        return self._activation_bits(per_image=True)

    @property
    def zero_fraction(self) -> float | None:
        """Share of zeros among all ternary codes; None without any."""
        ternary = [layer for layer in self.layers if layer.zero_fraction is not None]
        if not ternary:
            return None
        return _mean(ternary, lambda layer: layer.zero_fraction or 0.0, lambda layer: layer.weights)

    @property
    def packed_bytes(self) -> float:
        """Bytes at nominal bits per code, and floats and branches as they are stored."""
        return sum(layer.stored_bits for layer in self.layers) / 8

    @property
    def bits_per_parameter(self) -> float:
        """:attr:`packed_bytes` in bits, over all parameters."""
        return 8 * self.packed_bytes / self.parameters

    def as_dict(self) -> dict[str, Any]:
        """Plain types, totals first."""
        totals = {name: getattr(self, name) for name in _TOTALS}
        layers = [
            asdict(layer) | {"effective_weight_bits": layer.effective_weight_bits}
            for layer in self.layers
        ]
        return totals | {"attention_bits": self.attention_bits, "layers": layers}

    @property
    def _counted(self) -> tuple[LayerDescription, ...]:
        linear = tuple(layer for layer in self.layers if layer.multiply_adds)
        return self.quantized_layers or linear

    def _activation_bits(self, per_image: bool) -> float:
        seen = [layer for layer in self._counted if layer.per_image == per_image]
        return _mean(seen, lambda layer: layer.activation_bits, lambda layer: layer.multiply_adds)


_TOTALS = (
    "parameters",
    "float_parameter_share",
    "weight_bits",
    "effective_weight_bits",
    "average_activation_bits",
    "mean_activation_bits",
    "per_image_activation_bits",
    "zero_fraction",
    "bits_per_parameter",
    "packed_bytes",
)


def describe(model: nn.Module, per_image: Sequence[str] = PER_IMAGE) -> ModelDescription:
    """Say what a model stores and computes with.

    Args:
        model: Float, quantized or packed; not changed.
        per_image: Globs over the names of layers that see one token per image; they are kept apart
            from the average of activation bits, since they cost next to nothing.

    Raises:
        ValueError: for a model without parameters.
    """
    layers = tuple(
        _describe_module(name, module, any(fnmatchcase(name, glob) for glob in per_image))
        for name, module in _holders(model)
    )
    if not layers:
        raise ValueError(f"{type(model).__name__} has no parameters to describe")
    attention = {
        name: module.config.bits
        for name, module in model.named_modules()
        if isinstance(module, QuantAttention)
    }
    return ModelDescription(layers, attention)


def _holders(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Modules with tensors of their own; a head that is tied to the embedding has none."""
    seen: set[int] = set()
    for name, module in model.named_modules():
        own = {id(parameter) for parameter in module.parameters(recurse=False)}
        if isinstance(module, PackedLinear | IntLinear | CodedLinear) or own - seen:
            yield name, module
        seen |= own


def _describe_module(name: str, module: nn.Module, per_image: bool) -> LayerDescription:
    if isinstance(module, PackedLinear):
        counts = count_ternary(module.codes, module.in_features)
        zeros = counts[1] / sum(counts)
        return _describe_ternary(name, module, module.scale.numel(), zeros, per_image)
    if isinstance(module, IntLinear):
        return _describe_int(name, module, per_image)
    if isinstance(module, CodedLinear):
        return _describe_coded(name, module, per_image)
    if isinstance(module, QuantLinear):
        with torch.no_grad():
            codes, scale = module.config.weight.quantize(module.weight)
        zeros = float((codes == 0).double().mean())
        return _describe_ternary(name, module, scale.numel(), zeros, per_image)
    own = dict(module.named_parameters(recurse=False))
    weight = own.get("weight", max(own.values(), key=lambda parameter: parameter.numel()))
    count = sum(parameter.numel() for parameter in own.values())
    return LayerDescription(
        name=name,
        kind=type(module).__name__,
        shape=tuple(weight.shape),
        weights=weight.numel(),
        parameters=count,
        float_parameters=count,
        weight_bits=8 * weight.element_size(),
        float_bits=8 * weight.element_size(),
        per_image=per_image,
    )


def _describe_ternary(
    name: str, layer: QuantLinear | PackedLinear, scales: int, zeros: float, per_image: bool
) -> LayerDescription:
    weights, activation = layer.out_features * layer.in_features, layer.config.activation
    low_rank = layer.config.low_rank
    rank = 0 if low_rank is None else low_rank.rank
    floats = rank * (layer.out_features + layer.in_features)
    floats += 0 if layer.bias is None else layer.out_features
    return LayerDescription(
        name=name,
        kind="ternary",
        shape=(layer.out_features, layer.in_features),
        weights=weights,
        parameters=weights + floats,
        float_parameters=floats,
        scales=scales,
        side_bits=_FLOAT_BITS * scales,
        weight_bits=Ternary().bits,
        activation_bits=FLOAT_INPUT_BITS if activation is None else activation.bits,
        rank=rank,
        branch_bits=_FLOAT_BITS if low_rank is None else 8 * low_rank.torch_dtype.itemsize,
        rotation=_describe_rotation(layer.rotation),
        transform=() if layer.rotation is None else ("rotate",),
        zero_fraction=zeros,
        per_image=per_image,
        quantized=True,
    )


def _describe_int(name: str, layer: IntLinear, per_image: bool) -> LayerDescription:
    config, entry = layer.config, IntEntry.of(layer)
    weights, sizes = layer.out_features * layer.in_features, layer.out_features + layer.in_features
    floats = config.rank * sizes + (0 if layer.bias is None else layer.out_features)
    vectors = () if layer.transform is None else layer.transform.buffers()
    side = [t for t in (layer.scale, layer.zero, *vectors) if t is not None]
    bits = entry.activation_bits
    turns = [step for step in config.steps if step.kind == "rotate"]
    return LayerDescription(
        name=name,
        kind="int",
        shape=(layer.out_features, layer.in_features),
        weights=weights,
        parameters=weights + floats,
        float_parameters=floats,
        scales=layer.scale.numel(),
        side_bits=8 * sum(tensor.nbytes for tensor in side),
        weight_bits=config.grid.bits,
        activation_bits=FLOAT_INPUT_BITS if bits is None else bits,
        rank=config.rank,
        branch_bits=8 * getattr(torch, config.branch_dtype).itemsize,
        rotation=_describe_rotation(
            Rotation(layer.in_features, turns[0].seed, turns[0].block_size) if turns else None
        ),
        transform=tuple(step.kind for step in config.steps),
        policy=entry.by_timestep,
        per_image=per_image,
        quantized=True,
    )


def _describe_coded(name: str, layer: CodedLinear, per_image: bool) -> LayerDescription:
    weights, nominal = layer.out_features * layer.in_features, layer.nominal_weight_bits
    floats = 0 if layer.bias is None else layer.out_features
    return LayerDescription(
        name=name,
        kind=layer.kind.name,
        shape=(layer.out_features, layer.in_features),
        weights=weights,
        parameters=weights + floats,
        float_parameters=floats,
        side_bits=round(weights * (layer.effective_weight_bits - nominal)),
        weight_bits=nominal,
        per_image=per_image,
        quantized=True,
    )


def _describe_rotation(rotation: Rotation | None) -> RotationDescription | None:
    if rotation is None:
        return None
    width = rotation.width if rotation.block_size is None else rotation.block_size
    return RotationDescription(
        hadamard_factors(width), rotation.seed is not None, rotation.block_size
    )


def _mean(
    layers: Iterable[LayerDescription],
    value: Callable[[LayerDescription], float],
    weight: Callable[[LayerDescription], int],
) -> float:
    """Weighted mean; that of float inputs where there are no such layers."""
    weighted = [(value(layer), weight(layer)) for layer in layers]
    total = sum(share for _, share in weighted)
    return sum(x * share for x, share in weighted) / total if total else float(FLOAT_INPUT_BITS)
