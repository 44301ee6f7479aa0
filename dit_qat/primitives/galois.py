"""Finite fields GF(p^k), their quadratic character, and the Paley matrices made of it.

An element of GF(p^k) is a polynomial over Z_p of degree below k; its index reads the coefficients
as base-p digits, the leading one first, so a table over the field reshapes to ``(p,) * k`` and the
additive group is (Z_p)^k along those axes.
"""

from functools import cache
from itertools import product
from math import sqrt

import torch
from torch import Tensor

__all__ = [
    "jacobsthal_matrix",
    "paley_field",
    "paley_matrix",
    "paley_spectrum",
    "paley_transform",
    "prime_power",
    "quadratic_character",
]


@cache
def prime_power(q: int) -> tuple[int, int] | None:
    """Return ``(p, k)`` with ``q == p**k`` and p prime, or None where q is no prime power."""
    if q < 2:
        return None
    p = next((d for d in range(2, int(q**0.5) + 1) if q % d == 0), q)
    k = 0
    while q % p == 0:
        q //= p
        k += 1
    return (p, k) if q == 1 else None


def _remainder(dividend: list[int], divisor: list[int], p: int) -> list[int]:
    """Return the remainder of polynomials over Z_p (lowest coefficient first, monic divisor)."""
    rest = list(dividend)
    degree = len(divisor) - 1
    for top in range(len(rest) - 1, degree - 1, -1):
        lead = rest[top]
        for i, c in enumerate(divisor):
            rest[top - degree + i] = (rest[top - degree + i] - lead * c) % p
    return rest[:degree]


