"""The compensating solver against least squares, the textbook loop, and its own invariances."""

import logging

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.compensation import Block, column_by_column, compensate
from dit_qat.primitives.integer import IntegerGrid, decode, encode, fit_scales
from dit_qat.primitives.second_moment import SecondMoment


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def skewed(tokens: int, width: int, seed: int = 1) -> Tensor:
    """Tokens with correlated features of unequal size."""
    mix = normal(width, width, seed=seed + 100) * torch.linspace(0.1, 3, width).double()[:, None]
    return normal(tokens, width, seed=seed) @ mix


def round_block(W: Tensor, block: Block) -> Tensor:
    return (W * 4).round() / 4


def round_columns(W: Tensor, columns: Tensor) -> Tensor:
    return (W * 4).round() / 4


def keep(W: Tensor, block: Block) -> Tensor:
    return W


def output_error(X: Tensor, W: Tensor, Q: Tensor) -> float:
    return float((X @ (W - Q).T).square().sum())


def test_columns_to_come_are_the_least_squares_optimum() -> None:
    X, W = skewed(60, 12), normal(7, 12)
    H = X.T @ X
    for stop in (1, 4, 9):

        def quantize(block_W: Tensor, block: Block, stop: int = stop) -> Tensor:
            return round_block(block_W, block) if int(block.columns[-1]) < stop else block_W

        Q = compensate(W, H, quantize, block_size=1, damping=0).weight
        fixed, target = Q[:, :stop], X @ W.T
        best = torch.linalg.lstsq(X[:, stop:], target - X[:, :stop] @ fixed.T).solution.T
        torch.testing.assert_close(Q[:, stop:], best, rtol=1e-8, atol=1e-8)
        assert not torch.allclose(Q[:, stop:], W[:, stop:])


@pytest.mark.parametrize("size", [1, 3, 5, 12])
def test_every_block_sees_the_optimum_given_what_was_before(size: int) -> None:
    X, W = skewed(60, 12), normal(7, 12)
    seen: list[tuple[Tensor, Tensor]] = []

    def quantize(block_W: Tensor, block: Block) -> Tensor:
        seen.append((block_W.clone(), round_block(block_W, block)))
        return seen[-1][1]

    compensate(W, X.T @ X, quantize, block_size=size, damping=0)
    start, before = 0, torch.empty(7, 0, dtype=torch.float64)
    for block_W, Q in seen:
        best = torch.linalg.lstsq(X[:, start:], X @ W.T - X[:, :start] @ before.T).solution.T
        torch.testing.assert_close(block_W, best[:, : block_W.shape[1]], rtol=1e-8, atol=1e-8)
        start, before = start + block_W.shape[1], torch.cat([before, Q], 1)


def test_no_quantization_changes_nothing() -> None:
    X, W = skewed(60, 12), normal(7, 12)
    for update in ("exact", "diagonal"):
        assert torch.equal(compensate(W, X.T @ X, keep, 5, update).weight, W)  # type: ignore[arg-type]


@pytest.mark.parametrize("update", ["exact", "diagonal"])
def test_uncorrelated_inputs_give_round_to_nearest(update: str) -> None:
    W = normal(6, 10)
    for H in (torch.eye(10).double(), torch.linspace(1, 9, 10).double().diag()):
        Q = compensate(W, H, round_block, 4, update).weight  # type: ignore[arg-type]
        assert torch.equal(Q, round_columns(W, torch.arange(10)))


@pytest.mark.parametrize("scale", [1e-12, 1e15])
def test_the_scale_of_the_second_moment_changes_nothing(scale: float) -> None:
    X, W = skewed(60, 12), normal(7, 12)
    H = X.T @ X
    H[3], H[:, 3] = 0, 0  # nor does it where a column is dead
    plain = compensate(W, H, column_by_column(round_columns), 5)
    scaled = compensate(W, H * scale, column_by_column(round_columns), 5)
    assert torch.equal(plain.weight, scaled.weight)


def textbook(W: Tensor, H: Tensor, damping: float) -> Tensor:
    """GPTQ as its paper writes it: one column, then all columns to come."""
    W, n = W.clone(), W.shape[1]
    H = H + damping * H.diagonal().mean() * torch.eye(n).double()
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    Q = torch.zeros_like(W)
    for j in range(n):
        Q[:, j] = round_columns(W[:, j], torch.tensor([j]))
        error = (W[:, j] - Q[:, j]) / U[j, j]
        W[:, j + 1 :] -= error[:, None] * U[None, j, j + 1 :]
    return Q


