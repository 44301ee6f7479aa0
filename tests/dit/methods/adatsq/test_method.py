import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import CallStore
from dit_qat.calibration.engine import RunResult
from dit_qat.dit.methods import RTN
from dit_qat.dit.methods.adatsq import AdaTSQ, AdaTSQConfig, Policy, WeightSettings
from dit_qat.dit.methods.adatsq.search import (
    BitSwitch,
    additive_table,
    search_additive,
    search_path,
)
from dit_qat.dit.models import DiT
from dit_qat.dit.ptq import Trajectory, quantize_post_training
from dit_qat.dit.sampling import SamplerConfig
from dit_qat.layers import IntLinear

Quantize = Callable[..., RunResult]
OFFERED = [[(3,) * 8, (3, 8) * 4, (4,) * 8]] * 4
CAPACITY = 4 * 8 * 4


def _layers(model: nn.Module) -> dict[str, IntLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, IntLinear)}


def _policy(result: RunResult) -> Policy:
    return Policy.from_dict(result.report["policy"], "report")


@pytest.fixture
def searched(
    calibrated: tuple[Callable[[], DiT], CallStore],
) -> tuple[DiT, DiT, Trajectory, list[Tensor]]:
    """A model of 8 bits, its float twin, a trajectory and what the float model makes of it."""
    make, store = calibrated
    model = make()
    quantize_post_training(model, RTN(weight_bits=8, activation_bits=8), store)
    trajectory = Trajectory(make(), SamplerConfig(steps=4, seed=7), 2)
    return model, make(), trajectory, trajectory.run(make())


def _ways(offered: Any, capacity: int) -> Iterator[list[tuple[int, ...]]]:
    for way in itertools.product(*offered):
        if sum(map(sum, way)) <= capacity:
            yield [*way]


def _along(model: DiT, switch: BitSwitch, trajectory: Trajectory, exact: Any, way: Any) -> float:
    x, error = exact[0], 0.0
    with switch.restoring():
        for step, bits in enumerate(way):
            switch.set(bits)
            x = trajectory.step(model, x, step)
            wrong = (x - exact[step + 1]).double().square().sum()
            error += float(wrong / exact[step + 1].double().square().sum())
    return error


def test_a_wide_unpruned_path_search_equals_brute_force(searched: Any) -> None:
    model, _, trajectory, exact = searched
    switch = BitSwitch(_layers(model))
    offered = [row[:2] for row in OFFERED]
    found = search_path(
        model, switch, trajectory, exact, offered, CAPACITY + 16, width=None, prune=False
    )
    errors = [_along(model, switch, trajectory, exact, way) for way in found]
    ways = [*_ways(offered, CAPACITY + 16)]
    assert len(ways) < 2**4  # the budget excludes some
    brute = [_along(model, switch, trajectory, exact, way) for way in ways]
    assert min(errors) == pytest.approx(min(brute))
    assert {tuple(way) for way in found} == {tuple(way) for way in ways}


def test_a_narrow_search_keeps_no_dominated_path_and_meets_the_budget(searched: Any) -> None:
    model, _, trajectory, exact = searched
    switch = BitSwitch(_layers(model))
    found = search_path(model, switch, trajectory, exact, OFFERED, CAPACITY, width=2)
    sizes = [sum(map(sum, way)) for way in found]
    errors = [_along(model, switch, trajectory, exact, way) for way in found]
    assert 1 <= len(found) <= 2
    assert max(sizes) <= CAPACITY
    for a, b in itertools.permutations(range(len(found)), 2):
        assert not (sizes[a] <= sizes[b] and errors[a] <= errors[b])


def test_the_additive_search_equals_brute_force(
    searched: Any, calibrated: tuple[Callable[[], DiT], CallStore]
) -> None:
    model, reference, _, _ = searched
    switch = BitSwitch(_layers(model))
    table = additive_table(model, reference, switch, calibrated[1], OFFERED, rows=2)
    found = search_additive(table, OFFERED, CAPACITY)

    def total(way: Any) -> float:
        return sum(table[t][OFFERED[t].index(bits)] for t, bits in enumerate(way))

    assert sum(map(sum, found)) <= CAPACITY
    assert total(found) == pytest.approx(min(map(total, _ways(OFFERED, CAPACITY))))
    # More bits are better at every step, on the same latents.
    assert all(row[2] < row[0] for row in table)


