import pytest
import torch

from dit_qat.dit.methods.adatsq.candidates import (
    NEAR_FOUR,
    NEAR_THREE,
    Fractions,
    candidates,
    capacity,
    default_fractions,
)

BITS = (3, 4, 8)


def test_the_highest_scores_get_the_most_bits() -> None:
    scores = torch.tensor([0.1, 5.0, 3.0, 0.2])
    assert candidates(scores, BITS, [Fractions(0.25, 0.5)]) == [(3, 8, 4, 4)]


@pytest.mark.parametrize(("high", "middle"), [(0, 0), (0.05, 0.05), (0.1, 0.5), (0.2, 0.3), (1, 0)])
def test_mean_bits_are_those_of_the_fractions(high: float, middle: float) -> None:
    (bits,) = candidates(torch.arange(100.0), BITS, [Fractions(high, middle)])
    assert sum(bits) / 100 == pytest.approx(3 + 5 * high + middle)


def test_a_share_above_zero_is_at_least_one_layer() -> None:
    (bits,) = candidates(torch.arange(8.0), BITS, [Fractions(0.01, 0.01)])
    assert sorted(bits) == [3] * 6 + [4, 8]


def test_equal_candidates_come_once() -> None:
    assert candidates(torch.arange(3.0), BITS, [Fractions(0, 0), Fractions(0, 0)]) == [(3, 3, 3)]


def test_at_most_five_by_budget() -> None:
    assert default_fractions(BITS, 3.1) == NEAR_THREE
    assert default_fractions(BITS, 4.0) == NEAR_FOUR
    assert (1, 0) in default_fractions(BITS, 7.5)
    for budget in (3.0, 3.1, 3.6, 4.0, 5.0, 6.5, 8.0):
        assert 1 <= len(default_fractions(BITS, budget)) <= 5


def test_capacity_counts_bits_of_all_layers_and_steps() -> None:
    assert capacity(3.1, BITS, steps=20, layers=16) == 992
    assert capacity(3.0, BITS, steps=20, layers=16) == 960
    assert capacity(99, BITS, steps=2, layers=3) == 48
    with pytest.raises(ValueError, match=r"average_bits=2\.9 .*from 3 to 8"):
        capacity(2.9, BITS, 20, 16)
