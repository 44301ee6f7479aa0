"""What packed folders call a DiT, entered in the registry."""

from collections.abc import Mapping
from typing import Any

from dit_qat.dit.models.dit import DiT
from dit_qat.export.registry import register_architecture

__all__ = ["ARCHITECTURE", "register_dit"]

ARCHITECTURE = "dit"

_TIMESTEP = "t"

# Beyond any DiT; a damaged number must not take hours or all memory.
_LARGEST, _DEEPEST = 1 << 16, 1 << 10


def _build(arguments: Mapping[str, Any]) -> DiT:
    for name, value in arguments.items():
        limit = _DEEPEST if name == "depth" else _LARGEST
        if not isinstance(value, int | float) or not 0 <= value < limit:
            raise ValueError(f"{name}={value!r} is no number of a DiT")
    return DiT(**arguments)


def _describe(model: DiT) -> Mapping[str, Any]:
    return model.config


def register_dit() -> None:
    """Let packed folders hold DiTs."""
    register_architecture(ARCHITECTURE, DiT, _build, _describe, _TIMESTEP)
