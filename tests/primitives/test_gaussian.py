"""Gaussian quantizers against RobuQ's tables, closed forms and optimality conditions."""

from math import inf, pi, sqrt

import pytest
import torch
from scipy.special import ndtr

from dit_qat.primitives.formats import GridKind, UniformGrid
from dit_qat.primitives.gaussian import (
    gaussian_mse,
    gaussian_step,
    lloyd_max_levels,
    lloyd_max_mse,
)

# Grid, bits, step, MSE.
STEPS: list[tuple[GridKind, int, float, float]] = [
    ("mid_rise", 1, 1.595769, 0.36338),
    ("mid_rise", 2, 0.995687, 0.118846),
    ("mid_rise", 3, 0.586019, 0.0374397),
    ("mid_rise", 4, 0.335201, 0.0115429),
    ("mid_rise", 5, 0.188139, 0.00349521),
    ("mid_rise", 6, 0.104063, 0.00104005),
    ("mid_rise", 7, 0.056868, 3.0433e-4),
    ("mid_rise", 8, 0.030762, 8.7686e-5),
    ("twos_complement", 2, 1.048385, 0.14943),
    ("twos_complement", 3, 0.601824, 0.040638),
    ("twos_complement", 4, 0.338608, 0.011864),
    ("twos_complement", 5, 0.188792, 0.0035260),
    ("twos_complement", 6, 0.104179, 0.0010429),
    ("twos_complement", 7, 0.056887, 3.0458e-4),
    ("twos_complement", 8, 0.030766, 8.7707e-5),
    ("symmetric", 2, 1.224006, 0.19017),
    ("symmetric", 3, 0.650770, 0.046860),
    ("symmetric", 4, 0.353411, 0.012889),
    ("symmetric", 5, 0.193249, 0.0036932),
    ("symmetric", 6, 0.105488, 0.0010693),
    ("symmetric", 7, 0.057261, 3.0862e-4),
    ("symmetric", 8, 0.030870, 8.8308e-5),
]
GRIDS = [(grid, bits) for grid, bits, _, _ in STEPS]

# Bits, the lowest positive levels, the highest ones, MSE.
LLOYD_MAX: list[tuple[int, list[float], list[float], float]] = [
    (1, [0.7979], [], 0.36338),
    (2, [0.4528, 1.5104], [], 0.117482),
    (3, [0.2451, 0.7560, 1.3439, 2.1519], [], 0.0345478),
    (4, [0.1284, 0.3880, 0.6568, 0.9423, 1.2562, 1.6180, 2.0690, 2.7326], [], 0.0095010),
    (
        5,
        [0.0659, 0.1981, 0.3314, 0.4667, 0.6049, 0.7471, 0.8946, 1.0488],
        [1.2118, 1.3863, 1.5762, 1.7872, 2.0287, 2.3177, 2.6911, 3.2607],
        0.00250467,
    ),
    (6, [0.0334, 0.1003, 0.1673, 0.2346], [2.6723, 2.9174, 3.2404, 3.7441], 0.00064424),
    (7, [0.0168], [4.1897], 1.6348e-4),
    (8, [0.0084], [4.6035], 4.1185e-5),
]


def quantize(x: torch.Tensor, step: float, bits: int, grid: GridKind) -> torch.Tensor:
    levels = torch.tensor(UniformGrid(bits, grid).levels, dtype=x.dtype) * step
    return levels[torch.bucketize(x, (levels[1:] + levels[:-1]) / 2)]


def quadrature() -> tuple[torch.Tensor, torch.Tensor]:
    """Points and weights of N(0, 1), fine enough to see every cell of an 8-bit grid."""
    x = torch.linspace(-9, 9, 1_800_001, dtype=torch.float64)
    weights = torch.exp(-x * x / 2)
    return x, weights / weights.sum()


@pytest.mark.parametrize(("grid", "bits", "step", "mse"), STEPS)
def test_steps_match_the_tables(grid: GridKind, bits: int, step: float, mse: float) -> None:
    found = gaussian_step(bits, grid)
    assert found == pytest.approx(step, abs=1e-6)
    assert gaussian_mse(found, bits, grid) == pytest.approx(mse, rel=5e-5)


def test_one_bit_is_the_sign_times_the_mean_magnitude() -> None:
    assert gaussian_step(1) == pytest.approx(2 * sqrt(2 / pi), abs=1e-12)
    assert gaussian_mse(gaussian_step(1), 1) == pytest.approx(1 - 2 / pi, abs=1e-12)
    assert lloyd_max_levels(1).tolist() == pytest.approx([-sqrt(2 / pi), sqrt(2 / pi)], abs=1e-12)


def test_two_bits_with_a_zero_are_ternary() -> None:
    assert gaussian_step(2, "symmetric") / 2 == pytest.approx(0.612, abs=1e-4)
    assert gaussian_mse(gaussian_step(2, "symmetric"), 2, "symmetric") < 0.1902


