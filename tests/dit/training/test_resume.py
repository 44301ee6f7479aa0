"""Ten steps equal five, a kill, a resume, and five: bit for bit."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch

from dit_qat.dit.methods import RobuQ
from dit_qat.dit.training import EMA, Checkpoints, DiTTraining, last_checkpoint


def assert_same(a: Any, b: Any, path: str = "") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            assert_same(a[key], b[key], f"{path}/{key}")
    elif isinstance(a, list | tuple):
        assert len(a) == len(b), path
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{path}/{i}")
    else:
        assert a == b, path


def state(root: Path) -> dict[str, Any]:
    content = torch.load(last_checkpoint(root), weights_only=True)
    kept = ("state_dict", "current_model_state", "optimizer_states", "lr_schedulers", "global_step")
    return {name: content[name] for name in kept}


class KillAt(pl.Callback):
    """End the run with an exception that no one handles, as a crash would, after a step."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("killed")


class SignalAt(pl.Callback):
    """Send this process a signal during a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def on_before_zero_grad(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_resuming_a_killed_run_changes_nothing(
    tmp_path: Path,
    make_module: Callable[..., DiTTraining],
    fit: Callable[..., pl.Trainer],
    accumulate: int,
) -> None:
    method = RobuQ(activation_bits=2, rank=2, distillation=0.5)
    settings: dict[str, Any] = {"accumulate_grad_batches": accumulate}
    fit(make_module(method), tmp_path / "straight", 10, **settings)
    random_state = torch.get_rng_state()
    killed = [EMA(0.9), Checkpoints(every_n_steps=5), KillAt(7)]
    with pytest.raises(RuntimeError, match="killed"):
        fit(make_module(method), tmp_path / "parts", 10, killed, **settings)
    assert state(tmp_path / "parts")["global_step"] == 5
    torch.manual_seed(12345)
    resumed = make_module(method, fresh_start=False)
    last = str(last_checkpoint(tmp_path / "parts"))
    fit(resumed, tmp_path / "parts", 10, ckpt_path=last, **settings)
    assert_same(state(tmp_path / "straight"), state(tmp_path / "parts"))
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 1)])
def test_a_resumed_run_may_cut_its_steps_otherwise(
    tmp_path: Path,
    make_module: Callable[..., DiTTraining],
    fit: Callable[..., pl.Trainer],
    before: int,
    after: int,
) -> None:
    seen: list[tuple[int, int]] = []

    class Seen(pl.Callback):
        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, _: int) -> None:
            seen.append((trainer.global_step, len(batch[0])))

    fit(make_module(), tmp_path / "straight", 8)
    killed = [EMA(0.9), Checkpoints(every_n_steps=1), KillAt(4)]
    with pytest.raises(RuntimeError, match="killed"):
        fit(make_module(), tmp_path / "parts", 8, killed, accumulate_grad_batches=before)
    resumed, callbacks = make_module(fresh_start=False), [EMA(0.9), Checkpoints(100), Seen()]
    last = str(last_checkpoint(tmp_path / "parts"))
    options: dict[str, Any] = {"ckpt_path": last, "accumulate_grad_batches": after}
    fit(resumed, tmp_path / "parts", 8, callbacks, **options)
    assert seen == [(step, 16 // after) for step in range(3, 8) for _ in range(after)]
    straight, parts = (state(tmp_path / name)["state_dict"] for name in ("straight", "parts"))
    for name in straight:
        torch.testing.assert_close(parts[name], straight[name], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_leaves_a_checkpoint_of_the_step_in_flight(
    tmp_path: Path,
    make_module: Callable[..., DiTTraining],
    fit: Callable[..., pl.Trainer],
    number: signal.Signals,
) -> None:
    before = signal.getsignal(number)
    checkpoints = Checkpoints(every_n_steps=100)
    callbacks = [EMA(0.9), checkpoints, SignalAt(3, number)]
    trainer = fit(make_module(RobuQ(rank=2)), tmp_path / "run", 10, callbacks)
    assert checkpoints.stopped_by is number
    assert state(tmp_path / "run")["global_step"] == trainer.global_step < 10
    assert signal.getsignal(number) is before
    last = str(last_checkpoint(tmp_path / "run"))
    resumed = make_module(RobuQ(rank=2), fresh_start=False)
    fit(resumed, tmp_path / "run", 10, ckpt_path=last)
    fit(make_module(RobuQ(rank=2)), tmp_path / "straight", 10)
    assert_same(state(tmp_path / "straight"), state(tmp_path / "run"))


def test_another_seed_gives_other_weights(
    tmp_path: Path, make_module: Callable[..., DiTTraining], fit: Callable[..., pl.Trainer]
) -> None:
    weights = []
    for seed in (0, 1):
        module = make_module(RobuQ(rank=2), seed=seed)
        fit(module, tmp_path / str(seed), 2)
        weights.append(module.network.blocks[0].attn.qkv.weight)
    assert not torch.equal(*weights)
