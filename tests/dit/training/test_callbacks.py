"""Sample grids, quantizer statistics and throughput, as they happen in a run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from PIL import Image
from pytorch_lightning.loggers import Logger

from dit_qat.dit.evaluation.images import image_grid
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import DiT
from dit_qat.dit.models.autoencoder import load_autoencoder
from dit_qat.dit.sampling import SamplerConfig, sample_images, to_uint8
from dit_qat.dit.training import (
    EMA,
    Checkpoints,
    DiTTraining,
    QuantStatistics,
    SampleGrids,
    Throughput,
    last_checkpoint,
)
from dit_qat.dit.training.loading import load_checkpoint

Make = Callable[..., DiTTraining]
Fit = Callable[..., pl.Trainer]

SAMPLER = SamplerConfig(steps=2, batch_size=6)


class Memory(Logger):
    """A logger that remembers."""

    name, version = "memory", 0

    def __init__(self) -> None:
        super().__init__()
        self.logged: dict[str, list[int]] = {}
        self.values: dict[str, float] = {}

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        for name, value in metrics.items():
            self.logged.setdefault(name, []).append(step or 0)
            self.values[name] = value

    def log_hyperparams(self, *_: Any, **__: Any) -> None:
        """Nothing to remember."""


@pytest.mark.parametrize("averaged", [True, False])
def test_grids_show_the_weights_of_the_checkpoint(
    tmp_path: Path, make_module: Make, fit: Fit, averaged: bool
) -> None:
    grids = SampleGrids(every_n_steps=2, count=6, columns=3, sampler=SAMPLER)
    ema = [EMA(0.9)] if averaged else []
    fit(make_module(RobuQ(rank=2)), tmp_path, 4, [*ema, grids, Checkpoints(4)])
    names = sorted(path.name for path in (tmp_path / "samples").iterdir())
    assert names == ["step_0000002.png", "step_0000004.png"]
    network = load_checkpoint(last_checkpoint(tmp_path)).network
    images = torch.cat([drawn for _, drawn in sample_images(network, SAMPLER, range(6))])
    expected = image_grid(to_uint8(images), 3, scale=4)
    shown = np.asarray(Image.open(tmp_path / "samples" / "step_0000004.png"))
    np.testing.assert_array_equal(shown, expected)


def test_sampling_in_between_changes_nothing(tmp_path: Path, make_module: Make, fit: Fit) -> None:
    weights = []
    for name, extra in (
        ("with", [SampleGrids(1, 6, 3, SAMPLER), QuantStatistics(1)]),
        ("without", []),
    ):
        module = make_module(RobuQ(rank=2))
        fit(module, tmp_path / name, 3, [*extra, Checkpoints(3)])
        weights.append(module.network.state_dict())
    tensors = [key for key, value in weights[0].items() if isinstance(value, torch.Tensor)]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in tensors)


def test_latents_are_shown_through_the_autoencoder(
    tmp_path: Path, fit: Fit, latents: pl.LightningDataModule, vae_folder: Path
) -> None:
    module = DiTTraining(DiT(8, 4, 4, 32, 1, 2, num_classes=10))
    grids = SampleGrids(2, 6, 3, SAMPLER, vae=str(vae_folder))
    fit(module, tmp_path, 2, [grids, Checkpoints(2)], data=latents)
    network = load_checkpoint(last_checkpoint(tmp_path), "current").network
    drawn = torch.cat([images for _, images in sample_images(network, SAMPLER, range(6))])
    expected = to_uint8(load_autoencoder(str(vae_folder)).decode(drawn))
    assert expected.shape == (6, 3, 16, 16)
    grid = np.array(Image.open(tmp_path / "samples" / "step_0000002.png"))
    assert np.array_equal(grid, image_grid(expected, 3, scale=2))


def test_latents_need_an_autoencoder_that_fits(
    tmp_path: Path, fit: Fit, latents: pl.LightningDataModule, vae_folder: Path
) -> None:
    module = DiTTraining(DiT(8, 4, 4, 32, 1, 2, num_classes=10))
    with pytest.raises(ValueError, match=r"latents of 4 channels; name .* samples\.vae"):
        fit(module, tmp_path, 2, [SampleGrids(1, 6, 3, SAMPLER)], data=latents)
    digits = DiTTraining(DiT(8, 4, 1, 32, 1, 2, num_classes=10))
    with pytest.raises(ValueError, match="4 channels, the network draws 1"):
        fit(digits, tmp_path, 2, [SampleGrids(1, 6, 3, SAMPLER, vae=str(vae_folder))])


def test_guidance_needs_a_null_class(tmp_path: Path, fit: Fit) -> None:
    module = DiTTraining(DiT(8, 4, 1, 32, 1, 2, num_classes=10, class_dropout_prob=0.0))
    sampler = SamplerConfig(steps=2, guidance=2.0)
    with pytest.raises(ValueError, match="no null class"):
        fit(module, tmp_path, 2, [SampleGrids(1, 6, 3, sampler)])


@pytest.mark.parametrize("setting", [{"every_n_steps": -1}, {"count": 0}, {"columns": 0}])
def test_grids_that_cannot_be_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=r"samples\.every_n_steps"):
        SampleGrids(**setting)


def test_statistics_are_logged_at_the_steps_asked_for(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    memory = Memory()
    callbacks = [QuantStatistics(2), Throughput(3), Checkpoints(10)]
    module = make_module(RobuQ(activation_bits=2, rank=2))
    settings: dict[str, Any] = {"accumulate_grad_batches": 2, "log_every_n_steps": 1}
    # The fixture's trainer has no logger; put ours in before the first batch.
    callbacks.append(_Attach(memory))
    fit(module, tmp_path, 6, callbacks, **settings)
    assert memory.logged["quant/mean_clip_rate"] == [2, 4, 6]
    layer = "quant/blocks.0.mlp.fc1"
    assert memory.logged[f"{layer}/output_error"] == [2, 4, 6]
    # Two bits clip 4.6 % of a normal law (robust across layers to a few per cent).
    assert 0 < memory.values["quant/mean_clip_rate"] < 0.15
    assert 0.1 < memory.values[f"{layer}/zero_fraction"] < 0.6
    assert all(not module._forward_pre_hooks for module in module.network.modules())


class _Attach(pl.Callback):
    def __init__(self, logger: Logger) -> None:
        self.logger = logger

    def on_train_start(self, trainer: pl.Trainer, pl_module: Any) -> None:
        trainer.loggers = [self.logger]


def test_bfloat16_training_moves_every_kind_of_parameter(
    tmp_path: Path, make_module: Make, fit: Fit
) -> None:
    module = make_module(RobuQ(rank=2))
    before = {name: p.detach().clone() for name, p in module.network.named_parameters()}
    fit(module, tmp_path, 3, [Checkpoints(3)], precision="bf16-mixed")
    for name, parameter in module.network.named_parameters():
        assert parameter.dtype == torch.float32
        assert parameter.isfinite().all(), name
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name]), name
