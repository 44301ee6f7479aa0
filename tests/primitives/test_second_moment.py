"""Second moments: streaming, weights, resumption, and input that is refused."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_qat.primitives.second_moment import SecondMoment


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 7), st.floats(0, 4)), min_size=1, max_size=6))
def test_any_split_into_weighted_batches_is_the_sum_of_outer_products(
    batches: list[tuple[int, float]],
) -> None:
    moment, expected = SecondMoment(5, dtype=torch.float64), torch.zeros(5, 5, dtype=torch.float64)
    for number, (tokens, weight) in enumerate(batches):
        x = normal(tokens, 5, seed=number)
        moment.add(x, weight)
        for token in x:
            expected += weight * torch.outer(token, token)
    torch.testing.assert_close(moment.matrix, expected)
    assert moment.tokens == sum(tokens for tokens, _ in batches)


def test_weighting_tokens_is_scaling_features_by_the_root() -> None:
    x, weights = normal(3, 20, 6), [0.2, 3.0, 0.7]
    weighted, scaled = SecondMoment(6), SecondMoment(6)
    for tokens, weight in zip(x, weights, strict=True):
        weighted.add(tokens, weight)
        scaled.add(tokens * math.sqrt(weight))
    torch.testing.assert_close(weighted.matrix, scaled.matrix)


def test_leading_dimensions_and_dtypes_do_not_matter() -> None:
    x = normal(2, 3, 4, 6)
    one, other = SecondMoment(6), SecondMoment(6)
    one.add(x.bfloat16())
    other.add(x.bfloat16().float().flatten(0, 2))
    assert torch.equal(one.matrix, other.matrix)
    assert one.matrix.dtype == torch.float32
    assert one.tokens == other.tokens == 24


def test_autocast_does_not_round_it() -> None:
    x = normal(50, 8).float()
    plain, cast = SecondMoment(8), SecondMoment(8)
    plain.add(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast.add(x)
    assert torch.equal(plain.matrix, cast.matrix)


def test_a_resumed_one_goes_on() -> None:
    x = normal(40, 6)
    whole, first = SecondMoment(6), SecondMoment(6)
    whole.add(x[:10])
    whole.add(x[10:])
    first.add(x[:10])
    second = SecondMoment.from_state({k: v.clone() for k, v in first.state().items()})
    second.add(x[10:])
    assert torch.equal(second.matrix, whole.matrix)
    assert second.tokens == 40


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_and_change_nothing(bad: float) -> None:
    moment = SecondMoment(4)
    x = normal(7, 4)
    x[2, 1] = bad
    with pytest.raises(ValueError, match="1 of 7 tokens hold NaN or infinite"):
        moment.add(x)
    assert moment.tokens == 0
    assert not moment.matrix.any()


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \(3, 5\), the second moment width 4"):
        SecondMoment(4).add(normal(3, 5))
    for weight in (-1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match=f"weight={weight}"):
            SecondMoment(4).add(normal(3, 4), weight)
    with pytest.raises(ValueError, match="width=0"):
        SecondMoment(0)
    with pytest.raises(ValueError, match=r"not \(2, 3\)"):
        SecondMoment.from_state({"matrix": torch.zeros(2, 3), "tokens": torch.tensor(1)})
