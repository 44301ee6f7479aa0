"""Fits of a block: what the variants guarantee for the same zones, and pruning in steps."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_qat.layers.binary_code import BinaryLayout, decode_block
from dit_qat.llm.methods.binarizer import error_left
from dit_qat.llm.methods.binary_block import (
    BlockFit,
    Plain,
    best_rows,
    feed_back,
    fit_block,
    rounded,
    solve_jointly,
)
from dit_qat.llm.methods.pbs2p import PBS2PConfig, Progressive, change_of_loss
from dit_qat.llm.methods.pruning import drop_lowest, keep_highest
from dit_qat.llm.methods.zones import Zones
from dit_qat.primitives.binary import binarize, moment_error
from dit_qat.primitives.compensation import Block

N, K = 48, 32
LAYOUTS = [BinaryLayout(2, 1), BinaryLayout(2, 2), BinaryLayout(2, 2, column_scales=True)]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight() -> Tensor:
    return normal(N, K) ** 3 * (0.3 + normal(K, seed=1).abs()) + 0.2 * normal(N, 1, seed=2)


def moment() -> Tensor:
    X = normal(300, K, seed=3) @ (torch.eye(K) + normal(K, K, seed=4) / K**0.5) + 0.3
    return X.T @ X


def factor(S: Tensor) -> Tensor:
    return torch.linalg.cholesky(torch.linalg.inv(S)).T.contiguous()


def zones(W: Tensor) -> Zones:
    salient = torch.zeros(K, dtype=torch.bool)
    salient[W.square().sum(0).topk(5).indices] = True
    return Zones(salient, (W.abs() > W.abs().quantile(0.6)).to(torch.uint8))


def made(fit: BlockFit) -> Tensor:
    """What the values stand for, not rounded."""
    return sum(fit.values[:, a, None] * b for a, b in enumerate(fit.basis()))  # type: ignore[return-value]


def loss(W: Tensor, fit: BlockFit, S: Tensor | None = None) -> float:
    return float(moment_error(W - made(fit), S).sum())


def test_basis_times_values_is_what_is_stored() -> None:
    W = weight()
    for layout in LAYOUTS:
        own = zones(W)
        if layout.salient_groups == 1:
            own = own._replace(group=own.group * ~own.salient)
        fit = fit_block(W, own, layout, Plain(3))
        fit = fit._replace(values=fit.values.half().double())
        stored = decode_block(layout, rounded(fit)).double()
        torch.testing.assert_close(stored, made(fit), rtol=1e-6, atol=1e-6)


def test_arb_is_not_worse_than_billm_nor_x_than_arb_nor_joint_than_x() -> None:
    W, S, layout = weight(), moment(), BinaryLayout(2, 2)
    plain = fit_block(W, zones(W), layout, Plain(0))
    arb = fit_block(W, zones(W), layout, Plain(15))
    x = fit_block(W, zones(W), layout, Plain(15, moment=True), S)
    solved = fit_block(W, zones(W), layout, Plain(15, moment=True, sweeps=None), S)
    assert loss(W, arb) < loss(W, plain)
    for part in (zones(W).salient, ~zones(W).salient):
        for g in range(2):
            zone = ((zones(W).group == g) & part).double()

            def own(fit: BlockFit, zone: Tensor = zone) -> float:
                return float(moment_error(zone * (W - made(fit)), S).sum())

            assert own(solved) <= own(x) * (1 + 1e-9) < own(arb) * (1 + 1e-9)
    joint = solve_jointly(W, arb, S)
    assert loss(W, joint, S) < loss(W, solved, S)
    assert loss(W, joint, S) < loss(W, arb, S)


def test_no_iterations_are_billm() -> None:
    W = weight()
    fit = fit_block(W, zones(W), BinaryLayout(2, 2), Plain(0))
    mask = ((zones(W).group == 1) & ~zones(W).salient).double()
    torch.testing.assert_close(fit.values[:, 2:4], binarize(W, mask, 1).values)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_joint_values_are_least_squares_on_outputs(layout: BinaryLayout) -> None:
    W, S = weight(), moment()
    own = zones(W)
    if layout.salient_groups == 1:
        own = own._replace(group=own.group * ~own.salient)
    fit = solve_jointly(W, fit_block(W, own, layout, Plain(5)), S)
    root = torch.linalg.cholesky(S).T
    for row in (0, 17, 40):
        design = torch.stack([b[row] for b in fit.basis()], 1)
        best = torch.linalg.lstsq(root @ design, root @ W[row], driver="gelsd").solution
        torch.testing.assert_close(design @ fit.values[row], design @ best, rtol=1e-5, atol=1e-6)


def test_joint_values_of_a_pruned_block_are_least_squares_for_the_whole_weight() -> None:
    W, S = weight(), moment()
    fit = solve_jointly(W, pruned_once(W), S)
    root = torch.linalg.cholesky(S).T
    assert fit.keep is not None
    for row in (1, 22):
        design = torch.stack([b[row] for b in fit.basis()], 1)
        assert not bool(design[~fit.keep[row]].any())
        best = torch.linalg.lstsq(root @ design, root @ W[row], driver="gelsd").solution
        torch.testing.assert_close(design @ fit.values[row], design @ best, rtol=1e-5, atol=1e-6)


def test_joint_values_that_float16_cannot_hold_are_not_taken() -> None:
    W, S = weight(), moment()
    fit = fit_block(W, zones(W), BinaryLayout(2, 2), Plain(3))
    large = W.clone()
    large[5] *= 1e7
    found = solve_jointly(large, fit, S).values
    assert torch.equal(found[5], fit.values[5])
    torch.testing.assert_close(found[6:], solve_jointly(W, fit, S).values[6:])


@pytest.mark.parametrize("rows", [1, 3])
def test_feedback_leaves_the_weight_alone(rows: int) -> None:
    W, S = weight()[:rows], moment()
    before = W.clone()
    fit = fit_block(
        W, zones(weight())._replace(group=zones(weight()).group[:rows]), LAYOUTS[1], Plain(3)
    )
    feed_back(W, fit, factor(S))
    assert torch.equal(W, before)


def test_what_is_left_of_an_error_is_the_least_over_the_columns_behind() -> None:
    S, R = moment(), normal(3, 10, seed=8)
    U = factor(S)[:10, :10]
    rest = torch.linalg.solve(S[10:, 10:], S[10:, :10] @ R.T).T
    whole = torch.cat([R, -rest], 1)
    torch.testing.assert_close(moment_error(R, error_left(U)), moment_error(whole, S))


@pytest.mark.parametrize("layout", LAYOUTS[1:], ids=str)
def test_feedback_takes_nearest_levels_without_correlation_and_helps_with_it(
    layout: BinaryLayout,
) -> None:
    W, X = normal(N, K, seed=7), normal(300, 6, seed=8) @ normal(6, K, seed=9)
    S = X.T @ X + torch.eye(K)
    fit = fit_block(W, zones(W), layout, Plain(15))
    fit = fit._replace(values=fit.values.half().double())
    alone = feed_back(W, fit, torch.eye(K, dtype=torch.float64))
    assert loss(W, alone) <= loss(W, fit) * (1 + 1e-9)
    again = feed_back(W, fit, factor(S))
    assert loss(W, again, S) < 0.9 * loss(W, fit, S)
    best = best_rows(W, [fit, again], S)

    def by_row(one: BlockFit) -> Tensor:
        return moment_error(W - decode_block(layout, rounded(one)), S)

    torch.testing.assert_close(by_row(best), torch.minimum(by_row(fit), by_row(again)))


def test_values_beyond_float16_are_refused() -> None:
    fit = fit_block(1e6 * weight(), zones(weight()), BinaryLayout(2, 2), Plain(1))
    with pytest.raises(ValueError, match="float16"):
        rounded(fit)


def pruned_once(W: Tensor) -> BlockFit:
    own = zones(W)
    own = own._replace(group=own.group * ~own.salient)
    fit = fit_block(W, own, BinaryLayout(2, 1, kept=4, of=8, block_size=K), Plain(15))
    return fit._replace(keep=keep_highest(W.abs(), 6, 8))


def test_change_of_loss_is_the_difference_that_dropping_makes() -> None:
    W, S = weight(), moment()
    fit = pruned_once(W)
    fit = fit._replace(values=fit.values.half().double())
    change = change_of_loss(W, fit, S)
    before = moment_error(W - decode_block(fit.layout, rounded(fit)), S)
    assert fit.keep is not None
    for column in (0, 9, 30):
        keep = fit.keep.clone()
        keep[:, column] = False
        after = moment_error(W - decode_block(fit.layout, rounded(fit._replace(keep=keep))), S)
        expected = torch.where(fit.keep[:, column], after - before, 0.0)
        torch.testing.assert_close(change[:, column], expected, rtol=1e-6, atol=1e-6)


def test_every_refit_lowers_the_loss_and_with_fixed_scores_steps_equal_one_shot() -> None:
    W, S = weight(), moment()
    fit = pruned_once(W)
    fit = solve_jointly(W, fit._replace(keep=torch.ones_like(W, dtype=torch.bool)), S)
    score = W.square()
    for left in (7, 6, 5, 4):
        assert fit.keep is not None
        fit = fit._replace(keep=drop_lowest(score, fit.keep, 8))
        before = loss(W, fit, S)
        fit = solve_jointly(W, fit, S)
        assert loss(W, fit, S) < before
        at_once = solve_jointly(W, fit._replace(keep=keep_highest(score, left, 8)), S)
        torch.testing.assert_close(fit.values, at_once.values)


def test_dropping_by_the_exact_change_beats_a_fixed_score() -> None:
    W, S = weight(), moment()
    U, losses = factor(S), []
    for score in ("obs", "delta"):
        config = PBS2PConfig(preset="paper", score=score, block_size=K)  # type: ignore[arg-type]
        own = Progressive(config.recipe(4), S, config.choices)
        block = Block(torch.arange(K), U)
        fit = own.fit(W, own.zones(W, block, S, None), block, S, None)
        assert fit.keep is not None
        assert bool((fit.keep.view(N, -1, 8).sum(-1) == 4).all())
        losses.append(loss(W, fit, S))
    assert losses[1] < losses[0]


def test_lost_weights_count_in_the_joint_values() -> None:
    W, S = weight(), torch.eye(K, dtype=torch.float64)
    fit = solve_jointly(W, pruned_once(W), S)
    assert fit.keep is not None
    zone = (fit.zones.group == 0) & ~fit.zones.salient & fit.keep
    mean = (W * zone).sum(1) / zone.sum(1)
    got = fit.values[:, 0] + fit.values[:, 1] * (fit.first * zone).sum(1) / zone.sum(1)
    torch.testing.assert_close(got, mean)  # with S = I the levels keep the masked mean


def test_layouts_know_their_patterns() -> None:
    config = PBS2PConfig(kept=5)
    assert config.recipe(6).layout == replace(config.recipe(5).layout, kept=6)
