"""Architectures by name: what has to build a model asks here; applications enter what they have."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

__all__ = ["Architecture", "architecture_named", "architecture_of", "register_architecture"]


@dataclass(frozen=True)
class Architecture:
    """A kind of model that can be built from plain values.

    Attributes:
        name: What packed folders call it.
        model: Its class.
        build: From plain values to the float model; called under the meta device.
        describe: From a model to those plain values.
    """

    name: str
    model: type[nn.Module]
    build: Callable[[Mapping[str, Any]], nn.Module]
    describe: Callable[[Any], Mapping[str, Any]]


_BY_NAME: dict[str, Architecture] = {}


def register_architecture(
    name: str,
    model: type[nn.Module],
    builder: Callable[[Mapping[str, Any]], nn.Module],
    describer: Callable[[Any], Mapping[str, Any]],
) -> None:
    """Enter an architecture; see :class:`Architecture`."""
    _BY_NAME[name] = Architecture(name, model, builder, describer)


def architecture_named(name: str) -> Architecture:
    """Find an architecture by its name.

    Raises:
        ValueError: if there is none.
    """
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
        if type(model) is architecture.model:
            return architecture
    raise ValueError(
        f"a {type(model).__name__} has no entry in the registry of architectures ({_known()}); "
        "enter it with dit_qat.export.register_architecture"
    )


def _known() -> str:
    return f"there are: {', '.join(sorted(_BY_NAME)) or 'none'}"
