"""Hadamard matrices of any order that exists here, and fast rotations of a width by them.

Orders come from Sylvester (2^k), Paley I (q + 1, q = 3 mod 4) and Paley II (2(q + 1), q = 1 mod 4)
with q a prime power, and from Kronecker products of these. A width is rotated factor by factor,
``x (H1 (x) H2) = H1^T X H2``; no product of the full width is ever formed.

The factors and their order fix the matrix, and rotated weights are stored: changing
:func:`hadamard_factors` breaks every checkpoint that holds them.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import cache, lru_cache
from itertools import count
from math import prod, sqrt
from operator import index

import torch
from torch import Tensor

from dit_qat.primitives.galois import paley_field, paley_matrix, paley_spectrum, paley_transform
from dit_qat.primitives.tracing import compile_time_constant

__all__ = [
    "Rotation",
    "hadamard_factors",
    "hadamard_matrix",
    "hadamard_transform",
    "has_hadamard",
    "nearest_orders",
]

# One product of this size costs about as much as the two passes that would replace it.
_SINGLE_LIMIT = 128
# Up to here a dense product beats the FFT of a Paley core; its fp32 matrix takes 1 MiB.
_DENSE_LIMIT = 512
# Costs per element, in multiply-adds: a pass over memory, an FFT, and the smallest efficient order.
_PASS_COST, _FFT_COST, _ORDER_FLOOR = 48, 1500, 16


def _is_base(order: int) -> bool:
    return order & (order - 1) == 0 or paley_field(order) is not None


@cache
def _divisors(n: int) -> tuple[int, ...]:
    low = [d for d in range(1, int(sqrt(n)) + 1) if n % d == 0]
    return tuple(sorted({*low, *(n // d for d in low)}))


@cache
def _split(n: int) -> tuple[int, int] | None:
    """Return the first ``(a, b)`` with n = a b where a is a base order and b can be reached."""
    pairs = ((d, n // d) for d in _divisors(n) if d > 1 and _is_base(d))
    return next(((a, b) for a, b in pairs if b == 1 or has_hadamard(b)), None)


@cache
def has_hadamard(n: int) -> bool:
    """Whether the constructions here reach a Hadamard matrix of order n."""
    if n < 1 or (n > 2 and n % 4):
        return False
    return _is_base(n) or _split(n) is not None


def nearest_orders(n: int) -> tuple[int, int]:
    """Return the largest order up to n and the smallest from n on; both are n where it exists.

    Raises:
        ValueError: n is below 1.
    """
    if n < 1:
        raise ValueError(f"n={n} is no width; it must be at least 1")
    below = next(m for m in range(n, 0, -1) if has_hadamard(m))
    above = next(m for m in count(n) if has_hadamard(m))
    return below, above


def _require_order(n: int) -> None:
    if not has_hadamard(n):
        below, above = nearest_orders(n)
        raise ValueError(f"order {n} has no Hadamard matrix; nearest orders are {below}, {above}")


def _factorisations(n: int, least: int = 4) -> Iterator[tuple[int, ...]]:
    """Yield the ascending products of orders that make n and that a pass can apply."""
    if n >= least and has_hadamard(n) and (n <= _DENSE_LIMIT or paley_field(n)):
        yield (n,)
    for d in _divisors(n):
        if least <= d and d * d <= n and has_hadamard(d):
            yield from ((d, *rest) for rest in _factorisations(n // d, d))


def _cost(factors: tuple[int, ...]) -> int:
    sizes = (_FFT_COST if f > _DENSE_LIMIT else max(f, _ORDER_FLOOR) for f in factors)
    return sum(sizes) + _PASS_COST * len(factors)


@cache
def _search_factors(n: int) -> tuple[int, ...]:
    _require_order(n)
    if n <= _SINGLE_LIMIT:
        return (n,)
    # A pass of order 2 moves as much memory as any other: only where nothing else makes n.
    candidates = [*_factorisations(n)] or [*_factorisations(n, least=2)]
    best = min(candidates, key=lambda factors: (_cost(factors), factors))
    # Powers of two go last: the last factor is a plain matrix product with contiguous rows, and a
    # wide one behind the others keeps their batched products wide.
    return tuple(sorted(best, key=lambda f: (f & (f - 1) == 0, f)))


@compile_time_constant
def hadamard_factors(n: int) -> tuple[int, ...]:
    """Return the orders of the Kronecker factors of the Hadamard matrix of order n.

    Orders up to 128 are one factor. Above, the factors minimise multiply-adds plus a fixed price
    per pass over memory, which gives 1152 = 36 x 32 and 4608 = 12 x 24 x 16.

    Raises:
        ValueError: no construction reaches n.
    """
    return _search_factors(n)


def _sylvester(n: int) -> Tensor:
    """Return the matrix of +-1 whose entry is the parity of the bits common to row and column."""
    position = torch.arange(n, device="cpu")
    common = position[:, None] & position[None, :]
    parity = torch.zeros_like(common)
    while bool(common.any()):
        parity ^= common & 1
        common >>= 1
    return (1 - 2 * parity).to(torch.int8)


@lru_cache(maxsize=64)
def _signs_of_order(order: int) -> Tensor:
    """Return one factor as an int8 matrix of +-1."""
    if order & (order - 1) == 0:
        return _sylvester(order)
    field = paley_field(order)
    if field is not None:
        return paley_matrix(*field)
    split = _split(order)
    assert split is not None, order
    return torch.kron(_signs_of_order(split[0]), _signs_of_order(split[1]))


def hadamard_matrix(n: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the Hadamard matrix of order n that :func:`hadamard_transform` applies.

    Returns:
        (n, n) of +-1 on the CPU with ``H H^T = n I``, the Kronecker product of its factors.

    Raises:
        ValueError: no construction reaches n.
    """
    matrix = torch.ones(1, 1, dtype=torch.int8, device="cpu")
    for order in hadamard_factors(n):
        matrix = torch.kron(matrix, _signs_of_order(order))
    return matrix.to(dtype)


