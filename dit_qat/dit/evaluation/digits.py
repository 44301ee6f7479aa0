"""Scores of generated digits against all 1,797 real ones, without a download."""

import warnings

import torch
from torch import Tensor

from dit_qat.dit.data.digits import Digits, digit_images
from dit_qat.dit.evaluation.classifier import DigitClassifier, load_digit_classifier
from dit_qat.dit.evaluation.frechet import FeatureStatistics, frechet_distance
from dit_qat.dit.evaluation.precision_recall import precision_recall
from dit_qat.dit.sampling import to_uint8

__all__ = ["evaluate_digits"]

_NEIGHBOURS = 3
_BATCH = 1024
_TRUSTED_SAMPLES = 10 * DigitClassifier.num_features


def evaluate_digits(
    images: Tensor, labels: Tensor | None = None, classifier: DigitClassifier | None = None
) -> dict[str, float]:
    """Score generated digits by the features of the digit classifier.

    The reference is the whole data set of 1,797 images. Both sides go through 8 bits before the
    classifier sees them, as images on disk do, so that saving samples does not change their score:
    floating-point images are clamped to [-1, 1] and become ``round((x + 1) * 127.5)``.

    Args:
        images: Samples (N, 1, 8, 8), uint8 or floating-point in [-1, 1].
        labels: The digits that were asked for (N,), int64.
        classifier: Feature network; by default the one that ships with the package.

    Returns:
        ``fd_digits`` (squared Frechet distance of 64 features, lower is better; not an FID),
        ``precision`` and ``recall`` (3 nearest neighbours), ``num_samples``, and, with labels,
        ``class_accuracy`` (share of samples that the classifier takes for the digit asked for).

    Raises:
        ValueError: Wrong shape, dtype or labels, values that are not finite, or too few samples.
    """
    samples = _checked_uint8(images)
    if labels is not None:
        _check_labels(labels, len(samples))
    network = load_digit_classifier() if classifier is None else classifier
    generated, logits = _features_and_logits(network, samples)
    real, _ = _features_and_logits(network, to_uint8(digit_images()[0]))
    precision, recall = precision_recall(real, generated, k=_NEIGHBOURS)
    scores = {
        "fd_digits": frechet_distance(_statistics(generated), _statistics(real)),
        "precision": precision,
        "recall": recall,
        "num_samples": len(samples),
    }
    if labels is not None:
        hits = logits.argmax(dim=1) == labels.to(logits.device)
        scores["class_accuracy"] = float(hits.to(torch.float64).mean())
    return scores


def _checked_uint8(images: Tensor) -> Tensor:
    if images.ndim != 4 or images.shape[1:] != Digits.image_shape:
        raise ValueError(
            f"images of shape {tuple(images.shape)} are not digits; expected "
            f"(N, {', '.join(map(str, Digits.image_shape))})"
        )
    if len(images) <= _NEIGHBOURS:
        raise ValueError(
            f"{len(images)} samples are too few to score; use at least {_NEIGHBOURS + 1}, "
            f"better {_TRUSTED_SAMPLES} or more"
        )
    if len(images) < _TRUSTED_SAMPLES:
        warnings.warn(
            f"FD-digits from {len(images)} samples is biased upwards; use {_TRUSTED_SAMPLES} or "
            "more, and the same number wherever scores are compared",
            stacklevel=3,
        )
    if images.dtype == torch.uint8:
        return images
    if not images.is_floating_point():
        raise ValueError(f"images are {images.dtype}; expected uint8, or floating-point in [-1, 1]")
    if not images.isfinite().all():
        bad = int((~images.isfinite().flatten(1).all(dim=1)).sum())
        raise ValueError(f"{bad} of {len(images)} images hold NaN or infinite pixels")
    return to_uint8(images)


def _check_labels(labels: Tensor, count: int) -> None:
    if labels.shape != (count,):
        raise ValueError(
            f"{count} images need labels of shape ({count},), got {tuple(labels.shape)}"
        )
    if bool((labels < 0).any()) or bool((labels >= Digits.num_classes).any()):
        raise ValueError(
            f"labels must lie in 0..{Digits.num_classes - 1}, got "
            f"{int(labels.min())}..{int(labels.max())}"
        )


@torch.no_grad()
def _features_and_logits(classifier: DigitClassifier, images: Tensor) -> tuple[Tensor, Tensor]:
    """Return features (N, 64) and logits (N, 10) of uint8 images, on the classifier's device."""
    device = classifier.head.weight.device
    pixels = images.to(device, torch.float32).div(127.5).sub(1)
    features = torch.cat([classifier.features(batch) for batch in torch.split(pixels, _BATCH)])
    return features, classifier.head(features)


def _statistics(features: Tensor) -> FeatureStatistics:
    statistics = FeatureStatistics(features.shape[1])
    statistics.update(features)
    return statistics
