"""Low-rank splits: optimality, and what is left for the quantizer."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.lowrank import split_alternating, split_svd
from dit_qat.primitives.ternary import ternarize


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def fake_ternary(weight: Tensor) -> Tensor:
    codes, scale = ternarize(weight, "least_squares")
    return codes * scale


@pytest.mark.parametrize("shape", [(6, 9), (9, 6)])
def test_a_full_rank_split_leaves_nothing(shape: tuple[int, int]) -> None:
    weight = normal(*shape)
    up, down = split_svd(weight, 6)
    assert up.shape == (shape[0], 6)
    assert down.shape == (6, shape[1])
    assert (weight - up @ down).abs().max() < 1e-12


def test_the_residual_holds_the_smaller_singular_values() -> None:
    weight = normal(20, 30)
    up, down = split_svd(weight, 5)
    left = torch.linalg.svdvals(weight)[5:].square().sum()
    torch.testing.assert_close((weight - up @ down).square().sum(), left)
    torch.testing.assert_close(down @ down.T, torch.eye(5, dtype=torch.float64))


@pytest.mark.parametrize("rank", [0, 7])
def test_impossible_ranks_are_refused(rank: int) -> None:
    with pytest.raises(ValueError, match=rf"rank={rank} is outside 1\.\.6 for a \(6, 9\) weight"):
        split_svd(normal(6, 9), rank)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_factors_keep_the_dtype(dtype: torch.dtype) -> None:
    up, down = split_svd(normal(6, 9, dtype=dtype), 2)
    assert up.dtype == down.dtype == dtype


def error_after(weight: Tensor, up: Tensor, down: Tensor) -> Tensor:
    residual = weight - up @ down
    return (residual - fake_ternary(residual)).norm()


@pytest.mark.parametrize("rank", [1, 8])
def test_alternating_is_never_worse_than_one_split(rank: int) -> None:
    weight = normal(32, 48) + normal(32, 2) @ normal(2, 48)
    start = error_after(weight, *split_svd(weight, rank))
    errors = [
        error_after(weight, *split_alternating(weight, rank, fake_ternary, iterations))
        for iterations in (0, 2, 5)
    ]
    assert errors[0] == start
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.995 * start


def test_alternating_keeps_the_start_where_rounds_only_hurt() -> None:
    weight = normal(8, 8)
    erratic = iter([torch.zeros(8, 8), *(100 * normal(8, 8) for _ in range(3))])
    split = split_alternating(weight, 2, lambda residual: residual - next(erratic), 3)
    assert all(map(torch.equal, split, split_svd(weight, 2)))
