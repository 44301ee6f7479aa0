"""Budgets of bits weighted by cost: what can be afforded, in exact units."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import numpy.typing as npt

__all__ = ["Knapsack", "average_bits", "knapsack"]

FloatArray = npt.NDArray[np.float64]

# An average such as 4/3 times its costs must not fall below the whole number that it stands for.
_ROUNDING = 1 + Fraction(1, 10**12)


@dataclass(frozen=True, eq=False)
class Knapsack:
    """One choice per layer, under a limit on their summed sizes.

    Attributes:
        values: (L, B), to be minimised in sum; infinite where a choice is not allowed.
        choices: Bits (B), ascending.
        units: Cost of one bit in each layer (L), without a common divisor.
        capacity: Units that all layers together may take.
    """

    values: FloatArray
    choices: tuple[int, ...]
    units: tuple[int, ...]
    capacity: int


def average_bits(bits: Sequence[int], cost: Sequence[float]) -> float:
    """Mean bits weighted by cost.

    Example:
        >>> average_bits((4, 1), (1, 3))
        1.75
    """
    total = sum(Fraction(b) * Fraction(c) for b, c in zip(bits, cost, strict=True))
    return float(total / sum(map(Fraction, cost)))


def knapsack(
    sensitivity: FloatArray,
    cost: Sequence[float],
    choices: Sequence[int],
    average: float,
    bounds: Mapping[int, tuple[int, int]],
) -> Knapsack:
    """Check an allocation problem and put it into whole units; arguments as ``allocate_bits``.

    Raises:
        ValueError: as ``allocate_bits``.
    """
    _check_shapes(sensitivity, cost, choices)
    _check_numbers(sensitivity, cost, average)
    order = sorted(range(len(choices)), key=lambda column: choices[column])
    ascending = tuple(int(choices[column]) for column in order)
    values = sensitivity[:, order].copy()
    for layer, (low, high) in bounds.items():
        if not 0 <= layer < len(values):
            raise ValueError(
                f"bounds name layer {layer}, but layers go from 0 to {len(values) - 1}"
            )
        allowed = [low <= b <= high for b in ascending]
        if not any(allowed):
            raise ValueError(
                f"layer {layer} must have {low} to {high} bits, but the choices are "
                f"{', '.join(map(str, ascending))}; widen its bounds or add a choice"
            )
        values[layer, [not each for each in allowed]] = np.inf
    units = _units(cost)
    wanted = Fraction(average) * sum(units)
    problem = Knapsack(values, ascending, units, math.floor(wanted * _ROUNDING))
    _require_feasible(problem, average)
    return problem


def _check_shapes(sensitivity: FloatArray, cost: Sequence[float], choices: Sequence[int]) -> None:
    if sensitivity.ndim != 2 or sensitivity.shape != (len(cost), len(choices)) or not len(cost):
        raise ValueError(
            f"the sensitivity has shape {sensitivity.shape}, with {len(cost)} costs and "
            f"{len(choices)} choices; it must have a row per layer and a column per choice"
        )
    whole = all(float(b).is_integer() and b >= 1 for b in choices)
    if not choices or not whole or len(set(choices)) < len(choices):
        raise ValueError(f"choices={tuple(choices)} must be whole bits from 1 up, each once")


def _check_numbers(sensitivity: FloatArray, cost: Sequence[float], average: float) -> None:
    if not np.isfinite(sensitivity).all():
        row = int(np.argwhere(~np.isfinite(sensitivity))[0, 0])
        raise ValueError(
            f"the sensitivity of layer {row} is {sensitivity[row].tolist()}; all of them must be "
            "finite: measure it again"
        )
    if not all(math.isfinite(c) and c > 0 for c in cost):
        raise ValueError(f"cost={tuple(cost)} must be positive and finite, one per layer")
    if not math.isfinite(average):
        raise ValueError(f"average={average} is no budget; give mean bits, such as 2")


def _units(cost: Sequence[float]) -> tuple[int, ...]:
    """Costs as whole numbers without a common divisor."""
    exact = [Fraction(c) for c in cost]
    scale = math.lcm(*(c.denominator for c in exact))
    whole = [int(c * scale) for c in exact]
    divisor = math.gcd(*whole)
    return tuple(c // divisor for c in whole)


def _require_feasible(problem: Knapsack, average: float) -> None:
    allowed = [
        [b for b, value in zip(problem.choices, row, strict=True) if value < np.inf]
        for row in problem.values
    ]
    most = average_bits([each[-1] for each in allowed], problem.units)
    used = sum(each[0] * u for each, u in zip(allowed, problem.units, strict=True))
    if used > problem.capacity:
        least = math.ceil(Fraction(used * 10**6, sum(problem.units))) / 10**6  # it can be asked for
        raise ValueError(
            f"average={average:.9g} bits cannot be met: the choices and bounds allow averages from "
            f"{least:.9g} to {most:.6g}; raise the average, or allow fewer bits"
        )
