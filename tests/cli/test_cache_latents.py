import json
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image

from dit_qat.cli.cache_latents import cache_latents
from dit_qat.cli.verbs import run_function
from dit_qat.dit.data.latents import LatentCache

_COUNT = 24


@pytest.fixture(scope="module")
def sources(tmp_path_factory, make_vae):
    """Options that name a tiny folder of pictures and a tiny autoencoder."""
    root = tmp_path_factory.mktemp("sources")
    numbers = np.random.default_rng(0)
    for index in range(_COUNT):
        folder = root / "pictures" / f"class{index % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = numbers.integers(0, 256, (18, 20, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index:02d}.png")
    make_vae().save_pretrained(root / "vae")
    pictures = ["--images", "ImageFolder", "--images.root", str(root / "pictures")]
    sizes = ["--size", "16", "--shard_images", "2", "--batch_size", "2", "--num_workers", "0"]
    return [*pictures, "--vae", str(root / "vae"), *sizes, "--device", "cpu"]


def run(*arguments):
    run_function(cache_latents, "dit-qat cache-latents", [str(argument) for argument in arguments])


def test_the_command_says_the_size_writes_the_cache_and_reports(sources, tmp_path, capsys):
    run(*sources, "--out", tmp_path)
    printed = capsys.readouterr().out
    assert f"{_COUNT} images x 2 mirrors x 2 moments x 4x8x8 float16 = 49.3 kB" in printed
    assert "ImageNet's 1,281,167 at this size: 2.6 GB" in printed
    assert len(LatentCache(tmp_path, verify=True)) == _COUNT
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["num_images"] == metrics["encoded"] == _COUNT
    assert metrics["skipped"] == []
    run(*sources, "--out", tmp_path)  # has nothing left to do
    assert "images/s" not in capsys.readouterr().out
    assert json.loads((tmp_path / "metrics.json").read_text()) == metrics


def test_what_is_not_there_is_named(sources, tmp_path):
    pictures = tmp_path / "none"
    with pytest.raises(FileNotFoundError, match="none: there is no such folder"):
        run(*sources, "--images.root", pictures, "--out", tmp_path / "out")
    with pytest.raises(ValueError, match="image size 15 is no multiple of 2"):
        run(*sources, "--size", "15", "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


_SLOWLY = """
import sys, time
from dit_qat.dit.data import encoding
from dit_qat.cli.cache_latents import cache_latents
from dit_qat.cli.verbs import run_function

write = encoding.write_shard
def slowly(*arguments):
    time.sleep(0.3)
    return write(*arguments)
encoding.write_shard = slowly
run_function(cache_latents, "dit-qat cache-latents", sys.argv[1:])
"""


def test_a_killed_command_continues_where_it_was(sources, tmp_path):
    out, straight = tmp_path / "killed", tmp_path / "straight"
    command = [sys.executable, "-c", _SLOWLY, *sources, "--out", str(out)]
    process = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not list(out.glob("*.safetensors")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.kill()
    process.wait()
    survivors = len(list(out.glob("*.safetensors")))
    assert 1 <= survivors < _COUNT // 2
    assert not (out / "index.json").exists()
    for folder in (out, straight):
        run(*sources, "--out", folder)
    for path in straight.iterdir():
        if path.name not in (".lock", "metrics.json"):
            assert (out / path.name).read_bytes() == path.read_bytes()
    assert not list(out.glob(".*.tmp"))
    encoded = json.loads((out / "metrics.json").read_text())["encoded"]
    assert encoded == _COUNT - 2 * survivors
