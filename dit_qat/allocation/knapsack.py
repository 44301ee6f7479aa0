"""The allocation itself: an integer program, and dynamic programming over exact units.

Multiple-choice knapsack: minimise ``sum_l S[l, b_l]`` subject to ``sum_l cost_l b_l <= average *
sum_l cost_l`` (RobuQ, arXiv:2509.23582, searches by dynamic programming under such a budget).
"""

from collections.abc import Mapping, Sequence
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import csr_array
from torch import Tensor

from dit_qat.allocation.budget import Knapsack, knapsack

__all__ = ["Solver", "allocate_bits", "solve_by_milp", "solve_by_table"]

Solver = Literal["auto", "milp", "table"]

_LARGEST_TABLE = 50_000_000
_MOST_BYTES = 2 * 2**30
_ROW_BYTES = 32  # of an entry of the sums: before, after, a candidate, whether it is better
_VALUE_SPAN = 1e6  # HiGHS stops at an absolute gap of 1e-6: far below any difference that counts


def allocate_bits(
    sensitivity: npt.ArrayLike | Tensor,
    cost: npt.ArrayLike | Tensor,
    choices: Sequence[int],
    average: float,
    *,
    bounds: Mapping[int, tuple[int, int]] | None = None,
    solver: Solver = "auto",
) -> Tensor:
    """Choose bits per layer: least summed sensitivity within a mean of bits weighted by cost.

    Exact. Among equally good allocations the table takes the cheapest; an integer program, the one
    that HiGHS finds first, which is always the same one.

    Args:
        sensitivity: (L, B), what layer l costs in quality at ``choices[b]`` bits; finite. Tensors
            may be of any dtype, on any device.
        cost: (L,), positive: what a bit of layer l costs, such as its number of weights.
        choices: (B,) bits, whole, in any order.
        average: Largest allowed mean of bits, weighted by cost.
        bounds: Least and most bits by layer index (see :func:`bit_bounds`); equal: fixed.
        solver: ``table`` (dynamic programming over the costs in units of their greatest common
            divisor), ``milp`` (``scipy.optimize.milp``), or ``auto``: the table where it is small.

    Returns:
        Bits (L,), int64.

    Raises:
        ValueError: A budget below what choices and bounds allow, naming the feasible range; shapes
            that do not fit; values that are not finite; bounds that leave a layer no choice; an
            unknown solver; a table of more than 2 GiB, where one was asked for.

    Example:
        >>> allocate_bits([[9.0, 1.0], [2.0, 1.0]], [1, 1], [1, 2], 1.5).tolist()
        [2, 1]
    """
    if solver not in get_args(Solver):
        raise ValueError(f"solver={solver!r} is unknown; use one of {get_args(Solver)}")
    if isinstance(sensitivity, Tensor):
        sensitivity = sensitivity.detach().to("cpu", torch.float64).numpy()
    values = np.asarray(sensitivity, dtype=np.float64)
    costs = cost if isinstance(cost, Tensor) else np.asarray(cost)
    if costs.ndim != 1:
        raise ValueError(f"cost has shape {tuple(costs.shape)}; it must hold a number per layer")
    problem = knapsack(values, costs.tolist(), [*choices], float(average), bounds or {})
    size = len(problem.units) * len(problem.choices) * problem.capacity
    if solver == "table" or (solver == "auto" and size <= _LARGEST_TABLE):
        columns = solve_by_table(problem)
    else:
        columns = solve_by_milp(problem)
    return torch.tensor([problem.choices[column] for column in columns])


def solve_by_table(problem: Knapsack) -> list[int]:
    """Dynamic programming; the column chosen in each row.

    ``best[k]`` is the least sum of the layers so far that take exactly k units together. Ties go to
    fewer units in all, then to fewer bits in later layers.

    Raises:
        ValueError: for a table of more than 2 GiB.
    """
    most = sum(problem.choices[-1] * units for units in problem.units)
    room = min(problem.capacity, most) + 1
    size = room * (len(problem.units) + _ROW_BYTES)
    if size > _MOST_BYTES:
        raise ValueError(
            f"solver='table' would take {size / 2**30:.3g} GiB, for the costs come to "
            f"{sum(problem.units):.3g} units of their greatest common divisor; use solver='milp', "
            "or round the costs to multiples of a larger unit"
        )
    best = np.full(room, np.inf)
    best[0] = 0.0
    taken = np.zeros((len(problem.units), room), dtype=np.int8)
    for layer, (row, units) in enumerate(zip(problem.values, problem.units, strict=True)):
        extended = np.full(room, np.inf)
        for column, (bits, value) in enumerate(zip(problem.choices, row, strict=True)):
            size = units * bits
            if size >= room:
                break
            candidate = best[: room - size] + value
            better = candidate < extended[size:]
            extended[size:][better] = candidate[better]
            taken[layer, size:][better] = column
        best = extended
    left = int(np.argmin(best))
    columns = []
    for layer in reversed(range(len(problem.units))):
        columns.append(int(taken[layer, left]))
        left -= problem.units[layer] * problem.choices[columns[-1]]
    return columns[::-1]


def solve_by_milp(problem: Knapsack) -> list[int]:
    """Integer program with one binary variable per layer and choice; the column of each row.

    Raises:
        RuntimeError: if the solver gives up, which it does on no feasible problem of this kind.
    """
    layers, options = problem.values.shape
    allowed = np.isfinite(problem.values)
    values = np.where(allowed, problem.values, 0.0)
    values = np.where(allowed, values - np.where(allowed, values, np.inf).min(1, keepdims=True), 0)
    span = float(values.max()) or 1.0
    # Exact whole numbers while they are small; beyond, only their ratios matter to the solver.
    unit = max(1, max(problem.units) // 10**6)
    sizes = np.outer([u / unit for u in problem.units], problem.choices).ravel()
    one_each = csr_array(np.kron(np.eye(layers), np.ones(options)))
    limit = problem.capacity / unit
    while True:
        result: Any = milp(
            values.ravel() * (_VALUE_SPAN / span),
            integrality=np.ones(values.size),
            bounds=Bounds(0, allowed.ravel().astype(float)),
            constraints=[
                LinearConstraint(one_each, 1, 1),
                LinearConstraint(sizes[None], -np.inf, limit),
            ],
            options={"mip_rel_gap": 0.0},
        )
        if result.x is None:
            raise RuntimeError(f"scipy.optimize.milp: {result.message}")
        columns: list[int] = result.x.reshape(layers, options).argmax(1).tolist()
        used = sum(problem.choices[c] * u for c, u in zip(columns, problem.units, strict=True))
        if used <= problem.capacity:
            return columns
        limit -= 2 * (used - problem.capacity) / unit  # it had taken its tolerance for room