def test_changing_bits_never_changes_weights(searched: Any) -> None:
    model = searched[0]
    layers = _layers(model)
    before = {name: [b.data_ptr() for b in layer.buffers()] for name, layer in layers.items()}
    values = {name: [b.clone() for b in layer.buffers()] for name, layer in layers.items()}
    configs = [layer.config for layer in layers.values()]
    with BitSwitch(layers).restoring() as switch:
        for bits in (3, 4, 8):
            switch.set((bits,) * len(layers))
            assert {layer.config.activation.bits for layer in layers.values()} == {bits}
            for name, layer in layers.items():
                assert [b.data_ptr() for b in layer.buffers()] == before[name]
                assert all(map(torch.equal, layer.buffers(), values[name]))
    assert [layer.config for layer in layers.values()] == configs


def test_a_constant_policy_is_the_uniform_model_bit_for_bit(
    quantize: Quantize, calibrated: tuple[Callable[[], DiT], CallStore], output_of: Any
) -> None:
    result = quantize(average_bits=3.0)
    assert {b for row in _policy(result).bits for b in row} == {3}
    found = output_of(result.model, calibrated[1])
    for name, layer in _layers(result.model).items():
        uniform = layer.with_activation(layer.config.activation.with_bits(3))
        result.model.set_submodule(name, uniform)
    assert torch.equal(output_of(result.model, calibrated[1]), found)


@pytest.mark.parametrize("mode", ["path", "teacher_forced"])
@pytest.mark.parametrize("budget", [3.0, 3.4, 4.0])
def test_the_budget_is_met_and_no_constant_policy_is_better(
    quantize: Quantize, mode: str, budget: float
) -> None:
    result = quantize(average_bits=budget, mode=mode, trajectory=mode == "path")
    policy, compared = _policy(result), result.report["compared"]
    assert policy.average_bits <= budget
    assert policy.average_asked == budget
    chosen = min(compared, key=lambda entry: entry["loss"])
    assert chosen["average_bits"] == policy.average_bits
    assert chosen["average_bits_by_operations"] == policy.average_bits_by_operations
    assert 3.0 in [entry["average_bits"] for entry in compared]
    for name, layer in _layers(result.model).items():
        assert layer.config.step_bits == policy.step_bits(name)
    if budget == 3.4:
        # Candidates are worth something: the best is not the constant policy.
        assert policy.average_bits > 3


def test_the_quality_that_is_given_decides(quantize: Quantize) -> None:
    def fewest_bits(model: nn.Module) -> float:
        return -sum(sum(layer.config.step_bits.bits) for layer in _layers(model).values())

    assert _policy(quantize(fewest_bits, average_bits=4.0)).average_bits == 3
    most = _policy(quantize(lambda model: -fewest_bits(model), average_bits=4.0))
    assert most.average_bits == 4


@pytest.mark.parametrize("base", ["plain", "svd"])
def test_bases_end_to_end(
    quantize: Quantize,
    calibrated: tuple[Callable[[], DiT], CallStore],
    output_of: Any,
    base: Any,
) -> None:
    make, store = calibrated
    exact = output_of(make(), store)
    errors = []
    for bits in (3, 8):
        settings = {"group_size": 32, "rank": 4, "grid_steps": 2, "iterations": 2, "clip": None}
        weights = WeightSettings(bits, base, refits=1, probe_calls=1, **settings)
        result = quantize(average_bits=float(bits), weights=weights)
        found = output_of(result.model, store)
        errors.append(float((found - exact).square().sum() / exact.square().sum()))
    assert 0 < errors[1] < errors[0] / 20
    assert errors[0] < 1


