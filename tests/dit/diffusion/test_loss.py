import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from dit_qat.dit.diffusion import NoiseSchedule, diffusion_loss
from dit_qat.dit.diffusion.loss import discretized_log_likelihood, gaussian_kl

SCHEDULE = NoiseSchedule()
T = torch.tensor([0, 1, 50, 500, 999])


def case(seed=0):
    """Clean images on the 8-bit grid, noise, and the noisy images."""
    generator = torch.Generator().manual_seed(seed)
    x_0 = torch.randint(256, (5, 2, 4, 4), generator=generator) / 127.5 - 1
    noise = torch.randn(x_0.shape, generator=generator)
    return x_0, noise, SCHEDULE.add_noise(x_0, noise, T)


def test_kl_is_the_closed_form_of_torch():
    generator = torch.Generator().manual_seed(0)
    mean1, mean2, lv1, lv2 = torch.randn(4, 100, generator=generator)
    expected = kl_divergence(Normal(mean1, (lv1 / 2).exp()), Normal(mean2, (lv2 / 2).exp()))
    torch.testing.assert_close(gaussian_kl(mean1, lv1, mean2, lv2), expected, rtol=1e-4, atol=1e-5)


def test_the_256_bins_of_a_pixel_share_out_all_probability():
    values = (torch.arange(256, dtype=torch.float64) / 127.5 - 1)[:, None]
    means = torch.tensor([-1.4, -0.3, 0.0, 0.97], dtype=torch.float64)
    log_probability = discretized_log_likelihood(values, means, torch.tensor(-1.0).double())
    torch.testing.assert_close(log_probability.exp().sum(0), torch.ones(4, dtype=torch.float64))


def test_wide_distributions_approach_density_times_bin_width():
    x, mean, std = torch.tensor([0.2]), torch.tensor([0.5]), torch.tensor([0.4])
    expected = Normal(mean, std).log_prob(x) + math.log(2 / 255)
    torch.testing.assert_close(discretized_log_likelihood(x, mean, std.log()), expected)


def test_far_tails_are_floored_and_symmetric():
    distance = torch.tensor([-0.9, 0.9])
    out = discretized_log_likelihood(torch.zeros(2), distance, torch.tensor(-4.0))
    torch.testing.assert_close(out, torch.full((2,), math.log(1e-12)))
    near = discretized_log_likelihood(torch.zeros(2), distance / 10, torch.tensor(-4.0))
    torch.testing.assert_close(near[0], near[1])
    edges = torch.tensor([-0.09 - 1 / 255, -0.09 + 1 / 255], dtype=torch.float64)
    low, high = Normal(0.0, math.exp(-4.0)).cdf(edges)
    assert near[0].item() == pytest.approx((high - low).log().item(), rel=1e-4)


def test_vb_vanishes_when_the_prediction_is_the_posterior():
    x_0, noise, x_t = case()
    output = torch.cat([noise, -torch.ones_like(noise)], dim=1)
    loss = diffusion_loss(output, x_0, x_t, noise, T, SCHEDULE)
    assert torch.equal(loss.mse, torch.zeros(5))
    torch.testing.assert_close(loss.vb[1:], torch.zeros(4), rtol=0, atol=1e-4)
    assert loss.vb[0] > 0.1  # a likelihood, not a divergence


