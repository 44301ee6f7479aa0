"""Scores during validation are the scores of the same images afterwards."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch

from dit_qat.dit.data import Digits
from dit_qat.dit.evaluation import evaluate_digits
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.sampling import SamplerConfig, sample_images
from dit_qat.dit.training import EMA, Checkpoints, DiTTraining, OnlineMetrics, last_checkpoint
from dit_qat.dit.training.loading import load_checkpoint

Make = Callable[..., DiTTraining]
Fit = Callable[..., pl.Trainer]

SAMPLER = SamplerConfig(steps=2, batch_size=50)


@pytest.mark.parametrize("averaged", [True, False])
def test_the_score_is_that_of_the_checkpoints_weights(
    tmp_path: Path, make_module: Make, fit: Fit, averaged: bool
) -> None:
    callbacks = [*([EMA(0.5)] if averaged else []), OnlineMetrics(120, sampler=SAMPLER)]
    module = make_module(RobuQ(rank=2))
    trainer = fit(module, tmp_path, 4, [*callbacks, Checkpoints(4)], val_check_interval=4)
    network = load_checkpoint(last_checkpoint(tmp_path)).network
    drawn = torch.cat([images for _, images in sample_images(network, SAMPLER, range(120))])
    expected = evaluate_digits(drawn)["fd_digits"]
    found = float(trainer.callback_metrics["val/fd_digits_120"])
    assert found == pytest.approx(expected, rel=1e-3)


def test_validating_a_checkpoint_scores_its_averaged_weights(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    metrics = OnlineMetrics(60, sampler=SAMPLER)
    module = make_module(RobuQ(rank=2))
    trainer = fit(module, tmp_path, 3, [EMA(0.5), metrics, Checkpoints(3)], val_check_interval=3)
    during = float(trainer.callback_metrics["val/fd_digits_60"])
    options: dict[str, Any] = {"accelerator": "cpu", "logger": False, "callbacks": [metrics]}
    after = pl.Trainer(**options, enable_progress_bar=False).validate(
        make_module(RobuQ(rank=2)),
        Digits(),
        ckpt_path=last_checkpoint(tmp_path),
        weights_only=True,
        verbose=False,
    )
    assert after[0]["val/fd_digits_60"] == pytest.approx(during, rel=1e-6)


def test_the_sanity_check_draws_nothing(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    trainer = fit(
        make_module(RobuQ(rank=2)),
        tmp_path,
        1,
        [OnlineMetrics(60, sampler=SAMPLER)],
        val_check_interval=100,
        num_sanity_val_steps=1,
    )
    assert not any("fd_digits" in name for name in trainer.callback_metrics)


def test_averaged_weights_must_be_back_before_they_are_scored(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    with pytest.raises(ValueError, match="EMA must stand before OnlineMetrics"):
        fit(make_module(), tmp_path, 1, [OnlineMetrics(60, sampler=SAMPLER), EMA(0.5)])


@pytest.mark.parametrize("num", [-1, 1])
def test_numbers_that_cannot_be_scored_are_refused(num: int) -> None:
    with pytest.raises(ValueError, match=f"online.num={num}"):
        OnlineMetrics(num)


def test_latents_need_an_autoencoder_and_images_a_reference(
    tmp_path: Path, fit: Fit, latents: pl.LightningDataModule, vae_folder: Path
) -> None:
    module = DiTTraining(DiT(8, 4, 4, 32, 1, 2, num_classes=10))
    with pytest.raises(ValueError, match=r"online\.vae"):
        fit(module, tmp_path, 1, [OnlineMetrics(60, sampler=SAMPLER)], data=latents)
    metrics = OnlineMetrics(60, sampler=SAMPLER, vae=str(vae_folder))
    with pytest.raises(ValueError, match=r"needs online\.reference"):
        fit(module, tmp_path, 1, [metrics], data=latents)
    path = tmp_path / "images.npz"
    np.savez(path, arr_0=np.zeros((4, 16, 16, 3), dtype=np.uint8))
    metrics = OnlineMetrics(60, path, sampler=SAMPLER, vae=str(vae_folder))
    with pytest.raises(ValueError, match=r"holds no statistics .* --cache_reference"):
        fit(module, tmp_path, 1, [metrics], data=latents)


def test_a_run_that_never_validates_is_refused(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    metrics = OnlineMetrics(60, sampler=SAMPLER)
    with pytest.raises(ValueError, match=r"online\.num=60 scores at every validation, .* is none"):
        fit(make_module(), tmp_path, 1, [metrics], limit_val_batches=0)


def test_every_process_needs_a_batch(monkeypatch: pytest.MonkeyPatch, make_module: Make) -> None:
    trainer = pl.Trainer(accelerator="cpu", logger=False)
    monkeypatch.setattr(pl.Trainer, "world_size", 3)
    with pytest.raises(ValueError, match="makes 2 batches of 50, fewer than 3 processes"):
        OnlineMetrics(60, sampler=SAMPLER).setup(trainer, make_module(), "fit")
