import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_qat.allocation.beam import (
    BeamPath,
    beam_search,
    nearest_to_origin,
    nondominated,
    solve_additive,
    spread,
)


def _table(seed, steps, choices):
    generator = torch.Generator().manual_seed(seed)
    errors = torch.rand(steps, choices, generator=generator, dtype=torch.float64)
    sizes = torch.randint(3, 9, (steps, choices), generator=generator)
    return errors.tolist(), sizes.tolist()


def _additive(errors):
    return lambda state, step, choice: (None, errors[step][choice])


def _brute(sizes, capacity, error_of):
    ways = itertools.product(*(range(len(row)) for row in sizes))
    fitting = (w for w in ways if sum(r[c] for r, c in zip(sizes, w, strict=True)) <= capacity)
    return min(map(error_of, fitting))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(0, 20))
def test_additive_beam_equals_brute_force_and_knapsack(seed, slack):
    errors, sizes = _table(seed, 4, 3)
    capacity = sum(map(min, sizes)) + slack

    def total(way):
        return sum(errors[t][c] for t, c in enumerate(way))

    best = _brute(sizes, capacity, total)
    beam = beam_search(None, sizes, _additive(errors), capacity, width=None)
    exact = solve_additive(errors, sizes, capacity)
    assert min(path.error for path in beam) == pytest.approx(best)
    assert total(exact) == pytest.approx(best)
    assert sum(sizes[t][c] for t, c in enumerate(exact)) <= capacity


def _chained(seed):
    """Errors that depend on the way here: x' = A_c x, error its distance to a fixed point."""
    generator = torch.Generator().manual_seed(seed)
    matrices = torch.randn(3, 2, 2, generator=generator, dtype=torch.float64)

    def extend(x, step, choice):
        x = torch.tanh(matrices[choice] @ x + step)
        return x, float((x - 0.5).square().sum())

    return torch.ones(2, dtype=torch.float64), extend


@pytest.mark.parametrize("seed", range(8))
def test_path_dependent_beam_without_pruning_equals_brute_force(seed):
    _, sizes = _table(seed, 4, 3)
    capacity = sum(map(min, sizes)) + 4
    start, extend = _chained(seed)

    def total(way):
        x, error = start, 0.0
        for step, choice in enumerate(way):
            x, more = extend(x, step, choice)
            error += more
        return error

    beam = beam_search(start, sizes, extend, capacity, width=None, prune=False)
    assert min(path.error for path in beam) == pytest.approx(_brute(sizes, capacity, total))
    for path in beam:
        assert path.error == pytest.approx(total(path.choices))


@pytest.mark.parametrize("width", [1, 2, 4, None])
def test_what_is_returned_meets_the_capacity_and_dominates_nothing(width):
    errors, sizes = _table(5, 6, 4)
    capacity = sum(map(min, sizes)) + 5
    beam = beam_search(None, sizes, _additive(errors), capacity, width=width)
    assert beam
    assert width is None or len(beam) <= width
    for path in beam:
        assert path.size == sum(sizes[t][c] for t, c in enumerate(path.choices)) <= capacity
    for a, b in itertools.permutations(beam, 2):
        assert not (a.size <= b.size and a.error <= b.error)


def test_choices_without_room_are_not_tried():
    tried = []

    def extend(state, step, choice):
        tried.append((step, choice))
        return state, 1.0 - 0.5 * choice

    beam = beam_search(None, [[3, 8], [3, 4]], extend, 7)
    assert (0, 1) not in tried
    assert [path.choices for path in beam] == [(0, 0), (0, 1)]


def _paths(*points):
    return [BeamPath(None, error, size, ()) for size, error in points]


def test_nondominated_set():
    kept = nondominated(_paths((3, 2.0), (4, 1.0), (4, 1.5), (5, 1.0), (3, 2.0), (6, 0.5)))
    assert [(path.size, path.error) for path in kept] == [(3, 2.0), (4, 1.0), (6, 0.5)]


def test_distance_to_the_origin_ignores_units():
    points = [(30, 9.0), (40, 2.0), (60, 1.0), (80, 0.0)]
    for scale in (1e-6, 1.0, 1e6):
        kept = nearest_to_origin(_paths(*((s, e * scale) for s, e in points)), 1)
        assert kept[0].size == 40


def test_a_spread_has_both_ends_and_single_widths_keep_the_most_accurate():
    paths = _paths(*((30 + i, 9.0 - i) for i in range(9)))
    assert [path.size for path in spread(paths, 4)] == [38, 36, 33, 30]
    assert [path.size for path in spread(paths, 1)] == [38]
    assert spread(paths, 9) == paths
    errors, sizes = _table(5, 6, 4)
    room = sum(map(min, sizes)) + 5
    best = min(path.error for path in beam_search(None, sizes, _additive(errors), room, width=None))
    for keep in ("origin", "spread"):
        found = beam_search(None, sizes, _additive(errors), room, width=3, keep=keep)
        assert min(path.error for path in found) >= best - 1e-12
        assert len(found) <= 3
    with pytest.raises(ValueError, match="keep='all'"):
        beam_search(None, sizes, _additive(errors), room, keep="all")


def test_many_sizes_and_equal_sizes():
    # More different sizes than the table has columns; two choices of equal size at each step.
    sizes = [[100 + 2 * t, 100 + 2 * t, 101 + 2 * t] for t in range(80)]
    errors = [[2.0, 1.0, 0.5 if t % 2 else 1.5] for t in range(80)]
    chosen = solve_additive(errors, sizes, sum(row[0] for row in sizes) + 3)
    assert sorted(chosen) == [1] * 77 + [2] * 3


def test_errors_name_the_range():
    with pytest.raises(ValueError, match="allow 6 to 12"):
        beam_search(None, [[3, 4], [3, 8]], _additive([[0, 0], [0, 0]]), 5)
    with pytest.raises(ValueError, match="allow 6 to 12"):
        solve_additive([[0, 0], [0, 0]], [[3, 4], [3, 8]], 5)
    with pytest.raises(ValueError, match="choice 1 of step 0"):
        beam_search(None, [[3, 4]], _additive([[0.0, float("nan")]]), 5)
    with pytest.raises(ValueError, match="width=0"):
        beam_search(None, [[3]], _additive([[0.0]]), 5, width=0)
    with pytest.raises(ValueError, match="same steps"):
        solve_additive([[0.0]], [[3, 4]], 5)
