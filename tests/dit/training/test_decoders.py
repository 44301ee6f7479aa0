"""The autoencoder that shows samples is one for the latents in training."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from diffusers import AutoencoderKL

from dit_qat.dit.data import Latents
from dit_qat.dit.models import DiT
from dit_qat.dit.models.autoencoder import load_autoencoder
from dit_qat.dit.training.decoders import load_decoder


@pytest.fixture
def trainer(tmp_path: Path, vae_folder: Path) -> Any:
    data = Latents(str(tmp_path / "latents"))
    data.cache = SimpleNamespace(space=load_autoencoder(vae_folder).space)  # type: ignore[assignment]
    return SimpleNamespace(datamodule=data)


def test_another_scaling_is_refused_and_other_weights_are_not(
    tmp_path: Path, trainer: Any, make_vae: Callable[..., AutoencoderKL]
) -> None:
    network = DiT(8, 4, 4, 32, 1, 2, num_classes=10)
    make_vae(seed=1).save_pretrained(tmp_path / "other")
    assert load_decoder(str(tmp_path / "other"), network, trainer).space.channels == 4
    make_vae(scaling_factor=0.5).save_pretrained(tmp_path / "scaled")
    with pytest.raises(ValueError, match=r"scaled has scaling and shift \(0\.5, 0\.0\), .* that"):
        load_decoder(str(tmp_path / "scaled"), network, trainer)
