"""Scores of generated images and the files that they are read from."""

from dit_qat.dit.evaluation.classifier import (
    DigitClassifier,
    load_digit_classifier,
    train_digit_classifier,
)
from dit_qat.dit.evaluation.digits import evaluate_digits
from dit_qat.dit.evaluation.frechet import (
    FeatureStatistics,
    frechet_distance,
    gaussian_frechet_distance,
)
from dit_qat.dit.evaluation.images import (
    image_grid,
    load_images,
    save_images,
    save_npz,
    save_png,
)

__all__ = [
    "DigitClassifier",
    "FeatureStatistics",
    "evaluate_digits",
    "frechet_distance",
    "gaussian_frechet_distance",
    "image_grid",
    "load_digit_classifier",
    "load_images",
    "save_images",
    "save_npz",
    "save_png",
    "train_digit_classifier",
]