def _round_to(value: float, dtype: torch.dtype) -> float:
    return float(torch.tensor(value, dtype=torch.float64, device="cpu").to(dtype))


def _factor_scales(orders: tuple[int, ...], dtype: torch.dtype) -> list[float]:
    """Return scales near ``1 / sqrt(order)`` that dtype holds and whose product is the exact one.

    In bf16 each rounded scale alone is wrong by up to 0.2 %, which would be a systematic gain of
    the whole rotation; moving the first a few units lets the last one cancel the error.
    """
    scales = [_round_to(order**-0.5, dtype) for order in orders]
    if len(orders) < 2:
        return scales
    target = prod(order**-0.5 for order in orders) / prod(scales[1:-1])
    unit = torch.finfo(dtype).eps / 2
    firsts = [_round_to(scales[0] * (1 + i * unit), dtype) for i in range(-16, 17)]
    pairs = [(first, _round_to(target / first, dtype)) for first in firsts]
    first, last = min(pairs, key=lambda pair: abs(pair[0] * pair[1] / target - 1))
    return [first, *scales[1:-1], last]


def _table(order: int, scale: float, dtype: torch.dtype) -> Tensor:
    """Return the scaled matrix of a factor, or the spectrum that stands for a large one."""
    if order <= _DENSE_LIMIT:
        return (_signs_of_order(order).to(torch.float64) * scale).to(dtype)
    return paley_spectrum(order, torch.float64 if dtype == torch.float64 else torch.float32)


