"""Orders in which columns are quantized: chosen ones against fixed ones, and groups kept whole."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.compensation import Block, column_by_column, compensate


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def second_moment(width: int = 18) -> Tensor:
    X = normal(90, width) @ normal(width, width, seed=1)
    return X.T @ X


def round_block(W: Tensor, block: Block) -> Tensor:
    return (W * 4).round() / 4


def spread(W: Tensor, count: int) -> Tensor:
    """The columns of least norm: an order that depends on what has been made up for."""
    return W.norm(dim=0).topk(count, largest=False).indices


@pytest.mark.parametrize("update", ["exact", "diagonal"])
def test_a_chosen_order_gives_what_that_order_gives_when_fixed(update: str) -> None:
    H, W = second_moment(), normal(7, 18, seed=2)
    found = compensate(W, H, round_block, 5, update, spread)  # type: ignore[arg-type]
    assert found.order is not None
    assert torch.equal(found.order.sort().values, torch.arange(18))
    assert not torch.equal(found.order, torch.arange(18))
    fixed = compensate(W, H, round_block, 5, update, found.order)  # type: ignore[arg-type]
    torch.testing.assert_close(found.weight, fixed.weight)


def test_each_choice_is_made_on_the_weights_as_they_are_by_then() -> None:
    H, W, seen = second_moment(), normal(7, 18, seed=2), []
    blocks: list[Tensor] = []

    def quantize(part: Tensor, block: Block) -> Tensor:
        blocks.append(part.clone())
        return round_block(part, block)

    def choose(rest: Tensor, count: int) -> Tensor:
        picked = spread(rest, count)
        seen.append(rest[:, picked].sort(dim=1).values)
        return picked

    compensate(W, H, quantize, 5, order=choose)
    assert len(seen) == 3  # the last block takes what is left
    for picked, block in zip(seen, blocks, strict=False):
        torch.testing.assert_close(picked, block.sort(dim=1).values)


def test_eliminating_leaves_the_inverse_over_what_is_left() -> None:
    H, factors = second_moment(), []

    def quantize(W: Tensor, block: Block) -> Tensor:
        factors.append(block)
        return round_block(W, block)

    order = compensate(normal(7, 18), H, quantize, 5, order=spread, damping=0).order
    assert order is not None
    for number, block in enumerate(factors):
        left = order[5 * number :]
        fresh = torch.linalg.cholesky(torch.linalg.inv(H[left][:, left]), upper=True)
        size = len(block.columns)
        torch.testing.assert_close(block.factor, fresh[:size, :size], rtol=1e-10, atol=1e-12)
        assert torch.equal(block.columns, left[:size])


def test_dead_columns_become_zero_in_a_chosen_order_too() -> None:
    H = second_moment()
    H[4], H[:, 4] = 0, 0
    result = compensate(normal(7, 18), H, round_block, 5, order=spread)
    assert result.weight.isfinite().all()
    assert not result.weight[:, 4].any()


def test_group_activation_keeps_members_and_sorts_both_ways() -> None:
    H = second_moment()
    order = compensate(
        normal(3, 18), H, column_by_column(lambda w, _: w), order="group_activation", group_size=6
    ).order
    assert order is not None
    groups, strength = order.view(3, 6), H.diagonal()[order].view(3, 6)
    assert torch.equal(groups.sort(dim=1).values % 6, torch.arange(6).expand(3, 6))
    assert bool((strength.diff(dim=1) <= 0).all())
    assert bool((strength.amax(1).diff() <= 0).all())


@pytest.mark.parametrize(
    ("order", "message"),
    [
        (lambda W, count: torch.zeros(count, dtype=torch.long), "must choose 5 different"),
        (lambda W, count: torch.arange(2), "2 columns"),
        ("by_name", "order='by_name' is unknown"),
    ],
)
def test_bad_orders_are_refused(order: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compensate(normal(3, 18), second_moment(), round_block, 5, order=order)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="tears groups"):
        compensate(normal(3, 18), second_moment(), round_block, 6, order=spread, group_size=6)
