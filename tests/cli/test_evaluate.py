import hashlib
import json
from importlib import resources

import pytest
import torch

from dit_qat.cli.main import main
from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import evaluate_digits, save_images, save_npz
from dit_qat.dit.sampling import to_uint8

pytestmark = pytest.mark.filterwarnings("ignore:FD-digits from", "ignore:.*cannot fill")


@pytest.fixture
def samples(tmp_path):
    """A folder as ``dit-qat sample`` leaves it: 80 real images, and their labels."""
    images, labels = digit_images()
    folder = tmp_path / "samples"
    save_images(folder / "images", to_uint8(images[:80]), range(80))
    (folder / "metrics.json").write_text(json.dumps({"labels": labels[:80].tolist()}))
    return folder


def test_scores_protocol_and_files(samples, tmp_path, capsys):
    out = tmp_path / "scores"
    assert main(["evaluate", "--samples", str(samples), "--out", str(out)]) == 0
    content = json.loads((out / "metrics.json").read_text())
    images, labels = digit_images()
    assert content["metrics"] == pytest.approx(evaluate_digits(images[:80], labels[:80]))
    assert content["metrics"]["class_accuracy"] > 0.95
    asset = resources.files("dit_qat.dit") / "assets" / "digits_classifier.safetensors"
    digest = hashlib.sha256(asset.read_bytes()).hexdigest()
    assert content["protocol"]["classifier_sha256"] == digest
    assert content["protocol"]["real_images"] == 1797
    assert (out / "grid.png").is_file()
    printed = capsys.readouterr().out
    for part in ("fd_digits", "precision", "recall", digest[:16], "1797 real", "round(", "no FID"):
        assert part in printed
    assert "note: FD-digits from 80 samples is biased" in printed


def test_folders_without_labels_and_archives(samples, tmp_path, capsys):
    assert main(["evaluate", "--samples", str(samples / "images")]) == 0
    assert "class_accuracy" in capsys.readouterr().out
    save_npz(tmp_path / "alone.npz", to_uint8(digit_images()[0][:80]))
    (samples / "images").rename(tmp_path / "plain")
    for path in (tmp_path / "alone.npz", tmp_path / "plain"):
        assert main(["evaluate", "--samples", str(path)]) == 0
        printed = capsys.readouterr().out
        assert "fd_digits" in printed
        assert "class_accuracy" not in printed
    assert not (tmp_path / "metrics.json").exists()


class TestRefusals:
    def test_images_of_the_wrong_size(self, refused, tmp_path):
        save_images(tmp_path, torch.zeros(8, 1, 16, 16, dtype=torch.uint8), range(8))
        message = refused("evaluate", "--samples", tmp_path)
        assert "(8, 1, 16, 16)" in message
        assert "(N, 1, 8, 8)" in message

    def test_images_of_the_wrong_channels(self, refused, tmp_path):
        save_npz(tmp_path / "rgb.npz", torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
        assert "(8, 3, 8, 8)" in refused("evaluate", "--samples", tmp_path / "rgb.npz")

    def test_empty_folder(self, refused, tmp_path):
        assert f"{tmp_path} holds no PNG images" in refused("evaluate", "--samples", tmp_path)

    def test_nothing_there(self, refused, tmp_path):
        assert "does not exist" in refused("evaluate", "--samples", tmp_path / "no")

    def test_folder_with_results(self, refused, contents, samples, tmp_path, monkeypatch):
        def score(*_):
            raise AssertionError("the images were scored first")

        monkeypatch.setattr("dit_qat.cli.evaluate.evaluate_digits", score)
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "metrics.json").write_text("precious")
        message = refused("evaluate", "--samples", samples, "--out", tmp_path / "out")
        assert "already holds results (metrics.json)" in message
        assert contents(tmp_path / "out") == {tmp_path / "out" / "metrics.json": b"precious"}

    def test_bad_images_even_with_overwrite(self, refused, contents, tmp_path):
        save_npz(tmp_path / "rgb.npz", torch.zeros(8, 3, 8, 8, dtype=torch.uint8))
        out = tmp_path / "out"
        out.mkdir()
        (out / "metrics.json").write_text("precious")
        options = ["--samples", tmp_path / "rgb.npz", "--out", out, "--overwrite"]
        assert "(8, 3, 8, 8)" in refused("evaluate", *options)
        assert contents(out) == {out / "metrics.json": b"precious"}

    @pytest.mark.parametrize("where", ["", "images"])
    def test_the_samples_themselves(self, where, refused, contents, samples):
        before = contents(samples)
        options = ["--samples", samples, "--out", samples / where, "--overwrite"]
        assert "folder of the samples" in refused("evaluate", *options)
        assert contents(samples) == before

    def test_labels_of_another_number(self, refused, samples):
        (samples / "images" / "000003.png").unlink()
        message = refused("evaluate", "--samples", samples)
        assert "80 labels for 79 images" in message
