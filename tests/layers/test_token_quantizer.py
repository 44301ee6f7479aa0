"""TokenQuantizer: levels, groups, clipping and static ranges."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_qat.layers import TokenQuantizer

QUANTIZERS = [
    TokenQuantizer(bits, symmetric, group)
    for bits in (2, 3, 4, 8)
    for symmetric in (True, False)
    for group in (None, 8)
]
EACH = pytest.mark.parametrize("quantizer", QUANTIZERS, ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def grouped(x: Tensor, quantizer: TokenQuantizer) -> Tensor:
    return x.reshape(*x.shape[:-1], -1, quantizer.group_size or x.shape[-1])


@EACH
def test_values_are_integers_times_the_step_and_within_half_of_it(
    quantizer: TokenQuantizer,
) -> None:
    x = 3 * normal(2, 5, 32) + 1
    levels, step = quantizer.levels_and_step(x)
    assert torch.equal(levels, levels.round())
    assert step.shape == (2, 5, 1 if quantizer.group_size is None else 4)
    values = grouped(quantizer.fake_quantize(x), quantizer)
    assert torch.equal(values, grouped(levels, quantizer) * step[..., None])
    slack = 0.5 if quantizer.symmetric else 1.0  # the rounded zero point moves the range
    error = (values - grouped(x, quantizer)).abs()
    assert bool((error <= slack * 1.0001 * step[..., None]).all())
    for levels_of_group in grouped(levels, quantizer).flatten(0, -2):
        spread = float(levels_of_group.max() - levels_of_group.min())
        assert spread <= 2**quantizer.bits - (2 if quantizer.symmetric else 1)


@EACH
def test_zero_stays_zero(quantizer: TokenQuantizer) -> None:
    x = normal(6, 32) + 5
    x[:, 3], x[2] = 0, 0
    y = quantizer.fake_quantize(x)
    assert not y[:, 3].any()
    assert not y[2].any()
    assert y.isfinite().all()


@EACH
@settings(max_examples=10, deadline=None)
@given(factor=st.sampled_from([2.0**-20, 0.5, 64.0]), seed=st.integers(0, 1000))
def test_a_token_s_scale_passes_through_and_tokens_do_not_meet(
    quantizer: TokenQuantizer, factor: float, seed: int
) -> None:
    x = normal(4, 32, seed=seed)
    y = quantizer.fake_quantize(x)
    assert torch.equal(quantizer.fake_quantize(x * factor), y * factor)
    assert torch.equal(quantizer.fake_quantize(x[2]), y[2])


def test_groups_are_tokens_of_their_own() -> None:
    x = normal(4, 32)
    for symmetric in (True, False):
        whole = TokenQuantizer(4, symmetric).fake_quantize(x.view(16, 8)).view(4, 32)
        assert torch.equal(TokenQuantizer(4, symmetric, 8).fake_quantize(x), whole)


def test_symmetric_by_hand() -> None:
    x = torch.tensor([[-7.0, 3.4, 0.5, 7.0], [14.0, -2.9, 3.1, 0.9]])
    expected = torch.tensor([[-7.0, 3.0, 0.0, 7.0], [14.0, -2.0, 4.0, 0.0]])
    assert torch.equal(TokenQuantizer(4).fake_quantize(x), expected)


def test_asymmetric_by_hand() -> None:
    x = torch.tensor([[-1.0, 2.0, 0.4, 1.6], [5.0, 10.0, 15.0, 7.6], [-5.0, -15.0, -10.0, -7.6]])
    quantizer = TokenQuantizer(2, symmetric=False)
    expected = torch.tensor([[-1.0, 2.0, 0.0, 2.0], [5.0, 10.0, 15.0, 10.0]])
    assert torch.equal(quantizer.fake_quantize(x)[:2], expected)
    assert torch.equal(quantizer.fake_quantize(x)[2], torch.tensor([-5.0, -15.0, -10.0, -10.0]))


def test_clip_factors_move_their_own_end() -> None:
    x = torch.tensor([[-4.0, 0.0, 8.0]])
    assert TokenQuantizer(8, clip=(1.0, 0.5)).fake_quantize(x).tolist() == [[-4.0, 0.0, 4.0]]
    y = TokenQuantizer(8, symmetric=False, clip=(0.5, 1.0)).fake_quantize(x)
    assert y[0, 0] == pytest.approx(-2, abs=10 / 255)
    assert y[0, 2] == pytest.approx(8, abs=10 / 255)
    y = TokenQuantizer(8, symmetric=False, clip=(1.0, 0.5)).fake_quantize(x)
    assert y[0, 0] == pytest.approx(-4, abs=8 / 255)
    assert y[0, 2] == pytest.approx(4, abs=8 / 255)


def test_a_fixed_range_is_shared_by_all_tokens() -> None:
    x = torch.tensor([[-9.0, 0.26, 0.0, 1.0], [0.1, 2.6, 3.0, 9.0]])
    quantizer = TokenQuantizer(2, symmetric=False, fixed_range=(-1.0, 2.0))
    assert quantizer.fake_quantize(x).tolist() == [[-1.0, 0.0, 0.0, 1.0], [0.0, 2.0, 2.0, 2.0]]
    above_zero = TokenQuantizer(2, symmetric=False, fixed_range=(1.0, 3.0))  # holds zero as well
    assert above_zero.fake_quantize(x)[1].tolist() == [0.0, 3.0, 3.0, 3.0]
    symmetric = TokenQuantizer(2, fixed_range=(-3.0, 1.0))
    assert symmetric.fake_quantize(x).tolist() == [[-3.0, 0.0, 0.0, 0.0], [0.0, 3.0, 3.0, 3.0]]


def test_error_falls_with_bits() -> None:
    x = normal(64, 128)
    for symmetric in (True, False):
        errors = [
            float((TokenQuantizer(bits, symmetric).fake_quantize(x) - x).square().mean())
            for bits in range(2, 9)
        ]
        assert all(b < 0.5 * a for a, b in pairwise(errors))


def test_dtype_is_kept_and_rounding_happens_in_float32() -> None:
    x = normal(8, 32).bfloat16()
    for quantizer in QUANTIZERS:
        y = quantizer.fake_quantize(x)
        assert y.dtype == torch.bfloat16
        assert torch.equal(y, quantizer.fake_quantize(x.float()).bfloat16())
    assert TokenQuantizer().fake_quantize(x.double()).dtype == torch.float64


def test_gradient_is_straight_through() -> None:
    x = normal(4, 32).requires_grad_()
    y = TokenQuantizer(3).fake_quantize(x)
    assert torch.equal(y, TokenQuantizer(3).fake_quantize(x.detach()))
    weight = normal(4, 32, seed=1)
    (y * weight).sum().backward()
    assert torch.equal(x.grad, weight)  # type: ignore[arg-type]


def test_no_tokens() -> None:
    assert TokenQuantizer().fake_quantize(torch.empty(0, 32)).shape == (0, 32)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"bits": 1}, "bits=1 are outside 2..8"),
        ({"bits": 4.5}, r"bits=4\.5"),
        ({"group_size": 0}, "group_size=0"),
        ({"clip": (0.0, 1.0)}, r"clip=\(0\.0, 1\.0\)"),
        ({"clip": (1.0, 1.5)}, "clip="),
        ({"fixed_range": (2.0, 1.0)}, "fixed_range="),
        ({"fixed_range": (0.0, math.inf)}, "fixed_range="),
    ],
)
def test_bad_values_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TokenQuantizer(**changed)  # type: ignore[arg-type]


def test_a_width_that_groups_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"group_size=12 does not divide 32 inputs; .* 8, 16, 32"):
        TokenQuantizer(group_size=12).fake_quantize(normal(2, 32))


def test_lists_of_a_file_are_the_same_value() -> None:
    plain = TokenQuantizer(4, False, 8, [0.9, 0.8], [-1.0, 1.0])  # type: ignore[arg-type]
    assert plain == TokenQuantizer(4, False, 8, (0.9, 0.8), (-1.0, 1.0))
    assert hash(plain) is not None
    assert plain.with_bits(3) == TokenQuantizer(3, False, 8, (0.9, 0.8), (-1.0, 1.0))
