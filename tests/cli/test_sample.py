import json

import numpy as np
import pytest
import torch
from PIL import Image

from dit_qat.cli.main import main
from dit_qat.dit.evaluation import load_images
from dit_qat.dit.models import DiT, save_dit
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.dit.training.loading import load_checkpoint

SAMPLER = ["--sampler.steps", "2", "--sampler.batch_size", "4"]


@pytest.fixture
def checkpoint(quantized_run):
    return quantized_run / "checkpoints" / "last.ckpt"


@pytest.fixture
def latent_weights(tmp_path, network):
    path = tmp_path / "latent.safetensors"
    save_dit(DiT(**{**network, "in_channels": 4, "num_classes": 0}), path)
    return path


def test_checkpoint_to_pictures(checkpoint, tmp_path):
    out = tmp_path / "samples"
    options = ["--num", "6", "--classes", "3", "5", "--npz", "--device", "cpu", *SAMPLER]
    assert main(["sample", "--checkpoint", str(checkpoint), "--out", str(out), *options]) == 0
    network = load_checkpoint(checkpoint, "ema").network
    config = SamplerConfig(steps=2, batch_size=4)
    batches = sample_images(network, config, range(6), lambda index: (3, 5)[index % 2])
    expected = to_uint8(torch.cat([images for _, images in batches]))
    assert torch.equal(load_images(out / "images"), expected)
    assert torch.equal(load_images(out / "samples.npz"), expected)
    assert expected.shape == (6, 1, 8, 8)
    assert (out / "grid.png").is_file()
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["labels"] == [3, 5, 3, 5, 3, 5]
    assert metrics["images_per_second"] > 0
    assert metrics["sampler"]["steps"] == 2
    assert (metrics["source"], metrics["weights"]) == (str(checkpoint), "ema")


def test_embedded_weights_and_all_classes_in_turn(tmp_path):
    out = tmp_path / "samples"
    assert main(["sample", "--weights", "digits", "--out", str(out), "--num", "12", *SAMPLER]) == 0
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["labels"] == [*range(10), 0, 1]
    assert len(list((out / "images").iterdir())) == 12
    assert not (out / "samples.npz").exists()


def test_the_grid_shows_a_hundred_images_of_all_batches(latent_weights, network, tmp_path):
    save_dit(DiT(**network), latent_weights)
    source = ["--weights", str(latent_weights), "--sampler.steps", "1"]
    for num, rows in ((12, 2), (103, 10)):
        out = tmp_path / str(num)
        options = ["--out", str(out), "--num", str(num), "--sampler.batch_size", "4"]
        assert main(["sample", *source, *options]) == 0
        drawn = load_images(out / "images")
        with Image.open(out / "grid.png") as picture:
            grid = torch.from_numpy(np.array(picture))[::4, ::4]
        assert grid.shape == (8 * rows, 80)
        last = min(num, 100) - 1
        row, column = 8 * (last // 10), 8 * (last % 10)
        assert torch.equal(grid[row : row + 8, column : column + 8], drawn[last, 0])


def test_diverged_weights_are_refused(latent_weights, network, tmp_path, refused):
    model = DiT(**network)
    with torch.no_grad():
        model.final_layer.linear.bias.fill_(1e38)
    save_dit(model, latent_weights)
    source = ["--weights", latent_weights, "--out", tmp_path / "out", "--num", "3", *SAMPLER]
    assert "3 of 3 images drawn hold NaN or infinite values" in refused("sample", *source)


def test_latents(latent_weights, tmp_path, refused):
    out = tmp_path / "samples"
    source = ["--weights", latent_weights, "--out", out, "--num", "3", *SAMPLER]
    message = refused("sample", *source)
    assert "4 channels" in message
    assert "--latents true" in message
    assert not out.exists()
    assert main(["sample", *map(str, source), "--latents", "true"]) == 0
    drawn = np.load(out / "latents.npz")["arr_0"]
    assert (drawn.shape, drawn.dtype) == ((3, 4, 8, 8), np.float32)
    assert sorted(path.name for path in out.iterdir()) == ["latents.npz", "metrics.json"]


class TestRefusals:
    def test_folder_with_results(self, refused, contents, checkpoint, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "000000.png").write_bytes(b"precious")
        before = contents(tmp_path)
        message = refused("sample", "--checkpoint", checkpoint, "--out", tmp_path, *SAMPLER)
        assert "already holds results (images)" in message
        assert "--overwrite true" in message
        assert contents(tmp_path) == before

    def test_overwrite_replaces_them_and_nothing_else(self, checkpoint, tmp_path):
        (tmp_path / "images").mkdir()
        (tmp_path / "images" / "999999.png").write_bytes(b"old")
        (tmp_path / "notes.txt").write_text("mine")
        options = ["--num", "2", "--overwrite", *SAMPLER]
        arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path), *options]
        assert main(["sample", *arguments]) == 0
        assert len(list((tmp_path / "images").iterdir())) == 2
        assert (tmp_path / "notes.txt").read_text() == "mine"

    @pytest.mark.parametrize(
        ("options", "parts"),
        [
            (["--num", "0"], ["--num 0", "at least 1"]),
            (["--classes", "3", "11"], ["image 1 has label 11", "0 to 10"]),
            (["--classes", "[]"], ["empty list"]),
            (["--sampler.steps", "0"], ["steps=0", "1 to 1000"]),
            (["--sampler.kind", "euler"], ["sampler.kind", "euler"]),
            (["--npz", "--latents"], ["choose one"]),
            (["--device", "tpu9x"], ["tpu9x", "cpu"]),
            (["--weights", "digits"], ["both are given"]),
        ],
    )
    def test_bad_options_even_with_overwrite(
        self, options, parts, refused, contents, checkpoint, tmp_path
    ):
        (tmp_path / "metrics.json").write_text("precious")
        source = ["--checkpoint", checkpoint, "--out", tmp_path, "--overwrite"]
        message = refused("sample", *source, *options)
        assert all(part in message for part in parts), message
        assert contents(tmp_path) == {tmp_path / "metrics.json": b"precious"}

    def test_sources_that_are_not_there(self, refused, tmp_path):
        out = ["--out", tmp_path / "samples"]
        assert "no checkpoint" in refused("sample", "--checkpoint", tmp_path / "no.ckpt", *out)
        assert "embedded name" in refused("sample", "--weights", "digitz", *out)
        assert "neither is given" in refused("sample", *out)

    def test_damaged_weights(self, refused, latent_weights, tmp_path):
        latent_weights.write_bytes(latent_weights.read_bytes()[:200])
        message = refused("sample", "--weights", latent_weights, "--out", tmp_path / "samples")
        assert "truncated" in message
