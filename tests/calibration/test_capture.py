from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import CallStore, evaluating, fingerprint, record_calls

MakeToy = Callable[..., nn.Module]


def _sample(model: nn.Module, steps: int = 4, passes: int = 1) -> Callable[[], None]:
    def run() -> None:
        x = torch.randn(2, 5, 4)
        for step in range(steps):
            for _ in range(passes):
                with torch.inference_mode():
                    model(x + step, torch.full((2,), 900.0 - 200 * step), scale=0.5)

    return run


def test_calls_are_recorded_with_their_step_and_timestep(make_toy: MakeToy) -> None:
    model = make_toy()
    store = record_calls(model, _sample(model), timestep_argument="t")
    assert store.steps == [0, 1, 2, 3]
    assert store.timesteps == {0: 900.0, 1: 700.0, 2: 500.0, 3: 300.0}
    assert store.model == fingerprint(model)
    assert store[1].kwargs == {"scale": 0.5}
    assert store[1].rows == 2
    assert torch.equal(store[1].args[0], store[0].args[0] + 1)


def test_only_the_steps_to_keep_are_kept(make_toy: MakeToy) -> None:
    model = make_toy()
    store = record_calls(model, _sample(model), timestep_argument="t", keep=[3, 1])
    assert store.steps == [1, 3]


def test_two_passes_of_a_step_and_a_second_run_share_steps(make_toy: MakeToy) -> None:
    model = make_toy()

    def run() -> None:
        _sample(model, steps=2, passes=2)()
        _sample(model, steps=2)()

    assert record_calls(model, run, timestep_argument="t").steps == [0, 0, 1, 1, 0, 1]


def test_calls_that_go_around_hooks_are_recorded(make_toy: MakeToy) -> None:
    model = make_toy()
    store = record_calls(
        model, lambda: model.guided(torch.zeros(1, 5, 4), torch.ones(1)), timestep_argument="t"
    )
    assert store[0].kwargs == {"scale": 0.5}
    assert "forward" not in vars(model)


def test_recorded_tensors_are_copies_that_may_enter_a_gradient(make_toy: MakeToy) -> None:
    model = make_toy()
    x = torch.zeros(1, 5, 4)

    def run() -> None:
        with torch.inference_mode():
            model(x, torch.ones(1))
        x.fill_(7)

    store = record_calls(model, run, timestep_argument="t")
    (kept, t), kwargs = store[0].args, store[0].kwargs
    assert not kept.any()
    model(kept, t, **kwargs).sum().backward()
    assert model.embed.weight.grad is not None


def test_a_model_without_timesteps_is_recorded_as_one_step() -> None:
    model = nn.Linear(3, 3)
    store = record_calls(
        model, lambda: [model(torch.zeros(n, 3)) for n in (1, 2)], timestep_argument=None
    )
    assert (store.steps, store.rows) == ([0, 0], 3)


def test_scalar_timesteps_are_understood() -> None:
    class Scaled(nn.Module):
        def forward(self, x: Tensor, t: Tensor | float) -> Tensor:
            return x * t

    model = Scaled()
    for t in (torch.tensor(5.0), 5.0, torch.tensor([5])):
        store = record_calls(model, lambda t=t: model(torch.ones(1, 2), t), timestep_argument="t")
        assert store.timesteps == {0: 5.0}


def test_bad_recordings_are_refused(make_toy: MakeToy) -> None:
    model = make_toy()

    def mixed() -> None:
        model(torch.zeros(2, 5, 4), torch.tensor([1.0, 2.0]))

    with pytest.raises(ValueError, match="no argument 'time'; it has x, t, scale"):
        record_calls(model, mixed, timestep_argument="time")
    with pytest.raises(ValueError, match="mixes timesteps from 1 to 2"):
        record_calls(model, mixed, timestep_argument="t")
    with pytest.raises(ValueError, match="never called this Toy"):
        record_calls(model, lambda: None, timestep_argument="t")
    with pytest.raises(ValueError, match=r"steps \[7\] were to be kept.*steps 0 to 3"):
        record_calls(model, _sample(model), timestep_argument="t", keep={0, 7})
    assert "forward" not in vars(model)


def test_evaluating_restores_every_mode(make_toy: MakeToy) -> None:
    model = make_toy().train()
    model.embed.eval()
    with evaluating(model):
        assert not any(m.training for m in model.modules())
    assert model.training
    assert not model.embed.training


def test_a_store_knows_its_model(make_toy: MakeToy) -> None:
    one, other = make_toy(0), make_toy(0)
    assert fingerprint(one) == fingerprint(other)
    with torch.no_grad():
        other.late[1].down.bias[0] += 1
    assert fingerprint(one) != fingerprint(other)
    assert CallStore().model == ""
