"""IntLinear: exactly the product of its integers, its bytes, and its twins."""

import copy
import io
import json
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers import (
    InputTransform,
    IntLinear,
    IntLinearConfig,
    Permute,
    Rotate,
    Scale,
    StepBits,
    TokenQuantizer,
    timestep_scope,
)
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid, decode, round_to_nearest
from dit_qat.primitives.packing import unpack_int

WIDTH, OUT = 96, 40
GRIDS = [
    IntegerGrid(bits, symmetric, group)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group in (None, 32)
]
EACH = pytest.mark.parametrize("grid", GRIDS, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def steps() -> list[Scale | Permute | Rotate]:
    index = torch.randperm(WIDTH, generator=torch.Generator().manual_seed(1))
    return [
        Scale((0.3 * normal(WIDTH, seed=2)).exp()),
        Permute(index),
        Rotate(Rotation(WIDTH, 3, 32)),
    ]


def linear(bias: bool = True) -> nn.Linear:
    layer = nn.Linear(WIDTH, OUT, bias)
    with torch.no_grad():
        for number, parameter in enumerate(layer.parameters()):
            parameter.copy_(normal(*parameter.shape, seed=number + 10) / WIDTH**0.5)
    return layer


def built(
    grid: IntegerGrid = GRIDS[8],
    activation: TokenQuantizer | None = None,
    full: bool = True,
    bias: bool = True,
) -> IntLinear:
    layer, transform, branch = linear(bias), None, None
    weight = layer.weight.detach()
    if full:
        transform = InputTransform(WIDTH, steps())
        weight = transform.weight(weight)
        u, s, vt = torch.linalg.svd(weight, full_matrices=False)
        branch = ((u[:, :4] * s[:4]).half().float(), vt[:4].half().float())
        weight = weight - branch[0] @ branch[1]
    codes, scales = round_to_nearest(weight, grid)
    return IntLinear.build(
        layer,
        grid=grid,
        scales=scales,
        codes=codes,
        activation=activation,
        transform=transform,
        branch=branch,
    )


@EACH
@pytest.mark.parametrize("symmetric", [True, False])
def test_output_is_the_sum_of_integer_products(grid: IntegerGrid, symmetric: bool) -> None:
    activation = TokenQuantizer(4, symmetric, grid.group_size)
    layer, x = built(grid, activation, full=False), normal(7, WIDTH) + 0.3
    levels, step = activation.levels_and_step(x)
    codes = unpack_int(layer.codes, grid.bits, WIDTH, grid.symmetric).long()
    groups, expected = layer.scale.shape[1], layer.bias.double().expand(7, OUT).clone()  # type: ignore[union-attr]
    for g in range(groups):
        at = slice(g * WIDTH // groups, (g + 1) * WIDTH // groups)
        zero = 0 if layer.zero is None else layer.zero[:, g, None].long()
        sums = levels.long()[:, at] @ (codes[:, at] - zero).T
        expected += sums * step[:, g, None].double() * layer.scale[:, g].double()
    torch.testing.assert_close(layer(x).double(), expected, rtol=1e-5, atol=1e-5)


@EACH
def test_transform_branch_and_bias(grid: IntegerGrid) -> None:
    layer, x = built(grid, TokenQuantizer(8)), normal(2, 3, WIDTH)
    assert layer.transform is not None
    assert layer.low_rank_up is not None
    assert layer.low_rank_down is not None
    z = layer.transform(x)
    expected = TokenQuantizer(8).fake_quantize(z) @ layer.dequantized().T
    expected = expected + z @ (layer.low_rank_up.float() @ layer.low_rank_down.float()).T
    torch.testing.assert_close(layer(x), expected + layer.bias)


@EACH
@pytest.mark.parametrize("bias", [True, False])
def test_without_activation_bits_it_is_its_float_layer(grid: IntegerGrid, bias: bool) -> None:
    layer, x = built(grid, bias=bias), normal(6, WIDTH)
    torch.testing.assert_close(layer(x), layer.to_float()(x), rtol=1e-4, atol=1e-5)
    assert (layer.to_float().bias is not None) == bias


def test_many_bits_are_close_to_the_float_layer_and_fewer_further() -> None:
    x, errors = normal(50, WIDTH), []
    exact = linear()(x).detach()
    for bits in (8, 4, 3, 2):
        y = built(IntegerGrid(bits), TokenQuantizer(bits))(x)
        errors.append(float((y - exact).norm() / exact.norm()))
    assert errors == sorted(errors)
    assert errors[0] < 0.02


@EACH
@pytest.mark.parametrize("full", [True, False])
def test_state_dict_round_trip(grid: IntegerGrid, full: bool) -> None:
    layer = built(grid, TokenQuantizer(4, False, 32, (0.9, 0.8)), full)
    file = io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    plain = json.loads(json.dumps(layer.config.plain()))
    twin = IntLinear(WIDTH, OUT, True, IntLinearConfig.from_plain(plain))
    assert twin.config == layer.config
    twin.load_state_dict(torch.load(file, weights_only=True))
    x = normal(4, WIDTH)
    assert torch.equal(twin(x), layer(x))
    assert twin.bytes_stored == layer.bytes_stored


def test_codes_are_kept_bit_for_bit() -> None:
    for grid in GRIDS:
        codes, scales = round_to_nearest(linear().weight, grid)
        layer = built(grid, full=False)
        assert torch.equal(layer.dequantized(), decode(codes, grid, scales))


def test_another_configuration_and_float_weights_are_refused() -> None:
    layer = built(GRIDS[8], TokenQuantizer(4))
    other = built(GRIDS[8], TokenQuantizer(3))
    with pytest.raises(ValueError, match=r"saved under another configuration .*activation"):
        other.load_state_dict(layer.state_dict())
    with pytest.raises(ValueError, match=r"this holds codes \(IntLinear"):
        layer.load_state_dict(linear().state_dict())


def test_another_activation_shares_the_buffers() -> None:
    layer, x = built(GRIDS[8], TokenQuantizer(8)), normal(5, WIDTH)
    twin = layer.with_activation(TokenQuantizer(3))
    ours, theirs = dict(layer.named_buffers()), dict(twin.named_buffers())
    assert ours.keys() == theirs.keys()
    assert all(ours[name].data_ptr() == theirs[name].data_ptr() for name in ours)
    before = layer(x)
    assert not torch.equal(twin(x), before)
    assert torch.equal(twin.with_activation(TokenQuantizer(8))(x), before)
    assert layer.config.activation == TokenQuantizer(8)
    twin.register_buffer("codes", torch.zeros_like(twin.codes))
    assert torch.equal(layer(x), before)
    with pytest.raises(ValueError, match="group_size=36 does not divide 96"):
        layer.with_activation(TokenQuantizer(4, group_size=36))


def test_bits_by_timestep() -> None:
    layer, x = built(GRIDS[8], TokenQuantizer(8, False)), normal(4, 3, WIDTH)
    by_step = layer.with_step_bits(StepBits((900, 500, 100), (3, 4, 8)))
    fixed = {bits: layer.with_activation(TokenQuantizer(bits, False)) for bits in (3, 4, 8)}
    for timestep, bits in ((900, 3), (480.0, 4), (0, 8)):
        with timestep_scope(timestep):
            assert torch.equal(by_step(x), fixed[bits](x))
        with timestep_scope(torch.full((4,), float(timestep))):
            assert torch.equal(by_step(x), fixed[bits](x))
    with timestep_scope(torch.tensor([900, 100, 500, 880])):
        expected = [fixed[bits](x)[row] for row, bits in enumerate((3, 8, 4, 3))]
        torch.testing.assert_close(by_step(x), torch.stack(expected))
    with timestep_scope(torch.tensor([900, 100])):  # two rows of the layer for each of the batch
        expected = [fixed[bits](x)[row] for row, bits in enumerate((3, 3, 8, 8))]
        torch.testing.assert_close(by_step(x), torch.stack(expected))
    assert by_step.codes.data_ptr() == layer.codes.data_ptr()
    assert torch.equal(by_step.with_step_bits(None)(x), layer(x))


def test_bits_by_timestep_need_a_timestep_that_fits() -> None:
    by_step = built(GRIDS[8], TokenQuantizer(8)).with_step_bits(StepBits((9, 5), (3, 4)))
    with pytest.raises(RuntimeError, match="follow_timesteps_"):
        by_step(normal(4, WIDTH))
    with (
        timestep_scope(torch.tensor([9, 5, 5])),
        pytest.raises(ValueError, match="input of 4 rows"),
    ):
        by_step(normal(4, WIDTH))
    with timestep_scope(30), pytest.raises(ValueError, match="timestep 30 is not covered"):
        by_step(normal(4, WIDTH))


def test_a_cast_of_the_model_keeps_what_is_stored() -> None:
    for target in (torch.float16, torch.bfloat16, torch.float64):
        layer, x = built(GRIDS[9], TokenQuantizer(8)), normal(9, WIDTH)
        before, y = layer.dequantized(), layer(x)
        nn.Sequential(layer).to(target)
        assert torch.equal(layer.dequantized(), before)
        assert torch.equal(layer(x), y)
        assert layer(x.to(target)).dtype == target
        assert (layer(x.to(target)).float() - y).norm() < 0.02 * y.norm()


@pytest.mark.parametrize("group", [None, 32])
def test_autocast(group: int | None) -> None:
    activation = TokenQuantizer(8, False, group)
    layer, x = built(IntegerGrid(8, False, group), activation), normal(9, WIDTH)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    assert (y.float() - layer(x)).norm() < 0.02 * layer(x).norm()


def test_gradient_reaches_the_input() -> None:
    layer, x = built(GRIDS[8], TokenQuantizer(4), full=False), normal(3, WIDTH).requires_grad_()
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.dequantized().sum(0).expand(3, -1))


def test_bytes_and_effective_bits() -> None:
    layer = built(IntegerGrid(4, False, 32), TokenQuantizer(4))
    parts = {
        "codes": OUT * WIDTH // 2,
        "scale and zero": OUT * 3 * 3,
        "branch": (OUT + WIDTH) * 4 * 2,
        "transform": WIDTH * 8,
    }
    assert layer.bytes_stored == sum(parts.values()) + OUT * 4
    assert layer.effective_weight_bits == pytest.approx(8 * sum(parts.values()) / (OUT * WIDTH))
    per_channel = built(IntegerGrid(3), full=False)
    assert per_channel.effective_weight_bits == pytest.approx(3 + 16 / WIDTH)


def test_copies_and_empty_batches() -> None:
    layer = built(GRIDS[8], TokenQuantizer(4))
    x = normal(3, WIDTH)
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert layer(torch.empty(0, WIDTH)).shape == (0, OUT)
    assert "rank=4" in repr(layer)


def test_bad_values_are_refused() -> None:
    layer, grid = linear(), IntegerGrid(4)
    codes, scales = round_to_nearest(layer.weight, grid)
    fine = {"grid": grid, "scales": scales, "codes": codes, "activation": None}
    large = torch.full((OUT, 2), 1e6), torch.ones(2, WIDTH)
    for changed, message in (
        ({"codes": codes[:, :-1]}, r"codes \(40, 95\) do not fit"),
        ({"codes": codes + 20}, "only whole numbers from -8 to 7"),
        ({"scales": scales._replace(scale=scales.scale * torch.nan)}, "scale holds NaN"),
        ({"scales": scales._replace(zero=torch.zeros(OUT, 1))}, r"zero has shape \(40, 1\)"),
        ({"branch": large}, "low_rank_up holds NaN or infinite values, or larger ones than"),
        ({"branch": (torch.ones(OUT, 50), torch.ones(50, WIDTH))}, "rank=50 is beyond 40"),
        ({"branch": (torch.ones(OUT, 3), torch.ones(2, WIDTH))}, "low_rank_up has shape"),
        ({"activation": TokenQuantizer(group_size=7)}, "activation group_size=7"),
        ({"step_bits": StepBits((1,), (4,))}, "without an activation"),
        ({"transform": InputTransform(48, [])}, "transform of 48 inputs for a layer of 96"),
    ):
        with pytest.raises(ValueError, match=message):
            IntLinear.build(layer, **(fine | changed))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="rank=-1"):
        replace(built().config, rank=-1)
    with pytest.raises(ValueError, match="branch_dtype='int8'"):
        replace(built().config, branch_dtype="int8")  # type: ignore[arg-type]
