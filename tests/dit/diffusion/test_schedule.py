import copy

import pytest
import torch
from diffusers import DDPMScheduler

from dit_qat.dit.diffusion import NoiseSchedule


@pytest.fixture(scope="module")
def schedule():
    return NoiseSchedule()


def normals(seed, n=6):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 3, 3, generator=generator)


T = torch.tensor([0, 1, 10, 400, 998, 999])


def test_tables_are_those_of_diffusers(schedule):
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    torch.testing.assert_close(schedule.betas, theirs.betas)
    # Theirs is multiplied up in float32, so it drifts by some 1e-6 over 1000 factors.
    torch.testing.assert_close(schedule.alphas_cumprod, theirs.alphas_cumprod, rtol=1e-4, atol=0)


def test_noise_is_added_as_by_diffusers(schedule):
    theirs = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    x_0, noise = normals(0), normals(1)
    expected = theirs.add_noise(x_0, noise, T)
    torch.testing.assert_close(schedule.add_noise(x_0, noise, T), expected, rtol=1e-4, atol=1e-5)


def test_signal_and_noise_variances_sum_to_one(schedule):
    ones, zeros = torch.ones(1000, 1), torch.zeros(1000, 1)
    t = torch.arange(1000)
    signal = schedule.add_noise(ones, zeros, t)
    noise = schedule.add_noise(zeros, ones, t)
    torch.testing.assert_close(signal**2 + noise**2, ones)
    assert (signal.diff(dim=0) < 0).all()


def test_predicting_x_0_inverts_adding_noise(schedule):
    x_0, noise = normals(0), normals(1)
    x_t = schedule.add_noise(x_0, noise, T)
    # At t = 999 the signal is divided by 0.006, and so are rounding errors.
    torch.testing.assert_close(schedule.predict_x_0(x_t, noise, T), x_0, rtol=1e-4, atol=1e-4)


def test_posterior_follows_from_bayes_rule(schedule):
    """Prior q(x_{t-1} | x_0) times likelihood q(x_t | x_{t-1}), in float64 with precisions."""
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    kept = (1 - betas).cumprod(0)
    x_0, x_t, t = normals(0), normals(1), T.clamp(min=1)
    beta, before = (table.reshape(-1, 1, 1, 1) for table in (betas[t], kept[t - 1]))
    precision = 1 / (1 - before) + (1 - beta) / beta
    mean = (before.sqrt() * x_0 / (1 - before) + (1 - beta).sqrt() * x_t / beta) / precision
    torch.testing.assert_close(schedule.posterior_mean(x_0, x_t, t), mean.float())
    variance = (1 / precision).flatten()
    torch.testing.assert_close(schedule.posterior_variance[t], variance.float())
    lower, _ = schedule.log_variance_range(t, x_t)
    torch.testing.assert_close(lower.flatten(), variance.log().float())


def test_the_first_step_has_no_posterior_variance_so_the_second_stands_in(schedule):
    assert schedule.posterior_variance[0] == 0
    assert schedule.posterior_log_variance[0] == schedule.posterior_log_variance[1]
    x_0 = normals(0)
    t = torch.zeros(6, dtype=torch.long)
    torch.testing.assert_close(schedule.posterior_mean(x_0, normals(1), t), x_0)


def test_variance_range_is_ordered_and_shaped_to_broadcast(schedule):
    t = torch.arange(1000)
    lower, upper = schedule.log_variance_range(t, torch.zeros(1000, 1, 1, 1))
    assert lower.shape == upper.shape == (1000, 1, 1, 1)
    assert (lower[1:] < upper[1:]).all()


def test_tables_stay_float32_and_are_moved_once(schedule):
    assert schedule.to("cpu") is schedule
    moved = schedule.to("meta")
    assert moved is schedule.to("meta")
    assert moved.betas.device.type == "meta"
    assert moved.to("cpu") is schedule
    assert schedule.betas.dtype == schedule.posterior_log_variance.dtype == torch.float32


def test_copies_work_on_their_own(schedule):
    copied = copy.deepcopy(schedule)
    assert copied.to("cpu") is copied
    assert torch.equal(copied.betas, schedule.betas)


@pytest.mark.parametrize("wrong", [{"steps": 1}, {"beta_start": 0.0}, {"beta_end": 1.0}])
def test_impossible_schedules_are_refused(wrong):
    with pytest.raises(ValueError, match="0 < beta_start <= beta_end < 1"):
        NoiseSchedule(**wrong)


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_noise_is_added_on_the_device_of_the_images(schedule):
    x_0, noise = normals(0), normals(1)
    out = schedule.add_noise(x_0.cuda(), noise.cuda(), T.cuda())
    torch.testing.assert_close(out.cpu(), schedule.add_noise(x_0, noise, T))
