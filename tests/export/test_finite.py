"""Floats judged by their bits agree with floats judged as floats."""

from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from dit_qat.export.finite import check_finite, is_finite

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
INTEGERS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def refused(tensor: torch.Tensor, positive: bool = False) -> bool:
    try:
        check_finite(tensor, positive)
    except ValueError:
        return True
    return False


@given(st.sampled_from(DTYPES), st.lists(st.binary(min_size=8, max_size=8), min_size=1, max_size=4))
def test_any_bits_are_judged_as_torch_does(dtype: torch.dtype, words: list[bytes]) -> None:
    tensor = torch.frombuffer(bytearray(b"".join(words)), dtype=dtype)
    assert refused(tensor) == (not bool(tensor.isfinite().all()))
    assert refused(tensor) == (not is_finite(tensor))
    assert refused(tensor, positive=True) == (not bool((tensor.isfinite() & (tensor > 0)).all()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_edges(dtype: torch.dtype) -> None:
    largest, tiny = torch.finfo(dtype).max, torch.finfo(dtype).smallest_normal
    fine = torch.tensor([largest, -largest, tiny, 0.0, -0.0], dtype=dtype)
    check_finite(fine)
    check_finite(torch.tensor([largest, tiny], dtype=dtype), positive=True)
    for bad in (inf, -inf, nan, -nan):
        with pytest.raises(ValueError, match="NaN or infinite"):
            check_finite(torch.tensor([1.0, bad, 2.0], dtype=dtype))
    for bad in (0.0, -0.0, -tiny):
        with pytest.raises(ValueError, match="scales down to"):
            check_finite(torch.tensor([1.0, bad], dtype=dtype), positive=True)


def test_nothing_is_finite_and_order_does_not_matter() -> None:
    check_finite(torch.empty(0, 3), positive=True)
    holey = torch.full((4, 4), nan)
    holey[:, ::2] = 1
    check_finite(holey[:, ::2], positive=True)
    check_finite(torch.tensor(1.0), positive=True)