@pytest.mark.parametrize("size", [1, 2, 5, 7, 16, 100])
def test_column_by_column_is_the_textbook_loop_for_every_block_size(size: int) -> None:
    X, W = skewed(80, 16), normal(9, 16)
    H = X.T @ X
    Q = compensate(W, H, column_by_column(round_columns), size).weight
    torch.testing.assert_close(Q, textbook(W, H, 0.01), rtol=0, atol=1e-12)


def test_the_diagonal_update_is_the_release_s() -> None:
    X, W = skewed(80, 12), normal(5, 12)
    H = X.T @ X
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    rest = W.clone()
    expected = torch.zeros_like(W)
    for start in range(0, 12, 4):
        block = slice(start, start + 4)
        expected[:, block] = round_columns(rest[:, block], torch.arange(4))
        error = (rest[:, block] - expected[:, block]) / U[block, block].diagonal()
        rest[:, start + 4 :] -= error @ U[block, start + 4 :]
    Q = compensate(W, H, round_block, 4, "diagonal", damping=0).weight
    torch.testing.assert_close(Q, expected, rtol=0, atol=1e-12)
    exact = compensate(W, H, round_block, 4, "exact", damping=0).weight
    assert output_error(X, W, exact) < output_error(X, W, Q)


def test_the_factor_is_that_of_the_inverse() -> None:
    X = skewed(60, 12)
    H, factors = X.T @ X, []

    def quantize(W: Tensor, block: Block) -> Tensor:
        factors.append((block.columns, block.factor))
        return W

    order = torch.randperm(12, generator=torch.Generator().manual_seed(3))
    compensate(normal(3, 12), H, quantize, 5, order=order, damping=0)
    U = torch.linalg.cholesky(torch.linalg.inv(H[order][:, order]), upper=True)
    assert torch.equal(torch.cat([columns for columns, _ in factors]), order)
    for number, (_, factor) in enumerate(factors):
        block = slice(5 * number, 5 * number + 5)
        torch.testing.assert_close(factor, U[block, block])


def test_output_error_falls_below_round_to_nearest() -> None:
    X, W = skewed(500, 32), normal(20, 32)
    Q = compensate(W, X.T @ X, column_by_column(round_columns), 8).weight
    assert output_error(X, W, Q) < 0.7 * output_error(X, W, round_columns(W, torch.arange(32)))


def test_a_permuted_order_is_undone_on_return() -> None:
    X, W = skewed(80, 16), normal(9, 16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(5))
    there = compensate(W, X.T @ X, column_by_column(round_columns), 4, order=order)
    by_hand = compensate(
        W[:, order], X[:, order].T @ X[:, order], column_by_column(round_columns), 4
    )
    assert there.order is not None
    assert torch.equal(there.order, order)
    assert torch.equal(there.weight[:, order], by_hand.weight)


def test_activation_order_helps_on_a_skewed_second_moment() -> None:
    plain = ordered = 0.0
    for seed in range(5):
        # Large features last: what they have to make up for is largest without an order.
        X = normal(300, 24, seed=seed) * torch.logspace(-1, 1, 24).double()
        X = X + 0.3 * X.sum(1, keepdim=True)
        W, step = normal(16, 24, seed=seed + 50), column_by_column(round_columns)
        plain += output_error(X, W, compensate(W, X.T @ X, step, 8).weight)
        result = compensate(W, X.T @ X, step, 8, order="activation")
        assert result.order is not None
        assert bool((X.square().sum(0)[result.order].diff() <= 0).all())
        ordered += output_error(X, W, result.weight)
    assert ordered < plain


