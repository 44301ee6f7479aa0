"""Ternary codes: the same weight out as in, and nothing else gets in."""

from math import log2

import pytest
import torch
from torch import Tensor, nn

from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.ternary_code import TernaryCode, stored_half
from dit_qat.layers.weight_code import WEIGHT_CODES


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def parts(rows: int, width: int, group: int) -> tuple[Tensor, Tensor, Tensor]:
    groups = -(-width // group)
    codes = torch.randint(-1, 2, (rows, width), generator=generator())
    scale = torch.randn(rows, groups, generator=generator(1)).half()
    offset = torch.randn(rows, groups, generator=generator(2)).half()
    return codes, scale.float(), offset.float()


@pytest.mark.parametrize(
    ("rows", "width", "group"), [(3, 20, 8), (4, 256, 128), (2, 300, 128), (1, 1, 128)]
)
@pytest.mark.parametrize("ordered", [False, True])
def test_a_code_is_the_weight_it_was_made_of(
    rows: int, width: int, group: int, ordered: bool
) -> None:
    codes, scale, offset = parts(rows, width, group)
    order = torch.randperm(width, generator=generator(3)) if ordered else None
    code = TernaryCode.build(codes, scale, offset, group, order)
    columns = torch.arange(width) if order is None else order
    expected = torch.empty(rows, width)
    for place, column in enumerate(columns.tolist()):
        at = place // group
        expected[:, column] = codes[:, place] * scale[:, at] + offset[:, at]
    assert torch.equal(code.decode(), expected)
    again = WEIGHT_CODES["ternary"].restore(code.settings(), code.tensors())
    assert torch.equal(again.decode(), expected)
    assert (code.out_features, code.in_features) == (rows, width)
    assert order is None if code.columns is None else torch.equal(code.columns, columns)


def test_all_243_bytes_of_five_codes_come_back() -> None:
    every = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 5)
    code = TernaryCode.build(every, torch.ones(243, 1), torch.zeros(243, 1), 5)
    assert torch.equal(code.decode(), every.float())
    assert len(set(code.codes.flatten().tolist())) == 243


def test_bits_are_those_of_the_specification() -> None:
    code = TernaryCode.build(*parts(64, 1280, 128), 128)
    assert code.nominal_bits == log2(3)
    assert code.effective_bits == pytest.approx(1.6 + 0.25)
    order = torch.randperm(1280)
    ordered = TernaryCode.build(*parts(64, 1280, 128), 128, order)
    assert ordered.effective_bits == pytest.approx(1.85 + 16 / 64)
    few = TernaryCode.build(*parts(64, 256, 128), 128, torch.arange(256))
    assert few.order is not None
    assert few.order.shape == (256, 1)


def test_a_permutation_of_outputs_folds_into_the_rows_of_the_layer_before() -> None:
    """Gate and up give their rows in the order that down stores its columns in."""
    gate, up = (TernaryCode.build(*parts(40, 24, 8), 8) for _ in range(2))
    order = torch.randperm(40, generator=generator(5))
    down = TernaryCode.build(*parts(12, 40, 16), 16, order)
    x = torch.randn(7, 24, generator=generator(6))
    hidden = nn.functional.silu(x @ gate.decode().T) * (x @ up.decode().T)
    rows = [code.take_rows(order) for code in (gate, up)]
    folded = nn.functional.silu(x @ rows[0].decode().T) * (x @ rows[1].decode().T)
    assert torch.equal(rows[0].decode(), gate.decode()[order])
    torch.testing.assert_close(folded, hidden[:, order])
    assert down.order is not None
    taken = down.take_rows(torch.arange(12)).tensors()
    for name, tensor in down.tensors().items():
        assert torch.equal(taken[name], tensor)
        assert taken[name].data_ptr() != tensor.data_ptr()
    plain = down.without_order()
    assert plain.order is None
    torch.testing.assert_close(
        folded @ plain.decode().T, hidden @ down.decode().T, rtol=1e-4, atol=1e-3
    )


def test_group_sums_of_the_inputs_stand_for_the_offsets() -> None:
    codes, scale, offset = parts(16, 64, 16)
    code = TernaryCode.build(codes, scale, offset, 16)
    x = torch.randn(5, 64, generator=generator(4))
    sums = x.view(5, 4, 16).sum(-1)
    products = torch.einsum("tgk,ogk,og->to", x.view(5, 4, 16), codes.view(16, 4, 16) * 1.0, scale)
    torch.testing.assert_close(x @ code.decode().T, products + sums @ offset.T)


def test_it_serves_a_layer() -> None:
    code = TernaryCode.build(*parts(6, 20, 8), 8, torch.randperm(20, generator=generator()))
    layer = CodedLinear.build(nn.Linear(20, 6), code)
    x = torch.randn(3, 20)
    assert torch.equal(layer(x), nn.functional.linear(x, code.decode(), layer.bias))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("codes", torch.full((3, 4), 250, dtype=torch.uint8), "243 or more"),
        ("codes", torch.zeros(3, 5, dtype=torch.uint8), "codes of a ternary code"),
        ("scale", torch.full((3, 3), torch.inf).half(), "NaN or infinite"),
        ("offset", torch.zeros(3, 3), "offset of a ternary code is torch.float32"),
        ("order", torch.zeros(20, 1, dtype=torch.uint8), "no permutation of 20"),
        ("more", torch.zeros(1), "missing or unknown: more"),
    ],
)
def test_damaged_tensors_are_refused(name: str, value: Tensor, message: str) -> None:
    code = TernaryCode.build(*parts(3, 20, 8), 8, torch.randperm(20))
    with pytest.raises(ValueError, match=message):
        TernaryCode.restore(code.settings(), code.tensors() | {name: value})


def test_damaged_settings_are_refused() -> None:
    code = TernaryCode.build(*parts(3, 20, 8), 8)
    for changed in ({"group_size": 0}, {"group_size": 5}, {"ordered": True}, {"in_features": "20"}):
        with pytest.raises(ValueError, match=r"ternary code"):
            TernaryCode.restore(code.settings() | changed, code.tensors())


def test_scales_beyond_float16_name_their_row() -> None:
    with pytest.raises(ValueError, match=r"row 1 .* scale of 1e\+06, beyond the 65504"):
        stored_half(torch.tensor([[1.0], [-1e6]]), "a scale")
    assert float(stored_half(torch.tensor([[0.1]]), "a scale")) == float(torch.tensor(0.1).half())
