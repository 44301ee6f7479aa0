"""A small training run, quick to repeat."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from diffusers import AutoencoderKL
from torch import Tensor

from dit_qat.dit.data import Digits, Draw, StepData
from dit_qat.dit.methods import Method
from dit_qat.dit.models import DiT, save_dit
from dit_qat.dit.training import EMA, Checkpoints, DiTTraining, OptimizerConfig

NETWORK = {
    "input_size": 8,
    "patch_size": 4,
    "in_channels": 1,
    "hidden_size": 32,
    "depth": 1,
    "num_heads": 2,
    "num_classes": 10,
}


class _NormalLatents:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Tensor]:
        torch.manual_seed(draw.position)
        return torch.randn(len(draw.indices), 4, 8, 8), torch.tensor(draw.indices)


class NormalLatents(StepData):
    """Eight random latents (4, 8, 8) of as many classes."""

    def train_dataset(self) -> _NormalLatents:
        return _NormalLatents()

    def validation_dataset(self) -> _NormalLatents:
        return _NormalLatents()


@pytest.fixture
def latents() -> NormalLatents:
    return NormalLatents(batch_size=4)


@pytest.fixture
def vae_folder(tmp_path: Path, make_vae: Callable[..., AutoencoderKL]) -> Path:
    make_vae().save_pretrained(tmp_path / "vae")
    return tmp_path / "vae"


@pytest.fixture
def float_file(tmp_path: Path) -> Path:
    """Float weights of the small network, none of them zero."""
    torch.manual_seed(0)
    model = DiT(**NETWORK)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    path = tmp_path / "float.safetensors"
    save_dit(model, path)
    return path


@pytest.fixture
def make_module(float_file: Path) -> Callable[..., DiTTraining]:
    """Build a training module on the small network."""

    def make(method: Method | None = None, **kwargs: Any) -> DiTTraining:
        optimizer = OptimizerConfig(
            lr_ternary=1e-2, lr_low_rank=1e-2, lr_float=1e-2, warmup_steps=3
        )
        kwargs = {"float_weights": str(float_file), "optimizer": optimizer} | kwargs
        return DiTTraining(DiT(**NETWORK), method, **kwargs)

    return make


@pytest.fixture
def fit() -> Callable[..., pl.Trainer]:
    """Run Lightning on digits, silently."""

    def run(
        module: DiTTraining,
        root: Path,
        steps: int,
        callbacks: list[pl.Callback] | None = None,
        ckpt_path: str | None = None,
        data: pl.LightningDataModule | None = None,
        **kwargs: Any,
    ) -> pl.Trainer:
        if callbacks is None:
            callbacks = [EMA(0.9), Checkpoints(every_n_steps=5)]
        trainer = pl.Trainer(
            default_root_dir=root,
            max_steps=steps,
            accelerator="cpu",
            logger=False,
            callbacks=callbacks,
            enable_progress_bar=False,
            enable_model_summary=False,
            check_val_every_n_epoch=None,
            **kwargs,
        )
        trainer.fit(module, data or Digits(batch_size=16), ckpt_path=ckpt_path)
        return trainer

    return run