def test_bitnets_absmean_step_is_a_worse_one() -> None:
    step = sqrt(2 / pi) / sqrt(7)
    assert gaussian_mse(step, 4, "twos_complement") == pytest.approx(0.01313, abs=1e-5)


@pytest.mark.parametrize(("grid", "bits"), [("mid_rise", 3), ("twos_complement", 8)])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.7])
def test_the_closed_form_is_the_integral(grid: GridKind, bits: int, factor: float) -> None:
    step = factor * gaussian_step(bits, grid)
    x, weights = quadrature()
    error = (x - quantize(x, step, bits, grid)).square()
    assert gaussian_mse(step, bits, grid) == pytest.approx((weights * error).sum().item(), rel=1e-5)


@pytest.mark.parametrize(("grid", "bits"), GRIDS)
def test_the_step_is_the_best_one(grid: GridKind, bits: int) -> None:
    step = gaussian_step(bits, grid)
    best = gaussian_mse(step, bits, grid)
    others = [gaussian_mse(step * f, bits, grid) for f in (0.3, 0.6, 0.9, 0.999, 1.001, 1.1, 2, 4)]
    assert best < min(others)


@pytest.mark.parametrize(("grid", "bits"), [("mid_rise", 2), ("twos_complement", 4)])
def test_the_quantized_value_is_uncorrelated_with_its_error(grid: GridKind, bits: int) -> None:
    x, weights = quadrature()
    step = gaussian_step(bits, grid)
    c = quantize(x, step, bits, grid)
    power = (weights * c * c).sum().item()
    assert (weights * x * c).sum().item() == pytest.approx(power, abs=1e-5)
    assert gaussian_mse(step, bits, grid) == pytest.approx(1 - power, abs=1e-5)


@pytest.mark.parametrize(("bits", "lowest", "highest", "mse"), LLOYD_MAX)
def test_lloyd_max_matches_the_tables(
    bits: int, lowest: list[float], highest: list[float], mse: float
) -> None:
    positive = lloyd_max_levels(bits)[2 ** (bits - 1) :].tolist()
    assert positive[: len(lowest)] == pytest.approx(lowest, abs=5.1e-5)
    assert positive[len(positive) - len(highest) :] == pytest.approx(highest, abs=5.1e-5)
    assert lloyd_max_mse(bits) == pytest.approx(mse, rel=5e-5)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_are_the_centroids_of_their_cells(bits: int) -> None:
    levels = lloyd_max_levels(bits)
    inner = (levels[1:] + levels[:-1]) / 2
    edges = torch.cat([levels.new_tensor([-inf]), inner, levels.new_tensor([inf])])
    mass = -torch.exp(-edges.square() / 2).diff() / sqrt(2 * pi)
    # SciPy, since torch.special.ndtr loses digits in the tail; only the lower half, since the
    # probabilities of the upper tail are lost beside 1.
    half = 2 ** (bits - 1)
    centroids = mass[:half] / torch.from_numpy(ndtr(edges.numpy())).diff()[:half]
    torch.testing.assert_close(centroids, levels[:half], rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", range(1, 9))
def test_lloyd_max_levels_ascend_and_beat_the_uniform_grid(bits: int) -> None:
    levels = lloyd_max_levels(bits)
    assert levels.dtype == torch.float64
    assert levels.shape == (2**bits,)
    assert bool((levels.diff() > 0).all())
    assert torch.equal(levels, -levels.flip(0))
    assert lloyd_max_mse(bits) <= gaussian_mse(gaussian_step(bits), bits) + 1e-15


def test_the_levels_are_the_callers_own() -> None:
    lloyd_max_levels(3).zero_()
    assert lloyd_max_levels(3).abs().min() > 0.2


@pytest.mark.parametrize("bits", [0, 9])
def test_bits_out_of_range_are_named(bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} is outside 1"):
        gaussian_step(bits)
    with pytest.raises(ValueError, match=f"bits={bits} is outside 1"):
        gaussian_mse(1.0, bits)
    with pytest.raises(ValueError, match=f"bits={bits} is outside 1..8"):
        lloyd_max_levels(bits)
    with pytest.raises(ValueError, match=f"bits={bits} is outside 1..8"):
        lloyd_max_mse(bits)


@pytest.mark.parametrize("grid", ["twos_complement", "symmetric"])
@pytest.mark.parametrize("bits", [1, 9])
def test_grids_with_a_zero_need_two_bits(grid: GridKind, bits: int) -> None:
    with pytest.raises(ValueError, match=f"bits={bits} is outside 2..8"):
        gaussian_step(bits, grid)


@pytest.mark.parametrize("grid", ["unsigned", "midtread"])
def test_other_grids_are_refused(grid: GridKind) -> None:
    with pytest.raises(ValueError, match=grid):
        gaussian_step(4, grid)


@pytest.mark.parametrize("step", [0.0, -1.0, float("nan")])
def test_steps_must_be_positive(step: float) -> None:
    with pytest.raises(ValueError, match=f"step={step}"):
        gaussian_mse(step, 4)
