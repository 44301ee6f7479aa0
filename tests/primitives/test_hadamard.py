"""Hadamard matrices by their defining property, transforms by their dense matrix."""

import copy
import pickle
from math import prod, sqrt

import pytest
import torch
from scipy.linalg import hadamard
from torch import Tensor

from dit_qat.primitives import hadamard as module
from dit_qat.primitives.galois import (
    jacobsthal_matrix,
    paley_field,
    paley_matrix,
    prime_power,
    quadratic_character,
)
from dit_qat.primitives.hadamard import (
    Rotation,
    hadamard_factors,
    hadamard_matrix,
    hadamard_transform,
    has_hadamard,
    nearest_orders,
)

REACHED = [n for n in range(1, 301) if has_hadamard(n)]
WIDTHS = [768, 1152, 1536, 3072, 4608, 5120, 5504, 8960, 11008, 13824, 18944]


def normal(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def orthonormal(n: int) -> Tensor:
    return hadamard_matrix(n, torch.float64) / sqrt(n)


@pytest.mark.parametrize(("q", "field"), [(343, (7, 3)), (25, (5, 2)), (5503, (5503, 1))])
def test_prime_powers_are_recognised(q: int, field: tuple[int, int]) -> None:
    assert prime_power(q) == field


@pytest.mark.parametrize("q", [1, 12, 36, 1099])
def test_other_numbers_are_no_prime_powers(q: int) -> None:
    assert prime_power(q) is None


@pytest.mark.parametrize("q", [3, 5, 9, 13, 25, 27, 49, 81, 125, 343])
def test_jacobsthal_matrices(q: int) -> None:
    Q = jacobsthal_matrix(q).double()
    assert torch.equal(Q @ Q.T, q * torch.eye(q).double() - torch.ones(q, q))
    assert torch.equal(Q.T, Q if q % 4 == 1 else -Q)


def test_jacobsthal_matrices_need_an_odd_prime_power() -> None:
    with pytest.raises(ValueError, match="q=15 is no odd prime power"):
        jacobsthal_matrix(15)


def test_the_character_of_a_prime_field_is_eulers_criterion() -> None:
    chi = quadratic_character(23, 1)
    assert [int(c) % 23 for c in chi] == [pow(a, 11, 23) for a in range(23)]


def test_the_orders_missing_below_300_are_the_known_ones() -> None:
    missing = [n for n in range(4, 301, 4) if n not in REACHED]
    assert missing == [92, 116, 156, 172, 184, 188, 232, 236, 260, 268, 292]
    assert [n for n in REACHED if n % 4] == [1, 2]


@pytest.mark.parametrize("n", [*REACHED, 344, 524, 552, 568, 580, 1152])
def test_rows_are_orthogonal_and_entries_are_signs(n: int) -> None:
    H = hadamard_matrix(n)
    assert torch.equal(H.abs(), torch.ones(n, n))
    assert torch.equal(H @ H.T, n * torch.eye(n))


@pytest.mark.parametrize(("n", "field"), [(28, (1, 27)), (52, (2, 25)), (344, (1, 343))])
def test_prime_power_fields_are_used(n: int, field: tuple[int, int]) -> None:
    assert paley_field(n) == field
    H = paley_matrix(*field).double()
    assert torch.equal(H @ H.T, n * torch.eye(n).double())


@pytest.mark.parametrize("n", [1, 2, 4, 32, 128, 1024, 2048])
def test_powers_of_two_are_sylvesters(n: int) -> None:
    assert torch.equal(hadamard_matrix(n), torch.tensor(hadamard(n), dtype=torch.float32))


@pytest.mark.parametrize("n", [1, 12, 96, 128, 344, 524, 552, 568, 580, 1152, 2188])
def test_the_transform_applies_the_matrix(n: int) -> None:
    x = normal(3, n)
    H = orthonormal(n)
    torch.testing.assert_close(hadamard_transform(x), x @ H, rtol=0, atol=1e-12)
    torch.testing.assert_close(hadamard_transform(x, transpose=True), x @ H.T, rtol=0, atol=1e-12)


@pytest.mark.parametrize("n", [1152, 4608])
def test_the_widths_of_dit_xl_mix_every_channel_with_every_other(n: int) -> None:
    rows = hadamard_transform(torch.eye(n)[:: n // 64])
    torch.testing.assert_close(rows.abs(), torch.full_like(rows, n**-0.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("n", WIDTHS)
def test_wide_transforms_keep_products_and_invert(n: int) -> None:
    x, w = normal(2, 2, n)
    product = hadamard_transform(x) @ hadamard_transform(w).T
    torch.testing.assert_close(product, x @ w.T, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(hadamard_transform(hadamard_transform(x), transpose=True), x)


@pytest.mark.parametrize("n", [524, 580, 2188])
def test_large_paley_orders_go_through_the_fft(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(order: int) -> Tensor:
        raise AssertionError(f"dense matrix of order {order}")

    x = normal(2, n, dtype=torch.float32)
    expected = x.double() @ orthonormal(n)
    module._cached_tables.cache_clear()
    monkeypatch.setattr(module, "_signs_of_order", refuse)
    torch.testing.assert_close(hadamard_transform(x).double(), expected, rtol=0, atol=1e-5)


def test_rotated_weights_on_disk_rely_on_the_factors() -> None:
    factors = {n: hadamard_factors(n) for n in (128, 1152, 4608, 8960, 11008, 13824, 18944)}
    assert factors == {
        128: (128,),
        1152: (36, 32),
        4608: (12, 24, 16),
        8960: (20, 28, 16),
        11008: (344, 32),
        13824: (24, 24, 24),
        18944: (148, 8, 16),
    }


def test_every_order_has_factors_that_a_pass_can_apply() -> None:
    reached = [n for n in range(1, 6001) if has_hadamard(n)]
    factors = {n: hadamard_factors(n) for n in reached}
    assert [n for n, orders in factors.items() if prod(orders) != n] == []
    orders = {order for group in factors.values() for order in group}
    limit = module._DENSE_LIMIT
    assert all(has_hadamard(n) if n <= limit else paley_field(n) is not None for n in orders)
    pairs = {n: orders for n, orders in factors.items() if n > 2 and 2 in orders}
    assert len(pairs) == 153  # these have no other factorisation
    assert pairs[552] == (276, 2)
    assert pairs[568] == (284, 2)


def test_rotated_weights_on_disk_rely_on_the_signs() -> None:
    signs = Rotation(12).signs(torch.int64, "cpu")
    assert signs is not None
    assert signs.tolist() == [-1, 1, 1, -1, 1, 1, 1, 1, 1, 1, 1, -1]


@pytest.mark.parametrize("shape", [(1152,), (0, 1152), (2, 3, 1152), (2, 0, 3, 1152)])
def test_leading_shapes_are_kept(shape: tuple[int, ...]) -> None:
    assert hadamard_transform(torch.ones(shape)).shape == shape


def test_strided_input_gives_the_same_as_its_copy() -> None:
    x = normal(1152, 4).T
    assert torch.equal(hadamard_transform(x), hadamard_transform(x.contiguous()))


@pytest.mark.parametrize("n", [128, 1152, 524, 4608])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_kept_and_has_no_systematic_gain(n: int, dtype: torch.dtype) -> None:
    x = normal(64, n, dtype=dtype)
    y = hadamard_transform(x)
    expected = x.double() @ orthonormal(n)
    assert y.dtype == dtype
    assert (y.double() - expected).norm() < 4e-3 * expected.norm()
    gain = (y.double() * expected).sum() / expected.square().sum()
    assert gain.item() == pytest.approx(1, abs=4e-4)


def test_autocast_does_not_lower_the_precision() -> None:
    x = normal(4, 1152, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = hadamard_transform(x)
    assert torch.equal(y, hadamard_transform(x))


@pytest.mark.parametrize("rotation", [Rotation(144), Rotation(48, block_size=12), Rotation(524)])
@pytest.mark.parametrize("name", ["apply", "inverse"])
def test_gradients(rotation: Rotation, name: str) -> None:
    x = normal(2, rotation.width).requires_grad_()
    fast = rotation.width > 500
    assert torch.autograd.gradcheck(getattr(rotation, name), x, fast_mode=fast)


def test_tables_made_under_inference_mode_serve_training() -> None:
    rotation = Rotation(60, seed=77)
    with torch.inference_mode():
        rotation.apply(torch.ones(60))
    x = torch.ones(60, requires_grad=True)
    (gradient,) = torch.autograd.grad(rotation.apply(x).sum(), x)
    assert gradient.norm().item() == pytest.approx(60**0.5, rel=1e-5)


def test_tracing_needs_no_graph_break_for_several_widths() -> None:
    torch._dynamo.reset()
    traced = torch.compile(
        lambda x, r: r.apply(x) + hadamard_transform(x), fullgraph=True, backend="eager"
    )
    for rotation in (Rotation(1152), Rotation(4608), Rotation(1152, block_size=128)):
        x = normal(2, rotation.width)
        torch.testing.assert_close(traced(x, rotation), rotation.apply(x) + hadamard_transform(x))


def test_integers_are_refused() -> None:
    with pytest.raises(TypeError, match=r"int64.*x\.float"):
        hadamard_transform(torch.ones(128, dtype=torch.int64))


@pytest.mark.parametrize("seed", [None, 0, 5])
@pytest.mark.parametrize(("width", "block_size"), [(1152, None), (1152, 128), (1100, 44)])
def test_a_rotation_cancels_in_a_product(
    width: int, block_size: int | None, seed: int | None
) -> None:
    rotation = Rotation(width, seed, block_size)
    x, w = normal(2, 5, width)
    torch.testing.assert_close(rotation.apply(x) @ rotation.apply(w).T, x @ w.T)
    torch.testing.assert_close(rotation.inverse(rotation.apply(x)), x)
    torch.testing.assert_close(rotation.apply(rotation.inverse(x)), x)


def test_signs_multiply_before_the_matrix() -> None:
    rotation = Rotation(36, seed=3)
    s = rotation.signs(torch.float64, "cpu")
    assert s is not None
    expected = torch.diag(s) @ orthonormal(36)
    torch.testing.assert_close(rotation.apply(torch.eye(36).double()), expected)


def test_signs_depend_on_the_seed_alone() -> None:
    torch.manual_seed(1)
    first = Rotation(4608, seed=1).signs(torch.float32, "cpu")
    module._cached_signs.cache_clear()
    torch.manual_seed(2)
    again = Rotation(4608, seed=1).signs(torch.float32, "cpu")
    other = Rotation(4608, seed=2).signs(torch.float32, "cpu")
    assert first is not None
    assert again is not None
    assert other is not None
    assert torch.equal(first, again)
    assert 0.45 < (first == other).float().mean() < 0.55
    assert abs(first.mean()) < 0.05
    assert Rotation(4608, seed=None).signs(torch.float32, "cpu") is None


def test_signs_spread_the_mean_of_a_token() -> None:
    x = torch.ones(1, 4608)
    assert Rotation(4608, seed=None).apply(x).abs().max() > 50
    assert Rotation(4608, seed=0).apply(x).abs().max() < 6


def test_blocks_stay_apart() -> None:
    y = Rotation(1152, block_size=128).apply(torch.eye(1152))
    blocks = y.reshape(9, 128, 9, 128).abs().sum((1, 3))
    assert torch.equal(blocks > 0, torch.eye(9, dtype=torch.bool))


def test_rotations_are_values() -> None:
    rotation = Rotation(1152, 3, 128)
    assert pickle.loads(pickle.dumps(rotation)) == copy.deepcopy(rotation) == rotation
    assert len({rotation, Rotation(1152, 3, 128), Rotation(1152)}) == 2


@pytest.mark.parametrize(
    ("width", "block_size", "message"),
    [
        (1100, None, "width=1100 .*orders are 1096 and 1104, or use block_size=220, 100, 44$"),
        (13696, None, "width=13696 .*or use block_size=128, 64, 32$"),
        (1101, None, "width=1101 .*no block_size divides 1101$"),
        (1100, 48, "block_size=48 does not divide width=1100; use block_size=220, 100, 44$"),
        (1100, 50, "block_size=50 has no Hadamard matrix; .*block_size=220, 100, 44$"),
        (1152, 0, "block_size=0 does not divide"),
        (0, None, "width=0"),
    ],
)
def test_errors_name_the_value_and_the_cure(
    width: int, block_size: int | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Rotation(width, block_size=block_size)


def test_a_wrong_width_is_named() -> None:
    with pytest.raises(ValueError, match=r"256 channels.*512.*Rotation\(width=256\)"):
        Rotation(512, block_size=128).apply(torch.ones(256))


@pytest.mark.parametrize("function", [hadamard_matrix, hadamard_factors])
def test_a_missing_order_names_its_neighbours(function: object) -> None:
    assert callable(function)
    with pytest.raises(ValueError, match="order 92 has no Hadamard matrix; nearest orders are 88"):
        function(92)


def test_nearest_orders() -> None:
    assert nearest_orders(1152) == (1152, 1152)
    assert nearest_orders(3) == (2, 4)
    with pytest.raises(ValueError, match="n=0"):
        nearest_orders(0)
