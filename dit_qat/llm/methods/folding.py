"""What moves from one layer into the one before it, so that it costs nothing at inference."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.input_transform import InputTransform
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.plane_code import PlaneCode
from dit_qat.layers.ternary_code import TernaryCode
from dit_qat.layers.weight_code import WeightCode
from dit_qat.primitives.integer import Scales, unpack_codes

__all__ = ["fold_column_scale", "fold_input_scale", "fold_order", "foldable_scale"]

_ROUNDING = 1e-3  # how far a float16 scale may be from what it stands for, as a fraction


def fold_order(model: nn.Module, name: str, feeders: Sequence[str]) -> bool:
    """Let the layers before give their rows in the order in which a layer stores its columns.

    Args:
        model: Quantized; its modules are replaced.
        name: Of the layer whose columns are ordered.
        feeders: Of the layers whose outputs become its inputs, channel by channel.

    Returns:
        Whether there was an order, and all layers are ones whose rows can move.
    """
    layer = model.get_submodule(name)
    code = _ternary(layer)
    before = [model.get_submodule(feeder) for feeder in feeders]
    codes = [_ternary(module) for module in before]
    order = None if code is None else code.columns
    if code is None or order is None or any(found is None for found in codes):
        return False
    _replace(model, name, code.without_order(), _bias(layer))
    for feeder, module, rows in zip(feeders, before, codes, strict=True):
        assert rows is not None
        bias = _bias(module)
        _replace(model, feeder, rows.take_rows(order), None if bias is None else bias[order])
    return True


def fold_column_scale(model: nn.Module, name: str, feeder: str) -> bool:
    """Let the layer before take over the column scales of a layer of sign planes.

    The feeder's scales are rounded to float16 once more; its codes stay.

    Args:
        model: Quantized; its modules are replaced.
        name: Of the layer whose columns have scales.
        feeder: Of the layer whose outputs, times something, are its inputs, channel by channel.

    Returns:
        Whether there were such scales, and float16 could hold the products.
    """
    layer, before = model.get_submodule(name), model.get_submodule(feeder)
    if not isinstance(layer, CodedLinear) or not isinstance(before, IntLinear):
        return False
    code = layer.code
    if not isinstance(code, PlaneCode) or code.column_scale is None:
        return False
    scaled = _rows_times(before, code.column_scale.float())
    if scaled is None:
        return False
    model.set_submodule(feeder, scaled)
    _replace(model, name, code.without_column_scale(), layer.bias)
    return True


def foldable_scale(scale: Tensor, norm: nn.Module) -> Tensor:
    """The scale (in,) nearest to one by which a norm's weight can be divided without rounding."""
    weight = norm.weight
    assert isinstance(weight, Tensor)
    divided = (weight.float() / scale).to(weight.dtype).float()
    return torch.where(divided == 0, scale, weight.float() / torch.where(divided == 0, 1, divided))


@torch.no_grad()
def fold_input_scale(model: nn.Module, names: Sequence[str], before: str) -> bool:
    """Let the module before divide what layers would divide their inputs by.

    Args:
        model: Quantized; its modules are replaced, the norm's parameters are.
        names: Of layers that read the same input and nothing else reads.
        before: Of their norm, or of the quantized layer whose outputs, times something, they are.

    Returns:
        Whether the layers divide by one and the same vector, and it could be taken over.
    """
    layers = [model.get_submodule(name) for name in names]
    scale = _shared_scale(layers)
    if scale is None:
        return False
    source = model.get_submodule(before)
    if isinstance(source, IntLinear):
        scaled = _rows_times(source, scale.reciprocal())
        if scaled is None:
            return False
        model.set_submodule(before, scaled)
    else:
        for key, parameter in source.named_parameters(recurse=False):
            divided = (parameter.float() / scale).to(parameter.dtype)
            setattr(source, key, nn.Parameter(divided, requires_grad=False))
    for name, layer in zip(names, layers, strict=True):
        assert isinstance(layer, IntLinear)
        model.set_submodule(name, _rebuilt(layer, layer.scale.float(), layer.bias, None))
    return True


def _shared_scale(layers: Sequence[nn.Module]) -> Tensor | None:
    """The vector by which all layers divide, and do nothing else to their inputs."""
    found: list[Tensor] = []
    for layer in layers:
        transform = layer.transform if isinstance(layer, IntLinear) else None
        if transform is None or [step.kind for step in transform.steps] != ["scale"]:
            return None
        found.append(transform.get_buffer("vector0"))
    return found[0] if all(torch.equal(vector, found[0]) for vector in found) else None


def _rows_times(layer: IntLinear, factor: Tensor) -> IntLinear | None:
    """The layer with its outputs times a vector (out,); None where float16 has no such scales."""
    wanted = layer.scale.float() * factor[:, None]
    stored = wanted.half().float()
    if not bool(((stored - wanted).abs() <= _ROUNDING * wanted.abs()).all()):
        return None
    bias = None if layer.bias is None else layer.bias * factor
    return _rebuilt(layer, stored, bias, layer.transform)


def _rebuilt(
    layer: IntLinear, scale: Tensor, bias: Tensor | None, transform: InputTransform | None
) -> IntLinear:
    """The layer's codes with other scales, bias and transform."""
    sizes, grid = (layer.in_features, layer.out_features), layer.config.grid
    linear = nn.Linear(*sizes, bias is not None, device="meta").train(layer.training)
    if bias is not None:
        linear.bias = nn.Parameter(bias, requires_grad=False)
    return IntLinear.build(
        linear,
        grid=grid,
        scales=Scales(scale, layer.zero),
        codes=unpack_codes(layer.codes, grid, layer.in_features),
        activation=layer.config.activation,
        transform=transform,
    )


def _ternary(module: nn.Module) -> TernaryCode | None:
    if not isinstance(module, CodedLinear):
        return None
    return module.code if isinstance(module.code, TernaryCode) else None


def _bias(module: nn.Module) -> Tensor | None:
    bias = module.bias
    return bias if isinstance(bias, Tensor) else None


def _replace(model: nn.Module, name: str, code: WeightCode, bias: Tensor | None) -> None:
    training = model.get_submodule(name).training
    model.set_submodule(name, CodedLinear(code, bias).train(training))
