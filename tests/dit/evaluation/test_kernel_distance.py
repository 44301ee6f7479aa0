import pytest
import torch
from torch_fidelity.metric_kid import kid_features_to_metric

from dit_qat.dit.evaluation.kernel_distance import kernel_distance
from dit_qat.dit.randomness import generator_for


def normal(count, key, dimension=6):
    generator = generator_for(0, key)
    return torch.randn(count, dimension, generator=generator, dtype=torch.float64)


def test_it_equals_the_definition():
    x, y = normal(9, "x"), normal(9, "y") + 0.5

    def kernel(a, b):
        return float(a @ b / 6 + 1) ** 3

    within = sum(
        kernel(z[i], z[j]) for z in (x, y) for i in range(9) for j in range(9) if i != j
    ) / (9 * 8)
    between = sum(kernel(a, b) for a in x for b in y) / 81
    mean, deviation = kernel_distance(x, y, subsets=2, subset_size=9)
    assert mean == pytest.approx(within - 2 * between, rel=1e-6)
    assert deviation == pytest.approx(0, abs=1e-12)  # subsets of everything are equal


def test_it_equals_torch_fidelity():
    x, y = normal(80, "x", 16), normal(80, "y", 16) + 0.3
    theirs = kid_features_to_metric(x, y, kid_subsets=1, kid_subset_size=80, verbose=False)
    ours, _ = kernel_distance(x, y, 1, 80)
    assert ours == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)


def test_it_has_no_bias_by_the_number_of_samples():
    values = [
        kernel_distance(normal(400, f"a{size}"), normal(400, f"b{size}"), 60, size)[0]
        for size in (20, 100)
    ]
    shifted = kernel_distance(normal(400, "a"), normal(400, "b") + 0.5, 60, 100)[0]
    assert max(map(abs, values)) < 0.15 * shifted


def test_the_seed_decides_the_subsets():
    x, y = normal(60, "x"), normal(70, "y")
    first = kernel_distance(x, y, 5, 20, seed=1)
    assert first == kernel_distance(x, y, 5, 20, seed=1)
    assert first != kernel_distance(x, y, 5, 20, seed=2)
    assert first[1] > 0


def test_what_cannot_be_drawn_is_refused():
    x = normal(10, "x")
    with pytest.raises(ValueError, match="1 subsets of 11 cannot be drawn from 10 samples"):
        kernel_distance(x, normal(20, "y"), 1, 11)
    with pytest.raises(ValueError, match="0 subsets of 5"):
        kernel_distance(x, x, 0, 5)
    with pytest.raises(ValueError, match=r"\(10, 6\) and \(10, 5\)"):
        kernel_distance(x, x[:, :5], 1, 5)
