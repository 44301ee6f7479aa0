"""What of a model a reader would not get back, found before anything is written."""

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from dit_qat.export.entry import ModuleEntry, owned
from dit_qat.export.packers import PACKERS
from dit_qat.export.skeleton import FLOATS, listed

__all__ = ["check_modules", "own_dtypes"]

Stored = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


def check_modules(model: nn.Module, skeleton: nn.Module) -> None:
    """Name the modules, parameters and buffers that the format would not give back.

    Args:
        model: To be written.
        skeleton: What a reader builds.

    Raises:
        ValueError: see above.
    """
    wanted = {name: type(m) for name, m in skeleton.named_modules(remove_duplicate=False)}
    own = dict(model.named_modules(remove_duplicate=False))
    foreign = [
        f"{name} ({type(module).__name__})"
        for name, module in own.items()
        if wanted.get(name) is not _kept(type(module))
    ]
    lacking = wanted.keys() - own.keys()
    if foreign or lacking:
        raise ValueError(
            f"the packed format cannot hold {listed(foreign or lacking)}: it holds QuantLinear, "
            "IntLinear, CodedLinear, QuantAttention and the architecture's float modules; put the "
            "float module back (a rule with None leaves it float), or merge what was added to it"
        )
    shapes = {name: value.shape for name, value in skeleton.named_parameters()}
    differing = [
        name
        for name, value in model.named_parameters()
        if shapes.get(name, value.shape) != value.shape
    ]
    if differing:
        raise ValueError(
            f"{listed(differing)}: other shapes than the architecture's own arguments give"
        )
    held = {*skeleton.state_dict(), *shapes}
    lost = [
        name
        for name, _ in model.named_parameters()
        if name not in held and type(own[name.rpartition(".")[0]]) not in PACKERS
    ]
    if lost:
        raise ValueError(
            f"{listed(lost)}: the architecture has no such parameters, so that a reader would not "
            "get them; merge them into those that it has"
        )
    _check_constants(model, skeleton)


def _kept(kind: type[nn.Module]) -> type[nn.Module]:
    return PACKERS[kind].packed if kind in PACKERS else kind


def _check_constants(model: nn.Module, skeleton: nn.Module) -> None:
    """Compare buffers that no file holds with what a reader's constructor makes."""
    saved, own = skeleton.state_dict().keys(), dict(model.named_buffers(remove_duplicate=False))
    differing = [
        name
        for name, value in skeleton.named_buffers(remove_duplicate=False)
        if name not in saved and not _alike(own.get(name), value)
    ]
    if differing:
        raise ValueError(
            f"{listed(differing)}: a state dict does not hold them, and the architecture's own "
            "arguments do not give them; build the model by its arguments, and leave them alone"
        )


def _alike(own: Tensor | None, made: Tensor) -> bool:
    """Whether a buffer is the one that was made, perhaps cast to fewer bits since."""
    if own is None or made.is_meta or own.shape != made.shape:
        return False
    own = own.cpu()
    if not own.is_floating_point():
        return torch.equal(own, made.to(own.dtype))
    slack = 4 * torch.finfo(own.dtype).eps
    return torch.allclose(own.double(), made.double(), rtol=slack, atol=slack, equal_nan=True)


def own_dtypes(
    model: nn.Module, stored: Stored, layers: Mapping[str, ModuleEntry]
) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Dtype and shape in the file of float tensors that are stored as the model holds them."""
    return {
        name: (value.dtype, stored[name][1])
        for name, value in _floats(model, stored)
        if value.dtype in FLOATS and owned(name, layers) is None
    }


def _floats(model: nn.Module, stored: Stored) -> Iterable[tuple[str, Tensor]]:
    for name, value in model.state_dict().items():
        if name in stored and stored[name][0].is_floating_point:
            yield name, value
