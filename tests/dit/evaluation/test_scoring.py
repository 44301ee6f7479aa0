from pathlib import Path

import numpy as np
import pytest
import torch

from dit_qat.dit.evaluation import FeatureStatistics, frechet_distance, save_npz
from dit_qat.dit.evaluation.extraction import Networks, Wanted, extract
from dit_qat.dit.evaluation.inception_score import InceptionScore
from dit_qat.dit.evaluation.kernel_distance import kernel_distance
from dit_qat.dit.evaluation.precision_recall import precision_recall
from dit_qat.dit.evaluation.references import open_reference
from dit_qat.dit.evaluation.scoring import Comparison, choose_metrics
from dit_qat.dit.evaluation.scratch import scratch_folder
from dit_qat.dit.evaluation.sources import open_images

EVERY = ["fid", "sfid", "is", "kid", "precision", "recall"]


@pytest.fixture
def sides(make_images, tmp_path):
    """Generated and real images, on disk."""
    generated, real = make_images(83, "generated"), make_images(61, "real", shift=20)
    save_npz(tmp_path / "generated.npz", generated)
    save_npz(tmp_path / "real.npz", real)
    return generated, real


@pytest.fixture
def compare(sides, small_inception, tmp_path):
    def build(metrics=EVERY, reference="real.npz", **options):
        opened = None if reference is None else open_reference(tmp_path / reference)
        options = {"batch_size": 10, **options}
        networks = options.pop("networks", Networks(small_inception))
        source = open_images(tmp_path / "generated.npz")
        return Comparison(source, metrics, networks, opened, **options)

    return build


@pytest.fixture
def run(alone, tmp_path):
    def score(comparison, processes=alone):
        with scratch_folder(tmp_path / "out", processes) as folder:
            return comparison.run(processes, folder)

    return score


def statistics(features):
    result = FeatureStatistics(features.shape[1])
    result.update(features)
    return result


def test_scores_are_those_of_the_parts(compare, run, sides, small_inception):
    comparison = compare()
    assert comparison.check() == []
    values = run(comparison).values
    ours, theirs = (small_inception.activations(images) for images in sides)
    score = InceptionScore()
    score.update(0, ours.logits)
    precision, recall = precision_recall(theirs.pool, ours.pool)
    kid, kid_std = kernel_distance(theirs.pool, ours.pool, 100, 61)
    expected = {
        "fid": frechet_distance(statistics(ours.pool), statistics(theirs.pool)),
        "sfid": frechet_distance(statistics(ours.spatial), statistics(theirs.spatial)),
        "is": score.compute()[0],
        "is_std": 0,
        "kid": kid,
        "kid_std": kid_std,
        "precision": precision,
        "recall": recall,
    }
    assert values == pytest.approx(expected, rel=1e-5, abs=1e-6)
    assert list(values) == list(expected)
    assert min(precision, recall) > 0


@pytest.mark.parametrize("count", [2, 3])
def test_any_number_of_processes_scores_alike(compare, run, run_together, count):
    whole = run(compare()).values
    first, *others = run_together(count, lambda processes: run(compare(), processes))
    assert first.values == pytest.approx(whole, rel=1e-10, abs=1e-10)
    for name in ("kid", "kid_std", "precision", "recall"):
        assert first.values[name] == whole[name]
    assert others == [None] * (count - 1)


@pytest.mark.parametrize("count", [1, 2, 3, 12])
def test_every_image_is_seen_once_in_every_process_count(
    compare, run_together, small_inception, count
):
    source, networks = compare().samples, Networks(small_inception)
    wanted = Wanted(frozenset({"pool"}), score=True)
    merged = run_together(count, lambda p: extract(source, wanted, networks, p, 10))
    assert small_inception.images == 83
    alone = run_together(1, lambda p: extract(source, wanted, networks, p, 10))[0]
    for collected in merged:
        assert collected.count == collected.moments["pool"].count == 83
        for name in ("mean", "scatter"):
            one, other = (getattr(c.moments["pool"], name) for c in (collected, alone))
            torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
        assert collected.score.compute() == pytest.approx(alone.score.compute(), abs=1e-12)


def test_adm_statistics_serve_fid_and_its_images_the_rest(
    compare, run, sides, tmp_path, small_inception, make_images
):
    """The trap: FID of the 10,000 images in the file is not that of its statistics."""
    other = statistics(small_inception(make_images(90, "whole data set", shift=60)))
    spatial = statistics(torch.from_numpy(np.random.default_rng(0).normal(size=(50, 9))))
    np.savez(
        tmp_path / "adm.npz",
        arr_0=sides[1].permute(0, 2, 3, 1).numpy(),
        mu=other.mean,
        sigma=other.covariance,
        mu_s=spatial.mean,
        sigma_s=spatial.covariance,
    )
    values, plain = run(compare(reference="adm.npz")).values, run(compare()).values
    ours = statistics(small_inception(sides[0]))
    assert values["fid"] == pytest.approx(frechet_distance(ours, other), rel=1e-6)
    assert values["fid"] != pytest.approx(plain["fid"], rel=0.1)
    for name in ("kid", "precision", "recall", "is"):
        assert values[name] == plain[name]