def _irreducible(p: int, k: int) -> list[int]:
    """Find the first monic irreducible polynomial of degree k over Z_p by trial division."""

    def monic(degree: int) -> list[list[int]]:
        return [[*low, 1] for low in product(range(p), repeat=degree)]

    divisors = [d for degree in range(1, k // 2 + 1) for d in monic(degree)]
    for low in product(range(p), repeat=k):
        candidate = [*low, 1]
        if all(any(_remainder(candidate, d, p)) for d in divisors):
            return candidate
    raise AssertionError(f"GF({p}^{k}) exists for every prime p and k >= 1")


def _digits(p: int, k: int) -> Tensor:
    """Return the coefficients of all elements by index, (p^k, k), the leading one first."""
    index = torch.arange(p**k, device="cpu")
    return torch.stack([index // p ** (k - 1 - i) % p for i in range(k)], dim=1)


def quadratic_character(p: int, k: int) -> Tensor:
    """Return the quadratic character of GF(p^k) for odd p.

    Returns:
        int8 tensor of shape ``(p,) * k``: 0 at zero, +1 at the squares, -1 elsewhere.
    """
    coefficients = _digits(p, k).flip(1)  # lowest coefficient first, as the polynomials are
    square = torch.zeros(p**k, 2 * k - 1, dtype=torch.int64, device="cpu")
    for i, j in product(range(k), repeat=2):
        square[:, i + j] += coefficients[:, i] * coefficients[:, j]
    modulus = _irreducible(p, k)
    powers = [_remainder([0] * i + [1], modulus, p) for i in range(2 * k - 1)]
    padded = torch.tensor([row + [0] * (k - len(row)) for row in powers], device="cpu")
    reduced = square @ padded % p
    place = torch.tensor([p**i for i in range(k)], device="cpu")
    character = torch.full((p**k,), -1, dtype=torch.int8, device="cpu")
    character[(reduced * place).sum(1)] = 1
    character[0] = 0
    return character.reshape((p,) * k)


def jacobsthal_matrix(q: int) -> Tensor:
    """Return the Jacobsthal matrix ``Q[a, b] = chi(a - b)`` over GF(q) for an odd prime power.

    Returns:
        int8 tensor (q, q); ``Q Q^T = q I - J``, symmetric for q = 1 and skew for q = 3 modulo 4.

    Raises:
        ValueError: q is no odd prime power.
    """
    field = prime_power(q)
    if field is None or field[0] == 2:
        raise ValueError(f"q={q} is no odd prime power; Paley matrices exist over those only")
    p, k = field
    index = torch.zeros(q, q, dtype=torch.int32, device="cpu")
    for digit in _digits(p, k).to(torch.int32).unbind(1):
        index = index * p + (digit[:, None] - digit[None, :]) % p
    return quadratic_character(p, k).flatten()[index]


@cache
def paley_field(order: int) -> tuple[int, int] | None:
    """Return ``(kind, q)`` of the Paley matrix of this order, None where there is none.

    Kind 1 has order q + 1 with q = 3 mod 4, kind 2 has order 2 (q + 1) with q = 1 mod 4.
    """
    if order % 4:
        return None
    if prime_power(order - 1):
        return 1, order - 1
    q = order // 2 - 1
    return (2, q) if q % 4 == 1 and prime_power(q) else None


def paley_matrix(kind: int, q: int) -> Tensor:
    """Return Paley's Hadamard matrix over GF(q).

    With S the Jacobsthal matrix bordered by ones (by -1 below the corner for kind 1), it is I + S,
    or S (x) [[1, 1], [1, -1]] + I (x) [[1, -1], [-1, -1]] for kind 2.

    Returns:
        int8 tensor of +-1, (q + 1, q + 1) for kind 1 and (2q + 2, 2q + 2) for kind 2.
    """
    core = torch.zeros(q + 1, q + 1, dtype=torch.int8, device="cpu")
    core[0, 1:] = 1
    core[1:, 0] = -1 if kind == 1 else 1
    core[1:, 1:] = jacobsthal_matrix(q)
    eye = torch.eye(q + 1, dtype=torch.int8, device="cpu")
    if kind == 1:
        return core + eye
    pair = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8, device="cpu")
    border = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8, device="cpu")
    return torch.kron(core, pair) + torch.kron(eye, border)


def paley_spectrum(order: int, dtype: torch.dtype) -> Tensor:
    """Return the table :func:`paley_transform` needs: the half spectrum of the character.

    Returns:
        Complex tensor over (Z_p)^k, shape ``(p,) * (k - 1) + (p // 2 + 1,)``, on the CPU.

    Raises:
        ValueError: there is no Paley matrix of this order.
    """
    field = paley_field(order)
    if field is None:
        raise ValueError(f"order={order} has no Paley matrix; see paley_field")
    p, k = prime_power(field[1]) or (0, 0)
    spectrum: Tensor = torch.fft.rfftn(quadratic_character(p, k).to(dtype))
    return spectrum


def _times_bordered(x: Tensor, spectrum: Tensor, kind: int) -> Tensor:
    """Return x S over the last dimension, S the bordered Jacobsthal matrix of order q + 1."""
    head, rest = x[..., :1], x[..., 1:]
    k, p = spectrum.ndim, 2 * spectrum.shape[-1] - 1
    dims, shape = tuple(range(-k, 0)), (p,) * k
    # (x Q)[b] = sum_a x[a] chi(a - b) correlates with chi: the spectrum enters conjugated.
    modes = torch.fft.rfftn(rest.reshape(*x.shape[:-1], *shape), dim=dims) * spectrum.conj()
    core: Tensor = torch.fft.irfftn(modes, s=shape, dim=dims).reshape(rest.shape)
    total = rest.sum(-1, keepdim=True)
    return torch.cat([-total if kind == 1 else total, head + core], dim=-1)


def paley_transform(x: Tensor, spectrum: Tensor, transpose: bool = False) -> Tensor:
    """Return x H / sqrt(order) over the last dimension for Paley's H, without forming H.

    The Jacobsthal matrix is a circulant over (Z_p)^k, so the product is a pair of FFTs.

    Args:
        x: (..., order) in float32 or float64.
        spectrum: :func:`paley_spectrum` of the order, in the same precision.
        transpose: Multiply by H^T instead.
    """
    order = x.shape[-1]
    kind = 1 if order == (2 * spectrum.shape[-1] - 1) ** spectrum.ndim + 1 else 2
    if kind == 1:  # S is skew
        bordered = _times_bordered(x, spectrum, kind)
        return (x - bordered if transpose else x + bordered) / sqrt(order)
    a, b = x[..., 0::2], x[..., 1::2]  # symmetric: H^T = H
    u, v = (_times_bordered(part, spectrum, kind) for part in (a, b))
    return torch.stack([u + v + a - b, u - v - a - b], dim=-1).flatten(-2) / sqrt(order)
