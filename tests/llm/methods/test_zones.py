"""The zone search against brute force over plain fits."""

import pytest
import torch
from torch import Tensor

from dit_qat.llm.methods.zones import (
    Groups,
    Zones,
    ZoneSearch,
    find_zones,
    saliency,
    salient_columns,
)
from dit_qat.primitives.binary import binarize, moment_error, plain_error, reconstruct
from dit_qat.primitives.compensation import Block, compensate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def weight(n: int = 30, k: int = 32) -> Tensor:
    W = normal(n, k) ** 3
    W[:, [3, 8, 20]] *= 6
    return W


def masked_error(W: Tensor, mask: Tensor, order: int) -> float:
    return float(plain_error(W, order, mask.to(W.dtype)).sum())


def by_threshold(W: Tensor, part: Tensor, edge: Tensor, order: int) -> float:
    large = (W.abs() >= edge) & part
    return masked_error(W, large, order) + masked_error(W, part & ~large, order)


def test_saliency_is_the_error_of_zeroing_an_entry() -> None:
    X, W = normal(80, 12, seed=1) @ normal(12, 12, seed=2), normal(5, 12)
    H, found = X.T @ X, []

    def keep(values: Tensor, block: Block) -> Tensor:
        found.append(block.factor)
        return values

    compensate(W, H, keep, block_size=12, damping=0)
    for j in (0, 4, 11):
        rest = torch.linalg.inv(H[j:, j:])[0, 0]
        torch.testing.assert_close(saliency(W, found[0])[:, j], W[:, j].square() / rest)


def test_salient_columns_are_the_best_number_of_top_columns() -> None:
    W = weight()
    scores = W.abs().sum(0)
    order = scores.argsort(descending=True)
    errors = []
    for count in range(1, 21):
        top = torch.zeros(32, dtype=torch.bool)
        top[order[:count]] = True
        every = torch.ones_like(W, dtype=torch.bool)
        errors.append(masked_error(W, every & top, 2) + masked_error(W, every & ~top, 2))
    best = min(range(20), key=lambda i: errors[i])
    found = salient_columns(W, scores, 20)
    assert set(found.nonzero().flatten().tolist()) == set(order[: best + 1].tolist())
    assert not bool(salient_columns(W, scores, 0).any())
    assert not bool(salient_columns(W[:, :1], scores[:1], 20).any())


@pytest.mark.parametrize("on", ["weight", "saliency"])
def test_two_groups_have_the_best_threshold_of_all_tried(on: str) -> None:
    W = weight() if on == "weight" else weight().square()
    search = ZoneSearch(most_salient=9)
    zones = find_zones(W, W.abs().sum(0), search, Groups(2, 2))
    for part, order in ((~zones.salient, 1), (zones.salient, 2)):
        every = torch.ones_like(W, dtype=torch.bool) & part
        edges = search.edges(W[:, part].abs())
        errors = [by_threshold(W, every, edge, order) for edge in edges]
        found = masked_error(W, every & (zones.group == 1), order)
        found += masked_error(W, every & (zones.group == 0), order)
        assert found == pytest.approx(min(errors), rel=1e-9)
        assert float(W[every & (zones.group == 1)].abs().min()) >= float(
            W[every & (zones.group == 0)].abs().max()
        )


def test_four_groups_are_better_than_two_and_no_single_move_helps() -> None:
    W = weight()
    search = ZoneSearch(most_salient=0, quantiles=21, lowest=0.04, highest=0.96)
    edges = search.edges(W.abs())

    def error(cuts: Tensor) -> float:
        group = torch.bucketize(W.abs(), cuts, right=True)
        return sum(masked_error(W, group == g, 1) for g in range(len(cuts) + 1))

    zones = [find_zones(W, W.abs().sum(0), search, Groups(g, 1)) for g in (2, 4)]
    cuts = [
        torch.stack([W.abs()[z.group == g].min() for g in range(1, z.group.max() + 1)])
        for z in zones
    ]
    assert error(cuts[1]) < error(cuts[0])
    for t in range(3):
        for edge in edges:
            moved = cuts[1].clone()
            moved[t] = edge
            if bool((moved.diff() > 0).all()):
                assert error(moved) >= error(cuts[1]) * (1 - 1e-9)


def test_three_doubled_groups_have_thresholds_one_to_two() -> None:
    W = weight()
    search = ZoneSearch(most_salient=0, quantiles=160)
    zones = find_zones(W, W.abs().sum(0), search, Groups(3, 1, doubled=True))
    edges = search.edges(W.abs())
    legal = edges[2 * edges <= edges[-1]]
    errors, groups = [], []
    for edge in legal:
        group = torch.bucketize(W.abs(), torch.stack([edge, 2 * edge]), right=True)
        errors.append(sum(masked_error(W, group == g, 1) for g in range(3)))
        groups.append(group)
    best = min(range(len(errors)), key=lambda i: errors[i])
    assert torch.equal(zones.group.long(), groups[best])


def test_zeros_of_salient_columns_lower_the_quantiles_of_billm() -> None:
    W = weight()
    search = ZoneSearch(most_salient=9, quantiles=1, lowest=0.5, highest=0.5)
    share = [
        float(
            (find_zones(W, W.abs().sum(0), search, Groups(2, 1, zeros_count=z)).group == 0)
            .double()
            .mean()
        )
        for z in (False, True)
    ]
    assert share[1] < share[0]


def test_thresholds_by_outputs_are_the_best_by_outputs() -> None:
    W, X = weight(), normal(90, 32, seed=5) @ normal(32, 32, seed=6)
    S, search = X.T @ X, ZoneSearch(most_salient=0, quantiles=9)
    zones = find_zones(W, W.abs().sum(0), search, Groups(2, 1), S=S)

    def error(group: Tensor) -> float:
        made = torch.zeros_like(W)
        for g in range(2):
            mask = (group == g).double()
            made += mask * reconstruct(binarize(W, mask, 1))
        return float(moment_error(W - made, S).sum())

    every = [(W.abs() >= edge).long() for edge in search.edges(W.abs())]
    assert error(zones.group.long()) == pytest.approx(min(error(g) for g in every))


def test_pruned_entries_do_not_count() -> None:
    W = weight()
    keep = torch.rand(W.shape, generator=torch.Generator().manual_seed(3)) < 0.5
    other = torch.where(keep, W, 50 * normal(*W.shape, seed=9))

    def zones(values: Tensor) -> Zones:
        return find_zones(values, (values * keep).abs().sum(0), ZoneSearch(9), Groups(2, 2), keep)

    a, b = zones(W), zones(other)
    assert torch.equal(a.salient, b.salient)
    assert torch.equal(a.group[keep], b.group[keep])


@pytest.mark.parametrize("kind", ["zero", "constant", "one column"])
def test_degenerate_blocks_are_defined(kind: str) -> None:
    W = {"zero": torch.zeros(4, 16), "constant": torch.ones(4, 16), "one column": normal(4, 1)}[
        kind
    ]
    zones = find_zones(W, W.abs().sum(0), ZoneSearch(), Groups(2, 2))
    assert zones.group.shape == W.shape
    assert int(zones.group.max()) <= 1


def test_a_search_of_nothing_is_refused() -> None:
    for bad in ({"quantiles": 0}, {"lowest": 0.0}, {"lowest": 0.9, "highest": 0.1}):
        with pytest.raises(ValueError, match="quantiles"):
            ZoneSearch(**bad)  # type: ignore[arg-type]
