"""The experiment on digits: what it trains, and what a signal does to it."""

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from dit_qat.dit.experiment import Recipe, digits_sampler, score, train_quantized
from dit_qat.dit.methods import RobuQ
from dit_qat.dit.models import load_dit
from dit_qat.dit.training import DiTTraining, last_checkpoint

METHOD = RobuQ(activation_bits=4, rank=2, distillation=0.0)


def test_training_lowers_the_loss_and_keeps_a_checkpoint(tmp_path: Path) -> None:
    module, (steps, losses) = train_quantized(METHOD, Recipe(steps=12, batch_size=16), 0, tmp_path)
    assert steps == list(range(1, 13))
    assert sum(losses[-3:]) < sum(losses[:3])
    assert not module.training
    assert last_checkpoint(tmp_path).is_file()


def test_a_signal_ends_the_experiment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = DiTTraining.training_step

    def interrupted(self: DiTTraining, batch: Any, batch_idx: int) -> torch.Tensor:
        if batch_idx == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return step(self, batch, batch_idx)

    monkeypatch.setattr(DiTTraining, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train_quantized(METHOD, Recipe(steps=50, batch_size=4), 0, tmp_path)
    assert torch.load(last_checkpoint(tmp_path), weights_only=True)["global_step"] == 2


@pytest.mark.filterwarnings("ignore:FD-digits from")
def test_float_samples_look_like_their_digits() -> None:
    scored = score(load_dit("digits").eval(), digits_sampler(seed=0, steps=10), count=100)
    assert scored.images.shape == (100, 1, 8, 8)
    assert scored.labels.tolist() == [index % 10 for index in range(100)]
    assert scored.scores["class_accuracy"] > 0.8
