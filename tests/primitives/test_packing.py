"""Packing: exact inverses, the documented bytes, and damage found."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dit_qat.primitives import packing
from dit_qat.primitives.packing import (
    base3_bytes,
    base3_to_ternary,
    check_base3,
    check_int,
    check_signs,
    check_ternary,
    count_ternary,
    field_bytes,
    pack_base3,
    pack_int,
    pack_signs,
    pack_ternary,
    unpack_base3,
    unpack_int,
    unpack_signs,
    unpack_ternary,
)

WIDTHS = [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 16, 17, 19, 20, 21, 63, 96, 1152]


def integers(low: int, high: int, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high + 1, shape, generator=generator, dtype=torch.int16)


@pytest.mark.parametrize("width", WIDTHS)
def test_ternary_codes_survive_both_storages_and_the_step_between(width: int) -> None:
    codes = integers(-1, 1, 3, 2, width).to(torch.int8)
    fours, fives = pack_ternary(codes), pack_base3(codes)
    assert fours.shape == (3, 2, field_bytes(width, 2))
    assert fives.shape == (3, 2, base3_bytes(width))
    check_ternary(fours, width)
    check_base3(fives, width)
    assert torch.equal(unpack_ternary(fours, width), codes)
    assert torch.equal(unpack_base3(fives, width), codes)
    assert torch.equal(base3_to_ternary(fives, width), fours)
    assert count_ternary(fours, width) == tuple(int((codes == c).sum()) for c in (-1, 0, 1))


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [1, 7, 8, 9, 24, 33])
def test_integers_survive(bits: int, signed: bool, width: int) -> None:
    low = -(1 << (bits - 1)) if signed else 0
    codes = integers(low, low + (1 << bits) - 1, 5, width)
    packed = pack_int(codes, bits, signed)
    assert packed.shape == (5, field_bytes(width, bits))
    check_int(packed, bits, width)
    unpacked = unpack_int(packed, bits, width, signed)
    assert unpacked.dtype == (torch.int8 if signed else torch.uint8)
    assert torch.equal(unpacked.to(torch.int16), codes)


@pytest.mark.parametrize("width", [1, 8, 13])
def test_signs_survive(width: int) -> None:
    signs = integers(0, 1, 4, width).mul(2).sub(1)
    packed = pack_signs(signs)
    check_signs(packed, width)
    assert torch.equal(unpack_signs(packed, width).to(torch.int16), signs)


def as_number(packed: Tensor) -> int:
    return int.from_bytes(bytes(packed.tolist()), "little")


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_a_row_of_fields_is_one_little_endian_number(bits: int) -> None:
    codes = integers(0, (1 << bits) - 1, 13)
    expected = sum(int(code) << (bits * j) for j, code in enumerate(codes))
    assert as_number(pack_int(codes, bits, signed=False)) == expected


def test_ternary_fields_are_codes_plus_one() -> None:
    assert pack_ternary(torch.tensor([1, 0, -1, 1, 0])).tolist() == [0b10_00_01_10, 0b01]
    assert pack_signs(torch.tensor([1, -1, 1, 1, -1, -1, -1, -1, 1])).tolist() == [0b1101, 1]
    assert pack_int(torch.tensor([-1, -4, 3]), 3).tolist() == [0b11_100_111, 0]


@pytest.mark.parametrize("width", [1, 4, 5, 6, 9, 17, 23])
def test_base_3_is_its_formula(width: int) -> None:
    codes, m = integers(-1, 1, width), base3_bytes(width)
    d = [*(int(code) + 1 for code in codes), *[0] * (5 * m - width)]
    expected = [
        d[4 * j] + 3 * d[4 * j + 1] + 9 * d[4 * j + 2] + 27 * d[4 * j + 3] + 81 * d[4 * m + j]
        for j in range(m)
    ]
    assert pack_base3(codes).tolist() == expected


def test_every_byte_of_base_3_becomes_its_fields() -> None:
    codes = torch.cartesian_prod(*[torch.tensor([-1, 0, 1])] * 5)
    packed = pack_base3(codes)
    assert sorted(packed.flatten().tolist()) == list(range(243))
    assert torch.equal(base3_to_ternary(packed, 5), pack_ternary(codes))


def test_sizes_per_weight() -> None:
    assert base3_bytes(4608) * 8 / 4608 == pytest.approx(1.6, rel=1e-3)
    assert field_bytes(4608, 2) * 8 / 4608 == 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_codes_of_any_dtype_pack_alike(dtype: torch.dtype) -> None:
    codes = integers(-1, 1, 4, 11)
    assert torch.equal(pack_ternary(codes.to(dtype)), pack_ternary(codes))
    assert torch.equal(pack_base3(codes.to(dtype).T.contiguous().T), pack_base3(codes))


def test_chunks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = integers(-1, 1, 50, 37)
    whole = pack_base3(codes), pack_ternary(codes), pack_int(codes, 3)
    counts = count_ternary(whole[1], 37)
    monkeypatch.setattr(packing, "_CHUNK", 64)
    monkeypatch.setattr(packing, "_AT_ONCE", 64)
    for one, other in zip(
        whole, (pack_base3(codes), pack_ternary(codes), pack_int(codes, 3)), strict=True
    ):
        assert torch.equal(one, other)
    assert torch.equal(base3_to_ternary(whole[0], 37), whole[1])
    assert count_ternary(whole[1], 37) == counts


@pytest.mark.parametrize("bad", [2, -2, 0.5, float("nan"), 65536.0, 1e9])
@pytest.mark.parametrize("pack", [pack_ternary, pack_base3])
def test_other_codes_are_refused(pack: object, bad: float) -> None:
    assert callable(pack)
    with pytest.raises(ValueError, match="only whole numbers from -1 to 1 fit"):
        pack(torch.tensor([0.0, bad, 1.0]))


def test_values_beyond_the_bits_are_refused() -> None:
    for codes, bits, signed in (([8], 4, True), ([-9], 4, True), ([-1], 2, False), ([4], 2, False)):
        with pytest.raises(ValueError, match="fit"):
            pack_int(torch.tensor(codes), bits, signed)
    with pytest.raises(ValueError, match=r"bits=9 is outside 1\.\.8"):
        pack_int(torch.tensor([1]), 9)
    with pytest.raises(ValueError, match="holds -1 and \\+1 only"):
        pack_signs(torch.tensor([1, 0]))


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_checks_accept_exactly_what_packing_writes(data: st.DataObject) -> None:
    width = data.draw(st.integers(1, 23))
    for size, check, unpack, pack in (
        (field_bytes(width, 2), check_ternary, unpack_ternary, pack_ternary),
        (base3_bytes(width), check_base3, unpack_base3, pack_base3),
    ):
        given_bytes = data.draw(st.binary(min_size=size, max_size=size))
        packed = torch.tensor(list(given_bytes), dtype=torch.uint8).view(1, -1)
        try:
            check(packed, width)
        except ValueError as error:
            # Whatever was refused, reading it as if it were good gives other bytes again.
            assert "damaged" in str(error)  # noqa: PT017
            codes = unpack(packed, width)
            assert codes.max() > 1 or not torch.equal(pack(codes), packed)
        else:
            assert torch.equal(pack(unpack(packed, width)), packed)


@pytest.mark.parametrize(
    ("check", "width", "at", "byte", "message"),
    [
        (check_base3, 1152, 7, 243, "243 or more.*row 2, byte 7"),
        (check_base3, 1152, 230, 81, "ends .*row 2, byte 230"),
        (check_base3, 6, 1, 9, "ends .*row 2, byte 1"),
        (check_ternary, 1152, 7, 0b11, "fields of 3.*row 2, byte 7"),
        (check_ternary, 1151, 287, 0b1000000, "ends .*row 2, byte 287"),
    ],
)
def test_damage_is_found_and_named(
    check: Callable[[Tensor, int], None], width: int, at: int, byte: int, message: str
) -> None:
    size = base3_bytes(width) if check is check_base3 else field_bytes(width, 2)
    packed = torch.zeros(3, size, dtype=torch.uint8)
    check(packed, width)
    packed[2, at] = byte
    with pytest.raises(ValueError, match=message):
        check(packed, width)


@pytest.mark.parametrize("check", [check_ternary, check_base3, check_signs])
def test_rows_of_another_width_or_type_are_refused(check: object) -> None:
    assert callable(check)
    for packed in (torch.zeros(2, 9, dtype=torch.uint8), torch.zeros(2, 3, dtype=torch.int8)):
        with pytest.raises(ValueError, match=r"take torch\.uint8 rows of"):
            check(packed, 12)
