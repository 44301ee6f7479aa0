"""GPTAQ's term against its dense form, its textbook loop, and its own objective."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives import asymmetric as module
from dit_qat.primitives.asymmetric import Asymmetric, retarget
from dit_qat.primitives.compensation import Block, column_by_column, compensate
from dit_qat.primitives.second_moment import SecondMoment


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def inputs(tokens: int = 80, width: int = 16) -> tuple[Tensor, Tensor]:
    """What the float model feeds, and what the quantized one does."""
    exact = normal(tokens, width) @ normal(width, width, seed=1)
    return exact, exact + 0.3 * normal(tokens, width, seed=2) @ normal(width, width, seed=3)


def round_columns(W: Tensor, columns: Tensor) -> Tensor:
    return (W * 4).round() / 4


def round_block(W: Tensor, block: Block) -> Tensor:
    return (W * 4).round() / 4


def dense(H: Tensor, D: Tensor, strength: float) -> Tensor:
    U = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    return strength * (D @ U.T).triu(1) @ U


def moments(exact: Tensor, X: Tensor) -> tuple[Tensor, Tensor]:
    return X.T @ X, (exact - X).T @ X


def test_p_moves_the_columns_behind_by_their_own_regression() -> None:
    """P_jR = c D_jR (H_RR)^-1."""
    H, D = moments(*inputs())
    P = dense(H, D, 0.25)
    for j in range(15):
        rest = slice(j + 1, None)
        expected = 0.25 * D[j, rest] @ torch.linalg.inv(H[rest, rest])
        torch.testing.assert_close(P[j, rest], expected)
    assert not P.tril().abs().gt(1e-12).any()


def textbook(W: Tensor, H: Tensor, D: Tensor, strength: float, size: int, released: bool) -> Tensor:
    W, n = W.clone(), W.shape[1]
    U, P = torch.linalg.cholesky(torch.linalg.inv(H), upper=True), dense(H, D, strength)
    Q = torch.zeros_like(W)
    for start in range(0, n, size):
        stop = min(start + size, n)
        errors, block = torch.zeros_like(W[:, start:stop]), slice(start, stop)
        before = W[:, block].clone()
        for j in range(start, stop):
            before[:, j - start] = W[:, j]
            Q[:, j] = round_columns(W[:, j], torch.tensor([j]))
            errors[:, j - start] = (W[:, j] - Q[:, j]) / U[j, j]
            W[:, j + 1 : stop] -= errors[:, j - start, None] * U[None, j, j + 1 : stop]
            W[:, j + 1 : stop] += before[:, j - start, None] * P[None, j, j + 1 : stop]
        W[:, stop:] -= errors @ U[block, stop:]
        W[:, stop:] += (Q[:, block] if released else before) @ P[block, stop:]
    return Q


@pytest.mark.parametrize("size", [1, 5, 16])
@pytest.mark.parametrize("released", [False, True])
def test_columns_follow_the_textbook_loop(size: int, released: bool) -> None:
    H, D = moments(*inputs())
    W = normal(9, 16, seed=5)
    term = Asymmetric(D, 0.5, "as_released" if released else "pre_round")
    loop = column_by_column(round_columns)
    Q = compensate(W, H, loop, size, damping=0, asymmetric=term).weight
    torch.testing.assert_close(Q, textbook(W, H, D, 0.5, size, released), rtol=0, atol=1e-10)
    plain = compensate(W, H, loop, size, damping=0).weight
    assert not torch.equal(Q, plain)


@pytest.mark.parametrize("panel", [1, 3, 5, 16, 64])
def test_panels_make_up_the_dense_p(monkeypatch: pytest.MonkeyPatch, panel: int) -> None:
    monkeypatch.setattr(module, "_PANEL", panel)
    H, D = moments(*inputs())
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)
    torch.testing.assert_close(R @ R.T, H)
    for start, stop in ((0, 5), (5, 10), (10, 16)):
        rows = 0.5 * D[start:stop, start:]
        P = module.p_of_factor(rows, R[start:, start:])
        torch.testing.assert_close(P, dense(H, D, 0.5)[start:stop, start:])
        U = torch.linalg.inv(R)
        torch.testing.assert_close(module.p_of_upper(rows, U[start:, start:]), P)


@pytest.mark.parametrize("update", ["exact", "diagonal"])
@pytest.mark.parametrize("chosen", [False, True])
def test_blocks_move_the_rest_by_the_dense_p(update: str, chosen: bool) -> None:
    """Whole blocks at once: W_R += W_B P_BR with W_B as it stood before rounding."""
    H, D = moments(*inputs())
    W, targets = normal(9, 16, seed=5), []

    def keep(W: Tensor, block: Block) -> Tensor:
        targets.append(W.clone())
        return W.clone()  # no error: what moves is the asymmetric term alone

    order = (lambda rest, size: torch.arange(size)) if chosen else None
    term = Asymmetric(D, 0.25, within=False)
    Q = compensate(W, H, keep, 6, update, order, damping=0, asymmetric=term).weight  # type: ignore[arg-type]
    P, expected = dense(H, D, 0.25), W.clone()
    for start in (0, 6, 12):
        torch.testing.assert_close(targets[start // 6], expected[:, start : start + 6])
        expected[:, start + 6 :] += (
            expected[:, start : start + 6] @ P[start : start + 6, start + 6 :]
        )
    torch.testing.assert_close(Q, expected)


def test_equal_inputs_change_no_bit() -> None:
    exact, _ = inputs()
    H, D = moments(exact, exact)
    W = normal(9, 16, seed=5)
    loop = column_by_column(round_columns)
    for order in (None, "activation"):
        plain = compensate(W, H, loop, 5, order=order).weight  # type: ignore[arg-type]
        term = compensate(W, H, loop, 5, order=order, asymmetric=Asymmetric(D)).weight  # type: ignore[arg-type]
        assert torch.equal(plain, term)


def test_an_order_permutes_the_cross_moment_as_well() -> None:
    H, D = moments(*inputs())
    W, order = normal(9, 16, seed=5), torch.randperm(16)
    loop, term = column_by_column(round_columns), Asymmetric(D, 0.5)
    there = compensate(W, H, loop, 5, order=order, asymmetric=term).weight
    turned = Asymmetric(D[order][:, order], 0.5)
    here = compensate(W[:, order], H[order][:, order], loop, 5, asymmetric=turned).weight
    torch.testing.assert_close(there[:, order], here)


def test_the_term_brings_outputs_nearer_to_the_float_ones() -> None:
    exact, X = inputs(400, 24)
    W = normal(32, 24, seed=5)
    H, D = moments(exact, X)

    def error(Q: Tensor) -> float:
        return float((X @ Q.T - exact @ W.T).square().sum())

    loop = column_by_column(round_columns)
    plain = error(compensate(W, H, loop).weight)
    term = error(compensate(W, H, loop, asymmetric=Asymmetric(D, 1.0)).weight)
    aimed = error(compensate(retarget(W, H, D), H, loop).weight)
    assert aimed < term < plain


def test_the_target_differs_from_the_objective_by_a_constant() -> None:
    exact, X = inputs()
    H, D = moments(exact, X)
    W = normal(9, 16, seed=5)
    aim = retarget(W, H, D, damping=0)
    best = torch.linalg.lstsq(X, exact @ W.T).solution.T
    torch.testing.assert_close(aim, best)
    constants = []
    for seed in range(3):
        Q = normal(9, 16, seed=20 + seed)
        whole = (X @ Q.T - exact @ W.T).square().sum()
        constants.append(whole - ((Q - aim) @ H @ (Q - aim).T).trace())
    torch.testing.assert_close(constants[0].expand(3), torch.stack(constants))
    assert torch.equal(retarget(W, H, D, strength=0), W)


def test_the_target_of_few_tokens_is_damped_as_their_compensation_is() -> None:
    exact, X = inputs(8)
    H, D = moments(exact, X)
    few = SecondMoment(16, dtype=torch.float64)
    few.add(X)
    W = normal(9, 16, seed=5)
    assert torch.equal(retarget(W, few, D), retarget(W, H, D, damping=0.1))


def test_dead_columns_take_no_part() -> None:
    exact, X = inputs()
    X[:, 3] = 0
    H, D = moments(exact, X)
    D[:, 3] = torch.nan_to_num(torch.tensor(7.0))
    W = normal(9, 16, seed=5)
    Q = compensate(W, H, column_by_column(round_columns), asymmetric=Asymmetric(D, 1.0)).weight
    alive = [j for j in range(16) if j != 3]
    term = Asymmetric(D[alive][:, alive], 1.0)
    rest = compensate(
        W[:, alive], H[alive][:, alive], column_by_column(round_columns), asymmetric=term
    )
    torch.testing.assert_close(Q[:, alive], rest.weight)
    assert not Q[:, 3].any()


def test_bad_terms_are_refused() -> None:
    with pytest.raises(ValueError, match=r"strength=-1"):
        Asymmetric(torch.eye(3), -1)
    with pytest.raises(ValueError, match=r"multiplies='both'"):
        Asymmetric(torch.eye(3), 1, "both")  # type: ignore[arg-type]
    W, H = torch.ones(2, 4), torch.eye(4)
    with pytest.raises(ValueError, match=r"cross moment \(3, 3\) does not fit 4"):
        compensate(W, H, round_block, asymmetric=Asymmetric(torch.eye(3)))
    with pytest.raises(ValueError, match=r"cross moment holds NaN"):
        compensate(W, H, round_block, asymmetric=Asymmetric(torch.eye(4) * torch.nan))
