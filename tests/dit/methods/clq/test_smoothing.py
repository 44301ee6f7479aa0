from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.calibration import Needs
from dit_qat.calibration.statistics import LinearStatistics
from dit_qat.dit.methods.clq.smoothing import (
    Smoothing,
    channel_scores,
    choose_smoothing,
    permutation,
    smoothings,
)
from dit_qat.layers.input_transform import InputTransform
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.integer import IntegerGrid

KINDS = ("none", "group", "zigzag")


def _scores(width: int) -> Tensor:
    return torch.rand(width, generator=torch.Generator().manual_seed(width)) ** 4


@pytest.mark.parametrize("width", [1152, 1536, 3072, 8960])
@pytest.mark.parametrize("block", [None, 128])
def test_transforms_are_orthogonal_and_cancel(width: int, block: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, width, generator=generator).double() for n in (3, 5))
    rows = torch.randperm(width, generator=generator)[:40]
    units = F.one_hot(rows, width).double()
    for smoothing in smoothings(_scores(width), KINDS, block, (None, 7), "layer"):
        G = smoothing.transform
        moved = G(units)
        torch.testing.assert_close(moved @ moved.T, torch.eye(40).double(), atol=1e-12, rtol=0)
        torch.testing.assert_close(G(x) @ G.weight(w).T, x @ w.T, atol=1e-10, rtol=0)


def test_blocks_are_half_of_the_width_where_that_has_an_order() -> None:
    def block(width: int, limit: int | None = None) -> int | None:
        (smoothing,) = smoothings(_scores(width), ("none",), limit, (None,), "layer")
        return smoothing.transform.steps[-1].block_size

    assert block(1152) == 576
    assert block(8960) == 4480
    assert block(1152, 128) == 128
    # 4 * 37 / 2 = 74 is no order, 4 divides.
    assert block(148) == 4


@pytest.mark.parametrize("blocks", [2, 8])
def test_group_is_a_stable_partition_by_rank(blocks: int) -> None:
    scores = _scores(64)
    index = permutation(scores, blocks, "group")
    assert index is not None
    assert torch.equal(index.sort().values, torch.arange(64))
    parts = index.view(blocks, -1)
    assert torch.equal(parts, parts.sort(1).values)
    ranges = [(float(scores[part].min()), float(scores[part].max())) for part in parts]
    for first, second in pairwise(ranges):
        assert first[0] >= second[1]


def test_zigzag_evens_out_and_none_stays() -> None:
    scores = _scores(64)
    index = permutation(scores, 4, "zigzag")
    assert index is not None
    assert torch.equal(index.sort().values, torch.arange(64))
    spread = scores[index].view(4, -1).mean(1)
    plain = scores.view(4, -1).mean(1)
    assert float(spread.max() - spread.min()) < float(plain.max() - plain.min()) / 4
    assert permutation(scores, 4, "none") is None


def test_a_width_without_a_rotation_names_the_layer() -> None:
    with pytest.raises(ValueError, match=r"blocks\.0\.fc has 37 inputs.*skip this layer"):
        smoothings(_scores(37), KINDS, None, (None,), "blocks.0.fc")


def _offered(width: int) -> list[Smoothing]:
    return smoothings(_scores(width), KINDS, None, (None, 3), "layer")


def test_the_measured_error_decides() -> None:
    """Grouping hurts where tokens have one scale; a single one offered is taken as it is."""
    generator = torch.Generator().manual_seed(1)
    x, w = (torch.randn(n, 64, generator=generator) for n in (200, 48))
    outliers = torch.randperm(64, generator=generator)[:20]
    x[:, outliers] *= 8
    scores = x.abs().amax(0)
    grid, activation = IntegerGrid(4, symmetric=False), TokenQuantizer(4, symmetric=False)
    errors = {}
    for smoothing in smoothings(scores, KINDS, None, (None,), "layer"):
        chosen, errors[smoothing.permutation] = choose_smoothing(
            [smoothing], w, x, grid, activation
        )
        assert chosen is smoothing
    offered = smoothings(scores, KINDS, None, (None,), "layer")
    chosen, error = choose_smoothing(offered, w, x, grid, activation)
    assert error == min(errors.values()) == errors[chosen.permutation]
    assert errors["group"] > 1.1 * errors["zigzag"]
    none = Smoothing("none", False, InputTransform(64, []))
    assert choose_smoothing([none], w, x, grid, activation)[1] > error


def test_scores() -> None:
    statistics = LinearStatistics(4, 1, Needs(tokens=100))
    x = torch.randn(100, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1, 2, 9, 3])
    statistics.add(x, 0)
    assert channel_scores(statistics, "absmax").argmax() == 2
    torch.testing.assert_close(
        channel_scores(statistics, "rms"), x.square().mean(0).sqrt(), atol=1e-6, rtol=1e-6
    )


class _Unquantized(nn.Module):
    """A linear behind a smoothing, with nothing rounded."""

    def __init__(self, linear: nn.Linear, transform: InputTransform) -> None:
        super().__init__()
        self.transform, self.bias = transform, linear.bias
        self.weight = transform.weight(linear.weight.detach())

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.transform(x), self.weight, self.bias)


def test_without_rounding_the_network_stays_as_it_is() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 16), nn.Linear(16, 8))
    model = model.double()
    x = torch.randn(10, 24, dtype=torch.float64)
    exact = model(x)
    for at, linear in enumerate(model):
        if isinstance(linear, nn.Linear):
            transform = _offered(linear.in_features)[2 * (at % 3)].transform
            model[at] = _Unquantized(linear, transform)
    torch.testing.assert_close(model(x), exact, rtol=1e-12, atol=1e-12)
