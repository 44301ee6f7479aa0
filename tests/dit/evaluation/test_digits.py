import warnings

import pytest
import torch

from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import (
    FeatureStatistics,
    evaluate_digits,
    frechet_distance,
)
from dit_qat.dit.evaluation.precision_recall import precision_recall
from dit_qat.dit.randomness import generator_for
from dit_qat.dit.sampling import to_uint8


@pytest.fixture(scope="module")
def digits():
    return digit_images()


def noisy(images, std):
    noise = torch.randn(images.shape, generator=generator_for(0, "pixel noise"))
    return images + std * noise


def test_the_real_digits_are_at_distance_zero(digits, classifier):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = evaluate_digits(*digits, classifier)
    assert 0 <= scores["fd_digits"] < 1e-6
    assert scores["precision"] == scores["recall"] == 1
    assert scores["num_samples"] == 1797
    assert scores["class_accuracy"] > 0.9


def test_more_noise_scores_worse(digits, classifier):
    images, labels = digits
    all_scores = [
        evaluate_digits(noisy(images, std)[:700], labels[:700], classifier)
        for std in (0.0, 0.2, 0.4, 0.8)
    ]
    for name, sign in (("fd_digits", 1), ("precision", -1), ("class_accuracy", -1)):
        values = [sign * scores[name] for scores in all_scores]
        assert values == sorted(values)
        assert values[0] < values[-1]


def test_a_lost_class_costs_distance_and_recall(digits, classifier):
    images, labels = digits
    whole = evaluate_digits(images, None, classifier)
    lacking = evaluate_digits(images[labels != 3], None, classifier)
    assert lacking["fd_digits"] > whole["fd_digits"] + 1
    assert lacking["precision"] == 1
    assert lacking["recall"] < 0.97


def test_scores_are_those_of_features_that_went_through_8_bits(digits, classifier):
    samples = noisy(digits[0], 0.3)[:700]
    scores = evaluate_digits(samples, None, classifier)
    statistics, features = [], []
    for images in (samples, digits[0]):
        levels = ((images + 1) * 127.5).round().clamp(0, 255)
        features.append(classifier.features(levels / 127.5 - 1))
        statistics.append(FeatureStatistics(64))
        statistics[-1].update(features[-1])
    assert scores["fd_digits"] == pytest.approx(frechet_distance(*statistics), rel=1e-4)
    expected = precision_recall(features[1], features[0])
    assert (scores["precision"], scores["recall"]) == pytest.approx(expected, abs=0.002)


def test_saving_samples_as_8_bit_images_does_not_change_their_scores(digits, classifier):
    samples = noisy(digits[0], 0.1)[:700]
    scores = evaluate_digits(samples, None, classifier)
    assert evaluate_digits(to_uint8(samples), None, classifier) == scores
    assert evaluate_digits(samples.double(), None, classifier) == pytest.approx(scores, rel=1e-3)


def test_class_accuracy_counts_the_labels_that_were_asked_for(digits, classifier):
    images = digits[0][:700]
    predicted = classifier(to_uint8(images).float() / 127.5 - 1).argmax(dim=1)
    assert evaluate_digits(images, predicted, classifier)["class_accuracy"] == 1
    predicted[:70] = (predicted[:70] + 1) % 10
    assert evaluate_digits(images, predicted, classifier)["class_accuracy"] == pytest.approx(0.9)
    assert "class_accuracy" not in evaluate_digits(images, None, classifier)


def test_few_samples_warn(digits, classifier):
    with pytest.warns(UserWarning, match="from 639 samples is biased upwards; use 640"):
        evaluate_digits(digits[0][:639], None, classifier)


@pytest.mark.parametrize("count", [0, 1, 3])
def test_too_few_samples_are_refused(digits, classifier, count):
    with pytest.raises(ValueError, match=f"{count} samples are too few"):
        evaluate_digits(digits[0][:count], None, classifier)


@pytest.mark.parametrize("shape", [(700, 3, 8, 8), (700, 8, 8), (700, 1, 16, 16)])
def test_other_shapes_are_refused(classifier, shape):
    with pytest.raises(ValueError, match=r"are not digits; expected \(N, 1, 8, 8\)"):
        evaluate_digits(torch.zeros(shape), None, classifier)


def test_other_types_and_broken_pixels_are_refused(digits, classifier):
    with pytest.raises(ValueError, match=r"images are torch\.int64"):
        evaluate_digits(torch.zeros(700, 1, 8, 8, dtype=torch.int64), None, classifier)
    broken = digits[0].clone()
    broken[[4, 9], 0, 2, 2] = torch.nan
    with pytest.raises(ValueError, match="2 of 1797 images hold NaN"):
        evaluate_digits(broken, None, classifier)


def test_labels_that_do_not_fit_are_refused(digits, classifier):
    images, labels = digits
    with pytest.raises(ValueError, match=r"labels of shape \(1797,\), got \(1796,\)"):
        evaluate_digits(images, labels[1:], classifier)
    with pytest.raises(ValueError, match=r"0\.\.9, got 1\.\.10"):
        evaluate_digits(images, labels + 1, classifier)
