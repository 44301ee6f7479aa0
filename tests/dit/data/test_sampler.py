from itertools import chain

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_qat.dit.data.sampler import StepBatchSampler


def stream(size=10, batch_size=4, seed=0, start=0, length=12):
    return list(StepBatchSampler(size, batch_size, seed, start, length))


@settings(deadline=None, max_examples=40)
@given(
    size=st.integers(1, 40),
    batch_size=st.integers(1, 60),
    seed=st.integers(0, 2**31),
    length=st.integers(0, 12),
)
def test_each_epoch_of_the_stream_is_a_permutation(size, batch_size, seed, length):
    batches = stream(size, batch_size, seed, 0, length)
    assert [len(batch) for batch in batches] == [batch_size] * length
    flat = list(chain.from_iterable(batches))
    for begin in range(0, len(flat) - size + 1, size):
        assert sorted(flat[begin : begin + size]) == list(range(size))


@settings(deadline=None, max_examples=40)
@given(size=st.integers(1, 40), batch_size=st.integers(1, 60), start=st.integers(0, 12))
def test_a_later_start_is_a_suffix_of_the_same_run(size, batch_size, start):
    assert stream(size, batch_size, start=start) == stream(size, batch_size)[start:]


def test_a_longer_run_begins_with_the_shorter_one():
    assert stream(length=20)[:12] == stream(length=12)


def test_orders_differ_between_epochs_and_seeds():
    first, second = stream(size=50, batch_size=50, length=2)
    assert first != second
    assert stream(size=50, batch_size=50, seed=1, length=1)[0] != first


def test_iterating_twice_gives_the_same_batches_and_leaves_the_global_generator_alone():
    before = torch.get_rng_state()
    sampler = StepBatchSampler(10, 4, 0, 2, 9)
    assert list(sampler) == list(sampler)
    assert torch.equal(torch.get_rng_state(), before)


def test_length_counts_the_whole_run():
    assert len(StepBatchSampler(10, 4, 0, start=5, length=9)) == 9
    assert len(list(StepBatchSampler(10, 4, 0, start=5, length=9))) == 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((0, 4, 0, 0, 1), "size=0"),
        ((10, 0, 0, 0, 1), "batch_size=0"),
        ((10, 4, 0, -1, 1), "start=-1"),
        ((10, 4, 0, 0, -1), "length=-1"),
    ],
)
def test_impossible_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        StepBatchSampler(*arguments)
