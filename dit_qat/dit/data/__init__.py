"""Data modules whose batches are functions of (seed, step)."""

from dit_qat.dit.data.digits import Digits, digit_images
from dit_qat.dit.data.sampler import StepBatchSampler

__all__ = ["Digits", "StepBatchSampler", "digit_images"]
