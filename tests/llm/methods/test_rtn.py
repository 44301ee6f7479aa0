import pytest
import torch

from dit_qat.layers.rounding import ClipSearch
from dit_qat.llm.methods.rtn import RTNConfig, sign_code


def test_one_bit_is_the_nearest_of_two_opposite_levels() -> None:
    """Against brute force: no signs and no level of a group come closer."""
    weight = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    code = sign_code(weight, 8)
    found = (weight - code.decode()).square().view(6, 2, 8).sum(-1)
    levels = torch.linspace(0, 3, 3001)
    for row in range(6):
        for group, values in enumerate(weight[row].view(2, 8)):
            best = (values.abs()[:, None] - levels).square().sum(0).min()
            assert found[row, group] <= best + 1e-5
    assert code.nominal_bits == 1
    assert sign_code(torch.randn(4, 256)).effective_bits == 1 + 16 / 128


def test_rows_of_zeros_stay_zero() -> None:
    weight = torch.zeros(2, 16)
    weight[1] = 1.0
    assert torch.equal(sign_code(weight).decode(), weight)


def test_one_bit_has_no_range() -> None:
    with pytest.raises(ValueError, match="bits=1 has no range"):
        RTNConfig(bits=1, clip=ClipSearch())
