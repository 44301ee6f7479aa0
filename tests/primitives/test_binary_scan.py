"""Scanned errors against the plain fit on each zone itself."""

import pytest
import torch
from torch import Tensor

from dit_qat.primitives.binary import plain_error
from dit_qat.primitives.binary_scan import ZoneScan, quantiles_of


def weight(kind: str) -> Tensor:
    W = torch.randn(30, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    W[3], W[4, ::2], W[5] = 0, 0, 0.25
    return W.square() if kind == "saliency" else W


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("kind", ["saliency", "signed"])
def test_scan_is_the_plain_error_of_every_zone(kind: str, order: int, masked: bool) -> None:
    W = weight(kind)
    kept = torch.rand(W.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    mask = kept if masked else None
    edges = quantiles_of(W.abs(), torch.linspace(0.1, 0.9, 7))
    scan = ZoneScan(W, edges, mask)
    bounds = torch.cat([torch.zeros(1), edges, torch.tensor([torch.inf])]).double()
    pairs = [(a, b) for a in range(9) for b in range(a, 9)]
    low, high = torch.tensor(pairs).T
    found = scan.error(low, high, order)
    for (a, b), error in zip(pairs, found, strict=True):
        zone = (W.abs() >= bounds[a]) & (W.abs() < bounds[b])
        zone = zone & kept if masked else zone
        expected = plain_error(W, order, zone.double()).sum()
        torch.testing.assert_close(error, expected, rtol=1e-7, atol=1e-9)


def test_quantiles_are_those_of_torch() -> None:
    W = weight("signed")
    levels = torch.linspace(0, 1, 11)
    torch.testing.assert_close(quantiles_of(W, levels), W.flatten().quantile(levels.double()))
