from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dit_qat.dit.methods import DuQuant, QuaRot, ViDiTQ
from dit_qat.dit.methods.rotation import block_order, rotation_of, zigzag
from dit_qat.dit.ptq import PTQMethod


@pytest.mark.parametrize(
    ("width", "limit", "block"),
    [
        (1152, None, 576),
        (8960, None, 4480),
        (1100, None, 4),  # 550 is no order, and 4 is all that is in it of two
        (96, 32, 32),
        (1152, 128, 128),
        (1152, 1000, 128),  # 1000 does not divide it
        (24, 16, 8),
        (102, None, None),
    ],
)
def test_blocks_are_half_the_width_or_the_largest_power_of_two(
    width: int, limit: int | None, block: int | None
) -> None:
    assert block_order(width, limit) == block


@pytest.mark.parametrize("width", [128, 1152, 1100, 72])
def test_every_rotation_is_orthogonal(width: int) -> None:
    rotation = rotation_of(width, 0, "fc1")
    R = rotation.apply(torch.eye(width, dtype=torch.float64))
    torch.testing.assert_close(R @ R.T, torch.eye(width, dtype=torch.float64))


def test_the_full_width_is_preferred() -> None:
    assert rotation_of(1152, 0, "fc1").block_size is None
    assert rotation_of(128, 0, "fc1", 128).block_size is None
    assert rotation_of(256, 0, "fc1", 128).block_size == 128


def test_a_width_without_rotation_names_the_layer_and_the_cure() -> None:
    with pytest.raises(ValueError, match=r"blocks.3.fc1 has 102 inputs.*100 and 104.*skip"):
        rotation_of(102, 0, "blocks.3.fc1")


def test_zigzag_deals_forth_and_back() -> None:
    scores = torch.tensor([8.0, 7, 6, 5, 4, 3, 2, 1])
    assert zigzag(scores, 2).tolist() == [0, 3, 4, 7, 1, 2, 5, 6]
    assert zigzag(scores, 4).tolist() == [0, 7, 1, 6, 2, 5, 3, 4]
    with pytest.raises(ValueError, match="3 blocks"):
        zigzag(scores, 3)


def test_zigzag_brings_the_means_of_blocks_together() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(256, generator=generator) ** 8
    order = zigzag(scores, 8)
    assert torch.equal(order.sort().values, torch.arange(256))
    before, after = (x.view(8, -1).mean(1).std() for x in (scores, scores[order]))
    assert after < before / 4


@pytest.mark.parametrize("method", [QuaRot(), DuQuant(), ViDiTQ()])
def test_such_a_width_is_refused_before_the_run(method: PTQMethod) -> None:
    linears = {"fc1": nn.Linear(64, 8), "fc2": nn.Linear(102, 8)}
    run = SimpleNamespace(target=SimpleNamespace(linears=lambda: linears))
    with pytest.raises(ValueError, match="fc2 has 102 inputs"):
        method.start(run)
