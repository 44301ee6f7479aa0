from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_qat.dit.data.sampler import SequentialDraws, StepBatchSampler


def stream(size=10, batch_size=4, seed=0, start=0, stop=12, **parts):
    return list(StepBatchSampler(size, batch_size, seed, start, stop, **parts))


def indices(draws):
    return list(chain.from_iterable(draw.indices for draw in draws))


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    stop=st.integers(0, 12),
)
def test_each_epoch_of_the_stream_is_a_permutation(size, batch_size, seed, stop):
    draws = stream(size, batch_size, seed, 0, stop)
    assert [len(draw.indices) for draw in draws] == [batch_size] * stop
    flat = indices(draws)
    for begin in range(0, len(flat) - size + 1, size):
        assert sorted(flat[begin : begin + size]) == list(range(size))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 60), start=st.integers(0, 12))
def test_a_later_start_is_a_suffix_of_the_same_run(size, batch_size, start):
    assert stream(size, batch_size, start=start) == stream(size, batch_size)[start:]


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 40),
    micro=st.integers(1, 5),
    world_size=st.integers(1, 4),
    accumulated=st.integers(1, 3),
)
def test_processes_and_micro_batches_share_the_step_of_one_process(
    size, micro, world_size, accumulated
):
    batch = micro * world_size * accumulated
    whole = stream(size, batch, stop=5)
    shares = [
        stream(size, batch, stop=5, rank=rank, world_size=world_size, accumulated=accumulated)
        for rank in range(world_size)
    ]
    for step, expected in enumerate(whole):
        parts = range(step * accumulated, (step + 1) * accumulated)
        dealt = [shares[rank][part] for part in parts for rank in range(world_size)]
        assert indices(dealt) == expected.indices
        assert [draw.position for draw in dealt] == list(
            range(expected.position, expected.position + batch, micro)
        )


def test_a_longer_run_begins_with_the_shorter_one():
    assert stream(stop=20)[:12] == stream(stop=12)


def test_orders_differ_between_epochs_and_seeds():
    first, second = stream(size=50, batch_size=50, stop=2)
    assert first.indices != second.indices
    assert stream(size=50, batch_size=50, seed=1, stop=1)[0].indices != first.indices


def test_iterating_twice_gives_the_same_batches_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sampler = StepBatchSampler(10, 4, 0, 2, 9)
    assert list(sampler) == list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


def test_length_counts_the_micro_batches_of_the_whole_run():
    sampler = StepBatchSampler(10, 4, 0, start=5, stop=9, accumulated=2)
    assert len(sampler) == 18
    assert len(list(sampler)) == 8


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0, 1), "size=0"),
        ((10, 0, 0, 0, 1), "batch_size=0"),
        ((10, 4, 0, -1, 1), "start=-1"),
        ((10, 4, 0, 0, -1), "stop=-1"),
        ((10, 4, 0, 0, 1, 0, 3), "batch_size=4 .* 3 processes .* multiple of 3"),
        ((10, 4, 0, 0, 1, 0, 2, 4), "2 processes times 4 accumulated .* multiple of 8"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatchSampler(*arguments)


@settings(deadline=None, max_examples=40)
@given(size=st.integers(0, 50), batch_size=st.integers(1, 9), world_size=st.integers(1, 4))
def test_sequential_draws_are_the_same_batches_for_any_number_of_processes(
    size, batch_size, world_size
):
    alone = list(SequentialDraws(size, batch_size))
    assert indices(alone) == list(range(size))
    samplers = [SequentialDraws(size, batch_size, r, world_size) for r in range(world_size)]
    dealt = [list(sampler) for sampler in samplers]
    assert {len(sampler) for sampler in samplers} == {len(dealt[0])} == {len(d) for d in dealt}
    given = [draw for draw in chain.from_iterable(dealt) if draw.indices]
    assert sorted(given, key=lambda draw: draw.position) == alone
    for rank, draws in enumerate(dealt):
        assert draws[: len(alone[rank::world_size])] == alone[rank::world_size]
