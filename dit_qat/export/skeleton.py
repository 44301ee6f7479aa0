"""The model that a manifest describes, without memory."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.export.layer_entry import LayerEntry
from dit_qat.export.manifest import Manifest
from dit_qat.export.registry import architecture_named
from dit_qat.export.tensor_file import Place, dtype_name
from dit_qat.layers import AttentionConfig, QuantAttention

__all__ = ["build_skeleton", "check_names", "check_tensors", "listed", "stored_tensors"]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def build_skeleton(
    architecture: str,
    arguments: Mapping[str, Any],
    layers: Mapping[str, LayerEntry],
    attention_bits: Mapping[str, int],
) -> nn.Module:
    """Build an architecture on the meta device and swap in its packed layers.

    Raises:
        ValueError: for an unknown architecture, arguments that do not build it, or modules that it
            does not have or that are no such layers.
    """
    build = architecture_named(architecture).build
    try:
        with torch.device("meta"):
            model = build(arguments)
    except (TypeError, ValueError, ArithmeticError, RuntimeError) as error:
        raise ValueError(
            f"the arguments {dict(arguments)!r} build no {architecture!r} ({error}); they are "
            "damaged or of another version"
        ) from error
    modules = dict(model.named_modules())
    unknown = [name for name in (*layers, *attention_bits) if name not in modules or not name]
    if unknown:
        raise ValueError(
            f"the model has no module {listed(unknown)}; the bit map belongs to another model"
        )
    for name, bits in attention_bits.items():
        _swap_attention(model, name, bits)
    for name, entry in layers.items():
        _swap_linear(model, name, entry)
    return model


def _swap_attention(model: nn.Module, name: str, bits: int) -> None:
    module = model.get_submodule(name)
    try:
        model.set_submodule(name, QuantAttention(module, AttentionConfig(bits)))
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"module {name!r} is a {type(module).__name__} without quantized form ({error}); the "
            "bit map belongs to another model"
        ) from error


def _swap_linear(model: nn.Module, name: str, entry: LayerEntry) -> None:
    module = model.get_submodule(name)
    if type(module) is not nn.Linear:
        raise ValueError(
            f"module {name!r} is a {type(module).__name__}, not a linear layer; the bit map "
            "belongs to another model"
        )
    own = module.in_features, module.out_features, module.bias is not None
    if own != (entry.in_features, entry.out_features, entry.bias):
        raise ValueError(
            f"module {name!r} has inputs, outputs and bias {own}, but is packed with "
            f"{(entry.in_features, entry.out_features, entry.bias)}; the two belong to different "
            "models"
        )
    try:
        model.set_submodule(name, entry.make("meta"))
    except ValueError as error:
        raise ValueError(f"module {name!r}: {error}") from error


def stored_tensors(
    model: nn.Module, layers: Mapping[str, LayerEntry], float_dtype: torch.dtype
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape in the file, by name, of all tensors of a skeleton.

    Codes take the width of their storage, and floats outside the packed layers ``float_dtype``.
    """
    found = {}
    for name, tensor in _tensors(model).items():
        owner, _, leaf = name.rpartition(".")
        if owner not in layers:
            dtype = float_dtype if tensor.is_floating_point() else tensor.dtype
            found[name] = dtype, tuple(tensor.shape)
        elif leaf == "codes":
            found[name] = tensor.dtype, (tensor.shape[0], layers[owner].stored_width)
        else:
            found[name] = tensor.dtype, tuple(tensor.shape)
    return found


def check_tensors(model: nn.Module, manifest: Manifest, places: Mapping[str, Place]) -> None:
    """Compare what the model needs with what the manifest lists and what the file holds.

    The latter two have the same names already.

    Raises:
        ValueError: for the first tensor that does not fit.
    """
    wanted = stored_tensors(model, manifest.layers, torch.float32)
    check_names("config.json", manifest.tensors, wanted, "the model has")
    for name, (dtype, shape) in wanted.items():
        entry, place = manifest.tensors[name], places[name]
        if (entry.dtype, entry.shape) != (place.dtype, place.shape):
            raise ValueError(
                f"{name} is {place.dtype} of shape {place.shape} in the file, but {entry.dtype} of "
                f"{entry.shape} in config.json; the two files belong to different exports"
            )
        is_free = name.rpartition(".")[0] not in manifest.layers and dtype in _FLOATS
        allowed = [dtype_name(d) for d in (_FLOATS if is_free else (dtype,))]
        if place.dtype not in allowed or place.shape != shape:
            raise ValueError(
                f"{name} is {place.dtype} of shape {place.shape}, but the model needs "
                f"{' or '.join(allowed)} of {shape}; export the checkpoint again"
            )


def listed(names: Iterable[str]) -> str:
    """The first few of some names, for a message."""
    found = sorted(names)
    return ", ".join(found[:3]) + (f" and {len(found) - 3} more" if len(found) > 3 else "")


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    state = model.state_dict()
    return {name: value for name, value in state.items() if isinstance(value, Tensor)}


def check_names(where: str, found: Iterable[str], expected: Iterable[str], expecting: str) -> None:
    """Compare two sets of names.

    Raises:
        ValueError: with what ``where`` lacks or holds beyond what is ``expecting`` it.
    """
    missing, extra = set(expected) - set(found), set(found) - set(expected)
    if missing:
        raise ValueError(
            f"{where} lacks {listed(missing)}, which {expecting}; copy or export it again"
        )
    if extra:
        raise ValueError(
            f"{where} holds {listed(extra)}, which is not what {expecting}; copy or export it again"
        )
