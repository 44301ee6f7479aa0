import math

import pytest
import torch

from dit_qat.dit.convert.difference import TIMESTEPS, difference, fixed_inputs, outputs


def test_a_scaled_output_differs_by_the_scale():
    before = torch.randn(len(TIMESTEPS), 2, 4, 4)
    found = difference(before, 1.02 * before)
    assert found.overall == pytest.approx(0.02, rel=1e-4)
    assert found.by_timestep == pytest.approx(dict.fromkeys(TIMESTEPS, 0.02), rel=1e-4)


def test_one_timestep_is_told_from_the_others():
    before = torch.ones(len(TIMESTEPS), 1, 1, 1)
    after = before.clone()
    after[2] += 0.5
    found = difference(before, after)
    assert found.largest == (TIMESTEPS[2], 0.5)
    assert found.overall == pytest.approx(0.5 / math.sqrt(len(TIMESTEPS)))


def test_zero_and_broken_outputs():
    zero = torch.zeros(len(TIMESTEPS), 1, 1, 1)
    assert difference(zero, zero).overall == 0
    assert difference(zero, zero + 1).overall == math.inf
    assert math.isnan(difference(zero + 1, zero + math.nan).overall)


@pytest.mark.parametrize(
    ("overrides", "last"),
    [({}, 3), ({"class_dropout_prob": 0.0}, 2), ({"num_classes": 1000}, 1000)],
)
def test_inputs_are_fixed_and_end_with_the_null_class(make_dit, overrides, last):
    model = make_dit(**overrides)
    one, other = fixed_inputs(model), fixed_inputs(make_dit(seed=1, **overrides))
    assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    assert one.y[-1] == last
    assert outputs(model, one).shape == (len(TIMESTEPS), 4, 4, 4)


def test_unconditional_models_get_no_labels(make_dit):
    model = make_dit(num_classes=0)
    assert fixed_inputs(model).y is None
    assert outputs(model, fixed_inputs(model)).isfinite().all()
