import numpy as np
import pytest
import torch

from dit_qat.dit.evaluation import FeatureStatistics, save_images, save_npz
from dit_qat.dit.evaluation.references import Moments, open_reference, save_reference
from dit_qat.dit.evaluation.sources import file_sha256, open_images


def moments(dimension, seed=0, count=100):
    values = np.random.default_rng(seed).normal(size=(count, dimension))
    statistics = FeatureStatistics(dimension)
    statistics.update(torch.from_numpy(values))
    return Moments.of(statistics)


def arrays(pool=4, spatial=3, **changes):
    both = {"": moments(pool), "_s": moments(spatial, seed=1)}
    found = {f"mu{suffix}": m.mean.numpy() for suffix, m in both.items()}
    found |= {f"sigma{suffix}": m.covariance.numpy() for suffix, m in both.items()}
    return {name: value for name, value in (found | changes).items() if value is not None}


@pytest.fixture
def write(tmp_path):
    def save(**content):
        np.savez(tmp_path / "reference.npz", **content)
        return tmp_path / "reference.npz"

    return save


def test_adm_files_bring_statistics_and_other_images(write, make_images):
    images = make_images(7)
    path = write(**arrays(), arr_0=images.permute(0, 2, 3, 1).numpy())
    reference = open_reference(path)
    assert reference.moments.keys() == {"pool", "spatial"}
    assert torch.equal(reference.moments["pool"].mean, moments(4).mean)
    assert torch.equal(reference.moments["spatial"].covariance, moments(3, seed=1).covariance)
    assert reference.moments["pool"].count is None
    assert reference.images is not None
    assert len(reference.images) == 7
    assert all(reference.serves(feature) for feature in ("pool", "spatial", "dinov2"))
    assert reference.sha256() == file_sha256(path)


def test_plain_statistics_serve_fid_only(write):
    reference = open_reference(write(**arrays(mu_s=None, sigma_s=None)))
    assert reference.images is None
    assert reference.serves("pool")
    assert not reference.serves("spatial")


def test_float32_statistics_become_float64(write):
    content = {name: value.astype(np.float32) for name, value in arrays().items()}
    assert open_reference(write(**content)).moments["pool"].covariance.dtype == torch.float64


def test_images_are_references_too(make_images, tmp_path):
    save_images(tmp_path / "folder", make_images(5), range(5))
    save_npz(tmp_path / "images.npz", make_images(5))
    for path in (tmp_path / "folder", tmp_path / "images.npz"):
        reference = open_reference(path)
        assert not reference.moments
        assert reference.images is not None
        assert reference.sha256() == open_images(path).sha256()


def test_what_is_cached_comes_back_with_its_origin(tmp_path):
    path = tmp_path / "cache.npz"
    saved = {"pool": moments(4), "dinov2": moments(5)}
    save_reference(path, saved, {"pool": "a" * 64, "dinov2": "b" * 64}, "c" * 64)
    reference = open_reference(path)
    assert reference.moments.keys() == saved.keys()
    for name, value in saved.items():
        assert torch.equal(reference.moments[name].mean, value.mean)
        assert torch.equal(reference.moments[name].covariance, value.covariance)
        assert reference.moments[name].count == 100
    assert reference.source_sha256 == "c" * 64
    reference.check_extractor("pool", 4, "a" * 64)
    reference.check_extractor("spatial", 9, "a" * 64)  # nothing is given for it
    with pytest.raises(ValueError, match=r"mu was computed with .* aaaaaaaaaaaaaaaa, .*eeee"):
        reference.check_extractor("pool", 4, "e" * 64)
    with pytest.raises(ValueError, match=r"mu_dinov2 has 5 dimensions, .* have 6"):
        reference.check_extractor("dinov2", 6, "b" * 64)
    with pytest.raises(ValueError, match=r"must end in \.npz"):
        save_reference(tmp_path / "cache.npy", {}, {}, "")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sigma": None}, "has no sigma; statistics need mu and sigma in pairs"),
        ({"sigma": np.eye(3)}, r"mu of shape \(4,\) and sigma of \(3, 3\)"),
        ({"mu": np.zeros((4, 1))}, "are no mean and covariance"),
        ({"mu": np.array(0.0), "sigma": np.array(0.0)}, "are no mean and covariance"),
        ({"mu": np.full(4, np.nan)}, "hold NaN or infinite"),
        ({"sigma": np.full((4, 4), np.inf)}, "hold NaN or infinite"),
        ({"sigma": np.triu(np.ones((4, 4)))}, "sigma is not symmetric"),
        ({"sigma_s": -np.eye(3)}, "sigma_s has negative variances"),
        ({"mu": np.zeros(4, dtype=int)}, "expected floats"),
        ({"mu": np.array([None] * 4)}, "mu is damaged or no plain array"),
    ],
)
def test_statistics_that_are_none_are_refused(write, changes, message):
    with pytest.raises(ValueError, match=message):
        open_reference(write(**arrays(**changes)))


def test_damaged_and_missing_files_are_refused(write, tmp_path):
    path = write(**arrays())
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"reference\.npz is damaged"):
        open_reference(path)
    with pytest.raises(FileNotFoundError, match="nothing"):
        open_reference(tmp_path / "nothing.npz")
