"""The fused node against the composition of fake quantizers that it stands for."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dit_qat.layers.activation import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    ActivationQuantizer,
    MinMaxQuantizer,
    RobustQuantizer,
    StraightThrough,
)
from dit_qat.layers.ternary_matmul import TernaryWeight, ternary_matmul
from dit_qat.primitives.ste import straight_through
from dit_qat.primitives.ternary import TERNARY_FITS

ACTIVATIONS = [
    None,
    RobustQuantizer(1),
    RobustQuantizer(4, "clip"),
    RobustQuantizer(2, "soft_clip", center=True),
    MinMaxQuantizer(4),
    MinMaxQuantizer(2, "clip", zero_point="rounded"),
    AbsMaxQuantizer(3),
    AbsMeanQuantizer(4, "identity"),
]
TERNARIES = [
    TernaryWeight(fit, per_channel) for fit in TERNARY_FITS for per_channel in (True, False)
]


def normal(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def composed(
    x: Tensor, weight: Tensor, activation: ActivationQuantizer | None, ternary: TernaryWeight
) -> Tensor:
    quantized = x if activation is None else activation.fake_quantize(x)
    return quantized @ straight_through(weight, ternary.fake_quantize(weight)).T


def results(function, x, weight, grad, *args):  # type: ignore[no-untyped-def]
    """The value and both gradients."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = function(x, weight, *args)
    y.backward(grad.to(y.dtype))
    return y.detach(), x.grad, weight.grad


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("ternary", TERNARIES, ids=str)
@pytest.mark.parametrize("shape", [(11,), (2, 5)], ids=["2-D", "3-D"])
def test_the_node_is_the_composition(
    activation: ActivationQuantizer | None, ternary: TernaryWeight, shape: tuple[int, ...]
) -> None:
    x, weight = 2 * normal(*shape, 48), normal(32, 48, seed=1)
    grad = normal(*shape, 32, seed=2)
    for dtype, limit in ((torch.float64, 1e-12), (torch.float32, 1e-6)):
        tensors = x.to(dtype), weight.to(dtype), grad.to(dtype)
        fused = results(ternary_matmul, *tensors, activation, ternary)
        naive = results(composed, *tensors, activation, ternary)
        for a, b in zip(fused, naive, strict=True):
            assert a.dtype == dtype
            assert distance(a, b) < limit


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_bfloat16_is_as_good_as_its_rounding(activation: ActivationQuantizer | None) -> None:
    x, weight = (2 * normal(11, 48)).bfloat16(), normal(32, 48, seed=1).float()
    grad, ternary = normal(11, 32, seed=2).bfloat16(), TernaryWeight("absmean")
    fused = results(ternary_matmul, x, weight, grad, activation, ternary)
    exact = results(composed, x.double(), weight.double(), grad.double(), activation, ternary)
    for a, b, dtype in zip(fused, exact, (x.dtype, x.dtype, weight.dtype), strict=True):
        assert a.dtype == dtype
        assert distance(a, b) < 2**-7


@pytest.mark.parametrize("name", ["identity", "clip", "soft_clip"])
def test_gradients_are_the_straight_through_definitions(name: StraightThrough) -> None:
    activation, ternary = RobustQuantizer(2, name), TernaryWeight()
    x, weight, grad = normal(20, 64), normal(24, 64, seed=1), normal(20, 24, seed=2)
    _, grad_x, grad_weight = results(ternary_matmul, x, weight, grad, activation, ternary)
    mask = activation.gradient_mask(x, *activation.step_and_low(x))
    through = grad @ ternary.fake_quantize(weight)
    torch.testing.assert_close(grad_x, through if mask is None else through * mask)
    torch.testing.assert_close(grad_weight, grad.T @ activation.fake_quantize(x))
    assert mask is None or torch.equal(grad_x == 0, ~mask)


