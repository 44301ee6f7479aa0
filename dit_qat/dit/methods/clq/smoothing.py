"""OBS, CLQ's orthogonal-based smoothing: a static channel permutation, then block Hadamards.

``G = S Hb`` (CLQ, arXiv:2509.24416): ``Q(X G) Q(W G)^T`` for ``X W^T``. The paper puts channels of
like magnitude into one block; with one scale per token that can hurt, and dealing them out
(DuQuant's zigzag) helps, so each layer takes what its measured output error prefers (our choice).
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dit_qat.calibration.statistics import LinearStatistics
from dit_qat.dit.methods.rotation import block_order, zigzag
from dit_qat.layers.input_transform import InputTransform, Permute, Rotate
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.hadamard import Rotation, nearest_orders
from dit_qat.primitives.integer import IntegerGrid, decode, round_to_nearest

__all__ = [
    "Permutation",
    "Score",
    "Smoothing",
    "channel_scores",
    "choose_smoothing",
    "permutation",
    "smoothings",
]

Permutation = Literal["none", "group", "zigzag"]
Score = Literal["absmax", "rms"]


class Smoothing(NamedTuple):
    """One way to smooth a layer."""

    permutation: Permutation
    signs: bool
    transform: InputTransform


def channel_scores(statistics: LinearStatistics, score: Score) -> Tensor:
    """How much of an outlier each channel is (in,): .999 quantile of |x|, or root mean square."""
    if score == "rms":
        return statistics.rows.square().mean(0).sqrt()
    return statistics.absmax_quantile


def permutation(scores: Tensor, blocks: int, kind: Permutation) -> Tensor | None:
    """The channel order S as an index (in,), so that ``x[..., index]`` is ``x S``.

    Args:
        scores: (in,).
        blocks: How many Hadamard blocks follow.
        kind: ``group``: the block of a channel is its rank, a stable partition, so that channels of
            a block keep their order. ``zigzag``: dealt out to the blocks. ``none``: as they are.
    """
    if kind == "none":
        return None
    if kind == "zigzag":
        return zigzag(scores, blocks)
    ranked = scores.argsort(descending=True, stable=True)
    return ranked.view(blocks, -1).sort(1).values.flatten()


def smoothings(
    scores: Tensor,
    kinds: Sequence[Permutation],
    block_size: int | None,
    seeds: Sequence[int | None],
    layer: str,
) -> list[Smoothing]:
    """All ways to smooth a layer.

    Args:
        scores: Of its channels (in,).
        kinds: Permutations to try.
        block_size: Largest block; None: half of the width where that has a Hadamard order.
        seeds: Of random signs in front of the Hadamard; None: without signs, as in the paper.
        layer: Named in the error.

    Raises:
        ValueError: for a width that no Hadamard block of 4 or more divides.
    """
    width = scores.numel()
    block = block_order(width, block_size)
    if block is None:
        below, above = nearest_orders(width)
        raise ValueError(
            f"{layer} has {width} inputs, which no block Hadamard of 4 or more divides (nearest "
            f"orders are {below} and {above}); skip this layer"
        )
    found = []
    for kind in kinds if block < width else ("none",):
        index = permutation(scores, width // block, kind)
        moved = [] if index is None else [Permute(index)]
        for seed in seeds:
            rotate = Rotate(Rotation(width, seed, None if block == width else block))
            transform = InputTransform(width, [*moved, rotate])
            found.append(Smoothing(kind, seed is not None, transform.to(scores.device)))
    return found


@torch.no_grad()
def choose_smoothing(
    offered: Sequence[Smoothing],
    weight: Tensor,
    x: Tensor,
    grid: IntegerGrid,
    activation: TokenQuantizer | None,
) -> tuple[Smoothing, float]:
    """The smoothing of least output error ``||Q(XG) Q(WG)^T - X W^T||^2 / ||X W^T||^2``, and that.

    Args:
        offered: At least one; of equal ones the first is taken.
        weight: (out, in).
        x: Inputs (n, in).
        grid: Of the weight, rounded to nearest.
        activation: None: inputs stay float.
    """
    exact = x @ weight.T
    power = float(exact.square().sum()) or 1.0
    errors = []
    for smoothing in offered:
        codes, scales = round_to_nearest(smoothing.transform.weight(weight), grid)
        z = smoothing.transform(x)
        z = z if activation is None else activation.fake_quantize(z)
        rest = z @ decode(codes, grid, scales).T - exact
        errors.append(float(rest.square().sum()) / power)
    best = min(range(len(errors)), key=errors.__getitem__)
    return offered[best], errors[best]
