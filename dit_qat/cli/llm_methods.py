"""Methods for language models as the command line names them."""

from argparse import ArgumentError
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from importlib import import_module
from pkgutil import walk_packages
from typing import Any, get_args, get_type_hints

from jsonargparse import ArgumentParser

from dit_qat.calibration import Method

__all__ = ["method_of", "methods"]

_METHODS = "dit_qat.llm.methods"


def methods() -> dict[str, type[Method]]:
    """All methods by the name that ``--method`` takes."""
    package = import_module(_METHODS)
    for module in walk_packages(package.__path__, f"{_METHODS}."):
        import_module(module.name)
    found, rest = {}, [Method]
    while rest:
        kind = rest.pop()
        rest += kind.__subclasses__()
        if kind.__module__.startswith(_METHODS) and "name" in kind.__dict__:
            found[kind.name] = kind
    return dict(sorted(found.items()))


def method_of(method: Method | str, settings: Mapping[str, Any] | None) -> Method:
    """The method that ``--method`` and ``--settings`` name.

    Raises:
        ValueError: for an unknown method, settings that it does not have or allow, or settings
            beside a method that has its own.
    """
    if isinstance(method, Method):
        if settings:
            raise ValueError("--settings are for a method given by its name; leave them out")
        return method
    known = methods()
    if method not in known:
        raise ValueError(f"--method {method!r} is unknown; there are {', '.join(known)}")
    kind: Any = known[method]
    return kind(_config(kind, settings or {}))  # type: ignore[no-any-return]


def _config(kind: Any, settings: Mapping[str, Any]) -> Any:
    """A method's configuration from plain values, those of its parts included."""
    (config,) = (k for k in get_args(get_type_hints(kind.__init__)["config"]) if is_dataclass(k))
    names = [field.name for field in fields(config)]
    for name in settings:
        if name not in names:
            raise ValueError(
                f"--settings of {kind.name} have no {name!r}; there are {', '.join(names)}"
            )
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(config, "settings")
    try:
        return parser.instantiate(parser.parse_object({"settings": dict(settings)})).settings
    except ArgumentError as error:
        raise ValueError(f"--settings of {kind.name}: {' '.join(str(error).split())}") from error
