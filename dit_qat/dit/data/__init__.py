"""Data modules whose batches are functions of (seed, step)."""

from dit_qat.dit.data.digits import Digits, digit_images
from dit_qat.dit.data.latents import Latents
from dit_qat.dit.data.module import StepData
from dit_qat.dit.data.pixels import Images
from dit_qat.dit.data.sampler import Draw, SequentialDraws, StepBatchSampler

__all__ = [
    "Digits",
    "Draw",
    "Images",
    "Latents",
    "SequentialDraws",
    "StepBatchSampler",
    "StepData",
    "digit_images",
]
