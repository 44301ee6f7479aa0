"""In which order the columns of a weight are quantized."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

__all__ = ["Chooser", "Order", "bring_forward", "permutation_of"]

Order = Literal["activation", "group_activation"]

Chooser = Callable[[Tensor, int], Tensor]
"""Compensated weights (out, r) of the columns to come and a number B < r to which B are next."""


def permutation_of(
    order: Order | Tensor | None, diagonal: Tensor, group_size: int | None
) -> Tensor | None:
    """The order of columns in full, or None for the one they have; as ``compensate`` has it.

    Raises:
        ValueError: for an order that is no permutation or tears groups apart.
    """
    if order is None:
        return None
    if not isinstance(order, Tensor):
        return _by_activation(order, diagonal, group_size or 1)
    order = order.to(diagonal.device, torch.long)
    identity = torch.arange(diagonal.numel(), device=diagonal.device)
    if order.shape != identity.shape or not torch.equal(order.sort().values, identity):
        raise ValueError(
            f"order of shape {tuple(order.shape)} is no permutation of {diagonal.numel()} columns"
        )
    if group_size is not None:
        groups = (order // group_size).view(-1, group_size)
        if not bool((groups == groups[:, :1]).all()):
            raise ValueError(f"order tears groups of {group_size} columns apart; move whole groups")
    return order


def _by_activation(order: Order, diagonal: Tensor, size: int) -> Tensor:
    if order not in get_args(Order):
        raise ValueError(
            f"order={order!r} is unknown; use one of {get_args(Order)}, a permutation, a function "
            "or None"
        )
    groups = diagonal.view(-1, size)
    within = order == "group_activation"
    keys = groups.amax(1) if within else groups.mean(1)
    ranked = keys.argsort(descending=True, stable=True)
    if within:
        inner = groups[ranked].argsort(dim=1, descending=True, stable=True)
    else:
        inner = torch.arange(size, device=diagonal.device)
    return (ranked[:, None] * size + inner).flatten()


def bring_forward(picked: Tensor, size: int, W: Tensor, G: Tensor, columns: Tensor) -> None:
    """Exchange the first ``size`` columns for the picked ones, in place.

    Args:
        picked: (size,), positions among the columns below.
        size: Columns of a block.
        W: (out, r), written to.
        G: (r, r), symmetric, written to.
        columns: (r,), written to.

    Raises:
        ValueError: for another number of columns, or one that is picked twice.
    """
    if picked.shape != (size,) or len(set(picked.tolist())) != size:
        raise ValueError(
            f"an order chose {len(picked)} columns of shape {tuple(picked.shape)} for a block of "
            f"{size}; it must choose {size} different ones"
        )
    front = torch.arange(size, device=picked.device)
    gone, come = front[~torch.isin(front, picked)], picked[picked >= size]
    there, here = torch.cat([gone, come]), torch.cat([come, gone])
    columns[there] = columns[here]
    W[:, there] = W[:, here]
    G[there] = G[here]
    G[:, there] = G[:, here]