def test_vb_is_the_kl_between_the_two_steps_in_bits():
    """Against torch.distributions with beta as the variance (v = 1) and a wrong noise."""
    x_0, noise, x_t = case()
    predicted = noise + 0.3
    output = torch.cat([predicted, torch.ones_like(noise)], dim=1)
    vb = diffusion_loss(output, x_0, x_t, noise, T, SCHEDULE).vb
    shape = (-1, 1, 1, 1)
    variance, beta = SCHEDULE.posterior_variance[T].reshape(shape), SCHEDULE.betas[T].reshape(shape)
    guess = SCHEDULE.posterior_mean(SCHEDULE.predict_x_0(x_t, predicted, T), x_t, T)
    target = SCHEDULE.posterior_mean(x_0, x_t, T)
    kl = kl_divergence(Normal(target[1:], variance[1:].sqrt()), Normal(guess[1:], beta[1:].sqrt()))
    torch.testing.assert_close(vb[1:], kl.mean((1, 2, 3)) / math.log(2), rtol=1e-3, atol=1e-5)
    nll = -discretized_log_likelihood(x_0[0], guess[0], 0.5 * beta[0].log()).mean() / math.log(2)
    torch.testing.assert_close(vb[0], nll, rtol=1e-4, atol=1e-5)


def test_log_variance_is_interpolated_linearly():
    x_0, noise, x_t = case()
    t = torch.full((5,), 1)
    lower, upper = SCHEDULE.log_variance_range(t, x_t)
    output = torch.cat([noise, torch.zeros_like(noise)], dim=1)
    x_t = SCHEDULE.add_noise(x_0, noise, t)
    middle = (lower + upper) / 2
    expected = gaussian_kl(torch.zeros(1), lower, torch.zeros(1), middle).flatten() / math.log(2)
    vb = diffusion_loss(output, x_0, x_t, noise, t, SCHEDULE).vb
    torch.testing.assert_close(vb, expected, rtol=1e-3, atol=1e-4)


def test_gradient_of_vb_reaches_the_variance_but_not_the_noise():
    x_0, noise, x_t = case()
    output = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(2)).requires_grad_()
    loss = diffusion_loss(output, x_0, x_t, noise, T, SCHEDULE)
    (gradient,) = torch.autograd.grad(loss.vb.sum(), output, retain_graph=True)
    assert not gradient[:, :2].any()
    assert (gradient[:, 2:] != 0).float().mean() > 0.9
    (gradient,) = torch.autograd.grad(loss.mse.sum(), output)
    torch.testing.assert_close(gradient[:, :2], 2 * (output[:, :2] - noise) / 32)
    assert not gradient[:, 2:].any()


def test_mse_alone_without_learned_variance():
    x_0, noise, x_t = case()
    loss = diffusion_loss(noise + 0.5, x_0, x_t, noise, T, SCHEDULE)
    torch.testing.assert_close(loss.mse, torch.full((5,), 0.25))
    assert torch.equal(loss.total, loss.mse)
    assert not loss.vb.any()


def test_total_is_the_sum_and_losses_are_per_image():
    x_0, noise, x_t = case()
    output = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(2))
    whole = diffusion_loss(output, x_0, x_t, noise, T, SCHEDULE)
    torch.testing.assert_close(whole.total, whole.mse + whole.vb)
    for i in range(5):
        one = slice(i, i + 1)
        alone = diffusion_loss(output[one], x_0[one], x_t[one], noise[one], T[one], SCHEDULE)
        torch.testing.assert_close(alone.total, whole.total[one])


def test_half_precision_outputs_are_scored_in_float32():
    x_0, noise, x_t = case()
    output = torch.randn(5, 4, 4, 4, generator=torch.Generator().manual_seed(2)).bfloat16()
    loss = diffusion_loss(output, x_0, x_t, noise, T, SCHEDULE)
    assert {value.dtype for value in loss} == {torch.float32}
    exact = diffusion_loss(output.float(), x_0, x_t, noise, T, SCHEDULE)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = diffusion_loss(output, x_0, x_t, noise, T, SCHEDULE)
    assert torch.equal(loss.total, exact.total)
    assert torch.equal(cast.total, exact.total)


def test_other_channel_counts_are_refused():
    x_0, noise, x_t = case()
    with pytest.raises(ValueError, match=r"3 channels.*2 \(noise\) or 4"):
        diffusion_loss(torch.zeros(5, 3, 4, 4), x_0, x_t, noise, T, SCHEDULE)
