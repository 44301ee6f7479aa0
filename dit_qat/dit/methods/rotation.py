"""Which rotation a width gets, and the zigzag permutation between two of them."""

from collections.abc import Mapping

from torch import Tensor, nn

from dit_qat.primitives.hadamard import Rotation, has_hadamard, nearest_orders

__all__ = ["block_order", "check_rotations", "rotation_of", "zigzag"]

_LEAST_BLOCK = 4  # below, a rotation mixes next to nothing


def block_order(width: int, limit: int | None = None) -> int | None:
    """The block that a width is rotated in: half of it, else the largest power of two in it.

    Args:
        width: Number of channels.
        limit: Largest block allowed; None: half of the width.

    Returns:
        An order that divides the width, or None if no useful one (4 or more) does.
    """
    half = width // 2
    if limit is None and width % 2 == 0 and half >= _LEAST_BLOCK and has_hadamard(half):
        return half
    if limit is not None and width % limit == 0 and has_hadamard(limit):
        return limit
    order = width & -width
    while limit is not None and order > limit:
        order //= 2
    return order if order >= _LEAST_BLOCK else None


def rotation_of(
    width: int, seed: int | None, layer: str, block_size: int | None = None
) -> Rotation:
    """Rotate the full width where it has a Hadamard order, else blocks of :func:`block_order`.

    Args:
        width: Number of channels.
        seed: Of the random signs; None: without.
        layer: Named in the error.
        block_size: Largest block instead of the full width.

    Raises:
        ValueError: for a width without any rotation.
    """
    if block_size is None and has_hadamard(width):
        return Rotation(width, seed)
    block = block_order(width, block_size)
    if block is None:
        below, above = nearest_orders(width)
        raise ValueError(
            f"{layer} has {width} inputs, which no Hadamard matrix rotates (nearest orders are "
            f"{below} and {above}) and no block of {_LEAST_BLOCK} or more divides; skip this layer"
        )
    return Rotation(width, seed, None if block == width else block)


def check_rotations(linears: Mapping[str, nn.Linear], block_size: int | None = None) -> None:
    """Refuse, before a long run, layers that cannot be rotated.

    Raises:
        ValueError: naming the first.
    """
    for name, linear in linears.items():
        rotation_of(linear.in_features, None, name, block_size)


def zigzag(scores: Tensor, blocks: int) -> Tensor:
    """Deal channels by falling score to blocks 1..K, then K..1, and so on (DuQuant, section 3.2).

    Args:
        scores: (n,).
        blocks: K, a divisor of n.

    Returns:
        (n,) long: ``x[index]`` has the channels of block 1 first, each block with its own channels
        by falling score.

    Raises:
        ValueError: if the blocks do not divide the channels.
    """
    if blocks < 1 or scores.numel() % blocks:
        raise ValueError(f"{blocks} blocks do not divide {scores.numel()} channels")
    rounds = scores.argsort(descending=True, stable=True).view(-1, blocks).clone()
    rounds[1::2] = rounds[1::2].flip(1)
    return rounds.T.reshape(-1)
