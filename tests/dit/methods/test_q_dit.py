from collections.abc import Callable
from statistics import fmean
from typing import Any

import pytest
from torch import nn

from dit_qat.calibration import CallStore
from dit_qat.dit.methods import QDiT
from dit_qat.dit.methods.evolution import Evolution
from dit_qat.dit.methods.output_error import OutputError
from dit_qat.dit.ptq import PTQRun, quantize_post_training, target_of
from dit_qat.layers import IntLinear, TokenQuantizer
from dit_qat.layers.rounding import round_nearest

SHORT = Evolution(epochs=2, population=8, crossover=4, mutation=4)


def run_of(make: Callable[[], nn.Module], store: CallStore) -> PTQRun:
    model = make()
    return PTQRun(model, target_of(model), store)


def test_found_sizes_are_legal_and_no_worse_than_the_default(
    calibrated: tuple[Any, CallStore],
) -> None:
    make, store = calibrated
    run = run_of(make, store)
    method = QDiT(sizes=(16, 32, 64, 256), least_mean=64, search=SHORT, search_calls=1)
    method.start(run)
    sizes = method.group_sizes
    linears = run.target.linears()
    assert all(linears[name].in_features % size == 0 for name, size in sizes.items())
    assert fmean(sizes.values()) >= 64
    history = run.report["search_history"]
    assert history == sorted(history, reverse=True)
    assert len(history) == 3
    assert history[-1] < history[0]
    assert run.report["group_sizes"] == sizes


def test_the_fitness_is_the_output_error_of_the_layers_as_searched(
    calibrated: tuple[Any, CallStore],
) -> None:
    make, store = calibrated
    run = run_of(make, store)
    method = QDiT(sizes=(64,), least_mean=1, group_size=64, search=SHORT, search_calls=1)
    method.start(run)
    layers = {}
    for name, linear in run.target.linears().items():
        grid = method.config.grid(64, symmetric=True)
        codes, scales, _ = round_nearest(linear.weight, grid)
        layers[name] = IntLinear.build(
            linear,
            grid=grid,
            scales=scales,
            codes=codes,
            activation=TokenQuantizer(4, group_size=64),
        )
    error = OutputError(run.model, [store[0]])
    if run.report:
        assert run.report["search_history"][0] == pytest.approx(error(layers))
    else:
        assert set(method.group_sizes.values()) == {64}


def test_another_fitness_takes_part(calibrated: tuple[Any, CallStore]) -> None:
    make, store = calibrated

    def fitness(model: nn.Module) -> float:  # the more groups, the better
        layers = [m for m in model.modules() if isinstance(m, IntLinear)]
        assert len(layers) == 8
        return -sum(layer.scale.shape[1] for layer in layers)

    method = QDiT(fitness=fitness, sizes=(16, 64, 256), least_mean=50, search=SHORT)
    model = quantize_post_training(make(), method, store).model
    layers = [m for m in model.modules() if isinstance(m, IntLinear)]
    assert sum(layer.scale.shape[1] for layer in layers) > 14
    assert fmean(method.group_sizes.values()) >= 50
    for layer in layers:
        assert layer.config.activation.group_size == layer.config.grid.group_size
        assert not layer.config.grid.symmetric
        assert not layer.config.activation.symmetric


def test_where_only_the_default_is_legal_nothing_is_searched(
    calibrated: tuple[Any, CallStore],
) -> None:
    make, store = calibrated
    run = run_of(make, store)
    method = QDiT()
    method.start(run)
    assert not run.report
    assert list(method.group_sizes.values()) == [64, 64, 64, 128] * 2
