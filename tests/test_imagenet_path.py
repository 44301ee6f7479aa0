"""From a folder of pictures to a table of scores and a diffusers pipeline, as a user goes."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from diffusers import AutoencoderKL, DiTPipeline
from PIL import Image

from dit_qat.cli.main import main
from dit_qat.dit.randomness import generator_for
from dit_qat.dit.training import last_checkpoint
from dit_qat.dit.training.loading import read_checkpoint

STEPS = 20
TWO = ("--trainer.devices=2", "--trainer.strategy=ddp")

CONFIG = {
    "seed_everything": 0,
    "model": {
        "network": {
            "class_path": "dit_qat.dit.models.DiT",
            "init_args": {
                "input_size": 8,
                "patch_size": 2,
                "in_channels": 4,
                "hidden_size": 32,
                "depth": 2,
                "num_heads": 2,
                "num_classes": 1000,
                "timestep_shift": 1,  # diffusers' convention, to compare with diffusers below
                "norm2_eps": 1e-5,
            },
        },
        "method": {
            "class_path": "dit_qat.dit.methods.RobuQ",
            "init_args": {"activation_bits": 4, "rank": 2, "distillation": 0.0},
        },
        "optimizer": {
            "lr_ternary": 1e-2,
            "lr_low_rank": 1e-2,
            "lr_float": 1e-2,
            "warmup_steps": 2,
        },
    },
    "data": {
        "class_path": "dit_qat.dit.data.Latents",
        "init_args": {"root": "latents", "batch_size": 8, "validation_images": 6},
    },
    "ema": {"decay": 0.9},
    "checkpoints": {"every_n_steps": 1},
    "trainer": {
        "default_root_dir": "run",
        "max_steps": STEPS,
        "val_check_interval": STEPS,
        "accelerator": "cpu",
        "enable_progress_bar": False,
    },
}


class Shell:
    """Runs dit-qat in a folder of its own, here or in processes of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def start(self, *arguments: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-m", "dit_qat", *arguments],
            cwd=self.folder,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )

    def run(self, *arguments: str) -> None:
        process = self.start(*arguments)
        output, _ = process.communicate()
        assert process.returncode == 0, output

    def here(self, *arguments: str) -> None:
        assert main(arguments) == 0


@pytest.fixture
def shell(
    tmp_path: Path, make_vae: Callable[..., AutoencoderKL], monkeypatch: pytest.MonkeyPatch
) -> Shell:
    monkeypatch.chdir(tmp_path)
    numbers = np.random.default_rng(0)
    for name in ("n01440764", "n01443537", "n01484850"):
        (tmp_path / "pictures" / name).mkdir(parents=True)
        for index in range(4):
            pixels = numbers.integers(0, 256, (24, 20, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / "pictures" / name / f"{index}.png")
    make_vae(scaling_factor=0.5).save_pretrained(tmp_path / "vae")
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(CONFIG))
    return Shell(tmp_path)


def kill_after_first_checkpoint(process: "subprocess.Popen[str]", checkpoint: Path) -> None:
    deadline = time.monotonic() + 600
    while not checkpoint.exists():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)  # both processes at once, as a machine fails
    process.communicate()


def images_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted((folder / "images").iterdir())}


def test_from_pictures_to_scores_and_a_pipeline(shell: Shell, inception_file: Path) -> None:
    root = shell.folder
    pictures = ["--images", "ImageFolder", "--images.root", "pictures"]
    sizes = ["--size", "16", "--shard_images", "5", "--num_workers", "0"]
    shell.here("cache-latents", *pictures, "--vae", "vae", "--out", "latents", *sizes)

    checkpoint = last_checkpoint(root / "run")
    kill_after_first_checkpoint(shell.start("fit", "--config", "fit.yaml", *TWO), checkpoint)
    assert 1 <= read_checkpoint(checkpoint)["global_step"] < STEPS
    shell.run("fit", "--config", "fit.yaml", "--ckpt_path", "last", *TWO)
    assert read_checkpoint(checkpoint)["global_step"] == STEPS

    source = ["--checkpoint", str(checkpoint), "--sampler.steps", "2", "--sampler.batch_size", "16"]
    shell.here("sample", *source, "--out", "one", "--num", "64", "--npz")
    shell.run("sample", *source, "--out", "two", "--num", "64", "--npz", "--devices", "2")
    assert len(images_of(root / "one")) == 64
    assert images_of(root / "one") == images_of(root / "two")
    with np.load(root / "one" / "samples.npz") as one, np.load(root / "two" / "samples.npz") as two:
        assert one["arr_0"].shape == (64, 16, 16, 3)
        assert np.array_equal(one["arr_0"], two["arr_0"])

    sides = ["--samples", "one", "--reference", "pictures_16"]
    save_cropped(root / "pictures", root / "pictures_16")
    options = ["--inception", str(inception_file), "--metrics", "is", "kid", "precision", "recall"]
    shell.here("evaluate", *sides, *options, "--out", "scores")
    scores = json.loads((root / "scores" / "metrics.json").read_text())
    assert {"is", "kid", "precision", "recall"} <= scores["metrics"].keys()
    assert scores["protocol"]["num_samples"] == 64

    check_pipeline(shell, checkpoint)


def save_cropped(pictures: Path, target: Path) -> None:
    """The pictures at the samples' size, which a reference needs."""
    target.mkdir()
    for number, path in enumerate(sorted(pictures.rglob("*.png"))):
        with Image.open(path) as image:
            image.resize((16, 16)).save(target / f"{number}.png")


def check_pipeline(shell: Shell, checkpoint: Path) -> None:
    """The diffusers library draws the image that we draw from the same folder."""
    formats = ["--format", "pipeline", "--vae", "vae", "--dequantize"]
    shell.here("convert", "--source", str(checkpoint), "--out", "pipeline", *formats)
    settings: dict[str, Any] = {"steps": 5, "guidance": 4.0, "guided_channels": "null"}
    settings |= {"spacing": "leading", "batch_size": 3, "seed": 7}
    sampler = [f"--sampler.{name}={value}" for name, value in settings.items()]
    shell.here(
        *("sample", "--weights", "pipeline", "--out", "ours", "--num", "3"), *sampler, "--npz"
    )
    pipeline = DiTPipeline.from_pretrained(shell.folder / "pipeline", low_cpu_mem_usage=False)
    pipeline.set_progress_bar_config(disable=True)
    generators = [generator_for(7, "image", index) for index in range(3)]
    drawn = pipeline(
        [0, 1, 2], 4.0, generator=generators, num_inference_steps=5, output_type="np"
    ).images
    theirs = np.round(drawn * 255).astype(np.int64)
    with np.load(shell.folder / "ours" / "samples.npz") as ours:
        assert ours["arr_0"].std() > 1  # pictures, not a flat colour
        assert np.abs(ours["arr_0"].astype(np.int64) - theirs).max() <= 1
        assert (ours["arr_0"] == theirs).mean() > 0.99
