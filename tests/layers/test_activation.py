"""Activation quantizers: levels, integer path, equivariances, closed forms, gradients."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from dit_qat.layers.activation import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    ActivationQuantizer,
    MinMaxQuantizer,
    RobustQuantizer,
    StraightThrough,
)
from dit_qat.primitives.gaussian import gaussian_mse, gaussian_step
from dit_qat.primitives.ste import trust_mask

QUANTIZERS = [
    RobustQuantizer(1),
    RobustQuantizer(2),
    RobustQuantizer(4),
    RobustQuantizer(3, center=True),
    MinMaxQuantizer(1),
    MinMaxQuantizer(4),
    MinMaxQuantizer(3, zero_point="rounded"),
    AbsMaxQuantizer(2),
    AbsMaxQuantizer(8),
    AbsMeanQuantizer(4),
]
EVERY = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def gaussian_tokens(tokens: int, width: int) -> Tensor:
    """All quantiles of N(0, 1), shuffled: tails as heavy as they should be, at any sample size."""
    count = tokens * width
    order = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    uniform = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    return torch.special.ndtri(uniform)[order].reshape(tokens, width).float()


def error(quantizer: ActivationQuantizer, x: Tensor) -> float:
    """Mean squared error over mean square."""
    return float((quantizer.fake_quantize(x) - x).square().mean() / x.square().mean())


@EVERY
def test_every_token_takes_the_levels_of_the_grid(quantizer: ActivationQuantizer) -> None:
    x = normal(6, 500)
    step, low = quantizer.step_and_low(x)
    levels = quantizer.levels(x, step, low)
    assert step.shape == (6, 1)
    assert set(levels.unique().tolist()) <= set(quantizer.grid.levels)
    quantized = levels * step if low is None else levels * step + low
    assert torch.equal(quantizer.fake_quantize(x), quantized)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_the_integer_path_of_mid_rise(bits: int) -> None:
    x, quantizer = normal(6, 500), RobustQuantizer(bits)
    step, low = quantizer.step_and_low(x)
    odd = 2 * quantizer.levels(x, step, low)
    assert torch.equal(odd.to(torch.int16) % 2, torch.ones_like(x, dtype=torch.int16))
    assert torch.equal(odd * (step / 2), quantizer.fake_quantize(x))
    sigma = x.square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(step, gaussian_step(bits) * sigma)


def test_centring_uses_the_mean_and_the_spread_about_it() -> None:
    x = normal(6, 20, dtype=torch.float64) + 3
    step, low = RobustQuantizer(3, center=True).step_and_low(x)
    mean = x.mean(-1, keepdim=True)
    torch.testing.assert_close(low, mean)
    spread = (x - mean).square().mean(-1, keepdim=True).sqrt()
    torch.testing.assert_close(step, gaussian_step(3) * spread)


@EVERY
def test_scaling_a_token_scales_its_result(quantizer: ActivationQuantizer) -> None:
    x, factors = normal(4, 300), torch.tensor([[0.25], [1.0], [8.0], [2.0**-60]])
    scaled = quantizer.fake_quantize(x * factors)
    assert torch.equal(scaled, quantizer.fake_quantize(x) * factors)


@EVERY
def test_tokens_do_not_see_each_other(quantizer: ActivationQuantizer) -> None:
    x = normal(5, 200)
    alone = torch.stack([quantizer.fake_quantize(row) for row in x])
    torch.testing.assert_close(quantizer.fake_quantize(x), alone, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("quantizer", [RobustQuantizer(3, center=True), MinMaxQuantizer(3)])
def test_affine_grids_follow_a_shift(quantizer: ActivationQuantizer) -> None:
    x = normal(4, 300, dtype=torch.float64)
    shifted = quantizer.fake_quantize(x + 5)
    torch.testing.assert_close(shifted, quantizer.fake_quantize(x) + 5)


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("center", [False, True])
def test_the_error_on_normal_tokens_is_the_closed_form(bits: int, center: bool) -> None:
    found = error(RobustQuantizer(bits, center=center), gaussian_tokens(8, 65536))
    assert found == pytest.approx(gaussian_mse(gaussian_step(bits), bits), rel=0.01)


def test_the_error_of_bitnet_v2_on_normal_tokens() -> None:
    assert error(AbsMeanQuantizer(4), gaussian_tokens(8, 65536)) == pytest.approx(0.01313, rel=0.01)


@pytest.mark.parametrize(("bits", "ratio"), [(3, 1.9), (2, 3)])
def test_the_gaussian_grid_beats_min_max_at_low_bits(bits: int, ratio: float) -> None:
    x = normal(128, 1152)
    assert error(MinMaxQuantizer(bits), x) > ratio * error(RobustQuantizer(bits), x)


def test_one_bit_of_min_max_depends_on_the_zero_point() -> None:
    x = normal(256, 1152)
    assert error(MinMaxQuantizer(1, zero_point="float"), x) == pytest.approx(6.5, rel=0.1)
    assert error(MinMaxQuantizer(1, zero_point="rounded"), x) == pytest.approx(1.0, rel=0.1)


def test_min_max_reaches_both_ends_and_a_rounded_zero_is_a_level() -> None:
    x = normal(20, 300)
    ends = MinMaxQuantizer(4).fake_quantize(x)
    torch.testing.assert_close(ends.amin(-1), x.amin(-1))
    torch.testing.assert_close(ends.amax(-1), x.amax(-1))
    rounded = MinMaxQuantizer(4, zero_point="rounded")
    step, low = rounded.step_and_low(x)
    assert low is not None
    assert torch.equal((low / step).round() * step, low)


def test_absmax_keeps_the_largest_magnitude() -> None:
    x = normal(20, 300)
    torch.testing.assert_close(AbsMaxQuantizer(8).fake_quantize(x).abs().amax(-1), x.abs().amax(-1))


@EVERY
@pytest.mark.parametrize("straight_through", ["identity", "clip", "soft_clip"])
def test_the_gradient_is_the_mask(
    quantizer: ActivationQuantizer, straight_through: StraightThrough
) -> None:
    quantizer = replace(quantizer, straight_through=straight_through)
    x, grad = (3 * normal(6, 400)).requires_grad_(), normal(6, 400).flip(0)
    quantizer.fake_quantize(x).backward(grad)
    step, low = quantizer.step_and_low(x.detach())
    mask = quantizer.gradient_mask(x.detach(), step, low)
    assert (mask is None) == (straight_through == "identity")
    assert torch.equal(x.grad, grad if mask is None else grad * mask)


@pytest.mark.parametrize("bits", [1, 2, 3])
@pytest.mark.parametrize(("straight_through", "bound"), [("clip", 0.5), ("soft_clip", 1.0)])
def test_masks_on_mid_rise_are_quests_trust_masks(
    bits: int, straight_through: StraightThrough, bound: float
) -> None:
    x = normal(8, 4000)
    quantizer = RobustQuantizer(bits, straight_through)
    step, low = quantizer.step_and_low(x)
    mask = quantizer.gradient_mask(x, step, low)
    assert mask is not None
    # One float32 unit of slack: inside the grid errors come as close to half a step as can be.
    trusted = trust_mask(x, quantizer.fake_quantize(x), bound * step * (1 + 1e-5))
    assert torch.equal(mask, trusted)
    assert 0 < (~mask).sum() < 0.12 * x.numel()


@EVERY
@pytest.mark.parametrize("value", [0.0, 1e-42, 5.0, -5.0, 1e15])
def test_constant_tokens_stay_finite(quantizer: ActivationQuantizer, value: float) -> None:
    x = torch.full((2, 64), value, requires_grad=True)
    y = quantizer.fake_quantize(x)
    y.sum().backward()
    assert y.isfinite().all()
    assert (y - value).abs().max() <= abs(value) + 1e-37
    assert x.grad is not None
    assert x.grad.isfinite().all()


@EVERY
def test_bfloat16_tokens_take_the_same_levels(quantizer: ActivationQuantizer) -> None:
    x = normal(6, 500).bfloat16()
    step, low = quantizer.step_and_low(x)
    assert step.dtype == torch.float32
    levels = quantizer.levels(x, step, low)
    assert levels.dtype == quantizer.fake_quantize(x).dtype == torch.bfloat16
    exact = quantizer.levels(x.float(), *quantizer.step_and_low(x.float()))
    assert torch.equal(levels.float(), exact)


@pytest.mark.parametrize("bits", [0, 9, 2.5, "4"])
def test_other_bits_are_refused(bits: object) -> None:
    with pytest.raises(ValueError, match=r"is outside 1\.\.8; choose whole activation bits"):
        RobustQuantizer(bits)  # type: ignore[arg-type]


def test_settings_without_meaning_are_refused() -> None:
    with pytest.raises(ValueError, match=r"bits=1 is outside 2\.\.16 for a symmetric grid"):
        AbsMaxQuantizer(1)
    with pytest.raises(ValueError, match=r"bits=3 has no absmean form.*use MinMaxQuantizer"):
        AbsMeanQuantizer(3)
    with pytest.raises(ValueError, match=r"'soft' is unknown; use one of .*soft_clip"):
        RobustQuantizer(4, "soft")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="'int' is unknown; use float or rounded"):
        MinMaxQuantizer(4, zero_point="int")  # type: ignore[arg-type]