def test_group_aware_order_keeps_groups_whole_and_blocks_hold_whole_groups() -> None:
    X, W, blocks = skewed(80, 24), normal(4, 24), []

    def quantize(block_W: Tensor, block: Block) -> Tensor:
        blocks.append(block.columns)
        return block_W

    result = compensate(W, X.T @ X, quantize, 4, order="activation", group_size=6)
    assert result.order is not None
    groups = result.order.view(4, 6)
    assert torch.equal(groups, groups[:, :1] // 6 * 6 + torch.arange(6))
    means = (X.square().sum(0)).view(4, 6).mean(1)[groups[:, 0] // 6]
    assert bool((means.diff() <= 0).all())
    assert [len(columns) for columns in blocks] == [6] * 4


def test_dead_columns_become_zero_and_touch_nobody() -> None:
    X, W = skewed(60, 12), normal(7, 12)
    X[:, [2, 9]] = 0
    alive = [j for j in range(12) if j not in (2, 9)]
    result = compensate(W, X.T @ X, column_by_column(round_columns), 4)
    assert result.dead.nonzero().flatten().tolist() == [2, 9]
    assert not result.weight[:, [2, 9]].any()
    without = compensate(
        W[:, alive], X[:, alive].T @ X[:, alive], column_by_column(round_columns), 4
    )
    assert torch.equal(result.weight[:, alive], without.weight)
    nothing = compensate(W, torch.zeros(12, 12), column_by_column(round_columns))
    assert not nothing.weight.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_singular_second_moment_raises_the_damping_and_says_so(
    caplog: pytest.LogCaptureFixture, dtype: torch.dtype
) -> None:
    X, W = skewed(5, 12).to(dtype), normal(7, 12).to(dtype)
    with caplog.at_level(logging.WARNING):
        result = compensate(W, X.T @ X, column_by_column(round_columns), damping=0)
    assert 0 < result.damping <= 1e-3
    assert "damping raised from 0 to 1e-06" in caplog.text
    assert result.weight.isfinite().all()
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        assert compensate(W, X.T @ X, column_by_column(round_columns)).damping == 0.01
    assert not caplog.text


def test_fewer_tokens_than_columns_raise_the_damping(caplog: pytest.LogCaptureFixture) -> None:
    few, enough = SecondMoment(12), SecondMoment(12)
    few.add(skewed(5, 12))
    enough.add(skewed(12, 12))
    W = normal(7, 12)
    with caplog.at_level(logging.WARNING):
        assert compensate(W, few, round_block).damping == pytest.approx(0.1)
        assert "5 tokens cannot fill 12 columns" in caplog.text
        caplog.clear()
        assert compensate(W, enough, round_block).damping == 0.01
        assert not caplog.text


def test_single_precision_and_half_precision_weights() -> None:
    X, W = skewed(300, 32).float(), normal(20, 32).float()
    moment = SecondMoment(32)
    moment.add(X)
    grid = IntegerGrid(4)
    for weight in (W, W.bfloat16()):
        scales = fit_scales(weight, grid)

        def quantize(part: Tensor, columns: Tensor, scales=scales) -> Tensor:  # type: ignore[no-untyped-def]
            return decode(encode(part, grid, scales, columns), grid, scales, columns)

        Q = compensate(weight, moment, column_by_column(quantize), 8).weight
        assert Q.dtype == torch.float32
        assert torch.equal(decode(encode(Q, grid, scales), grid, scales), Q)
        near = decode(encode(weight, grid, scales), grid, scales)
        assert output_error(X, weight.float(), Q) < output_error(X, weight.float(), near)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"second_moment": torch.eye(5)}, r"weight \(3, 4\) and second moment \(5, 5\)"),
        ({"second_moment": torch.eye(4) * torch.nan}, "second moment holds NaN"),
        ({"weight": torch.full((3, 4), torch.inf)}, "weight holds NaN or infinite"),
        ({"second_moment": -torch.eye(4)}, "negative diagonal"),
        (
            {"second_moment": 1 - 9 * torch.ones(4, 4).tril(-1) - 9 * torch.ones(4, 4).triu(1)},
            "even",
        ),
        ({"block_size": 0}, "block_size=0"),
        ({"update": "best"}, "update='best'"),
        ({"order": "random"}, "order='random'"),
        ({"order": torch.tensor([0, 1, 1, 3])}, "no permutation of 4 columns"),
        ({"order": torch.tensor([0, 2, 1, 3]), "group_size": 2}, "tears groups of 2"),
        ({"group_size": 3}, "group_size=3 does not divide 4"),
        ({"damping": -0.1}, "damping=-0.1"),
        ({"block_quantizer": lambda W, block: W[:, :1]}, r"made \(3, 1\) of a block of \(3, 4\)"),
    ],
)
def test_bad_input_is_refused(changed: dict[str, object], message: str) -> None:
    arguments = {"weight": torch.ones(3, 4), "second_moment": torch.eye(4), "block_quantizer": keep}
    with pytest.raises(ValueError, match=message):
        compensate(**(arguments | changed))  # type: ignore[arg-type]
