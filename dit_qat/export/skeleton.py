"""The model that a manifest describes, without memory."""

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from dit_qat.export.entry import ModuleEntry, owned
from dit_qat.export.manifest import Manifest
from dit_qat.export.registry import architecture_named
from dit_qat.export.tensor_file import Place, dtype_name
from dit_qat.layers import AttentionConfig, QuantAttention

__all__ = [
    "FLOATS",
    "add_biases",
    "build_skeleton",
    "check_names",
    "check_tensors",
    "listed",
    "stored_tensors",
    "swap_linears",
]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def build_skeleton(
    architecture: str,
    arguments: Mapping[str, Any],
    layers: Mapping[str, ModuleEntry],
    attention_bits: Mapping[str, int],
) -> nn.Module:
    """Build an architecture on the meta device and swap in its packed layers.

    Raises:
        ValueError: for an unknown architecture, arguments that do not build it, or modules that it
            does not have or that are no such layers.
    """
    build = architecture_named(architecture).build
    try:
        with _Unfilled(), torch.device("meta"):
            model = build(arguments)
    except Exception as error:  # other packages' constructors raise whatever they stumble over
        raise ValueError(
            f"the arguments {dict(arguments)!r} build no {architecture!r} "
            f"({type(error).__name__}: {error}); they are damaged or of another version"
        ) from error
    modules = dict(model.named_modules())
    unknown = [name for name in (*layers, *attention_bits) if name not in modules or not name]
    if unknown:
        raise ValueError(
            f"the model has no module {listed(unknown)}; the bit map belongs to another model"
        )
    for name, bits in attention_bits.items():
        _swap_attention(model, name, bits)
    swap_linears(model, layers)
    return model


def swap_linears(model: nn.Module, layers: Mapping[str, ModuleEntry]) -> None:
    """Put packed layers without tensors in the place of linear layers.

    Raises:
        ValueError: for layers that the model does not have, or that do not fit.
    """
    names = dict(model.named_modules())
    for name, entry in layers.items():
        if name not in names:
            raise ValueError(f"the model has no module {name!r}; it belongs to another model")
        _swap_linear(model, name, entry)


def add_biases(model: nn.Module, names: Iterable[str]) -> list[str]:
    """Give float linear layers of a skeleton biases that the architecture does not have.

    A correction of what the last norm gives is such a bias, of the head.

    Args:
        model: The skeleton, or another model without values.
        names: Of tensors; others than biases of such layers mean nothing here.

    Returns:
        Those that were added.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    added: list[str] = []
    for name in names:
        owner, _, leaf = name.rpartition(".")
        linear = modules.get(owner)
        if leaf != "bias" or type(linear) is not nn.Linear:
            continue
        own: Tensor | None = linear.bias
        if own is None:
            empty = torch.empty(linear.out_features, dtype=linear.weight.dtype, device="meta")
            linear.bias = nn.Parameter(empty, requires_grad=False)
            added.append(name)
    return added


class _Unfilled(TorchFunctionMode):
    """Skips the initialization of tensors without memory, a fifth of the time to build a model."""

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function in _FILLING:
            tensor: Tensor = args[0] if args else (kwargs or {})["tensor"]
            if tensor.is_meta:
                return tensor
        return function(*args, **(kwargs or {}))


_FILLING = {
    *(Tensor.uniform_, Tensor.normal_, Tensor.zero_, Tensor.fill_),
    *(nn.init.uniform_, nn.init.normal_, nn.init.constant_, nn.init.kaiming_uniform_),
}


def _swap_attention(model: nn.Module, name: str, bits: int) -> None:
    module = model.get_submodule(name)
    try:
        model.set_submodule(name, QuantAttention(module, AttentionConfig(bits)))
    except (AttributeError, ValueError) as error:
        raise ValueError(
            f"module {name!r} is a {type(module).__name__} without quantized form ({error}); the "
            "bit map belongs to another model"
        ) from error


def _swap_linear(model: nn.Module, name: str, entry: ModuleEntry) -> None:
    module = model.get_submodule(name)
    if type(module) is not nn.Linear:
        raise ValueError(
            f"module {name!r} is a {type(module).__name__}, not a linear layer; the bit map "
            "belongs to another model"
        )
    own_bias: Tensor | None = module.bias
    bias = own_bias is not None or (entry.bias and entry.adds_bias)
    own = module.in_features, module.out_features, bias
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
    model: nn.Module,
    layers: Mapping[str, ModuleEntry],
    float_dtype: torch.dtype,
    tied: Collection[str] = (),
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape in the file, by name, of all tensors of a skeleton.

    Codes take the width of their storage, and floats outside the packed layers ``float_dtype``;
    ``tied`` are names under which others are found again.
    """
    found = {}
    for name, tensor in _tensors(model).items():
        if name in tied:
            continue
        place = owned(name, layers)
        if place is None:
            dtype = float_dtype if tensor.is_floating_point() else tensor.dtype
            found[name] = dtype, tuple(tensor.shape)
        else:
            shape = layers[place.layer].stored_shape(place.leaf, tensor)
            found[name] = tensor.dtype, shape
    return found


def check_tensors(model: nn.Module, manifest: Manifest, places: Mapping[str, Place]) -> None:
    """Compare what the model needs with what the manifest lists and what the file holds.

    The latter two have the same names already.

    Raises:
        ValueError: for the first tensor that does not fit.
    """
    tied = architecture_named(manifest.architecture).tied(model)
    wanted = stored_tensors(model, manifest.layers, torch.float32, tied)
    check_names("config.json", manifest.tensors, wanted, "the model has")
    for name, (dtype, shape) in wanted.items():
        entry, place = manifest.tensors[name], places[name]
        if (entry.dtype, entry.shape) != (place.dtype, place.shape):
            raise ValueError(
                f"{name} is {place.dtype} of shape {place.shape} in the file, but {entry.dtype} of "
                f"{entry.shape} in config.json; the two files belong to different exports"
            )
        is_free = owned(name, manifest.layers) is None and dtype in FLOATS
        allowed = [dtype_name(d) for d in (FLOATS if is_free else (dtype,))]
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
