"""What packed folders call a transformer of diffusers, entered in the registry."""

import inspect
import json
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from dit_qat.export.meta import parameters_on_meta
from dit_qat.export.registry import Architecture, register_family

__all__ = ["ARCHITECTURE", "register_diffusers"]

ARCHITECTURE = "diffusers"

_KEYS = {"class", "config"}
_TIMESTEPS = ("timestep", "t", "timesteps")

# Beyond any transformer; a damaged number must not take hours or all memory.
_LARGEST, _DEEPEST = 1 << 20, 1 << 10
_DEPTHS = ("layers", "blocks", "depth")  # in the names of what is built that many times


def register_diffusers() -> None:
    """Let packed folders hold transformers of diffusers, of any of its classes."""
    register_family(
        Architecture(ARCHITECTURE, _has, _build, _describe, _timestep),
    )


def _has(kind: type[nn.Module]) -> bool:
    """Whether diffusers offers a class; without importing diffusers for what is none of it."""
    if kind.__module__.partition(".")[0] != "diffusers":
        return False
    return _class_named(kind.__name__) is kind


def _class_named(name: object) -> type[nn.Module] | None:
    """A public model class of diffusers; None if there is none of that name."""
    import diffusers  # seconds, which only this costs

    if not isinstance(name, str) or not name.isidentifier() or name.startswith("_"):
        return None
    found = getattr(diffusers, name, None)
    is_model = isinstance(found, type) and issubclass(found, diffusers.ModelMixin)
    return found if is_model and found is not diffusers.ModelMixin else None


def _build(arguments: Mapping[str, Any]) -> nn.Module:
    if arguments.keys() != _KEYS:
        raise ValueError(f"it has the keys {sorted(arguments)}, not {sorted(_KEYS)}")
    kind, config = _class_named(arguments["class"]), arguments["config"]
    if kind is None:
        raise ValueError(
            f"{arguments['class']!r} is no model class of the diffusers that is installed"
        )
    if not isinstance(config, dict):
        raise ValueError("config is no JSON object")
    _check_settings(kind, config)
    # What draws random numbers for a parameter must not disturb those of the caller.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), parameters_on_meta():
        return kind(**config)


def _check_settings(kind: type[nn.Module], config: Mapping[str, Any]) -> None:
    """Refuse names that the class would ignore, and numbers that no model has."""
    named = inspect.signature(kind).parameters.values()
    unknown = sorted(config.keys() - {p.name for p in named if p.kind is not p.VAR_KEYWORD})
    if unknown:
        raise ValueError(f"{kind.__name__} has no setting {', '.join(unknown[:3])}")
    for name, value in config.items():
        limit = _DEEPEST if any(part in name for part in _DEPTHS) else _LARGEST
        for number in _numbers(value):
            if not -limit <= number <= limit:
                raise ValueError(f"{name}={value!r} is beyond what a transformer has")


def _numbers(value: Any) -> Iterator[float]:
    """All numbers within a plain value."""
    if isinstance(value, int | float):
        yield value
    elif isinstance(value, list | dict):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _numbers(inner)


def _describe(model: Any) -> Mapping[str, Any]:
    settings = {name: value for name, value in model.config.items() if not name.startswith("_")}
    for name, value in settings.items():
        try:
            settings[name] = json.loads(json.dumps(value, allow_nan=False))
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"{type(model).__name__} was built with {name}={value!r}, which JSON does not hold "
                f"({error}); build it from plain values"
            ) from error
    return {"class": type(model).__name__, "config": settings}


def _timestep(model: nn.Module) -> str:
    names = inspect.signature(model.forward).parameters
    found = next((name for name in _TIMESTEPS if name in names), None)
    if found is None:
        raise ValueError(
            f"forward of {type(model).__name__} calls no argument {' or '.join(_TIMESTEPS)}, so "
            "that bits by timestep cannot be followed; quantize it with the same bits at all steps"
        )
    return found