@pytest.mark.parametrize("base", ["svd", "hadamard"])
def test_weights_that_count_on_rounded_activations_are_better_at_low_bits(
    quantize: Quantize,
    calibrated: tuple[Callable[[], DiT], CallStore],
    output_of: Any,
    base: Any,
) -> None:
    make, store = calibrated
    exact, errors = output_of(make(), store), []
    for rounds in (True, False):
        settings = {"group_size": 32, "rank": 4, "grid_steps": 1, "clip": None, "tokens": 512}
        settings |= {"iterations": 2, "refits": 2, "probe_calls": 1}
        weights = WeightSettings(4, base, round_activations=rounds, **settings)
        result = quantize(average_bits=3.0, weights=weights)
        errors.append(float((output_of(result.model, store) - exact).square().sum()))
    assert errors[0] < 0.9 * errors[1]
    counted = [WeightSettings(activation_bits=bits).counts_rounding for bits in (3, 4, 8)]
    assert counted == [True, False, False]
    assert [WeightSettings(activation_bits=3).rows(n) for n in (512, 4608)] == [4096, 18432]
    assert WeightSettings(activation_bits=3, tokens=100).rows(4608) == 100
    assert WeightSettings(activation_bits=4, tokens=100).rows(4608) == 0


def test_fisher_weights_spare_the_step_that_weighs_most(
    quantize: Quantize, calibrated: tuple[Callable[[], DiT], CallStore]
) -> None:
    """Summed over layers: solving for a step more does not raise its error."""
    make, store = calibrated
    by_step: dict[bool, Tensor] = {}
    for weighting in (True, False):
        result = quantize(average_bits=8.0, fisher_weighting=weighting, ratio_cap=1e6, tau=0.05)
        if weighting:
            alpha = torch.tensor(result.report["fisher"]["alpha"])
        by_step[weighting] = _errors_by_step(result.model, make(), store)
    highest = alpha.argmax(0)
    columns = torch.arange(len(highest))
    weighted, uniform = (by_step[kind][highest, columns].sum() for kind in (True, False))
    assert float(weighted) < float(uniform)


def _errors_by_step(model: nn.Module, reference: nn.Module, store: CallStore) -> Tensor:
    """Output error of each linear's weights on float inputs (steps, layers)."""
    errors = []
    for call in store:
        row: list[float] = []
        for name, layer in _layers(model).items():
            linear = reference.get_submodule(name)
            inputs: list[Tensor] = []
            handle = linear.register_forward_pre_hook(lambda _, x, kept=inputs: kept.append(x[0]))
            with torch.no_grad():
                reference(*call.args, **call.kwargs)
                handle.remove()
                difference = inputs[0] @ (layer.to_float().weight - linear.weight).T
                row.append(float(difference.square().sum() / linear(inputs[0]).square().sum()))
        errors.append(row)
    return torch.tensor(errors)


def test_bad_settings_are_refused_at_once(quantize: Quantize) -> None:
    with pytest.raises(ValueError, match=r"average_bits=2\.5 .*from 3 to 8"):
        AdaTSQConfig(average_bits=2.5)
    with pytest.raises(ValueError, match=r"average_bits=9\.0 is above the highest choice"):
        AdaTSQConfig(average_bits=9.0)
    with pytest.raises(ValueError, match="three rising"):
        AdaTSQConfig(activation_bits=(4, 3, 8))
    with pytest.raises(ValueError, match="mode='both'"):
        AdaTSQConfig(mode="both")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="beam=0"):
        AdaTSQConfig(beam=0)
    with pytest.raises(ValueError, match="tau=0"):
        AdaTSQConfig(tau=0)
    with pytest.raises(ValueError, match="fractions="):
        AdaTSQConfig(fractions=((0.6, 0.6),))
    with pytest.raises(ValueError, match="base='lora'"):
        WeightSettings(base="lora")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="refits=-1"):
        WeightSettings(refits=-1)
    with pytest.raises(ValueError, match="tokens=0"):
        WeightSettings(tokens=0)
    with pytest.raises(ValueError, match="not both"):
        AdaTSQ(AdaTSQConfig(), average_bits=3.0)
    with pytest.raises(ValueError, match="teacher_forced"):
        quantize(trajectory=False)


def test_layers_without_activation_bits_are_refused(searched: Any) -> None:
    layers = _layers(searched[0])
    name, layer = next(iter(layers.items()))
    with pytest.raises(ValueError, match=f"{name} keeps float activations"):
        BitSwitch({name: layer.with_activation(None)})
