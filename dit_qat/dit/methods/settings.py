"""How a method is given its settings: a configuration, or the fields of one."""

from collections.abc import Mapping
from typing import Any

__all__ = ["refuse_both"]


def refuse_both(method: str, config: object | None, fields: Mapping[str, Any]) -> None:
    """Refuse a configuration beside fields of one.

    Raises:
        ValueError: if both are given.
    """
    if config is not None and fields:
        raise ValueError(f"give {method} either a config or fields of it, not both: {dict(fields)}")
