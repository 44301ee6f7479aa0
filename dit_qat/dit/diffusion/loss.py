"""DiT's training loss: noise error, plus a variational term for the learned variance.

Nichol and Dhariwal, "Improved Denoising Diffusion Probabilistic Models", arXiv:2102.09672.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dit_qat.dit.diffusion.schedule import NoiseSchedule

__all__ = ["DiffusionLoss", "diffusion_loss", "discretized_log_likelihood", "gaussian_kl"]

# Half the distance between neighbouring 8-bit pixel values on [-1, 1].
_HALF_BIN = 1 / 255
# Probabilities below this count as this, so that one outlier does not rule the batch.
_FLOOR = 1e-12


class DiffusionLoss(NamedTuple):
    """Losses per image, each (N,): ``total`` = ``mse`` + ``vb``; ``vb`` in bits per value."""

    total: Tensor
    mse: Tensor
    vb: Tensor


def diffusion_loss(
    output: Tensor, x_0: Tensor, x_t: Tensor, noise: Tensor, t: Tensor, schedule: NoiseSchedule
) -> DiffusionLoss:
    """Score a model's output at x_t, in float32 whatever the output's dtype.

    Args:
        output: (N, C, H, W) noise, or (N, 2C, H, W) noise and variance values: -1 is the
            posterior's log-variance, 1 the logarithm of beta (section 3.1, eq. 15).
        x_0: Clean images (N, C, H, W).
        x_t: Noisy images (N, C, H, W), ``schedule.add_noise(x_0, noise, t)``.
        noise: The noise in ``x_t``.
        t: Timesteps (N,), long.
        schedule: The forward process.

    Returns:
        Losses per image; ``vb`` is zero when the variance is not learned. Its gradient reaches
        the variance values only (section 3.1), and it is not rescaled.

    Raises:
        ValueError: If ``output`` has neither C nor 2C channels.
    """
    channels = x_0.shape[1]
    if output.shape[1] not in (channels, 2 * channels):
        raise ValueError(
            f"the output has {output.shape[1]} channels; images of {channels} channels need "
            f"{channels} (noise) or {2 * channels} (noise and variance)"
        )
    output, x_0, x_t, noise = (value.float() for value in (output, x_0, x_t, noise))
    predicted = output[:, :channels]
    mse = (predicted - noise).square().flatten(1).mean(1)
    if output.shape[1] == channels:
        return DiffusionLoss(mse, mse, torch.zeros_like(mse))
    vb = _variational_bound(predicted.detach(), output[:, channels:], x_0, x_t, t, schedule)
    return DiffusionLoss(mse + vb, mse, vb)


def _variational_bound(
    noise: Tensor, values: Tensor, x_0: Tensor, x_t: Tensor, t: Tensor, schedule: NoiseSchedule
) -> Tensor:
    """One term of the bound per image, (N,) in bits per value: L_{t-1}, or L_0 where t is 0."""
    lower, upper = schedule.log_variance_range(t, x_t)
    log_variance = lower + (values + 1) / 2 * (upper - lower)
    mean = schedule.posterior_mean(schedule.predict_x_0(x_t, noise, t), x_t, t)
    target = schedule.posterior_mean(x_0, x_t, t)
    kl = gaussian_kl(target, lower, mean, log_variance).flatten(1).mean(1)
    nll = -discretized_log_likelihood(x_0, mean, log_variance / 2).flatten(1).mean(1)
    return torch.where(t == 0, nll, kl) / math.log(2)


def gaussian_kl(
    mean1: Tensor, log_variance1: Tensor, mean2: Tensor, log_variance2: Tensor
) -> Tensor:
    """KL divergence of the second normal distribution from the first, per value, in nats."""
    ratio = torch.exp(log_variance1 - log_variance2)
    shift = (mean1 - mean2).square() * torch.exp(-log_variance2)
    return 0.5 * (log_variance2 - log_variance1 + ratio + shift - 1)


def discretized_log_likelihood(x: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Log-probability, in nats, of the 8-bit bin of each value under a normal distribution.

    The outermost bins reach to infinity. Arguments broadcast; ``x`` is on [-1, 1]. DDPM,
    arXiv:2006.11239, eq. 13.
    """
    distance = x - mean
    inverse_std = torch.exp(-log_std)
    below = _normal_cdf((distance + _HALF_BIN) * inverse_std)
    above = _normal_cdf((_HALF_BIN - distance) * inverse_std)
    # Differences are taken in the lower tail, where float32 does not round them to zero.
    near = _normal_cdf((_HALF_BIN - distance.abs()) * inverse_std)
    far = _normal_cdf((-_HALF_BIN - distance.abs()) * inverse_std)
    probability = torch.where(x < -0.999, below, torch.where(x > 0.999, above, near - far))
    return probability.clamp(min=_FLOOR).log()


def _normal_cdf(z: Tensor) -> Tensor:
    """The normal distribution function, exact in the lower tail (``special.ndtr`` is 1 + erf)."""
    return 0.5 * torch.erfc(-z / math.sqrt(2))
