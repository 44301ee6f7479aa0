import hashlib
import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from torch import nn

from dit_qat.cli import scoring
from dit_qat.cli.main import main
from dit_qat.dit.data import digit_images
from dit_qat.dit.evaluation import evaluate_digits, save_images, save_npz
from dit_qat.dit.evaluation.inception import Activations, _Network
from dit_qat.dit.randomness import generator_for
from dit_qat.dit.sampling import to_uint8
from dit_qat.export.files import locked

pytestmark = pytest.mark.filterwarnings("ignore:FD-digits from", "ignore:.*cannot fill")


@pytest.fixture
def samples(tmp_path):
    """A folder as ``dit-qat sample`` leaves it: 80 real images, and their labels."""
    images, labels = digit_images()
    folder = tmp_path / "samples"
    save_images(folder / "images", to_uint8(images[:80]), range(80))
    (folder / "metrics.json").write_text(json.dumps({"labels": labels[:80].tolist()}))
    return folder


@pytest.fixture
def inception_file(tmp_path):
    """Random weights, as the published file holds them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        torch.save(_Network().state_dict(), tmp_path / "inception.pth")
    return tmp_path / "inception.pth"


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

    def test_the_run_that_the_samples_are_of(self, refused, contents, samples):
        before = contents(samples)
        for path in (samples / "images", samples / ".." / samples.name / "images"):
            options = ["--samples", path, "--out", samples, "--overwrite"]
            assert "folder of the samples" in refused("evaluate", *options)
        assert contents(samples) == before

    def test_labels_of_another_number(self, refused, samples):
        (samples / "images" / "000003.png").unlink()
        message = refused("evaluate", "--samples", samples)
        assert "80 labels for 79 images" in message


class SmallInception(nn.Module):
    """Outputs like Inception's, of few dimensions."""

    num_features, num_spatial, sha256 = 6, 5, "5" * 64

    def activations(self, images):
        cells = torch.nn.functional.adaptive_avg_pool2d(images.expand(-1, 3, -1, -1) / 255, 3)
        return Activations(*cells.flatten(1)[:, :21].split([6, 5, 10], dim=1))


@pytest.fixture
def quick(monkeypatch, tmp_path):
    """Replace Inception, and give generated and real images, 3x16x16."""
    monkeypatch.setattr("dit_qat.cli.scoring.find_inception", Path)
    monkeypatch.setattr("dit_qat.cli.scoring.load_inception", lambda *_: SmallInception())
    for name, count in (("generated", 30), ("real", 20)):
        images = torch.randint(
            256, (count, 3, 16, 16), generator=generator_for(0, name), dtype=torch.uint8
        )
        save_npz(tmp_path / f"{name}.npz", images)
    return ["evaluate", "--samples", str(tmp_path / "generated.npz")]


