"""The diffusion process that a DiT is trained on."""

from dit_qat.dit.diffusion.loss import DiffusionLoss, diffusion_loss
from dit_qat.dit.diffusion.schedule import NoiseSchedule

__all__ = ["DiffusionLoss", "NoiseSchedule", "diffusion_loss"]
