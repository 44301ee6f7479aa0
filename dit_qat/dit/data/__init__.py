"""Data modules whose batches are functions of (seed, step)."""

from dit_qat.dit.data.digits import Digits, digit_images
from dit_qat.dit.data.module import StepData
from dit_qat.dit.data.sampler import Draw, SequentialDraws, StepBatchSampler

__all__ = [
    "Digits",
    "Draw",
    "SequentialDraws",
    "StepBatchSampler",
    "StepData",
    "digit_images",
]
