"""The forward process: how much noise each timestep holds, and what it implies backwards."""

import torch
from torch import Tensor

__all__ = ["NoiseSchedule"]


class NoiseSchedule:
    """Tables of the linear schedule, computed in float64 and stored in float32.

    Ho et al., "Denoising Diffusion Probabilistic Models", arXiv:2006.11239. A timestep ``t`` runs
    from 0 (least noise) to ``steps - 1``.

    Args:
        steps: Number of timesteps.
        beta_start: Variance added by the first step.
        beta_end: Variance added by the last step.

    Attributes:
        betas: (steps,) variance that each step adds.
        alphas_cumprod: (steps,) share of the signal's variance left after each step.
        posterior_variance: (steps,) variance of q(x_{t-1} | x_t, x_0), eq. 7; 0 at t = 0.
        log_betas: (steps,) logarithm of ``betas``.
        posterior_log_variance: (steps,) logarithm of ``posterior_variance``; at t = 0, where that
            variance is 0, the value of t = 1 stands in.

    Raises:
        ValueError: If the betas do not rise inside (0, 1).
    """

    def __init__(self, steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> None:
        if steps < 2 or not 0 < beta_start <= beta_end < 1:
            raise ValueError(
                f"steps={steps}, beta_start={beta_start}, beta_end={beta_end}: need at least two "
                "steps and 0 < beta_start <= beta_end < 1"
            )
        self.steps, self.beta_start, self.beta_end = steps, beta_start, beta_end
        betas = torch.linspace(beta_start, beta_end, steps, dtype=torch.float64)
        alphas = 1 - betas
        kept = alphas.cumprod(0)
        kept_before = torch.cat([torch.ones(1, dtype=torch.float64), kept[:-1]])
        variance = betas * (1 - kept_before) / (1 - kept)
        self.betas = betas.float()
        self.log_betas = betas.log().float()
        self.alphas_cumprod = kept.float()
        self.posterior_variance = variance.float()
        self.posterior_log_variance = torch.cat([variance[1:2], variance[1:]]).log().float()
        self._signal = kept.sqrt().float()
        self._noise = (1 - kept).sqrt().float()
        self._inverse_signal = kept.rsqrt().float()
        self._noise_to_signal = ((1 - kept) / kept).sqrt().float()
        self._mean_of_x_0 = (betas * kept_before.sqrt() / (1 - kept)).float()
        self._mean_of_x_t = (alphas.sqrt() * (1 - kept_before) / (1 - kept)).float()
        self._on_device = {torch.device("cpu"): self}

    def to(self, device: torch.device | str) -> "NoiseSchedule":
        """Return this schedule with its tables on ``device``, copied there once."""
        device = torch.device(device)
        if device not in self._on_device:
            moved = object.__new__(NoiseSchedule)
            for name, value in vars(self).items():
                setattr(moved, name, value.to(device) if isinstance(value, Tensor) else value)
            self._on_device[device] = moved
        return self._on_device[device]

    def add_noise(self, x_0: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Draw x_t from x_0 (N, ...), noise (N, ...) and timesteps (N,), eq. 4."""
        tables = self.to(x_0.device)
        return _at(tables._signal, t, x_0) * x_0 + _at(tables._noise, t, x_0) * noise

    def predict_x_0(self, x_t: Tensor, noise: Tensor, t: Tensor) -> Tensor:
        """Invert :meth:`add_noise`: the x_0 (N, ...) that x_t implies if it holds this noise."""
        tables = self.to(x_t.device)
        signal = _at(tables._inverse_signal, t, x_t) * x_t
        return signal - _at(tables._noise_to_signal, t, x_t) * noise

    def posterior_mean(self, x_0: Tensor, x_t: Tensor, t: Tensor) -> Tensor:
        """Mean (N, ...) of q(x_{t-1} | x_t, x_0), eq. 7."""
        tables = self.to(x_t.device)
        return _at(tables._mean_of_x_0, t, x_t) * x_0 + _at(tables._mean_of_x_t, t, x_t) * x_t

    def log_variance_range(self, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
        """Posterior log-variance and log beta at t, the bounds of a step's log-variance.

        Both have shape (N, 1, ...), with as many dimensions as ``like`` and on its device.
        """
        tables = self.to(like.device)
        return _at(tables.posterior_log_variance, t, like), _at(tables.log_betas, t, like)


def _at(table: Tensor, t: Tensor, like: Tensor) -> Tensor:
    return table[t].reshape(-1, *(1,) * (like.ndim - 1))
