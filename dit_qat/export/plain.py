"""Plain values of a JSON file, checked before anything is made of them."""

import hashlib
from collections.abc import Mapping
from dataclasses import fields
from functools import lru_cache
from math import isfinite
from typing import Any, TypeVar

import torch

from dit_qat.primitives.hadamard import Rotation, hadamard_factors
from dit_qat.primitives.packing import pack_signs

__all__ = [
    "WIDEST",
    "built",
    "check_same",
    "natural",
    "numbers",
    "object_of",
    "rotation_facts",
    "settings",
    "typed",
    "width_of",
]

WIDEST = 1 << 24
"""Wider layers than anyone has would only cost a reader its memory."""

T = TypeVar("T")


def object_of(content: object, what: str) -> Mapping[str, Any]:
    """A JSON object.

    Raises:
        ValueError: if it is something else.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{what} is {content!r}, not a JSON object")
    return content


def typed(content: Mapping[str, Any], key: str, kind: type[T]) -> T:
    """A value of exactly this type.

    Raises:
        ValueError: if it has another, or is not there.
    """
    value = content.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key}={value!r} is no {kind.__name__}")
    return value


def natural(content: Mapping[str, Any], key: str, least: int, limit: int) -> int:
    """A whole number from ``least`` to below ``limit``.

    Raises:
        ValueError: if it is none.
    """
    value = typed(content, key, int)
    if not least <= value < limit:
        raise ValueError(f"{key}={value} is outside {least} .. {limit - 1}")
    return value


def width_of(content: Mapping[str, Any], key: str) -> int:
    """The width of a layer; see :func:`natural`."""
    return natural(content, key, 1, WIDEST)


def built(kind: type[T], content: object, what: str) -> T:
    """A frozen configuration of plain values, each of the type of the default.

    Raises:
        ValueError: for other settings than it has, or of another type.
    """
    kinds = {
        field.name: (int, type(None)) if field.default is None else (type(field.default),)
        for field in fields(kind)  # type: ignore[arg-type]
    }
    return kind(**settings(content, what, kinds))


def settings(content: object, what: str, kinds: Mapping[str, tuple[type, ...]]) -> dict[str, Any]:
    """Values by name, of exactly these types.

    Raises:
        ValueError: for other names, or a value of another type.
    """
    given = object_of(content, what)
    if given.keys() != kinds.keys():
        raise ValueError(f"{what} has the settings {sorted(given)}, not {sorted(kinds)}")
    for key, allowed in kinds.items():
        if type(given[key]) not in allowed:
            raise ValueError(f"{what} has {key}={given[key]!r}, which is no {allowed[0].__name__}")
    return dict(given)


def numbers(content: object, what: str, kind: type[T]) -> tuple[T, ...]:
    """A list of finite numbers, all of one type.

    Raises:
        ValueError: if it is none.
    """
    if not isinstance(content, list) or not all(type(value) is kind for value in content):
        raise ValueError(f"{what} is {content!r}, not a list of {kind.__name__}")
    if kind is float and not all(isfinite(value) for value in content):
        raise ValueError(f"{what} holds values that are not finite")
    return tuple(content)


def check_same(own: Mapping[str, Any], content: Mapping[str, Any]) -> None:
    """Compare what was read with what would be written for what was understood of it.

    Raises:
        ValueError: naming the first setting that differs.
    """
    differing = sorted(k for k in {**own, **content} if own.get(k, ()) != content.get(k, ()))
    if differing:
        key = differing[0]
        raise ValueError(
            f"{key} is {content.get(key)!r}, which this version makes {own.get(key)!r}; "
            "export it again with this version"
        )


@lru_cache(maxsize=256)
def rotation_facts(rotation: Rotation) -> dict[str, Any]:
    """What a reader checks its own construction of a rotation against; not to be written to."""
    factors = hadamard_factors(rotation.block_size or rotation.width)
    signs = rotation.signs(torch.int8, "cpu")
    digest = None
    if signs is not None:
        digest = hashlib.sha256(pack_signs(signs).numpy().data).hexdigest()
    return {"factors": list(factors), "signs_sha256": digest}
