from collections.abc import Callable
from itertools import product

import pytest
import torch
from torch import nn

from dit_qat.calibration import BlockView, CallStore, Needs
from dit_qat.dit.methods.clq.parameters import (
    PERTURBATIONS,
    Ahead,
    LayerTrial,
    bounded_scales,
    find_target,
    search_bounds,
)
from dit_qat.layers.input_transform import InputTransform, Rotate
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid, decode, encode

VALUES = (0.5, 0.6, 0.7, 0.8, 0.9, 1.0)


def _table(seed: int) -> dict[tuple[float, float], float]:
    generator = torch.Generator().manual_seed(seed)
    pairs = product(VALUES, VALUES)
    return {pair: float(torch.rand((), generator=generator)) for pair in pairs}


@pytest.mark.parametrize("seed", range(12))
def test_bounds_are_an_optimum_along_each_coordinate(seed: int) -> None:
    table = _table(seed)
    (a, b), error = search_bounds(table.__getitem__, VALUES)
    assert error == table[a, b] <= table[1.0, 1.0]
    assert error == min(table[other, b] for other in VALUES)
    assert error == min(table[a, other] for other in VALUES)


@pytest.mark.parametrize("seed", range(4))
def test_the_full_search_returns_the_minimum(seed: int) -> None:
    table = _table(seed)
    best, error = search_bounds(table.__getitem__, VALUES, "full")
    assert error == table[best] == min(table.values())


def test_no_clipping_is_always_in_the_set_and_nothing_is_asked_twice() -> None:
    asked = []

    def error(bounds: tuple[float, float]) -> float:
        asked.append(bounds)
        return -sum(bounds)

    assert search_bounds(error, (0.5, 0.6)) == ((1.0, 1.0), -2.0)
    assert len(asked) == len(set(asked)) == 5
    patient = len(asked)
    asked.clear()
    search_bounds(error, VALUES, patience=1)
    assert len(asked) < patient


def test_patience_ends_a_walk_but_never_loses_the_best_so_far() -> None:
    asked = []

    def error(bounds: tuple[float, float]) -> float:
        asked.append(bounds)
        return abs(bounds[0] - 0.8) + abs(bounds[1] - 0.9)

    assert search_bounds(error, VALUES, patience=2)[0] == (0.8, 0.9)
    assert (0.5, 1.0) not in asked


def test_bounds_are_fractions_of_the_range_of_every_channel() -> None:
    grid = IntegerGrid(4, symmetric=False)
    weight = torch.tensor([[-4.0, 0.0, 2.0, 11.0], [1.0, 2.0, 3.0, 6.0]])
    scales = bounded_scales(weight, grid, (0.5, 0.5))
    assert scales.scale.flatten().tolist() == pytest.approx([7.5 / 15, 3 / 15], rel=1e-3)
    values = decode(encode(weight, grid, scales), grid, scales)
    assert values[0].tolist() == [-2.0, 0.0, 2.0, 5.5]
    assert values[1, 3] == pytest.approx(3, rel=1e-3)


def _trial(linear: nn.Linear, bits: int = 3, seed: int | None = 0) -> LayerTrial:
    transform = InputTransform(linear.in_features, [Rotate(Rotation(linear.in_features, seed))])
    weight = transform.weight(linear.weight.detach())
    activation = TokenQuantizer(bits, symmetric=False)
    return LayerTrial(linear, weight, transform, IntegerGrid(bits, symmetric=False), activation)


@pytest.fixture
def ahead(view_of: Callable[..., BlockView]) -> tuple[BlockView, Ahead]:
    view = view_of(Needs(probe_calls=2))
    return view, Ahead(view, 1)


def test_later_linears(ahead: tuple[BlockView, Ahead]) -> None:
    view, seen = ahead
    first = [*view.linears]
    assert seen.later("blocks.0.ff.0") == [
        "blocks.0.ff.2",
        *(n for n in seen.reference if "1." in n[:9]),
    ]
    assert len(seen.later(first[0])) == 2 * len(first) - 1
    assert Ahead(view, 0).later("blocks.0.ff.2") == ["blocks.0.ff.2"]


def test_few_rows_are_the_first_of_every_call(view_of: Callable[..., BlockView]) -> None:
    view = view_of(Needs(probe_calls=2))  # two calls of 4 rows of 12 tokens
    every, few = Ahead(view, 1).reference, Ahead(view, 1, rows=1).reference
    for name, outputs in few.items():
        torch.testing.assert_close(outputs, every[name].view(2, 4, 12, -1)[:, 0].flatten(0, 1))


def test_a_float_layer_has_no_error_anywhere(ahead: tuple[BlockView, Ahead]) -> None:
    view, seen = ahead
    name = "blocks.0.attn.to_v"
    targets = seen.later(name)
    assert float(seen.l1_errors(name, view.linears[name], targets, relative=True).sum()) == 0
    assert seen.squared_error(name, view.linears[name], targets[-1]) == 0


def test_the_target_is_the_later_layer_whose_error_varies_most(
    toy: tuple[nn.Module, CallStore], view_of: Callable[..., BlockView]
) -> None:
    """By relative errors the size of a layer's outputs does not count; by raw ones it does."""
    model, store = toy
    name, last = "blocks.0.attn.to_out.0", "blocks.1.ff.2"
    chosen = {}
    for gain, relative in product((1, 100), (True, False)):
        with torch.no_grad():
            model.get_submodule(last).weight.mul_(gain)
        store.model = ""  # the calls are still such as the model gets
        view = view_of(Needs(probe_calls=2))
        seen, trial = Ahead(view, 1), _trial(view.linears[name])
        later = seen.later(name)
        errors = torch.stack(
            [seen.l1_errors(name, trial.quantized(step=d), later, relative) for d in PERTURBATIONS]
        )
        assert bool((errors > 0).all())
        chosen[gain, relative] = find_target(seen, name, trial, relative)
        assert chosen[gain, relative] == later[int(errors.var(0).argmax())]
        with torch.no_grad():
            model.get_submodule(last).weight.div_(gain)
    assert chosen[100, True] == chosen[1, True] != last
    assert chosen[100, False] == last


def test_bounds_never_raise_the_error_at_the_target(ahead: tuple[BlockView, Ahead]) -> None:
    view, seen = ahead
    name = "blocks.0.ff.0"
    trial = _trial(view.linears[name])
    target = find_target(seen, name, trial)

    def error(bounds: tuple[float, float]) -> float:
        return seen.squared_error(name, trial.quantized(bounds), target)

    bounds, least = search_bounds(error, VALUES)
    assert least == error(bounds) <= error((1.0, 1.0))
    assert bounds != (1.0, 1.0)  # three bits gain from clipping
