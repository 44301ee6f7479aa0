"""Small stand-ins for what nobody can download in a test."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:
    # Before torch is there: tests side by side, and what they start, must not fight for the cores.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from diffusers import AutoencoderKL
from torch import nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

# torch remembers which constructors a device diverts when one is first entered. transformers puts
# another linspace in place while it loads; were that the first time, linspace would stay on the CPU
# for the rest of the process.
with torch.device("meta"):
    torch.empty(0)


@pytest.fixture(scope="session")
def make_vae() -> Callable[..., AutoencoderKL]:
    """A random autoencoder of a few thousand parameters: 4 channels, 2 pixels per latent."""

    def make(seed: int = 0, **overrides: Any) -> AutoencoderKL:
        blocks = {"block_out_channels": (4, 8), "norm_num_groups": 4, "latent_channels": 4}
        kinds = {
            "down_block_types": ("DownEncoderBlock2D",) * 2,
            "up_block_types": ("UpDecoderBlock2D",) * 2,
        }
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return AutoencoderKL(**(blocks | kinds | overrides))

    return make


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Random weights in a file like the published one, made without our code."""
    path = tmp_path_factory.mktemp("inception") / "weights.pth"
    with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
        torch.manual_seed(0)
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        patch.setattr(torch, "load", lambda *_, **__: {})
        network = FeatureExtractorInceptionV3(
            "inception-v3-compat", ["2048"], feature_extractor_weights_path="unused"
        )
        for module in network.modules():
            if isinstance(module, nn.Conv2d):  # so that signals neither fade nor explode
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    torch.save(network.state_dict(), path)
    return path