class TestInceptionPath:
    def test_scores_card_warnings_and_files(self, quick, tmp_path, capsys):
        out = tmp_path / "scores"
        reference = ["--reference", str(tmp_path / "real.npz")]
        assert main([*quick, *reference, "--out", str(out), "--compare_to", "dit"]) == 0
        content = json.loads((out / "metrics.json").read_text())
        expected = ["fid", "sfid", "is", "is_std", "kid", "kid_std", "precision", "recall"]
        assert list(content["metrics"]) == expected
        assert content["protocol"]["num_samples"] == 30
        assert content["protocol"]["guidance"] == "unknown"
        assert any(w.startswith("num_samples: 30 here, 50000 there") for w in content["warnings"])
        assert {path.name for path in out.iterdir()} - {".lock"} == {"metrics.json", "grid.png"}
        printed = capsys.readouterr()
        for part in ("fid ", "published: 2.27", "guidance", "unknown", "5" * 64):
            assert part in printed.out
        for part in ("WARNING", "num_samples: 30 here", "extractor_sha256"):
            assert part in printed.err

    def test_cached_statistics_give_the_same_distance(self, quick, tmp_path, capsys):
        cache, real = tmp_path / "cache.npz", tmp_path / "real.npz"
        scores = []
        for options in (
            ["--reference", real, "--cache_reference", cache, "--metrics", "fid", "sfid"],
            ["--reference", cache, "--metrics", "fid", "sfid"],
            ["--reference", cache],
        ):
            out = tmp_path / f"scores{len(scores)}"
            assert main([*quick, *map(str, options), "--out", str(out)]) == 0
            scores.append(json.loads((out / "metrics.json").read_text()))
        assert scores[0]["metrics"] == scores[1]["metrics"]
        assert set(scores[2]["metrics"]) == {"fid", "sfid", "is", "is_std"}
        assert any("kid is left out" in note for note in scores[2]["notes"])
        kind = scores[1]["protocol"]["reference_kind"]
        assert kind.startswith("cached statistics of images")
        assert scores[1]["protocol"]["reference_count"] == 20

    def test_the_real_network_scores_without_a_reference(self, tmp_path, inception_file, capsys):
        images = torch.randint(
            256, (3, 3, 8, 8), generator=generator_for(0, "x"), dtype=torch.uint8
        )
        save_images(tmp_path / "x", images, range(3))
        options = ["--samples", tmp_path / "x", "--metrics", "is", "--out", tmp_path / "out"]
        assert main(["evaluate", *map(str, options), "--inception", str(inception_file)]) == 0
        content = json.loads((tmp_path / "out" / "metrics.json").read_text())
        assert set(content["metrics"]) == {"is", "is_std"}
        digest = hashlib.sha256(inception_file.read_bytes()).hexdigest()
        assert content["protocol"]["extractor_sha256"] == digest
        assert "extractor_sha256" in capsys.readouterr().err

    def test_options_that_do_not_fit(self, refused, quick, tmp_path):
        real = ["--reference", tmp_path / "real.npz"]
        for options, message in (
            ([], "name real images or their statistics with --reference"),
            (["--metrics", "fid"], "fid compares with real images"),
            (["--metrics", "fidd", *real], "fidd"),
            (["--metrics", "fd_dinov2", *real], "--dino FILE"),
            (["--cache_reference", tmp_path / "c.npz"], "name a --reference"),
            ([*real, "--cache_reference", tmp_path / "c.npy"], "must end in .npz"),
            ([*real, "--cache_reference", tmp_path / "real.npz"], "real.npz exists"),
            ([*real, "--batch_size", "0"], "--batch_size 0"),
            ([*real, "--num_nodes", "2"], "--out"),
            (["--reference", tmp_path / "nothing"], "nothing does not exist"),
        ):
            assert message in refused(*quick, *options), options

    def test_too_few_samples_unless_asked(self, refused, quick, tmp_path, capsys):
        save_npz(tmp_path / "few.npz", torch.zeros(6, 3, 16, 16, dtype=torch.uint8))
        options = [*quick, "--reference", str(tmp_path / "few.npz"), "--metrics", "fid"]
        message = refused(*options)
        assert "few.npz has 6 images, too few for fid: it needs more than 6" in message
        assert main([*options, "--allow_few_samples"]) == 0
        assert "too few for fid" in capsys.readouterr().err

    def test_results_are_written_before_another_run_gets_the_folder(
        self, quick, tmp_path, monkeypatch
    ):
        def write(out, *_):
            with pytest.raises(BlockingIOError), locked(out):
                pass
            return original(out, *_)

        original = scoring._write
        monkeypatch.setattr(scoring, "_write", write)
        assert main([*quick, "--metrics", "is", "--out", str(tmp_path / "out")]) == 0

    def test_a_run_that_ended_meanwhile_is_not_replaced(
        self, refused, quick, contents, tmp_path, monkeypatch
    ):
        out = tmp_path / "out"

        def load(*_):
            out.mkdir()
            (out / "metrics.json").write_text("precious")
            return SmallInception()

        monkeypatch.setattr("dit_qat.cli.scoring.load_inception", load)
        monkeypatch.setattr(scoring, "make_report", lambda *_: pytest.fail("scored first"))
        assert "already holds results" in refused(*quick, "--metrics", "is", "--out", out)
        assert (out / "metrics.json").read_text() == "precious"

    def test_scores_outlive_a_cache_that_cannot_be_written(
        self, refused, quick, tmp_path, monkeypatch
    ):
        def full(*_):
            raise OSError("no space left")

        monkeypatch.setattr(scoring, "save_reference", full)
        options = ["--reference", tmp_path / "real.npz", "--cache_reference", tmp_path / "c.npz"]
        assert "no space left" in refused(*quick, *options, "--out", tmp_path / "out")
        assert "fid" in json.loads((tmp_path / "out" / "metrics.json").read_text())["metrics"]

    def test_another_run_holds_the_folder(self, refused, quick, tmp_path):
        with locked(tmp_path / "out"):
            message = refused(*quick, "--metrics", "is", "--out", tmp_path / "out")
        assert "another run is writing" in message
