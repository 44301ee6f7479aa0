import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from dit_qat.dit.evaluation.frechet import (
    FeatureStatistics,
    frechet_distance,
    gaussian_frechet_distance,
)
from dit_qat.dit.randomness import generator_for


def normal(*shape, key):
    return torch.randn(shape, generator=generator_for(0, key), dtype=torch.float64)


def statistics(*batches):
    result = FeatureStatistics(batches[0].shape[1])
    for batch in batches:
        result.update(batch)
    return result


def covariance(dimension, key):
    factor = normal(dimension, dimension, key=key)
    return factor @ factor.T / dimension


@pytest.fixture
def features():
    # Far from the origin and of unequal spread, where raw second moments would cancel.
    return normal(300, 6, key="features") * torch.arange(1, 7) + 1e4


def test_moments_are_those_of_numpy(features):
    result = statistics(features)
    assert result.count == 300
    np.testing.assert_allclose(result.mean, features.numpy().mean(axis=0), rtol=1e-13)
    np.testing.assert_allclose(result.covariance, np.cov(features.numpy().T), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("pieces", [[300], [1] * 300, [0, 100, 200], [299, 1]])
def test_batches_do_not_matter(features, pieces):
    whole, parts = statistics(features), statistics(*features.split(pieces))
    assert parts.count == whole.count
    torch.testing.assert_close(parts.mean, whole.mean, rtol=1e-13, atol=0)
    torch.testing.assert_close(parts.covariance, whole.covariance, rtol=1e-9, atol=1e-8)


def test_order_of_updates_does_not_matter(features):
    forward = statistics(*features.split(70))
    backward = statistics(*reversed(features.split(70)))
    torch.testing.assert_close(forward.covariance, backward.covariance, rtol=1e-9, atol=1e-8)


def test_merging_equals_updating(features):
    merged, empty = statistics(features[:120]), FeatureStatistics(6)
    merged.merge(statistics(features[120:]))
    merged.merge(empty)
    empty.merge(merged)
    for result in (merged, empty):
        assert result.count == 300
        torch.testing.assert_close(
            result.covariance, statistics(features).covariance, rtol=1e-9, atol=1e-8
        )


def test_float32_features_are_summed_in_float64():
    features = (normal(1000, 3, key="f32") + 300).float()
    expected = np.cov(features.double().numpy().T)
    np.testing.assert_allclose(statistics(*features.split(10)).covariance, expected, rtol=1e-9)


def test_commuting_covariances_have_the_closed_form():
    basis = torch.linalg.qr(normal(5, 5, key="basis")).Q
    a, b = torch.tensor([0.0, 1.0, 4.0, 9.0, 2.0]), torch.tensor([1.0, 0.0, 1.0, 16.0, 2.0])
    mean_a, mean_b = normal(5, key="mean a"), normal(5, key="mean b")
    distance = gaussian_frechet_distance(mean_a, basis * a @ basis.T, mean_b, basis * b @ basis.T)
    expected = (mean_a - mean_b).square().sum() + (a.sqrt() - b.sqrt()).square().sum()
    assert distance == pytest.approx(float(expected), rel=1e-7)


def test_it_equals_the_formula_with_a_matrix_square_root():
    a, b = covariance(8, "a"), covariance(8, "b")
    zero = torch.zeros(8)
    root = scipy.linalg.sqrtm((a @ b).numpy())
    expected = float(a.trace() + b.trace()) - 2 * np.trace(root).real
    assert gaussian_frechet_distance(zero, a, zero, b) == pytest.approx(expected, rel=1e-9)


def test_it_equals_torch_fidelity():
    a, b = normal(400, 32, key="a"), normal(300, 32, key="b") * 1.2 + 0.1
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(a), fid_features_to_statistics(b), verbose=False
    )["frechet_inception_distance"]
    assert frechet_distance(statistics(*a.split(7)), statistics(b)) == pytest.approx(
        theirs, rel=1e-9
    )


def test_it_is_symmetric_and_zero_for_equal_sets(features):
    a, b = statistics(features), statistics(features.flip(1) * 1.5)
    assert frechet_distance(a, b) == pytest.approx(frechet_distance(b, a), rel=1e-9)
    assert 0 <= frechet_distance(a, a) < 1e-9 * float(a.covariance.trace())


def test_a_shift_costs_its_square_and_a_rotation_nothing(features):
    shift = torch.tensor([3.0, 0, 0, 4.0, 0, 0])
    a, b = statistics(features), statistics(features + shift)
    assert frechet_distance(a, b) == pytest.approx(25, rel=1e-6)
    turn = torch.linalg.qr(normal(6, 6, key="turn")).Q
    other = features * 2 - 1e4
    plain = frechet_distance(a, statistics(other))
    turned = frechet_distance(statistics(features @ turn), statistics(other @ turn))
    assert turned == pytest.approx(plain, rel=1e-7)


def test_few_samples_warn_and_a_single_one_is_refused(features):
    few, many = statistics(features[:6]), statistics(features)
    with pytest.warns(UserWarning, match="6 samples cannot fill a covariance of 6"):
        frechet_distance(few, many)
    with pytest.raises(ValueError, match="at least 2 samples, these statistics have 1"):
        frechet_distance(many, statistics(features[:1]))


def test_different_dimensions_are_refused(features):
    with pytest.raises(ValueError, match="6 and 5 dimensions"):
        frechet_distance(statistics(features), statistics(features[:, :5]))
    with pytest.raises(ValueError, match="6 and 5 dimensions"):
        statistics(features).merge(FeatureStatistics(5))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_features_are_refused_and_leave_no_trace(features, bad):
    result = statistics(features)
    broken = features.clone()
    broken[[3, 7], 2] = bad
    with pytest.raises(ValueError, match="2 of 300 feature vectors hold NaN"):
        result.update(broken)
    assert result.count == 300
    assert result.covariance.isfinite().all()


@pytest.mark.parametrize("shape", [(6,), (3, 5), (2, 3, 6)])
def test_shapes_that_do_not_fit_are_refused(shape):
    with pytest.raises(ValueError, match=r"do not fit statistics of shape \(N, 6\)"):
        FeatureStatistics(6).update(torch.zeros(shape))


def test_moments_that_do_not_fit_are_refused():
    mean, matrix = torch.zeros(3), torch.eye(3)
    with pytest.raises(ValueError, match=r"covariance of shape \(3, 2\)"):
        gaussian_frechet_distance(mean, matrix[:, :2], mean, matrix)
    with pytest.raises(ValueError, match="NaN"):
        gaussian_frechet_distance(mean, matrix, mean, matrix * torch.nan)
    with pytest.raises(ValueError, match="dimension=0"):
        FeatureStatistics(0)
