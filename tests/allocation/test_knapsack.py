"""Allocations against brute force, closed forms and each other."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_qat.allocation import allocate_bits, average_bits
from dit_qat.allocation.knapsack import Solver

SOLVERS: tuple[Solver, ...] = ("table", "milp")


def summed(scores, choices, bits):
    return sum(row[choices.index(b)] for row, b in zip(scores, bits, strict=True))


def best_by_trying(scores, cost, choices, average, bounds):
    least = np.inf
    for bits in itertools.product(choices, repeat=len(cost)):
        within = sum(c * b for c, b in zip(cost, bits, strict=True)) <= average * sum(cost)
        bounded = all(low <= bits[i] <= high for i, (low, high) in bounds.items())
        if within and bounded:
            least = min(least, summed(scores, choices, bits))
    return least


@st.composite
def problems(draw):
    layers = draw(st.integers(1, 6))
    choices = draw(st.lists(st.integers(1, 8), min_size=1, max_size=4, unique=True))
    value = st.floats(-1, 1, width=32).map(lambda v: v * 10 ** draw(st.integers(-4, 2)))
    row = st.lists(value, min_size=len(choices), max_size=len(choices))
    scores = draw(st.lists(row, min_size=layers, max_size=layers))
    size = st.sampled_from([1, 3, 4, 5, 12, 0.5, 1327104])
    cost = draw(st.lists(size, min_size=layers, max_size=layers))
    bound = st.tuples(st.sampled_from(choices), st.sampled_from(choices)).map(sorted).map(tuple)
    bounds = draw(st.dictionaries(st.integers(0, layers - 1), bound, max_size=2))
    average = draw(st.floats(min(choices), max(choices) + 1).map(lambda v: round(v, 2)))
    return scores, cost, choices, average, bounds


@settings(max_examples=80, deadline=None)
@given(problems())
def test_both_solvers_find_what_trying_everything_finds(problem) -> None:
    scores, cost, choices, average, bounds = problem
    best = best_by_trying(scores, cost, choices, average, bounds)
    scale = max(1e-12, max(abs(v) for row in scores for v in row))
    for solver in ("auto", "milp"):
        if best == np.inf:
            with pytest.raises(ValueError, match="allow averages from"):
                allocate_bits(scores, cost, choices, average, bounds=bounds, solver=solver)
            continue
        bits = allocate_bits(scores, cost, choices, average, bounds=bounds, solver=solver).tolist()
        assert sum(c * b for c, b in zip(cost, bits, strict=True)) <= average * sum(cost) + 1e-9
        assert all(low <= bits[i] <= high for i, (low, high) in bounds.items())
        assert abs(summed(scores, choices, bits) - best) <= 1e-9 * scale, solver


@pytest.mark.parametrize("solver", SOLVERS)
def test_both_ways_agree_on_a_dit_xl(solver: Solver) -> None:
    generator = np.random.default_rng(0)
    errors = np.array([0.363, 0.119, 0.0374, 0.0115]) * generator.lognormal(size=(112, 1))
    cost = [1152**2 * parts for parts in (3, 1, 4, 4)] * 28
    bits = allocate_bits(errors, cost, (1, 2, 3, 4), 2.0, solver=solver)
    assert average_bits(bits.tolist(), cost) <= 2
    other = allocate_bits(errors, cost, (1, 2, 3, 4), 2.0, solver="auto")
    choices = (1, 2, 3, 4)
    assert summed(errors, choices, bits) == pytest.approx(summed(errors, choices, other), rel=1e-12)
    assert summed(errors, choices, bits) < summed(errors, choices, [2] * 112)


def test_costs_without_a_common_unit_take_no_table() -> None:
    generator = np.random.default_rng(0)
    errors = np.array([0.363, 0.119, 0.0374, 0.0115]) * generator.lognormal(size=(112, 1))
    choices = (1, 2, 3, 4)
    for cost in (generator.uniform(1, 5, 112), generator.integers(1, 10**9, 112)):
        bits = allocate_bits(errors, cost, choices, 2.0)
        assert average_bits(bits.tolist(), cost.tolist()) <= 2
        assert summed(errors, choices, bits) < summed(errors, choices, [2] * 112)
        # Rounded down to whole units the costs are less, so that the optimum is no worse.
        rounded = np.floor(cost / cost.max() * 1000)
        capacity = 2.0 * cost.sum() / cost.max() * 1000
        relaxed = allocate_bits(errors, rounded, choices, capacity / rounded.sum(), solver="table")
        assert summed(errors, choices, bits) >= summed(errors, choices, relaxed) - 1e-9
        assert summed(errors, choices, bits) == pytest.approx(
            summed(errors, choices, relaxed), rel=2e-2
        )
        with pytest.raises(ValueError, match=r"solver='table' would take .* GiB.*solver='milp'"):
            allocate_bits(errors, cost, choices, 2.0, solver="table")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_come_as_they_are(dtype: torch.dtype) -> None:
    errors = torch.tensor([[4.0, 1.0, 0.5], [9.0, 2.0, 0.25]], dtype=dtype, requires_grad=True)
    bits = allocate_bits(errors, torch.tensor([1.0, 2.0], dtype=dtype), (1, 2, 4), np.float32(2.5))
    assert torch.equal(bits, allocate_bits(errors.tolist(), [1, 2], (1, 2, 4), 2.5))


def test_the_quoted_map_of_robuq_has_the_quoted_average() -> None:
    # Means over 28 blocks of qkv, proj, fc1 and fc2 (arXiv:2509.23582), sizes 3:1:4:4.
    totals = {"qkv": (62, 3), "proj": (77, 1), "fc1": (56, 4), "fc2": (46, 4)}
    bits, cost = [], []
    for total, size in totals.values():
        low, more = divmod(total, 28)
        bits += [low + 1] * more + [low] * (28 - more)
        cost += [size] * 28
    assert average_bits(bits, cost) == pytest.approx(671 / 336)
    assert sum(b * c for b, c in zip(bits, cost, strict=True)) == 671


def test_a_budget_of_whole_bits_is_never_worse_than_uniform_bits() -> None:
    generator = torch.Generator().manual_seed(0)
    for average in (1, 2, 3, 4):
        scores = torch.rand(16, 4, generator=generator, dtype=torch.float64)
        bits = allocate_bits(scores, torch.tensor([3, 1, 4, 4] * 4), (1, 2, 3, 4), average)
        chosen = scores.gather(1, bits[:, None] - 1).sum()
        assert chosen <= scores[:, average - 1].sum()


def test_more_bits_go_to_the_cheap_and_sensitive() -> None:
    errors = [[4.0, 1.0, 0.25, 0.06]] * 4
    errors[1] = [400.0, 100.0, 25.0, 6.0]
    assert allocate_bits(errors, [3, 1, 4, 4], (1, 2, 3, 4), 2.0).tolist()[1] == 4


def test_an_average_that_is_no_binary_number_reaches_its_whole_number() -> None:
    # Two bits for one layer in three: 4/3 is below its true value as a float.
    bits = allocate_bits([[1.0, 0.0], [1.0, 0.5], [1.0, 0.9]], [1, 1, 1], (1, 2), 4 / 3)
    assert bits.tolist() == [2, 1, 1]
    bits = allocate_bits([[1.0, 0.0]] * 10, [1] * 10, (1, 2), 1.3)
    assert bits.sum() == 13


@pytest.mark.parametrize("solver", SOLVERS)
def test_ties_are_decided_alike_every_time(solver: Solver) -> None:
    scores = [[1.0, 1.0, 0.5]] * 6
    found = [
        allocate_bits(scores, [1] * 6, (1, 2, 3), 2.0, solver=solver).tolist() for _ in range(3)
    ]
    assert found[0] == found[1] == found[2]
    assert found[0].count(3) == 3


def test_where_bits_gain_nothing_the_cheapest_allocation_is_taken() -> None:
    assert allocate_bits([[1.0, 1.0]] * 3, [1, 2, 3], (2, 4), 4.0).tolist() == [2, 2, 2]


def test_choices_may_come_in_any_order() -> None:
    one = allocate_bits([[4.0, 1.0, 0.1], [9.0, 2.0, 0.2]], [1, 2], (1, 2, 4), 2.5)
    other = allocate_bits([[0.1, 4.0, 1.0], [0.2, 9.0, 2.0]], [1, 2], (4, 1, 2), 2.5)
    assert torch.equal(one, other)
    assert one.dtype == torch.int64


def test_the_least_average_that_is_named_can_be_asked_for() -> None:
    given = {"sensitivity": [[3.0, 2.0, 1.0]] * 2, "cost": [1, 335], "choices": (1, 2, 4)}
    bounds = {1: (2, 2)}  # 671/336 = 1.9970238...
    with pytest.raises(ValueError, match=r"averages from 1\.997024 to ") as refused:
        allocate_bits(**given, average=1.99702, bounds=bounds)
    assert "average=1.99702 bits" in str(refused.value)
    assert allocate_bits(**given, average=1.997024, bounds=bounds).tolist() == [1, 2]
    with pytest.raises(ValueError, match=r"average=1\.9999999 bits .* from 2 to"):
        allocate_bits(**given, average=1.9999999, bounds={0: (2, 2), 1: (2, 2)})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"average": 0.9}, r"average=0\.9 bits cannot be met.* from 1 to 4"),
        ({"average": 1.4, "bounds": {1: (3, 4)}}, r"allow averages from 1\.75 to 4"),
        ({"bounds": {2: (1, 2)}}, "bounds name layer 2, but layers go from 0 to 1"),
        ({"bounds": {0: (5, 8)}}, "layer 0 must have 5 to 8 bits, but the choices are 1, 2, 4"),
        ({"sensitivity": [[1.0, float("nan"), 0.0], [1.0, 1.0, 1.0]]}, r"sensitivity of layer 0"),
        ({"sensitivity": [[1.0, 1.0], [1.0, 1.0]]}, r"shape \(2, 2\), with 2 costs and 3 choices"),
        ({"cost": [1, 0]}, r"cost=\(1, 0\) must be positive"),
        ({"choices": (1, 2, 2)}, r"choices=\(1, 2, 2\) must be whole bits"),
        ({"choices": (1, 2, float("inf"))}, r"choices=\(1, 2, inf\) must be whole bits"),
        ({"choices": (), "sensitivity": [[], []]}, r"choices=\(\) must be whole bits"),
        ({"cost": [[3], [1]]}, r"cost has shape \(2, 1\); it must hold a number per layer"),
        ({"cost": 3}, r"cost has shape \(\)"),
        ({"solver": "greedy"}, r"solver='greedy' is unknown; use one of .*'milp'"),
        ({"average": float("nan")}, "average=nan is no budget"),
    ],
)
def test_what_cannot_be_allocated_is_refused(changed, message: str) -> None:
    given = {
        "sensitivity": [[3.0, 2.0, 1.0]] * 2,
        "cost": [3, 1],
        "choices": (1, 2, 4),
        "average": 2.0,
    }
    with pytest.raises(ValueError, match=message):
        allocate_bits(**(given | changed))
