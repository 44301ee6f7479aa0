"""How a method is given its settings: a configuration, the fields of one, or a preset."""

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from torch import nn

from dit_qat.primitives.integer import divisors

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["Preset", "check_among", "check_at_least", "check_groups", "overridden", "settled"]

Preset = Literal["paper", "exact"]
"""``paper``: as published or released; ``exact``: our corrected or improved form."""

_USUAL_LEAST = 16  # smaller groups store more scales than codes

ConfigT = TypeVar("ConfigT")
RecipeT = TypeVar("RecipeT", bound="DataclassInstance")


def settled(kind: type[ConfigT], config: ConfigT | None, own: Mapping[str, Any]) -> ConfigT:
    """The configuration of a method that was given one, or else the fields of one.

    Raises:
        ValueError: if both are given.
        TypeError: for unknown fields.
    """
    if config is not None and own:
        raise ValueError(
            f"give either a {kind.__name__} or fields of one, not both: {', '.join(own)}"
        )
    return kind(**own) if config is None else config


def overridden(presets: Mapping[Preset, RecipeT], config: Any) -> RecipeT:
    """What a configuration's preset says, but where its own fields of the same names say other.

    Args:
        presets: A dataclass per preset.
        config: With the field ``preset``, and one for each of theirs; None: as the preset.

    Raises:
        ValueError: for an unknown preset.
    """
    if config.preset not in presets:
        raise ValueError(f"preset={config.preset!r} is unknown; use one of {', '.join(presets)}")
    recipe = presets[config.preset]
    names = [field.name for field in fields(recipe)]
    own = {name: getattr(config, name) for name in names if getattr(config, name) is not None}
    return replace(recipe, **own)


def check_at_least(config: Any, **limits: float) -> None:
    """Refuse numbers below their limits.

    Raises:
        ValueError: naming the first.
    """
    for name, least in limits.items():
        value = getattr(config, name)
        if not value >= least:
            raise ValueError(f"{name}={value} is below {least}; choose it higher")


def check_among(name: str, value: str, known: Sequence[str]) -> None:
    """Refuse an unknown word.

    Raises:
        ValueError: naming the known ones.
    """
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; use one of {', '.join(known)}")


def check_groups(linears: Mapping[str, nn.Linear], group_size: int | None) -> None:
    """Refuse groups that do not fill the inputs of every layer; larger ones are whole rows.

    Raises:
        ValueError: naming the first layer, and sizes that fill it.
    """
    for name, linear in linears.items():
        width = linear.in_features
        if group_size is not None and group_size < width and width % group_size:
            fitting = [size for size in divisors(width) if size >= _USUAL_LEAST]
            raise ValueError(
                f"group_size={group_size} does not divide the {width} inputs of {name}; choose one "
                f"of {', '.join(map(str, fitting)) or width}"
            )
