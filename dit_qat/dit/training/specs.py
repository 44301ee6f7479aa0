"""Networks and settings as plain types, so that checkpoints load with ``weights_only=True``."""

import sys
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, TypeVar

from dit_qat.dit.methods import Method
from dit_qat.dit.models import DiT

__all__ = ["restore", "spec_of"]

T = TypeVar("T")


def spec_of(value: Any) -> dict[str, Any] | None:
    """Describe a network, a method or a dataclass by class path and constructor arguments."""
    if value is None:
        return None
    if isinstance(value, DiT):
        arguments = value.config
    elif isinstance(value, Method):
        arguments = asdict(value.config)
    else:
        assert is_dataclass(value)
        assert not isinstance(value, type)
        arguments = asdict(value)
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": path, "init_args": arguments}


def restore(value: T, base: type[Any]) -> T:
    """Construct what :func:`spec_of` described; anything else is returned as it is.

    A file must not decide what is imported, so only classes of modules that are imported already
    are accepted, and only subclasses of ``base``.

    Raises:
        ValueError: for a class that is not imported or not a ``base``, or no specification.
    """
    if not isinstance(value, Mapping):
        return value
    arguments = value.get("init_args")
    if "class_path" not in value or not isinstance(arguments, Mapping):
        raise ValueError(
            f"the checkpoint's {base.__name__} names no class_path with init_args but "
            f"{', '.join(map(str, value)) or 'nothing'}; was it written by dit-qat fit?"
        )
    module, _, name = str(value["class_path"]).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"the checkpoint names {value['class_path']}, which is not an imported "
            f"{base.__name__}; import its module before loading"
        )
    built: T = found(**arguments)
    return built