def test_the_forward_multiplies_integers_exactly_in_bfloat16() -> None:
    x, weight = normal(8, 1152).bfloat16(), normal(16, 1152, seed=1)
    activation, ternary = RobustQuantizer(4), TernaryWeight()
    step, low = activation.step_and_low(x)
    codes, scale = ternary.quantize(weight)
    sums = activation.levels(x, step, low).double() @ codes.T
    y = ternary_matmul(x, weight, activation, ternary)
    # Two roundings to bfloat16: of the sum that the product returns, and of the result.
    torch.testing.assert_close(y.double(), sums * step * scale.T, rtol=2**-7, atol=0)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_an_addend_is_added_and_gets_its_gradient(activation: ActivationQuantizer | None) -> None:
    x, weight, ternary = normal(2, 5, 48), normal(32, 48, seed=1), TernaryWeight()
    addend = normal(2, 5, 32, seed=3).requires_grad_()
    grad = normal(2, 5, 32, seed=2)
    y = ternary_matmul(x, weight, activation, ternary, addend)
    torch.testing.assert_close(y, ternary_matmul(x, weight, activation, ternary) + addend)
    y.backward(grad)
    assert torch.equal(addend.grad, grad)


def test_the_inputs_are_left_as_they_were() -> None:
    x, weight, addend = normal(5, 48), normal(32, 48, seed=1), normal(5, 32, seed=3)
    copies = [t.clone() for t in (x, weight, addend)]
    y = ternary_matmul(x.requires_grad_(), weight, RobustQuantizer(2), TernaryWeight(), addend)
    y.sum().backward()
    assert all(map(torch.equal, (x, weight, addend), copies))


@pytest.mark.parametrize("wanted", ["x", "weight"])
def test_only_wanted_gradients_are_computed(wanted: str) -> None:
    tensors = {"x": normal(5, 48), "weight": normal(32, 48, seed=1)}
    tensors[wanted].requires_grad_()
    ternary_matmul(
        **tensors, activation=RobustQuantizer(2), ternary=TernaryWeight()
    ).sum().backward()
    assert [name for name, t in tensors.items() if t.grad is not None] == [wanted]


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("fit", TERNARY_FITS)
def test_zeros_give_finite_results(activation: ActivationQuantizer | None, fit: str) -> None:
    x, weight = normal(4, 48).float(), normal(8, 48, seed=1).float()
    x[1], weight[2] = 0, 0
    ternary = TernaryWeight(fit)  # type: ignore[arg-type]
    for tokens, rows in ((x, weight), (x, 0 * weight), (0 * x, weight)):
        values = results(ternary_matmul, tokens, rows, torch.ones(4, 8), activation, ternary)
        assert all(value.isfinite().all() for value in values)
        assert not values[0][:, 2].any()


def test_no_tokens_at_all() -> None:
    x, weight = torch.zeros(0, 48, requires_grad=True), normal(8, 48).float().requires_grad_()
    ternary_matmul(x, weight, RobustQuantizer(2), TernaryWeight()).sum().backward()
    assert x.grad is not None
    assert torch.equal(weight.grad, torch.zeros(8, 48))


def kept_bytes(run, weight: Tensor) -> int:  # type: ignore[no-untyped-def]
    """Bytes of the tensors kept for backward, each storage once, without the weight's."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() != weight.data_ptr():
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = run()
    del output
    return sum(kept.values())


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_it_keeps_what_a_linear_layer_keeps(activation: ActivationQuantizer | None) -> None:
    x, weight = normal(64, 512).requires_grad_(), normal(96, 512, seed=1).requires_grad_()
    kept = kept_bytes(lambda: ternary_matmul(x, weight, activation, TernaryWeight()), weight)
    linear = kept_bytes(lambda: F.linear(x, weight), weight)
    assert linear == 64 * 512 * 8
    assert kept <= 1.02 * linear


@pytest.mark.parametrize(
    ("activation", "dtype"),
    [
        (None, torch.float32),
        (RobustQuantizer(4), torch.bfloat16),
        (RobustQuantizer(2, "clip", center=True), torch.float32),
        (MinMaxQuantizer(2, zero_point="rounded"), torch.float32),
    ],
    ids=str,
)
def test_it_compiles_without_graph_breaks(
    activation: ActivationQuantizer | None, dtype: torch.dtype
) -> None:
    torch.compiler.reset()
    x, weight, grad = normal(6, 48).to(dtype), normal(8, 48, seed=1).float(), normal(6, 8, seed=2)
    compiled = torch.compile(ternary_matmul, fullgraph=True, backend="aot_eager")
    args = (x, weight, grad, activation, TernaryWeight("least_squares"))
    for a, b in zip(results(compiled, *args), results(ternary_matmul, *args), strict=True):
        torch.testing.assert_close(a, b)


def test_unknown_fits_are_refused() -> None:
    with pytest.raises(ValueError, match="'best' is unknown; use one of"):
        replace(TernaryWeight(), fit="best")  # type: ignore[arg-type]
