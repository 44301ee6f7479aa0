"""Straight-through estimators: values bit for bit, gradients equal to their masks."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.ste import clip_gradient, clip_mask, straight_through, trust_mask
from dit_qat.primitives.uniform import decode, encode, outer_edges


def normal(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def test_the_value_is_the_quantized_one_bit_for_bit() -> None:
    x = normal(1000).requires_grad_()
    quantized = (x.detach() / 0.3).round() * 0.3
    assert torch.equal(straight_through(x, quantized), quantized)


def test_the_gradient_is_the_mask() -> None:
    x, grad = normal(8, 5).requires_grad_(), normal(8, 5)
    mask = x.detach() > 0
    straight_through(x, x.detach().round(), mask).backward(grad)
    assert torch.equal(x.grad, grad * mask)


def test_without_a_mask_the_gradient_is_the_identity() -> None:
    x, grad = normal(8, 5).requires_grad_(), normal(8, 5)
    straight_through(x, x.round()).backward(grad)  # a graph of the quantized value is cut
    assert torch.equal(x.grad, grad)


def test_no_gradient_passes_at_the_edges_or_beyond() -> None:
    x = torch.tensor([-2.0, -1.0, -0.999, 0.0, 1.999, 2.0, 3.0])
    assert clip_mask(x, -1, 2).tolist() == [False, False, True, True, True, False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_clipping_a_gradient_is_multiplying_by_the_mask(dtype: torch.dtype) -> None:
    x = torch.cat([normal(1000), torch.tensor([-0.75, 1.25])])
    grad = normal(1002).flip(0).to(dtype)
    assert torch.equal(
        clip_gradient(grad, x, -0.75, 1.25).to(dtype), grad * clip_mask(x, -0.75, 1.25)
    )


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize(("bound", "margin"), [(0.5, 0.0), (1.0, 0.5)])
def test_quests_trust_mask_on_mid_rise_is_a_clip_mask(
    bits: int, bound: float, margin: float
) -> None:
    grid, step = UniformGrid(bits, "mid_rise"), torch.tensor(0.4)
    x = 3 * normal(2000)
    quantized = decode(encode(x, step, grid), step, grid)
    low, high = outer_edges(grid)
    clipped = clip_mask(x / step, low - margin, high + margin)
    # One float32 unit of slack: inside the grid errors come as close to half a step as can be.
    trusted = trust_mask(x, quantized, bound * step * (1 + 1e-5))
    assert 0 < clipped.sum() < x.numel()
    assert torch.equal(trusted, clipped)
