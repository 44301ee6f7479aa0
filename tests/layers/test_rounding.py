import math

import pytest
import torch
from torch import Tensor

from dit_qat.layers import InputTransform, Permute, Rotate, Scale
from dit_qat.layers.rounding import (
    ClipSearch,
    GPTQSettings,
    choose_scales,
    legal_group,
    round_gptq,
    round_nearest,
    transformed_moment,
)
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid, decode, encode
from dit_qat.primitives.second_moment import SecondMoment

GRIDS = [IntegerGrid(4), IntegerGrid(3, symmetric=False), IntegerGrid(4, group_size=16)]


def moment_of(X: Tensor) -> SecondMoment:
    moment = SecondMoment(X.shape[1])
    moment.add(X)
    return moment


def correlated(seed: int, rows: int = 512, width: int = 64) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(width, width, generator=generator) / math.sqrt(width)
    return torch.randn(rows, width, generator=generator) @ mix


@pytest.mark.parametrize("grid", GRIDS)
def test_with_independent_inputs_gptq_rounds_to_the_nearest(grid: IntegerGrid) -> None:
    W, moment = (
        torch.randn(24, 64),
        SecondMoment.from_state({"matrix": torch.eye(64), "tokens": torch.tensor(1000)}),
    )
    found, nearest = round_gptq(W, moment, grid, GPTQSettings()), round_nearest(W, grid)
    assert torch.equal(found.codes, nearest.codes)
    assert torch.equal(found.values, nearest.values)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("static", [False, True])
def test_gptq_lowers_the_output_error_and_its_codes_are_its_values(
    grid: IntegerGrid, act_order: bool, static: bool
) -> None:
    settings = GPTQSettings(block_size=32, act_order=act_order, static_groups=static)
    errors = []
    for seed in range(4):
        X, W = correlated(seed), torch.randn(24, 64)
        found, nearest = round_gptq(W, moment_of(X), grid, settings), round_nearest(W, grid)
        assert torch.equal(decode(found.codes, grid, found.scales), found.values)
        pair = [float((X @ (W - r.values).T).square().sum()) for r in (found, nearest)]
        errors.append(pair[0] / pair[1])
    assert sum(errors) / len(errors) < 0.8
    assert max(errors) < 1


def test_scaling_the_second_moment_changes_nothing() -> None:
    X, W, grid = correlated(0), torch.randn(8, 64), IntegerGrid(4)
    moment = moment_of(X)
    scaled = SecondMoment.from_state(
        {"matrix": moment.matrix * 1024, "tokens": torch.tensor(moment.tokens)}
    )
    one, other = (round_gptq(W, m, grid, GPTQSettings()) for m in (moment, scaled))
    assert torch.equal(one.codes, other.codes)


def test_scales_of_a_later_group_follow_the_compensated_weight_unless_static() -> None:
    X, W, grid = correlated(1), torch.randn(8, 64), IntegerGrid(2, group_size=16)
    moment = moment_of(X)
    before = choose_scales(W, grid)
    static = round_gptq(W, moment, grid, GPTQSettings(block_size=16, static_groups=True)).scales
    moving = round_gptq(W, moment, grid, GPTQSettings(block_size=16)).scales
    assert torch.equal(static.scale, before.scale)
    assert torch.equal(moving.scale[:, 0], before.scale[:, 0])
    assert not torch.equal(moving.scale[:, 1:], before.scale[:, 1:])


def test_the_moment_of_transformed_inputs_is_the_transformed_moment() -> None:
    X = correlated(2)
    steps = [Scale(torch.rand(64) + 0.5), Permute(torch.randperm(64)), Rotate(Rotation(64, 3, 16))]
    transform = InputTransform(64, steps)
    found = transformed_moment(moment_of(X), transform)
    Z = transform(X.double())
    torch.testing.assert_close(found.matrix, Z.T @ Z, rtol=1e-4, atol=1e-3)
    assert found.tokens == 512


def test_clipping_never_raises_the_error_that_it_searches() -> None:
    generator = torch.Generator().manual_seed(0)
    W = torch.randn(16, 64, generator=generator) ** 3
    for grid in GRIDS:
        full, best = choose_scales(W, grid), choose_scales(W, grid, ClipSearch(20))
        errors = [
            (W - decode(encode(W, grid, s), grid, s))
            .abs()
            .pow(2.4)
            .view(*s.scale.shape, -1)
            .sum(-1)
            for s in (full, best)
        ]
        assert (errors[1] <= errors[0]).all()
        assert errors[1].sum() < errors[0].sum()


def test_the_clip_search_of_the_release() -> None:
    factors = ClipSearch().factors
    assert len(factors) == 100
    assert factors[0] == 1
    assert factors[-1] == pytest.approx(0.2)
    with pytest.raises(ValueError, match="searches nothing"):
        ClipSearch(least=0)


@pytest.mark.parametrize(
    ("width", "wanted", "group"),
    [(1152, 128, 128), (512, 128, 128), (96, 64, 48), (100, 64, 50), (13, 8, 13), (64, 128, 64)],
)
def test_a_group_divides_the_width(width: int, wanted: int, group: int) -> None:
    assert legal_group(width, wanted) == group


def test_gptq_without_statistics_says_what_to_ask_for() -> None:
    with pytest.raises(ValueError, match="second_moment=True"):
        round_gptq(torch.ones(2, 2), None, IntegerGrid(4), GPTQSettings())
