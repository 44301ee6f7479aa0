import math

import pytest
import torch
from torch_fidelity.metric_isc import isc_features_to_metric

from dit_qat.dit.evaluation.inception_score import InceptionScore
from dit_qat.dit.randomness import generator_for


def logits(count, classes=20):
    return 3 * torch.randn(count, classes, generator=generator_for(0, "logits"))


def score_of(values, split_size, batch_size=7):
    score = InceptionScore(split_size)
    for first in range(0, len(values), batch_size):
        score.update(first, values[first : first + batch_size])
    return score


def test_certain_and_even_predictions_score_the_number_of_classes():
    certain = 1e3 * torch.eye(8).repeat(5, 1)
    assert score_of(certain, 40).compute() == (pytest.approx(8), 0)


def test_equal_predictions_score_one():
    assert score_of(logits(1).expand(30, -1), 10).compute() == (pytest.approx(1), pytest.approx(0))


def test_it_equals_torch_fidelity_on_the_same_splits():
    values = logits(300)
    theirs = isc_features_to_metric(values, splits=6, shuffle=False)
    mean, deviation = score_of(values, 50).compute()
    assert mean == pytest.approx(theirs["inception_score_mean"], rel=1e-9)
    assert deviation == pytest.approx(theirs["inception_score_std"], rel=1e-6)


def test_the_last_split_may_be_smaller():
    values = logits(70)
    parts = [score_of(part, 50).compute()[0] for part in (values[:50], values[50:])]
    assert score_of(values, 50).compute()[0] == pytest.approx(sum(parts) / 2)


def test_processes_merge_to_the_same_score_in_any_order():
    values = logits(130)
    whole = score_of(values, 50).compute()
    halves = [InceptionScore(50), InceptionScore(50)]
    halves[0].update(0, values[:64])
    halves[1].update(64, values[64:])
    for one, other in ((0, 1), (1, 0)):
        merged = InceptionScore(50)
        merged.merge(halves[one])
        merged.merge(halves[other])
        assert merged.compute() == pytest.approx(whole, abs=1e-12)
    assert math.isclose(halves[0].compute()[0], score_of(values[:64], 50).compute()[0])


def test_no_images_have_no_score():
    with pytest.raises(ValueError, match="at least 1 image"):
        InceptionScore().compute()
