"""Architectures by name: what has to build a model asks here; applications enter what they have."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = [
    "Architecture",
    "architecture_named",
    "architecture_of",
    "register_architecture",
    "register_family",
    "timestep_argument",
]


@dataclass(frozen=True)
class Architecture:
    """A kind of model that can be built from plain values.

    Attributes:
        name: What packed folders call it.
        has: Whether a class of models is of it.
        build: From plain values to the float model; called under the meta device. What a state dict
            does not hold it makes on the CPU.
        describe: From a model to those plain values.
        timestep: From a model to what its forward calls the timestep; None: it has none.
        embeds: Whether ``config.json`` is that of transformers, with the manifest inside, rather
            than the manifest.
        tied: From a model to the names of tensors that are others of it under a second name.
        finish: Called with a model that has been loaded, and its manifest's plain values.
    """

    name: str
    has: Callable[[type[nn.Module]], bool]
    build: Callable[[Mapping[str, Any]], nn.Module]
    describe: Callable[[Any], Mapping[str, Any]]
    timestep: Callable[[Any], str] | None = None
    embeds: bool = False
    tied: Callable[[Any], Collection[str]] = lambda model: ()
    finish: Callable[[Any, Mapping[str, Any]], None] | None = None


_BY_NAME: dict[str, Architecture] = {}
_LATER: dict[str, Callable[[], object]] = {}


def register_architecture(
    name: str,
    model: type[nn.Module],
    builder: Callable[[Mapping[str, Any]], nn.Module],
    describer: Callable[[Any], Mapping[str, Any]],
    timestep: str | None = None,
) -> None:
    """Enter one class of models; see :class:`Architecture`.

    Args:
        name: What packed folders call it.
        model: The class.
        builder: From plain values to the float model.
        describer: From a model to those plain values.
        timestep: What its forward calls the timestep; None: it has none.
    """
    argument = None if timestep is None else lambda _: timestep
    register_family(Architecture(name, lambda kind: kind is model, builder, describer, argument))


def register_family(architecture: Architecture) -> None:
    """Enter an architecture that may be of many classes."""
    _BY_NAME[architecture.name] = architecture


def enter_later(name: str, enter: Callable[[], object]) -> None:
    """Name an architecture whose package takes long to import.

    Args:
        name: What packed folders call it.
        enter: Enters it; called when it is asked for.
    """
    _LATER[name] = enter


def architecture_named(name: str) -> Architecture:
    """Find an architecture by its name.

    Raises:
        ValueError: if there is none.
    """
    if name not in _BY_NAME and name in _LATER:
        _LATER.pop(name)()
    if not _BY_NAME:
        raise ValueError(
            f"architecture {name!r} is unknown, for nothing is entered yet; take load_quantized "
            "from dit_qat, or import dit_qat.dit.models first"
        )
    if name not in _BY_NAME:
        raise ValueError(
            f"architecture {name!r} is unknown here ({_known()}); read the folder with the version "
            "of dit_qat that wrote it"
        )
    return _BY_NAME[name]


def architecture_of(model: nn.Module) -> Architecture:
    """Find the architecture of a model.

    Raises:
        ValueError: if there is none.
    """
    for architecture in _BY_NAME.values():
        if architecture.has(type(model)):
            return architecture
    raise ValueError(
        f"a {type(model).__name__} has no entry in the registry of architectures ({_known()}); "
        "enter it with dit_qat.export.register_architecture"
    )


def timestep_argument(architecture: Architecture, model: nn.Module) -> str:
    """What a model's forward calls the timestep.

    Raises:
        ValueError: if it has none.
    """
    if architecture.timestep is None:
        raise ValueError(
            f"layers have bits by timestep, and a {architecture.name!r} has no timestep"
        )
    return architecture.timestep(model)


def _known() -> str:
    return f"there are: {', '.join(sorted(_BY_NAME)) or 'none'}"
