"""Networks and methods as plain types, so that checkpoints load with ``weights_only=True``."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from dit_qat.dit.methods import Method
from dit_qat.dit.models import DiT

__all__ = ["build", "spec_of"]

T = TypeVar("T")


def spec_of(value: DiT | Method) -> dict[str, Any]:
    """Describe an object by class path and constructor arguments."""
    arguments = value.config if isinstance(value, DiT) else asdict(value.config)
    path = f"{type(value).__module__}.{type(value).__qualname__}"
    return {"class_path": path, "init_args": arguments}


def build(spec: Mapping[str, Any], base: type[T]) -> T:
    """Construct what :func:`spec_of` described.

    A file must not decide what is imported, so only classes of modules that are imported already
    are accepted, and only subclasses of ``base``.

    Raises:
        ValueError: for a class that is not imported or not a ``base``.
    """
    module, _, name = str(spec["class_path"]).rpartition(".")
    found = getattr(sys.modules.get(module), name, None)
    if not (isinstance(found, type) and issubclass(found, base)):
        raise ValueError(
            f"the checkpoint names {spec['class_path']}, which is not an imported "
            f"{base.__name__}; import its module before loading"
        )
    return found(**spec["init_args"])
