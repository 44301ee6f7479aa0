import pytest
import torch

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.calibration.statistics import step_scales

CALLS = [torch.randn(2, 7, 5, generator=torch.Generator().manual_seed(n)) for n in range(6)]
ROWS = torch.cat(CALLS).flatten(0, 1)


def _gather(needs: Needs, weights: list[float] | None = None) -> LinearStatistics:
    statistics = LinearStatistics(5, len(CALLS), needs)
    for index, x in enumerate(CALLS):
        weight = 1.0 if weights is None else weights[index]
        statistics.add(x, index, step=index // 2, weight=weight)
    return statistics


def test_the_second_moment_is_the_sum_over_all_tokens() -> None:
    found = _gather(Needs(second_moment=True)).second_moment
    assert found is not None
    torch.testing.assert_close(found.matrix, ROWS.T @ ROWS)
    assert found.tokens == 84


def test_step_weights_count_the_mean_of_a_step() -> None:
    weights = torch.tensor([0.5, 0.3, 0.2])
    # The second step has one call only, and so half as many rows.
    steps, x = [0, 0, 1, 2, 2], CALLS[:5]
    scales = step_scales(weights, steps, [len(c.flatten(0, 1)) for c in x])
    statistics = LinearStatistics(5, 5, Needs(second_moment=True))
    for index, (step, call) in enumerate(zip(steps, x, strict=True)):
        statistics.add(call, index, step, scales[step])
    expected = torch.zeros(5, 5)
    for step in range(3):
        rows = torch.cat([c for c, s in zip(x, steps, strict=True) if s == step]).flatten(0, 1)
        expected += weights[step] * rows.T @ rows / len(rows)
    assert statistics.second_moment is not None
    torch.testing.assert_close(statistics.second_moment.matrix, expected)
    assert step_scales(None, steps, [1] * 5) == {0: 1.0, 1: 1.0, 2: 1.0}


def test_left_out_tokens_are_stood_for_by_the_others() -> None:
    ones = [torch.ones(10, 2)] * 3
    statistics = LinearStatistics(2, 3, Needs(second_moment=True, moment_tokens=4))
    for index, x in enumerate(ones):
        statistics.add(x, index)
    assert statistics.second_moment is not None
    assert statistics.second_moment.matrix.tolist() == [[30.0, 30.0]] * 2
    assert (statistics.tokens, statistics.second_moment.tokens) == (30, 12)


def test_ranges_are_those_of_all_tokens() -> None:
    found = _gather(Needs(call_ranges=True))
    assert torch.equal(found.low, ROWS.amin(0))
    assert torch.equal(found.high, ROWS.amax(0))
    assert torch.equal(found.absmax, ROWS.abs().amax(0))
    of_calls = torch.stack([x.abs().flatten(0, 1).amax(0) for x in CALLS])
    assert torch.equal(found.call_absmax, of_calls)
    torch.testing.assert_close(found.absmax_quantile, of_calls.quantile(0.999, 0))


@pytest.mark.parametrize(("tokens", "per_call"), [(12, [2] * 6), (8, [1, 1, 2, 1, 1, 2])])
def test_kept_rows_are_spread_evenly_over_the_calls(tokens: int, per_call: list[int]) -> None:
    found = _gather(Needs(tokens=tokens))
    assert found.rows.shape == (tokens, 5)
    assert found.row_steps.tolist() == [i // 2 for i, n in enumerate(per_call) for _ in range(n)]
    first = found.rows[: per_call[0]]
    assert all(any(torch.equal(row, x) for x in CALLS[0].flatten(0, 1)) for row in first)
    torch.testing.assert_close(found.absmax_quantile, found.rows.abs().quantile(0.999, 0))


def test_more_tokens_than_there_are_keep_all_in_order() -> None:
    assert torch.equal(_gather(Needs(tokens=10_000)).rows, ROWS)


def test_layers_of_one_input_keep_the_same_rows() -> None:
    assert torch.equal(_gather(Needs(tokens=12)).rows, _gather(Needs(tokens=12)).rows)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(bad: float) -> None:
    x = torch.zeros(3, 5)
    x[1, 2] = bad
    with pytest.raises(ValueError, match="1 of 3 inputs hold NaN or infinite"):
        LinearStatistics(5, 1, Needs()).add(x, 0)


@pytest.mark.parametrize(
    ("name", "cure"),
    [
        ("low", "ranges=True"),
        ("call_absmax", "call_ranges=True"),
        ("absmax_quantile", "call_ranges=True or tokens above 0"),
        ("rows", "tokens above 0"),
        ("row_steps", "tokens above 0"),
    ],
)
def test_what_was_not_asked_for_is_named(name: str, cure: str) -> None:
    found = _gather(Needs(ranges=False))
    assert found.second_moment is None
    with pytest.raises(ValueError, match=rf"ask for Needs\({cure}\)"):
        getattr(found, name)


@pytest.mark.parametrize("bad", [{"tokens": -1}, {"moment_tokens": 0}, {"probe_calls": 0}])
def test_needs_refuse_what_cannot_be(bad: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least"):
        Needs(**bad)
