from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from dit_qat.calibration import CallStore
from dit_qat.dit.methods.output_error import OutputError
from dit_qat.dit.ptq.evaluation import spread_calls


def test_it_is_the_relative_squared_error_and_leaves_the_model(
    calibrated: tuple[Any, CallStore], output_of: Callable[..., torch.Tensor]
) -> None:
    make, store = calibrated
    model = make()
    before = output_of(model, store)
    error = OutputError(model, list(store))
    assert error({}) == 0
    silent = nn.Linear(64, 192)
    nn.init.zeros_(silent.weight)
    name = "blocks.0.attn.qkv"
    other = make()
    other.set_submodule(name, silent)
    expected = (output_of(other, store) - before).square().sum() / before.square().sum()
    assert error({name: silent}) == pytest.approx(float(expected), rel=1e-5)
    assert torch.equal(output_of(model, store), before)


def test_calls_are_spread_from_the_first_to_the_last(calibrated: tuple[Any, CallStore]) -> None:
    store = calibrated[1]
    steps = [call.step for call in spread_calls(store, 3)]
    assert steps[0] == 0
    assert steps[-1] == 3
    assert len(steps) == 3
    assert len(spread_calls(store, 100)) == len(store)
    assert [call.step for call in spread_calls(store, 1)] == [0]
