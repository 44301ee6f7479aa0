from collections.abc import Callable

import pytest
import torch

from dit_qat.calibration import BlockView
from dit_qat.dit.methods import RTN, DuQuant
from dit_qat.dit.methods.duquant import zigzag_transform
from dit_qat.dit.methods.rotation import rotation_of


@pytest.mark.parametrize("width", [128, 96, 1152])
def test_the_whole_transform_is_orthogonal(width: int) -> None:
    rotation = rotation_of(width, 0, "fc1", 32)
    transform = zigzag_transform(torch.randn(40, width), rotation)
    G = transform(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(G @ G.T, torch.eye(width, dtype=torch.float64))
    X, W = torch.randn(5, width, dtype=torch.float64), torch.randn(3, width, dtype=torch.float64)
    torch.testing.assert_close(transform(X) @ transform.weight(W).T, X @ W.T)


def test_outliers_are_shared_out_over_the_blocks() -> None:
    torch.manual_seed(0)
    X = torch.randn(200, 128)
    X[:, :32] *= 30  # all outliers in the first of four blocks
    rotation = rotation_of(128, 0, "fc1", 32)
    transform = zigzag_transform(X, rotation)
    once, twice = rotation.apply(X), transform(X)
    means = [x.abs().amax(0).view(4, 32).mean(1) for x in (once, twice)]
    spread = [float(m.max() / m.min()) for m in means]
    assert spread[0] > 10
    assert spread[1] < 2


def test_it_helps_where_channels_stand_out(view_of: Callable[..., BlockView]) -> None:
    errors = {}
    for method in (RTN(), DuQuant(block_size=8)):
        view = view_of(method.needs)
        errors[method.name] = view.error(method.quantize_block(view), "blocks.0.attn")
    assert errors["duquant"] < 0.7 * errors["rtn"]
