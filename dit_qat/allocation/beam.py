"""Pareto-pruned beam search over a sequence of choices, and the exact solver where errors add up.

A path takes one choice per step; each choice has a size, and all sizes of a path together stay
within a capacity. Where the error of a step depends on the steps before it (AdaTSQ,
arXiv:2602.09883, searches so over denoising steps), only a search can tell; where errors simply add
up, the problem is a knapsack with an exact answer.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, Literal, TypeVar, get_args

import numpy as np
import numpy.typing as npt

from dit_qat.allocation.budget import Knapsack
from dit_qat.allocation.knapsack import solve_by_milp, solve_by_table

__all__ = [
    "BeamPath",
    "Keep",
    "beam_search",
    "check_capacity",
    "nearest_to_origin",
    "nondominated",
    "solve_additive",
    "spread",
]

S = TypeVar("S")

Keep = Literal["origin", "spread"]

Sizes = Sequence[Sequence[int]]
"""Of each choice (C_t) of each step (T)."""

_MOST_COLUMNS = 127  # the table keeps a column in 8 bits


@dataclass(frozen=True, eq=False)
class BeamPath(Generic[S]):
    """Choices for the first steps.

    Attributes:
        state: Where they lead; whatever the next step starts from.
        error: Summed over the steps.
        size: Summed over the steps.
        choices: One index per step.
    """

    state: S
    error: float
    size: int
    choices: tuple[int, ...]


def beam_search(
    start: S,
    sizes: Sizes,
    extend: Callable[[S, int, int], tuple[S, float]],
    capacity: int,
    *,
    width: int | None = 4,
    prune: bool = True,
    keep: Keep = "origin",
) -> list[BeamPath[S]]:
    """Extend paths step by step, and keep the best trade-offs between size and error.

    Without a limit on the width this is exact where errors do not depend on the path, and with
    ``prune=False`` everywhere.

    Args:
        start: State before the first step.
        sizes: Of each choice of each step.
        extend: ``(state, step, choice)`` to the next state and the error that the step adds; not
            called for choices that leave no room for the smallest ones to come.
        capacity: Largest size of a whole path.
        width: Paths kept after a step; None: all.
        prune: Whether paths that others dominate are dropped.
        keep: Which paths, where there are more than ``width``: those nearest to the ``origin`` of
            size and error, as in AdaTSQ, or a ``spread`` of them from the smallest to the largest.

    Returns:
        The paths that are left, by size.

    Raises:
        ValueError: as :func:`check_capacity`, a width below 1, another ``keep``, or an error that
            is not finite.
    """
    if keep not in get_args(Keep):
        raise ValueError(f"keep={keep!r} is unknown; use one of {get_args(Keep)}")
    if width is not None and width < 1:
        raise ValueError(f"width={width} keeps no path; use at least 1")
    check_capacity(sizes, capacity)
    least = [min(row) for row in sizes]
    beam = [BeamPath(start, 0.0, 0, ())]
    for step, row in enumerate(sizes):
        room = capacity - sum(least[step + 1 :])
        children = [
            _child(path, step, choice, size, extend)
            for path in beam
            for choice, size in enumerate(row)
            if path.size + size <= room
        ]
        beam = nondominated(children) if prune else children
        if width is not None:
            beam = (nearest_to_origin if keep == "origin" else spread)(beam, width)
    return sorted(beam, key=lambda path: (path.size, path.error))


def nondominated(paths: Iterable[BeamPath[S]]) -> list[BeamPath[S]]:
    """Paths that no other beats in size or error without losing in the other, by rising size.

    Of equal ones the first is kept.
    """
    kept: list[BeamPath[S]] = []
    for path in sorted(paths, key=lambda path: (path.size, path.error)):
        if not kept or path.error < kept[-1].error:
            kept.append(path)
    return kept


def nearest_to_origin(paths: list[BeamPath[S]], count: int) -> list[BeamPath[S]]:
    """The ``count`` paths nearest to the origin of the plane of size and error.

    Both axes are stretched to [0, 1] over these paths, for sizes and errors have no common unit.
    """
    if len(paths) <= count:
        return paths
    axes = [_stretched([path.size for path in paths]), _stretched([path.error for path in paths])]
    distance = [math.hypot(*point) for point in zip(*axes, strict=True)]
    return [paths[i] for i in sorted(range(len(paths)), key=lambda i: distance[i])[:count]]


def spread(paths: list[BeamPath[S]], count: int) -> list[BeamPath[S]]:
    """``count`` paths evenly over the order of their sizes, the last one first of all."""
    if len(paths) <= count:
        return paths
    ordered = sorted(paths, key=lambda path: (path.size, -path.error))
    last = len(ordered) - 1
    return [ordered[last - i * last // max(count - 1, 1)] for i in range(count)]


def solve_additive(errors: Sequence[Sequence[float]], sizes: Sizes, capacity: int) -> list[int]:
    """The choices of least summed error, where a step's error does not depend on other steps.

    Args:
        errors: Of each choice of each step.
        sizes: Likewise.
        capacity: Largest summed size.

    Raises:
        ValueError: as :func:`check_capacity`; shapes that differ; errors that are not finite.
    """
    if [len(row) for row in errors] != [len(row) for row in sizes]:
        raise ValueError("errors and sizes must have the same steps and choices")
    check_capacity(sizes, capacity)
    unit = math.gcd(*(size for row in sizes for size in row))
    offered = sorted({size // unit for row in sizes for size in row})
    column = {size: i for i, size in enumerate(offered)}
    values: npt.NDArray[np.float64] = np.full((len(sizes), len(offered)), np.inf)
    choice = np.zeros(values.shape, dtype=np.int64)
    for step, (row, costs) in enumerate(zip(sizes, errors, strict=True)):
        for index, (size, error) in enumerate(zip(row, costs, strict=True)):
            _require_finite(error, step, index)
            at = column[size // unit]
            if error < values[step, at]:
                values[step, at], choice[step, at] = error, index
    problem = Knapsack(values, tuple(offered), (1,) * len(sizes), capacity // unit)
    solve = solve_by_table if len(offered) <= _MOST_COLUMNS else solve_by_milp
    return [int(choice[step, at]) for step, at in enumerate(solve(problem))]


def check_capacity(sizes: Sizes, capacity: int) -> None:
    """Refuse a problem without an answer.

    Raises:
        ValueError: for no steps, a step without choices, sizes below 1, or a capacity below the
            smallest path.
    """
    if not sizes or not all(sizes) or any(size < 1 for row in sizes for size in row):
        raise ValueError("every step needs choices, of whole sizes from 1 up")
    least, most = (sum(pick(row) for row in sizes) for pick in (min, max))
    if capacity < least:
        raise ValueError(
            f"capacity={capacity} cannot be met: the choices allow {least} to {most}; raise it, or "
            "offer smaller choices"
        )


def _child(
    path: BeamPath[S],
    step: int,
    choice: int,
    size: int,
    extend: Callable[[S, int, int], tuple[S, float]],
) -> BeamPath[S]:
    state, error = extend(path.state, step, choice)
    _require_finite(error, step, choice)
    return BeamPath(state, path.error + error, path.size + size, (*path.choices, choice))


def _require_finite(error: float, step: int, choice: int) -> None:
    if not math.isfinite(error):
        raise ValueError(
            f"choice {choice} of step {step} has error {error}; errors must be finite: the model "
            "diverges there"
        )


def _stretched(values: Sequence[float]) -> list[float]:
    low, high = min(values), max(values)
    return [(value - low) / ((high - low) or 1) for value in values]
