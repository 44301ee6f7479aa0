"""Optional dependencies, imported where they are used."""

from importlib import import_module
from types import ModuleType

__all__ = ["import_extra"]


def import_extra(module: str, extra: str) -> ModuleType:
    """Import a module of an optional dependency.

    Args:
        module: Dotted name, such as ``datasets``.
        extra: The extra of this package that installs it.

    Raises:
        ValueError: if it is not installed, naming the command that installs it.
    """
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"{module} is needed here and not installed ({error}); "
            f"run: pip install 'dit-qat[{extra}]'"
        ) from error
