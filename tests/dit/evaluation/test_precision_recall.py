import pytest
import torch
from torch_fidelity.metric_prc import prc_features_to_metric

from dit_qat.dit.evaluation import precision_recall as module
from dit_qat.dit.evaluation.feature_file import FeatureFile
from dit_qat.dit.evaluation.precision_recall import precision_recall
from dit_qat.dit.randomness import generator_for


def normal(count, key, dimension=5):
    return torch.randn(count, dimension, generator=generator_for(0, key))


def line(*positions):
    return torch.tensor(positions, dtype=torch.float64).unsqueeze(1)


def by_hand(real, generated, k):
    """The definition, point by point."""

    def share(points, centres):
        inside = 0
        for point in points:
            for i, centre in enumerate(centres):
                others = torch.cat([centres[:i], centres[i + 1 :]])
                radius = (others - centre).norm(dim=1).sort().values[k - 1]
                if (point - centre).norm() <= radius:
                    inside += 1
                    break
        return inside / len(points)

    return share(generated, real), share(real, generated)


def test_equal_sets_score_one_even_with_repeated_points():
    points = normal(20, "equal")
    assert precision_recall(points, points.clone()) == (1.0, 1.0)
    repeated = points.repeat_interleave(5, dim=0) + 1e3  # all radii are 0 at k=3
    assert precision_recall(repeated, repeated.clone()) == (1.0, 1.0)


def test_sets_far_apart_score_zero():
    points = normal(20, "far")
    assert precision_recall(points, points + 1e3) == (0.0, 0.0)


def test_a_lost_mode_costs_recall_only():
    real = torch.cat([line(0, 1, 2, 3), line(100, 101, 102, 103)])
    generated = line(0.1, 1.1, 2.1, 2.9)
    assert precision_recall(real, generated) == (1.0, 0.5)


def test_an_invented_mode_costs_precision_only():
    real = line(0, 1, 2, 3)
    generated = torch.cat([line(0.1, 1.1, 2.1, 2.9), line(50, 51, 52, 53)])
    assert precision_recall(real, generated) == (0.5, 1.0)


def test_the_radius_reaches_the_kth_neighbour_and_includes_it():
    real = line(0, 1, 3, 7)
    assert precision_recall(real, line(10.9, 11, 11.1, -7), k=1)[0] == pytest.approx(0.5)
    assert precision_recall(real, line(13, 13.1, -7, -7.1), k=2)[0] == pytest.approx(0.25)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_it_equals_the_definition(k):
    real, generated = normal(30, "real").double(), normal(25, "generated").double() + 0.7
    expected = by_hand(real, generated, k)
    assert 0 < min(expected) < max(expected) <= 1
    assert precision_recall(real, generated, k) == pytest.approx(expected)


def test_swapping_the_sets_swaps_the_scores():
    real, generated = normal(40, "real"), normal(30, "generated") * 0.5
    assert precision_recall(real, generated) == precision_recall(generated, real)[::-1]


@pytest.mark.parametrize("block", [1, 7, 20])
def test_blocks_do_not_matter(monkeypatch, block):
    real, generated = normal(40, "real"), normal(33, "generated") + 0.5
    whole = precision_recall(real, generated)
    monkeypatch.setattr(module, "_BLOCK", block)
    assert precision_recall(real, generated) == whole


def test_features_are_read_in_blocks_only(monkeypatch, tmp_path):
    real, generated = normal(40, "real"), normal(33, "generated") + 0.5
    monkeypatch.setattr(module, "_BLOCK", 8)
    largest = 0

    class Watched(FeatureFile):
        def __getitem__(self, rows):
            nonlocal largest
            read = super().__getitem__(rows)
            largest = max(largest, len(read))
            return read

    files = []
    for name, values in (("real", real), ("generated", generated)):
        files.append(Watched(tmp_path / name, *values.shape))
        files[-1].create()
        files[-1].write(0, values)
    assert precision_recall(*files) == precision_recall(real, generated)
    assert largest == 8


def test_it_equals_torch_fidelity():
    real, generated = normal(150, "real", 30), normal(120, "generated", 30) * 0.8
    theirs = prc_features_to_metric(generated, real, verbose=False)
    precision, recall = precision_recall(real, generated)
    assert 0 < recall < precision < 1
    assert precision == pytest.approx(theirs["precision"], abs=1e-6)
    assert recall == pytest.approx(theirs["recall"], abs=1e-6)


def test_twins_far_from_the_origin_are_inside_though_products_cancel():
    points = normal(300, "twins", 64) * 1e-3 + normal(1, "centre", 64) * 1e2
    pairs = points.repeat_interleave(4, dim=0)  # every radius at k=3 is zero
    assert precision_recall(pairs, points.repeat(4, 1)) == (1.0, 1.0)
    nudged = pairs + 1e-4 * torch.ones(64)
    assert precision_recall(pairs, nudged) == (0.0, 0.0)


def test_a_collapsed_model_has_precision_only_if_its_image_is_real():
    real = normal(50, "real")
    assert precision_recall(real, real[7].expand(60, -1)) == (1.0, pytest.approx(1 / 50))


@pytest.mark.parametrize("k", [0, 4])
def test_a_rank_without_a_neighbour_is_refused(k):
    with pytest.raises(ValueError, match=f"k={k} must be at least 1 and below the "):
        precision_recall(normal(9, "real"), normal(4, "generated"), k)


def test_features_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(9, 5\) and \(9, 4\)"):
        precision_recall(normal(9, "real"), normal(9, "generated", 4))
    with pytest.raises(ValueError, match="generated features hold NaN"):
        precision_recall(normal(9, "real"), normal(9, "generated") * torch.nan)