@lru_cache(maxsize=256)
def _cached_tables(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    orders = hadamard_factors(n)
    # A table first asked for under inference mode must still serve training later.
    with torch.inference_mode(False), torch.no_grad():
        scales = _factor_scales(orders, dtype)
        pairs = zip(orders, scales, strict=True)
        return tuple(_table(order, scale, dtype).to(device) for order, scale in pairs)


@compile_time_constant
def _tables(n: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, ...]:
    return _cached_tables(n, dtype, device)


def _apply_factor(x: Tensor, table: Tensor, transpose: bool) -> Tensor:
    """Multiply dimension 1 of x (batches, order, post) by one factor."""
    if table.is_complex():
        exact = x.to(table.real.dtype).movedim(1, -1)
        return paley_transform(exact, table, transpose).movedim(-1, 1).to(x.dtype)
    if x.shape[2] == 1:
        return (x.squeeze(2) @ (table.mT if transpose else table)).unsqueeze(2)
    return torch.matmul(table if transpose else table.mT, x)


def _without_autocast(device_type: str) -> AbstractContextManager[object]:
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def hadamard_transform(x: Tensor, transpose: bool = False) -> Tensor:
    """Return x H / sqrt(n) over the last dimension, H being :func:`hadamard_matrix` of n.

    Works on any leading shape, keeps the dtype (under autocast as well), differentiates, and
    compiles without graph breaks.

    Args:
        x: (..., n), floating point.
        transpose: Return x H^T / sqrt(n) instead, which is the inverse.

    Raises:
        TypeError: x is not floating point.
        ValueError: no construction reaches n.
    """
    if not x.is_floating_point():
        raise TypeError(f"x has dtype {x.dtype}; a rotation needs floating point, use x.float()")
    n = index(x.shape[-1])  # a width is a constant to torch.compile, even where widths vary
    y, post = x, 1
    with _without_autocast(x.device.type):
        orders = hadamard_factors(n)
        tables = _tables(n, x.dtype, x.device)
        for order, table in zip(reversed(orders), reversed(tables), strict=True):
            y = y.reshape(x.numel() // (order * post), order, post)
            y = _apply_factor(y, table, transpose)
            post *= order
    return y.reshape(x.shape)


@lru_cache(maxsize=256)
def _cached_signs(width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        generator = torch.Generator(device="cpu").manual_seed(seed)
        coins = torch.randint(0, 2, (width,), generator=generator, device="cpu")
        return (2 * coins - 1).to(dtype).to(device)


@compile_time_constant
def _signs(width: int, seed: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    return _cached_signs(width, seed, dtype, device)


@dataclass(frozen=True)
class Rotation:
    """The orthogonal matrix diag(s) H / sqrt(n): random signs, then a Hadamard matrix.

    Applied to activations and weights alike it cancels in the product:
    ``x W^T = (x R)(W R)^T``. The signs keep the mean of a token out of a single channel.

    Args:
        width: Number of channels rotated.
        seed: Seed of the signs; None for no signs.
        block_size: Rotate contiguous blocks of this order instead of the full width.

    Raises:
        ValueError: the width, or the block, has no Hadamard matrix, or the block does not divide
            the width.
    """

    width: int
    seed: int | None = 0
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.width < 1:
            raise ValueError(f"width={self.width} is no width; it must be at least 1")
        if self.block_size is None:
            self._check_order("width", self.width, "or use")
        elif self.block_size < 1 or self.width % self.block_size:
            message = f"block_size={self.block_size} does not divide width={self.width}"
            raise ValueError(f"{message}; {self._block_advice('use')}")
        else:
            self._check_order("block_size", self.block_size, "and dividing the width there are")

    def _check_order(self, name: str, order: int, link: str) -> None:
        if has_hadamard(order):
            return
        below, above = nearest_orders(order)
        message = f"{name}={order} has no Hadamard matrix; nearest orders are {below} and {above}"
        raise ValueError(f"{message}, {self._block_advice(link)}")

    def _block_advice(self, link: str) -> str:
        sizes = [d for d in reversed(_divisors(self.width)) if d > 2 and has_hadamard(d)]
        if not sizes:
            return f"and no block_size divides {self.width}"
        return f"{link} block_size={', '.join(map(str, sizes[:3]))}"

    def signs(self, dtype: torch.dtype, device: torch.device | str) -> Tensor | None:
        """Return the signs s, (width,) of +-1, or None without a seed; do not write to them."""
        if self.seed is None:
            return None
        return _signs(index(self.width), index(self.seed), dtype, torch.device(device))

    def apply(self, x: Tensor) -> Tensor:
        """Return (x * s) H / sqrt(n) for x of shape (..., width), in the dtype of x."""
        self._check_width(x)
        s = self.signs(x.dtype, x.device)
        return self._transform(x if s is None else x * s, transpose=False)

    def inverse(self, x: Tensor) -> Tensor:
        """Return (x H^T / sqrt(n)) * s, undoing :meth:`apply`."""
        self._check_width(x)
        y = self._transform(x, transpose=True)
        s = self.signs(x.dtype, x.device)
        return y if s is None else y * s

    def _transform(self, x: Tensor, transpose: bool) -> Tensor:
        if self.block_size is None:
            return hadamard_transform(x, transpose)
        blocks = x.reshape(*x.shape[:-1], self.width // self.block_size, self.block_size)
        return hadamard_transform(blocks, transpose).reshape(x.shape)

    def _check_width(self, x: Tensor) -> None:
        if x.shape[-1] != self.width:
            message = f"x has {x.shape[-1]} channels, the rotation {self.width}"
            raise ValueError(f"{message}; build Rotation(width={x.shape[-1]})")
