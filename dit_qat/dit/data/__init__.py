"""Data modules whose batches are functions of (seed, step)."""

from dit_qat.dit.data.digits import Digits, digit_images
from dit_qat.dit.data.latents import LatentCache, Latents
from dit_qat.dit.data.module import StepData
from dit_qat.dit.data.pictures import Pictures
from dit_qat.dit.data.pixels import Images
from dit_qat.dit.data.sampler import Draw, SequentialDraws, StepBatchSampler
from dit_qat.dit.data.sources import CIFAR10, Folder, HuggingFace, ImageFolder

__all__ = [
    "CIFAR10",
    "Digits",
    "Draw",
    "Folder",
    "HuggingFace",
    "ImageFolder",
    "Images",
    "LatentCache",
    "Latents",
    "Pictures",
    "SequentialDraws",
    "StepBatchSampler",
    "StepData",
    "digit_images",
]
