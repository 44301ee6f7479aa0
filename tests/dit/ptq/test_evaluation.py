from collections.abc import Callable

import pytest
import torch
from torch import nn

from dit_qat.calibration import Call, CallStore
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import PTQMethod, Trajectory, calibrate_dit, quantize_post_training
from dit_qat.dit.ptq.evaluation import output_errors, path_errors, spread_calls
from dit_qat.dit.ptq.method import float_twin
from dit_qat.dit.sampling import SamplerConfig
from dit_qat.layers.int_linear import IntLinear
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest

MakeDiT = Callable[..., DiT]
MakeRound = Callable[..., PTQMethod]
SAMPLER = SamplerConfig(steps=3, batch_size=2)


class Two(nn.Module):
    """Two linear layers in a row."""

    def __init__(self) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.first, self.second = nn.Linear(8, 16, bias=False), nn.Linear(16, 8, bias=False)

    def forward(self, x: torch.Tensor, t: float) -> torch.Tensor:
        out: torch.Tensor = self.second(self.first(x))
        return out


def rounded(linear: nn.Linear, bits: int) -> IntLinear:
    grid = IntegerGrid(bits)
    codes, scales = round_to_nearest(linear.weight.detach(), grid, "minmax")
    return IntLinear.build(linear, grid=grid, scales=scales, codes=codes, activation=None)


def calls(*timesteps: float) -> list[Call]:
    inputs = torch.randn(len(timesteps), 4, 8, generator=torch.Generator().manual_seed(1))
    pairs = zip(inputs, timesteps, strict=True)
    return [Call((x, t), {}, step, t, 4) for step, (x, t) in enumerate(pairs)]


def relative(found: torch.Tensor, true: torch.Tensor) -> float:
    return float((found - true).double().square().sum() / true.double().square().sum())


def test_errors_are_those_of_their_definition() -> None:
    reference, model = Two(), Two()
    model.first, model.second = rounded(model.first, 3), rounded(model.second, 3)
    recorded = calls(900.0, 100.0)
    found = output_errors(model, reference, recorded)
    assert [*found.by_timestep] == [900.0, 100.0]
    for call in recorded:
        want = relative(model(*call.args), reference(*call.args))
        assert found.by_timestep[call.timestep] == pytest.approx(want)
    x = torch.cat([call.args[0] for call in recorded])
    assert found.output == pytest.approx(relative(model(x, 0.0), reference(x, 0.0)))
    # The second layer's own error: a float layer on what the first quantized one gives.
    middle = model.first(x)
    own = relative(model.second(middle), reference.second(middle))
    assert found.layers == pytest.approx(
        {"first": relative(middle, reference.first(x)), "second": own}
    )


def test_a_float_model_has_no_error(make_dit: MakeDiT) -> None:
    model = make_dit()
    store = calibrate_dit(model, SAMPLER, images=2)
    found = output_errors(float_twin(model), model, store)
    assert found.output == 0
    assert set(found.by_timestep.values()) == {0.0}
    assert found.layers == {}
    path = path_errors(model, model, Trajectory(model, SAMPLER, 2))
    assert path.trajectory_error == 0
    assert torch.equal(path.reference, path.found)


def test_fewer_bits_err_more_everywhere(make_dit: MakeDiT, make_round: MakeRound) -> None:
    found = {}
    for bits in (8, 4):
        model = make_dit()
        store = calibrate_dit(model, SAMPLER, images=2)
        reference = float_twin(model)
        quantize_post_training(model, make_round(bits), store)
        errors = output_errors(model, reference, store)
        path = path_errors(model, reference, Trajectory(model, SAMPLER, 2))
        assert len(errors.layers) == 8
        assert len(path.by_step) == len(path.timesteps) == 3
        assert path.plain()["trajectory_error"] == pytest.approx(sum(path.by_step) / 3)
        found[bits] = errors, path
    few, many = found[4], found[8]
    assert few[0].output > 10 * many[0].output > 0
    assert few[1].trajectory_error > 10 * many[1].trajectory_error > 0
    assert all(few[0].layers[name] > error > 0 for name, error in many[0].layers.items())


def test_an_output_that_is_not_finite_is_refused_with_its_timestep() -> None:
    reference, model = Two(), Two()
    with torch.no_grad():
        model.second.weight[0, 0] = torch.nan
    with pytest.raises(ValueError, match="timestep 900 is not finite"):
        output_errors(model, reference, calls(900.0))


def test_without_calls_nothing_is_compared() -> None:
    with pytest.raises(ValueError, match="no recorded calls"):
        output_errors(Two(), Two(), [])


@pytest.fixture
def store() -> CallStore:
    """Three calls at each of four steps, batch after batch."""
    made = CallStore()
    for batch in range(3):
        for step in range(4):
            made.append(Call((torch.tensor([batch, step]),), {}, step, 100.0 * step))
    return made


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 8, 11, 12, 50])
def test_calls_are_spread_over_the_steps(store: CallStore, count: int) -> None:
    some = spread_calls(store, count)
    assert len(some) == min(count, 12)
    assert len({tuple(call.args[0].tolist()) for call in some}) == len(some)
    times = [sum(call.step == step for call in some) for step in range(4)]
    assert max(times) - min(times) <= 1


def test_no_calls_asked_for_is_refused(store: CallStore) -> None:
    with pytest.raises(ValueError, match="at least 1"):
        spread_calls(store, 0)
