import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import Call, CallStore, Needs
from dit_qat.calibration.statistics import LinearStatistics, step_scales
from dit_qat.dit.methods.adatsq.fisher import (
    StepScores,
    first_rows,
    narrowed,
    noise_channels,
    temporal_fisher,
    temporal_weights,
)
from dit_qat.dit.models import DiT
from dit_qat.dit.randomness import generator_for
from dit_qat.primitives.second_moment import SecondMoment

STEPS, WIDTH = 5, 6


def test_weights_of_a_layer_sum_to_one_and_follow_the_scores(scores: Tensor) -> None:
    alpha = temporal_weights(scores)
    torch.testing.assert_close(alpha.sum(0), torch.ones(3, dtype=torch.float64))
    assert torch.equal(alpha.argsort(0), scores.argsort(0))
    # Scale-free, layer by layer.
    torch.testing.assert_close(temporal_weights(scores * torch.tensor([1e-9, 1, 1e9])), alpha)


def test_an_infinite_temperature_gives_uniform_weights(scores: Tensor) -> None:
    alpha = temporal_weights(scores, tau=float("inf"))
    torch.testing.assert_close(alpha, torch.full((5, 3), 0.2, dtype=torch.float64))


def test_the_ratio_is_capped_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    scores = torch.tensor([[0.0, 1.0], [0.0, 1.0], [9.0, 1.1]], dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        alpha = temporal_weights(scores, ratio=10)
    assert "1 of 2 layers" in caplog.text
    assert float(alpha[:, 0].max() / alpha[:, 0].min()) == pytest.approx(10)
    assert float(alpha[:, 1].max() / alpha[:, 1].min()) < 2
    torch.testing.assert_close(alpha.sum(0), torch.ones(2, dtype=torch.float64))


def test_a_layer_without_information_has_uniform_weights() -> None:
    alpha = temporal_weights(torch.zeros(4, 1, dtype=torch.float64))
    torch.testing.assert_close(alpha, torch.full((4, 1), 0.25, dtype=torch.float64))


@pytest.mark.parametrize(("tau", "ratio"), [(0.0, 10.0), (-1.0, 10.0), (1.0, 0.5)])
def test_bad_settings_are_refused(scores: Tensor, tau: float, ratio: float) -> None:
    with pytest.raises(ValueError, match="tau="):
        temporal_weights(scores, tau, ratio)


def _inputs(step: int) -> Tensor:
    # Steps have different numbers of rows, which must not multiply alpha.
    return torch.randn(4 + 3 * step, WIDTH, generator=torch.Generator().manual_seed(step))


def _weighted(alpha: Tensor) -> Tensor:
    rows = [len(_inputs(step)) for step in range(STEPS)]
    scales = step_scales(alpha, [*range(STEPS)], rows)
    statistics = LinearStatistics(WIDTH, STEPS, Needs(second_moment=True))
    for step in range(STEPS):
        statistics.add(_inputs(step), step, step, scales[step])
    assert statistics.second_moment is not None
    return statistics.second_moment.matrix


def test_the_second_moment_is_the_weighted_sum_and_that_of_scaled_features(scores: Tensor) -> None:
    alpha = temporal_weights(scores)[:, 0]
    found = _weighted(alpha)
    pairs = [(float(a), _inputs(step)) for step, a in enumerate(alpha)]
    torch.testing.assert_close(found, sum(a * x.T @ x / len(x) for a, x in pairs))
    plain = SecondMoment(WIDTH)
    for a, x in pairs:
        plain.add(x * (a / len(x)) ** 0.5)
    torch.testing.assert_close(found, plain.matrix)


def test_uniform_weights_give_the_plain_second_moment_over_the_steps(scores: Tensor) -> None:
    alpha = temporal_weights(scores, tau=float("inf"))[:, 0]
    plain = sum(_inputs(step).T @ _inputs(step) / len(_inputs(step)) for step in range(STEPS))
    torch.testing.assert_close(_weighted(alpha), plain / STEPS)


@pytest.mark.parametrize("tokens", [2, 40])
def test_fisher_equals_the_gradients_of_autograd(tokens: int) -> None:
    """Both ways to the norm of a gradient: by tokens where they are few, else by weights."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 7), nn.GELU(), nn.Linear(7, 6)).double()
    x = torch.randn(3, tokens, 6, dtype=torch.float64)
    store = CallStore()
    store.append(Call((x,), {}, step=2, timestep=500.0, rows=3))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    found = temporal_fisher(model, store, layers, rows=2, seed=4)
    noise = torch.randn((2, tokens, 6), generator=generator_for(4, "fisher", 0)).double()
    expected = torch.zeros(2, dtype=torch.float64)
    for row in range(2):
        loss = (model(x[row]) * noise[row]).sum()
        gradients = torch.autograd.grad(loss, [layer.weight for layer in layers.values()])
        expected += torch.stack([g.square().sum() for g in gradients]) / 2
    torch.testing.assert_close(found.values[0], expected, rtol=1e-5, atol=0)
    assert (found.steps, found.timesteps, found.layers) == ((2,), (500.0,), ("0", "2"))


def test_fisher_of_a_dit_leaves_the_model_and_counts_no_variance(
    calibrated: tuple[Callable[[], DiT], CallStore],
) -> None:
    make, store = calibrated
    model = make()
    layers = {"blocks.1.mlp.fc2": model.blocks[1].mlp.fc2}
    before = temporal_fisher(model, store, layers, rows=4)
    assert before.values.shape == (4, 1)
    assert bool((before.values > 0).all())
    assert not model.blocks[1].mlp.fc2._forward_hooks
    with torch.no_grad():  # the last layer's rows that predict the variance
        rows = model.final_layer.linear.weight.view(-1, 4, 64)
        rows[:, 2:] *= 100
    torch.testing.assert_close(temporal_fisher(model, store, layers, rows=4).values, before.values)


def test_a_gradient_that_is_not_finite_names_layer_and_timestep() -> None:
    model = nn.Sequential(nn.Linear(4, 4))
    with torch.no_grad():
        model[0].weight[0, 0] = float("nan")
    store = CallStore()
    store.append(Call((torch.full((2, 4), torch.inf),), {}, 0, 250.0, 2))
    with pytest.raises(ValueError, match=r"layer 0 at timestep 250"):
        temporal_fisher(model, store, {"0": model[0]})


def test_columns_by_step_and_the_nearest_timestep() -> None:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    found = StepScores((1, 3), (900.0, 100.0), ("a", "b"), values)
    assert found.by_step(values)["b"].tolist() == [0, 2, 0, 4]
    assert found.at(499.0).tolist() == [3, 4]
    assert found.at(1000.0).tolist() == [1, 2]


def test_rows_and_channels_are_cut() -> None:
    call = Call((torch.ones(8, 3), torch.ones(2, 5)), {"y": torch.ones(8)}, 1, 10.0, 8)
    part = narrowed(call, 2)
    assert [len(t) for t in (*part.args, part.kwargs["y"])] == [2, 2, 2]
    assert (part.rows, part.step, part.timestep) == (2, 1, 10.0)
    assert narrowed(call, 8) is call
    x = torch.ones(2, 4, 8, 8)
    text = torch.ones(2, 3, 6)
    assert noise_channels(torch.ones(2, 8, 8, 8), (text, x)).shape == (x.numel(),)
    assert noise_channels((torch.ones(2, 9, 6),), (text,)).shape == (2 * 9 * 6,)
    images = [torch.ones(4, 1, 8, 8), torch.ones(4, 1, 8, 8)]  # as Z-Image has them
    assert noise_channels((images,), ({"x": images},)).shape == (2 * 4 * 64,)


def test_a_list_of_one_tensor_per_row_is_cut_as_a_list() -> None:
    images = [torch.full((4, 1, 8, 8), float(i)) for i in range(4)]  # 4 channels, 4 rows
    call = Call((), {"x": images, "t": torch.ones(4)}, 0, 10.0, 4)
    part = narrowed(call, 3)
    assert [x.shape for x in part.kwargs["x"]] == [(4, 1, 8, 8)] * 3
    assert len(part.kwargs["t"]) == part.rows == 3


def test_rows_are_those_of_a_step_whatever_the_size_of_its_calls() -> None:
    store = CallStore()
    for step, rows in ((0, 2), (0, 2), (0, 2), (1, 8), (2, 1)):
        store.append(Call((torch.ones(rows, 3),), {}, step, 10.0 * step, rows))
    found = [(i, call.step, call.rows, len(call.args[0])) for i, call in first_rows(store, 3)]
    assert found == [(0, 0, 2, 2), (1, 0, 1, 1), (3, 1, 3, 3), (4, 2, 1, 1)]


class _Parallel(nn.Module):
    """Two blocks, and a layer whose output is thrown away."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            [nn.Sequential(nn.Linear(6, 9), nn.GELU(), nn.Linear(9, 6)) for _ in range(2)]
        )
        self.unused = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + block(x)
        self.unused(x)
        return x


def test_blocks_that_run_again_and_frozen_weights_score_the_same() -> None:
    torch.manual_seed(0)
    model = _Parallel()
    store = CallStore()
    store.append(Call((torch.randn(3, 5, 6),), {}, 0, 500.0, 3))
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    plain = temporal_fisher(model, store, layers)
    again = temporal_fisher(model, store, layers, blocks=[*model.blocks])
    frozen = temporal_fisher(model.requires_grad_(False), store, layers, blocks=[*model.blocks])
    assert torch.equal(plain.values, again.values)
    assert torch.equal(plain.values, frozen.values)
    assert plain.values[0, -1] == 0
    assert bool((plain.values[0, :-1] > 0).all())
    assert not any("forward" in vars(block) for block in model.blocks)
    assert not any(layer._forward_hooks for layer in layers.values())