def test_only_what_is_needed_is_computed(compare, run, small_inception, alone, tmp_path):
    assert set(run(compare(["is"], None)).values) == {"is", "is_std"}
    assert small_inception.images == 83
    run(compare(["recall"]))
    assert small_inception.images == 83 + 83 + 61
    comparison = compare(["fid"])
    scores = comparison.run(alone, tmp_path)
    assert set(scores.values) == {"fid"}
    assert set(scores.reference) == {"pool"}
    assert not list(tmp_path.glob("*.f32"))


def test_dinov2_is_one_more_feature(compare, run, sides, small_inception):
    comparison = compare(["fd_dinov2"], networks=Networks(None, small_inception))
    ours, theirs = (statistics(small_inception(images)) for images in sides)
    assert comparison.check() == []
    assert run(comparison).values == {
        "fd_dinov2": pytest.approx(frechet_distance(ours, theirs), rel=1e-5)
    }


def test_features_leave_no_file_behind(compare, run, tmp_path):
    (tmp_path / "out" / ".features").mkdir(parents=True)
    (tmp_path / "out" / ".features" / "left by a killed run").touch()
    run(compare(["kid"]))
    assert list((tmp_path / "out").iterdir()) == []


def test_a_failure_in_one_process_is_told_by_all(compare, run, run_together, tmp_path):
    path = tmp_path / "generated.npz"
    whole = path.read_bytes()
    path.write_bytes(whole[:-3000] + bytes(x ^ 255 for x in whole[-3000:-2000]) + whole[-2000:])
    first, second = run_together(2, lambda processes: run(compare(["is"], None), processes))
    assert "generated.npz is damaged" in str(first)
    assert str(first).startswith("process 1 failed")
    assert "generated.npz is damaged" in str(second)


def test_a_process_on_another_machine_must_see_the_folder(run_together, tmp_path):
    def hold(processes):
        if processes.rank == 1:  # its own folder of temporary files is another
            object.__setattr__(processes, "gather", elsewhere(processes.gather))
        with scratch_folder(None, processes):
            raise AssertionError("went on")

    def elsewhere(gather):
        def changed(value):
            found = gather(value)
            return [(tmp_path / "not here", None) if isinstance(x[0], Path) else x for x in found]

        return changed

    first, second = run_together(2, hold)
    assert "is not there for process 1" in str(first)
    assert "--out" in str(second)
    assert isinstance(second, FileNotFoundError)


def test_together_returns_what_each_process_found(run_together):
    found = run_together(3, lambda p: p.together(lambda: p.rank**2))
    assert found == [[0, 1, 4]] * 3


def test_together_fails_in_all_processes_whatever_fails_in_one(run_together):
    def action(process):
        if process.rank == 1:
            raise RuntimeError("out of memory")

    first, second = run_together(2, lambda p: p.together(lambda: action(p)))
    assert repr(first) == "ValueError('process 1 failed: out of memory')"
    assert repr(second) == "RuntimeError('out of memory')"


class TestChecks:
    def test_too_few_images_are_counted_before_the_work(self, compare, make_images, tmp_path):
        save_npz(tmp_path / "few.npz", make_images(12))
        few = compare(["fid", "sfid"], "few.npz").check()
        assert len(few) == 1
        assert "few.npz has 12 images, too few for fid: it needs more than 12" in few[0]

    def test_statistics_with_a_count_are_counted_too(self, compare, tmp_path):
        np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=np.eye(12), count=np.array(9))
        assert "s.npz has 9 images, too few for fid" in compare(["fid"], "s.npz").check()[0]
        np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=np.eye(12))
        assert compare(["fid"], "s.npz").check() == []

    def test_statistics_of_another_network(self, compare, tmp_path):
        np.savez(tmp_path / "s.npz", mu=np.zeros(64), sigma=np.eye(64))
        with pytest.raises(ValueError, match=r"mu has 64 dimensions, the pool features .* have 12"):
            compare(["fid"], "s.npz").check()

    def test_metrics_that_the_reference_cannot_serve(self, compare, tmp_path):
        np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=np.eye(12))
        for metric in ("kid", "precision", "recall"):
            with pytest.raises(ValueError, match=f"no images, which {metric} needs"):
                compare([metric], "s.npz").check()
        with pytest.raises(ValueError, match="neither images nor statistics of spatial features"):
            compare(["sfid"], "s.npz").check()
        with pytest.raises(ValueError, match="fid compares with real images"):
            compare(["fid"], None).check()

    def test_images_too_few_to_compute_at_all(self, compare, make_images, tmp_path):
        save_npz(tmp_path / "few.npz", make_images(3))
        with pytest.raises(ValueError, match="has 3 images, recall needs at least 4"):
            compare(["recall"], "few.npz").check()


def test_by_default_everything_that_can_be_had_is_chosen(compare, tmp_path):
    np.savez(tmp_path / "s.npz", mu=np.zeros(12), sigma=np.eye(12))
    statistics_only = compare(["fid"], "s.npz").reference
    images = compare().reference
    assert choose_metrics(None, images, False) == (EVERY, [])
    assert choose_metrics(None, images, True)[0] == [*EVERY, "fd_dinov2"]
    chosen, notes = choose_metrics(None, statistics_only, False)
    assert chosen == ["fid", "is"]
    assert any(note.startswith("kid is left out: the reference has no images") for note in notes)
    assert choose_metrics(["recall", "fid"], images, False) == (["fid", "recall"], [])
    with pytest.raises(ValueError, match="--dino FILE"):
        choose_metrics(["fd_dinov2"], images, False)
    with pytest.raises(ValueError, match="empty list"):
        choose_metrics([], images, False)
