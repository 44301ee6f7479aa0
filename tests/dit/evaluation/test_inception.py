import hashlib
import pickle
from http.client import BadStatusLine
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import (
    URL_INCEPTION_V3,
    FeatureExtractorInceptionV3,
)
from torchmetrics.image.fid import FrechetInceptionDistance

from dit_qat.dit.evaluation import FeatureStatistics, frechet_distance
from dit_qat.dit.evaluation.inception import (
    INCEPTION_SHA256,
    InceptionFeatures,
    find_inception,
    load_inception,
)


@pytest.fixture(scope="module")
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (3, 3, 40, 24), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def activations(inception, images):
    return inception.activations(images)


def test_outputs_are_those_of_torch_fidelity(inception_file, images, activations):
    theirs = FeatureExtractorInceptionV3(
        "inception-v3-compat",
        ["2048", "logits_unbiased"],
        feature_extractor_weights_path=str(inception_file),
    )
    branches = []
    theirs.Mixed_6d.branch1x1.register_forward_hook(lambda _m, _i, out: branches.append(out))
    pool, logits = theirs(images)
    assert torch.equal(activations.pool, pool)
    assert torch.equal(activations.logits, logits)
    # mixed_6/conv:0 in TensorFlow's order of axes, and its [..., :7], flattened.
    branch = branches[0].permute(0, 2, 3, 1)
    assert branch.shape == (3, 17, 17, 192)
    assert torch.equal(activations.spatial, branch[..., :7].reshape(3, -1))
    assert activations.spatial.shape == (3, InceptionFeatures.num_spatial)
    assert activations.spatial.min() == 0 < activations.spatial.max()
    assert not theirs.fc.bias.eq(0).all()


def test_grey_images_count_as_equal_colours(inception, images):
    grey = images[:1, :1]
    assert torch.equal(inception(grey), inception(grey.repeat(1, 3, 1, 1)))


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_autocast_and_fast_products_do_not_reach_it(inception, images, activations, precision):
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found = inception.activations(images)
        assert torch.get_float32_matmul_precision() == precision
    finally:
        torch.set_float32_matmul_precision(before)
    for ours, theirs in zip(found, activations, strict=True):
        assert ours.dtype == torch.float32
        assert torch.equal(ours, theirs)


def test_it_stays_frozen_and_hooks_leave_no_trace(inception):
    inception.train()
    assert not any(module.training for module in inception.modules())
    assert not any(parameter.requires_grad for parameter in inception.parameters())
    assert not inception.network.Mixed_6d._forward_hooks


def test_loading_draws_no_random_numbers_and_records_the_hash(inception_file):
    before = torch.get_rng_state()
    features = load_inception(inception_file)
    assert torch.equal(torch.get_rng_state(), before)
    assert features.sha256 == hashlib.sha256(inception_file.read_bytes()).hexdigest()
    assert all(p.dtype == torch.float32 for p in features.parameters())


def test_torchmetrics_takes_it_as_a_feature(inception, images):
    metric = FrechetInceptionDistance(feature=inception)
    metric.update(images[:2], real=True)
    assert metric.real_features_sum.shape == (2048,)
    assert torch.allclose(metric.real_features_sum.float(), inception(images[:2]).sum(dim=0))


def test_torchmetrics_finds_our_distance(small_inception, make_images):
    """On a network of few features, so that 300 images fill a covariance."""
    metric = FrechetInceptionDistance(feature=small_inception)
    ours = []
    for real, shift in ((True, 0), (False, 30)):
        images = make_images(300, key=f"side {real}", shift=shift)
        statistics = FeatureStatistics(small_inception.num_features)
        for batch in images.split(64):
            metric.update(batch, real=real)
            statistics.update(small_inception(batch))
        ours.append(statistics)
    distance = frechet_distance(*ours)
    assert distance > 0.05
    assert float(metric.compute()) == pytest.approx(distance, abs=1e-3, rel=1e-3)


@pytest.mark.parametrize(
    "images",
    [
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 2, 8, 8, dtype=torch.uint8),
        torch.zeros(3, 8, 8, dtype=torch.uint8),
    ],
)
def test_what_is_no_8_bit_image_is_refused(inception, images):
    with pytest.raises(ValueError, match="Inception needs uint8 images"):
        inception(images)


class TestFiles:
    @pytest.mark.filterwarnings("ignore:Detected pickle protocol")
    def test_pickles_are_not_executed(self, tmp_path):
        class Trap:
            def __reduce__(self):
                return (tmp_path.joinpath("sprung").touch, ())

        path = tmp_path / "weights.pth"
        path.write_bytes(pickle.dumps(Trap()))
        with pytest.raises(ValueError, match=r"weights\.pth is truncated or no file of tensors"):
            load_inception(path)
        assert not (tmp_path / "sprung").exists()

    def test_other_weights_are_refused(self, tmp_path):
        torch.save({"fc.weight": torch.zeros(3)}, tmp_path / "x.pth")
        with pytest.raises(ValueError, match=r"weights of another network.*Missing key"):
            load_inception(tmp_path / "x.pth")
        for content in ([1], {}, {"epoch": 3}):
            torch.save(content, tmp_path / "x.pth")
            with pytest.raises(ValueError, match="no state dict"):
                load_inception(tmp_path / "x.pth")

    def test_a_missing_file_is_named(self, tmp_path):
        with pytest.raises(FileNotFoundError, match=r"--inception .*nothing\.pth: no such file"):
            find_inception(str(tmp_path / "nothing.pth"))

    def test_auto_downloads_once_and_checks_the_hash(self, tmp_path, monkeypatch):
        asked = []

        def download(url, path, hash_prefix, progress=True):
            asked.append((url, hash_prefix))
            Path(path).write_bytes(b"weights")

        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", download)
        path = find_inception("auto")
        assert path.parent == tmp_path / "checkpoints"
        assert find_inception("auto") == path
        assert asked == [(URL_INCEPTION_V3, INCEPTION_SHA256)]
        assert path.stem.endswith(INCEPTION_SHA256[:8])

    @pytest.mark.parametrize(
        "error", [URLError("no route"), ConnectionResetError("no route"), BadStatusLine("no route")]
    )
    def test_offline_says_what_to_do(self, tmp_path, monkeypatch, error):
        def fail(*_):
            raise error

        monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
        monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
        with pytest.raises(ConnectionError, match=r"no route.*https://.*--inception FILE"):
            find_inception("auto")
