"""Tiny pictures, autoencoders and latent caches."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image

from dit_qat.dit.data.cache_job import CacheJob
from dit_qat.dit.data.caching import write_cache
from dit_qat.dit.data.sources import ImageFolder
from dit_qat.dit.models.autoencoder import Autoencoder
from dit_qat.dit.processes import Processes

SIZE = 16


@pytest.fixture(scope="session")
def alone() -> Processes:
    return Processes(0, 1, torch.device("cpu"))


@pytest.fixture(scope="session")
def make_autoencoder(make_vae: Callable[..., AutoencoderKL]) -> Callable[..., Autoencoder]:
    def make(seed: int = 0, **overrides: Any) -> Autoencoder:
        factors = {"scaling_factor": 0.5, "shift_factor": 0.25}
        return Autoencoder(make_vae(seed, **(factors | overrides)), f"autoencoder {seed}")

    return make


@pytest.fixture(scope="session")
def autoencoder(make_autoencoder: Callable[..., Autoencoder]) -> Autoencoder:
    return make_autoencoder()


@pytest.fixture(scope="session")
def class_folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of seven pictures of different sizes; tests must not change them."""
    root = tmp_path_factory.mktemp("pictures")
    numbers = np.random.default_rng(0)
    for name in ("tench", "goldfish"):
        (root / name).mkdir()
        for index in range(7):
            shape = (*numbers.integers(SIZE - 4, 3 * SIZE, 2), 3)
            pixels = numbers.integers(0, 256, shape, dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def make_job(class_folders: Path, autoencoder: Autoencoder) -> Callable[..., CacheJob]:
    """Fourteen images of 16 pixels in four shards, in batches that do not divide them."""

    def make(**overrides: Any) -> CacheJob:
        options = {"pictures": ImageFolder(class_folders), "autoencoder": autoencoder}
        sizes = {"size": SIZE, "batch_size": 3, "shard_images": 4}
        return CacheJob(**(options | sizes | overrides))

    return make


@pytest.fixture(scope="session")
def cached(
    tmp_path_factory: pytest.TempPathFactory, make_job: Callable[..., CacheJob], alone: Processes
) -> Path:
    """A finished cache; tests must not change it."""
    out = tmp_path_factory.mktemp("cache")
    write_cache(out, make_job(), alone)
    return out
