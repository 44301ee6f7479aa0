"""The factor in panels against LAPACK's, its damping, and what it does with dead columns."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives import damped_cholesky as module
from dit_qat.primitives.damped_cholesky import (
    damped_cholesky,
    damped_inverse,
    damped_upper,
    enough_damping,
)


def second_moment(width: int, tokens: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(tokens, width, generator=generator, dtype=torch.float64)
    return X.T @ X + 3 * torch.outer(X[0], X[0])


@pytest.mark.parametrize("panel", [1, 4, 7, 30, 64])
@pytest.mark.parametrize("indexed", [False, True])
def test_the_factor_is_that_of_the_damped_matrix(
    monkeypatch: pytest.MonkeyPatch, panel: int, indexed: bool
) -> None:
    monkeypatch.setattr(module, "_PANEL", panel)
    H = second_moment(30)
    index = torch.randperm(30, generator=torch.Generator().manual_seed(1)) if indexed else None
    L, damping = damped_cholesky(H, 0.05, index)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(30).double()
    damped = damped if index is None else damped[index][:, index]
    torch.testing.assert_close(L, torch.linalg.cholesky(damped), rtol=1e-11, atol=1e-11)
    assert damping == 0.05
    assert not L.triu(1).any()


@pytest.mark.parametrize("width", [1, 2, 29, 30])
@pytest.mark.parametrize("panel", [1, 4, 64])
def test_the_upper_factor_is_the_lower_one_read_backwards(
    monkeypatch: pytest.MonkeyPatch, width: int, panel: int
) -> None:
    monkeypatch.setattr(module, "_PANEL", panel)
    H = second_moment(width)
    index = torch.randperm(width, generator=torch.Generator().manual_seed(1))
    R, _ = damped_upper(H, 0.05, index)
    damped = H + 0.05 * H.diagonal().mean() * torch.eye(width).double()
    torch.testing.assert_close(R @ R.T, damped[index][:, index])
    assert not R.tril(-1).any()


def test_the_inverse_is_the_inverse() -> None:
    H = second_moment(30)
    inverse, _ = damped_inverse(H, 0.01)
    damped = H + 0.01 * H.diagonal().mean() * torch.eye(30).double()
    torch.testing.assert_close(inverse @ damped, torch.eye(30).double(), rtol=0, atol=1e-9)


def test_dead_columns_stand_apart() -> None:
    H = second_moment(30)
    H[4], H[:, 4] = 0, 0
    L, _ = damped_cholesky(H, 0.01)
    off = L @ L.T
    assert float(off[4, 4]) > 0
    off[4, 4] = 0
    assert not off[4].any()
    alive = [j for j in range(30) if j != 4]
    rest, _ = damped_cholesky(H[alive][:, alive], 0.01)
    torch.testing.assert_close(off[alive][:, alive], rest @ rest.T)


def test_what_is_no_second_moment_is_refused_and_input_is_kept() -> None:
    H = second_moment(12)
    before = H.clone()
    damped_cholesky(H, 0.01)
    assert torch.equal(H, before)
    with pytest.raises(ValueError, match="no second moment"):
        damped_cholesky(torch.eye(4) - 30 * torch.ones(4, 4).fill_diagonal_(0), 0.0)


def test_damping_rises_where_tokens_are_few() -> None:
    assert enough_damping(0.01, None, 100) == 0.01
    assert enough_damping(0.01, 100, 100) == 0.01
    assert enough_damping(0.01, 99, 100) == pytest.approx(0.1)
    assert enough_damping(0.01, 0, 100) == 0.01
