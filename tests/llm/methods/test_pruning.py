"""N:M masks and how many entries a layer keeps."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_qat.llm.methods.pruning import (
    allocate_kept,
    drop_lowest,
    keep_highest,
    outlier_share,
    ria,
    shifted_kept,
)

BARS = [2.85, 1.7, 1.5, 1.0, 1.5, 1.5, *[1.0] * 16, *[0.3] * 8, 0.75, 2.75]


def score(n: int = 9, k: int = 32) -> torch.Tensor:
    return torch.randn(n, k, generator=torch.Generator().manual_seed(0)).abs()


@pytest.mark.parametrize("kept", range(1, 9))
def test_the_highest_of_every_group_are_kept(kept: int) -> None:
    mask = keep_highest(score(), kept, 8)
    groups, values = mask.view(9, -1, 8), score().view(9, -1, 8)
    assert bool((groups.sum(-1) == kept).all())
    least = values.masked_fill(~groups, torch.inf).amin(-1)
    assert bool((values.masked_fill(groups, -torch.inf).amax(-1) < least).all())


def test_steps_of_one_with_a_fixed_score_end_where_one_shot_does() -> None:
    keep = torch.ones(9, 32, dtype=torch.bool)
    for step in range(1, 5):
        before, keep = keep, drop_lowest(score(), keep, 8)
        assert bool((keep.view(9, -1, 8).sum(-1) == 8 - step).all())
        assert not bool((keep & ~before).any())  # what a step drops was still there
        assert torch.equal(keep, keep_highest(score(), 8 - step, 8))


def test_ria_by_hand() -> None:
    W = torch.tensor([[1.0, -3.0], [1.0, 0.0]])
    found = ria(W, torch.tensor([4.0, 9.0]))
    expected = [[(1 / 2 + 1 / 4) * 2, (1 + 3 / 4) * 3], [(1 / 2 + 1) * 2, 0.0]]
    torch.testing.assert_close(found, torch.tensor(expected))
    assert bool((ria(0 * W, torch.zeros(2)) == 0).all())


def test_outliers_are_counted_above_a_multiple_of_the_mean() -> None:
    assert outlier_share(torch.tensor([[1.0, 1, 1, 1, 1, 1, 1, 9]])) == 1 / 8


def test_release_defaults_allocate_nothing_and_shifts_of_one_become_two() -> None:
    shares = [0.01, 0.02, 0.05, 0.011]
    assert shifted_kept(shares, 4, 8, 0.08) == [4] * 4
    found = shifted_kept([0.0, 0.0, 0.0, 1.0], 4, 8, 1.5)
    assert found == [4, 4, 4, 6]
    assert shifted_kept([0.2, 0.2], 4, 8, 5.0) == [4, 4]


def test_the_example_of_32_layers() -> None:
    kept = allocate_kept(BARS, 4, 3, 6)
    assert sum(kept) == 4 * 32
    assert kept[0] == kept[31] == 6
    assert kept[1] == kept[4] == kept[5] == 5
    assert kept[22:30] == [3] * 8


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(0.01, 5), min_size=1, max_size=40),
    st.integers(2, 7),
    st.floats(0, 4),
)
def test_budget_is_met_exactly_and_importance_is_respected(
    importance: list[float], target: int, gain: float
) -> None:
    low, high = target - 1, min(8, target + 2)
    kept = allocate_kept(importance, target, low, high, gain)
    assert sum(kept) == target * len(kept)
    assert all(low <= n <= high for n in kept)
    order = sorted(range(len(kept)), key=lambda i: importance[i])
    assert all(kept[a] <= kept[b] for a, b in pairwise(order) if importance[a] < importance[b])


def test_layers_of_unequal_size_stay_within_the_budget() -> None:
    sizes = [10, 30, 20, 5]
    kept = allocate_kept([3.0, 1.0, 0.5, 2.0], 4, 3, 6, sizes=sizes)
    assert sum(n * s for n, s in zip(kept, sizes, strict=True)) <= 4 * sum(sizes)
    assert kept[0] > kept[2]


def test_impossible_budgets_are_refused() -> None:
    with pytest.raises(ValueError, match="target"):
        allocate_kept([1.0], 2, 3, 6)
    with pytest.raises(ValueError, match="finite"):
        allocate_kept([0.0, 0.0], 4, 3, 6)
