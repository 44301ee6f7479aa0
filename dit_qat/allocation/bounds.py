"""Layers whose bits are fixed or bounded, by rules over their names."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

__all__ = ["BoundRule", "bit_bounds"]

BoundRule = int | tuple[int, int]
"""Fixed bits, or the least and the most bits."""


def bit_bounds(
    layers: Sequence[str], rules: Mapping[str, BoundRule], choices: Sequence[int] | None = None
) -> dict[int, tuple[int, int]]:
    """Resolve rules to bounds by layer index, as :func:`allocate_bits` takes them.

    Args:
        layers: Names, in the order of the allocation.
        rules: Bounds by glob over the names; in order, the last one that matches wins.
        choices: Bits that there are to choose from; None: any.

    Raises:
        ValueError: for a glob that matches no layer, with near names, what is no bound, bounds in
            the wrong order, or such as no choice meets.

    Example:
        >>> bit_bounds(("attn.qkv", "mlp.fc2"), {"*": (1, 3), "mlp.*": 2})
        {0: (1, 3), 1: (2, 2)}
    """
    found: dict[int, tuple[int, int]] = {}
    for pattern, rule in rules.items():
        matching = [i for i, name in enumerate(layers) if fnmatchcase(name, pattern)]
        if not matching:
            near = get_close_matches(pattern, layers, n=3, cutoff=0.4) or layers[:3]
            raise ValueError(
                f"bounds: {pattern!r} matches no layer; near names: {', '.join(near) or 'none'}"
            )
        low, high = _both_ends(pattern, rule)
        if choices is not None and not any(low <= b <= high for b in choices):
            raise ValueError(
                f"bounds: {pattern!r} asks for {low} to {high} bits, but the choices are "
                f"{', '.join(map(str, choices))}; widen it, or add a choice"
            )
        found |= dict.fromkeys(matching, (low, high))
    return found


def _both_ends(pattern: str, rule: BoundRule) -> tuple[int, int]:
    # Files hand pairs over as lists.
    ends = list(rule) if isinstance(rule, Sequence) else [rule, rule]
    if len(ends) != 2 or not all(isinstance(end, int) for end in ends):
        raise ValueError(
            f"bounds: {pattern!r} asks for {rule!r}; give fixed bits, such as 2, or the least and "
            "the most, such as (2, 4)"
        )
    low, high = ends
    if low > high:
        raise ValueError(
            f"bounds: {pattern!r} asks for at least {low} and at most {high} bits; swap the two"
        )
    return low, high
