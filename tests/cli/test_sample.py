import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dit_qat.cli.main import main
from dit_qat.dit.evaluation import load_images
from dit_qat.dit.models import DiT, save_dit
from dit_qat.dit.models.autoencoder import load_autoencoder
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
    assert "--vae SOURCE" in message
    assert "--latents true" in message
    assert not out.exists()
    assert main(["sample", *map(str, source), "--latents", "true"]) == 0
    drawn = np.load(out / "latents.npz")["arr_0"]
    assert (drawn.shape, drawn.dtype) == ((3, 4, 8, 8), np.float32)
    names = sorted(path.name for path in out.iterdir() if path.name != ".lock")
    assert names == ["latents.npz", "metrics.json", "sampling.json"]


class TestDecoding:
    """A network of 4 latent channels, with a small random autoencoder."""

    @pytest.fixture(autouse=True)
    def _use(self, make_vae):
        self.make_vae = make_vae

    @pytest.fixture
    def vae(self, tmp_path):
        return self.save(tmp_path / "vae", seed=0)

    def save(self, folder, seed, channels=4):
        self.make_vae(seed, latent_channels=channels).save_pretrained(folder)
        return folder

    @pytest.fixture
    def arguments(self, latent_weights, tmp_path):
        return ["sample", "--weights", str(latent_weights), "--num", "6", *SAMPLER]

    @pytest.fixture
    def trained(self, checkpoint, vae, network, tmp_path):
        """A checkpoint of a run on latents of ``vae``; its network draws one channel."""
        self.save(vae, seed=0, channels=1)
        content = torch.load(checkpoint, weights_only=True)
        space = vars(load_autoencoder(vae).space)
        torch.save(content | {"Latents": {"latent_space": space}}, tmp_path / "latent.ckpt")
        return tmp_path / "latent.ckpt"

    def test_latents_become_images(self, arguments, vae, latent_weights, tmp_path):
        out = tmp_path / "out"
        assert main([*arguments, "--out", str(out), "--vae", str(vae), "--npz"]) == 0
        assert main([*arguments, "--out", str(tmp_path / "raw"), "--latents"]) == 0
        latents = torch.from_numpy(np.load(tmp_path / "raw" / "latents.npz")["arr_0"])
        autoencoder = load_autoencoder(vae)
        batches = [autoencoder.decode(part) for part in latents.split(4)]
        assert torch.equal(load_images(out / "samples.npz"), to_uint8(torch.cat(batches)))
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["latent_space"]["sha256"] == autoencoder.space.sha256
        assert metrics["decode_batch_size"] == 8

    def test_the_decoder_is_part_of_the_record(self, arguments, vae, tmp_path, refused):
        out = ["--out", str(tmp_path / "out")]
        assert main([*arguments, *out, "--vae", str(vae)]) == 0
        again = self.save(tmp_path / "again", seed=0)
        assert main([*arguments, *out, "--vae", str(again)]) == 0  # the same under another name
        other = self.save(tmp_path / "other", seed=1)
        assert "latent_space.sha256" in refused(*arguments, *out, "--vae", other)
        message = refused(*arguments, *out, "--vae", vae, "--decode_batch_size", "4")
        assert "decode_batch_size: 8 there, 4 here" in message

    def test_channels_that_do_not_fit(self, arguments, tmp_path, refused):
        three = self.save(tmp_path / "three", seed=0, channels=3)
        message = refused(*arguments, "--out", tmp_path / "out", "--vae", three)
        assert "latents of 3 channels" in message
        assert "network draws 4" in message

    def test_a_checkpoint_knows_its_decoder(self, trained, vae, tmp_path, refused):
        source = ["sample", "--checkpoint", str(trained), "--num", "2", *SAMPLER]
        out = tmp_path / "out"
        assert main([*source, "--out", str(out)]) == 0
        assert load_images(out / "images").shape == (2, 3, 16, 16)
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["latent_space"]["source"] == str(vae)
        assert metrics["checkpoint_step"] == 6
        other = self.save(tmp_path / "other", seed=1, channels=1)
        options = [*source, "--out", str(tmp_path / "out2"), "--vae", str(other)]
        message = refused(*options)
        assert all(str(path) in message for path in (vae, other))
        assert load_autoencoder(other).space.sha256 in message
        assert main([*options, "--any_vae"]) == 0
        vae.rename(tmp_path / "moved")
        message = refused(*source, "--out", tmp_path / "out3")
        assert "name it by --vae" in message
        moved = ["--vae", str(tmp_path / "moved")]
        assert main([*source, "--out", str(tmp_path / "out3"), *moved]) == 0


class TestProcesses:
    """Whole commands, as a shell starts them."""

    SOURCE = ("--weights", "digits", "--num", "42", "--npz", "--device", "cpu")
    PACE = ("--sampler.steps", "25", "--sampler.batch_size", "4")

    def start(self, out, *options):
        command = [sys.executable, "-m", "dit_qat", "sample", "--out", str(out), *options]
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        return subprocess.Popen(command, env=environment, start_new_session=True, **quiet)

    @pytest.fixture(scope="class")
    def expected(self, tmp_path_factory):
        out = tmp_path_factory.mktemp("alone")
        assert main(["sample", "--out", str(out), *self.SOURCE, *self.PACE]) == 0
        return out

    def test_two_processes_are_killed_and_one_goes_on(self, expected, tmp_path):
        out = tmp_path / "out"
        with self.start(out, *self.SOURCE, *self.PACE, "--devices", "2") as running:
            give_up = time.monotonic() + 600
            while len(list((out / "shards").glob("*.npz"))) < 4 and running.poll() is None:
                assert time.monotonic() < give_up
                time.sleep(0.01)
            os.killpg(running.pid, signal.SIGKILL)
        found = len(list((out / "shards").glob("*.npz")))
        assert 4 <= found < 11, running.returncode
        assert not (out / "metrics.json").exists()
        assert main(["sample", "--out", str(out), *self.SOURCE, *self.PACE]) == 0
        metrics = json.loads((out / "metrics.json").read_text())
        assert metrics["images_drawn"] == 42 - 4 * found
        self.assert_same(out, expected)

    def test_two_processes_draw_what_one_draws(self, expected, tmp_path):
        out = tmp_path / "out"
        with self.start(out, *self.SOURCE, *self.PACE, "--devices", "2") as running:
            _, errors = running.communicate(timeout=600)
        assert running.returncode == 0, errors
        assert json.loads((out / "metrics.json").read_text())["processes"] == 2
        self.assert_same(out, expected)

    def assert_same(self, out, expected):
        # Hidden are the lock, and what a process had not finished writing when it was killed.
        names = {str(path.relative_to(out)) for path in out.rglob("[!.]*") if path.is_file()}
        assert names == {
            *(f"images/{index:06d}.png" for index in range(42)),
            *("grid.png", "samples.npz", "sampling.json", "metrics.json"),
        }
        for name in names - {"metrics.json"}:
            assert (out / name).read_bytes() == (expected / name).read_bytes()


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
            (["--npz", "--latents"], ["--npz holds images", "choose one"]),
            (["--vae", "folder", "--latents"], ["--vae decodes", "choose one"]),
            (["--vae", "no/such/folder"], ["no/such/folder", "no such folder"]),
            (["--decode_batch_size", "0"], ["--decode_batch_size 0", "at least 1"]),
            (["--threads", "0"], ["--threads 0", "at least 1"]),
            (["--devices", "0"], ["--devices 0", "at least 1"]),
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
