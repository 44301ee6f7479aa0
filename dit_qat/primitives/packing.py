"""Codes to bytes and back, bit for bit as ``docs/format.md`` has it.

Codes are packed along the last dimension; every row starts at a byte. Two layouts cover everything:

* *fields* of b bits: code j of a row takes bits ``b j .. b j + b - 1`` of the row, which is read
  as one little-endian number. Four ternary codes (stored as code + 1) take a byte, eight 3-bit
  codes three bytes.
* *base 3*: five ternary codes per byte. A row of n codes takes ``m = ceil(n / 5)`` bytes, each
  below 243: with ``d[i] = code[i] + 1``, byte j is
  ``d[4 j] + 3 d[4 j + 1] + 9 d[4 j + 2] + 27 d[4 j + 3] + 81 d[4 m + j]``. Four of the five are
  those of byte j at 2 bits, so that one layout becomes the other by operations on whole bytes.

What lies beyond a row's last code is zero. Temporaries stay below a few megabytes, however large
the tensor. Storage is checked and converted on the CPU through numpy: it divides bytes 32 at a time
where torch takes them one by one, and starts no threads, of which a loader has its own.
"""

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

__all__ = [
    "base3_bytes",
    "base3_to_ternary",
    "check_base3",
    "check_int",
    "check_signs",
    "check_ternary",
    "count_ternary",
    "field_bytes",
    "pack_base3",
    "pack_int",
    "pack_signs",
    "pack_ternary",
    "unpack_base3",
    "unpack_int",
    "unpack_signs",
    "unpack_ternary",
]

_AT_ONCE = 1 << 20  # bytes that fit the caches with a few temporaries; a loader's threads take
# turns between numpy's calls, which therefore must not be short
_CHUNK = 1 << 19  # bytes or codes whose temporaries, about tenfold, exist at a time


def field_bytes(count: int, bits: int) -> int:
    """Bytes of a row of ``count`` fields."""
    return -(-count * bits // 8)


def base3_bytes(count: int) -> int:
    """Bytes of a row of ``count`` ternary codes, five per byte."""
    return -(-count // 5)


def pack_ternary(codes: Tensor) -> Tensor:
    """Pack -1, 0, +1 at 2 bits, four per byte: (..., n) of any dtype to (..., ceil(n/4)) uint8.

    Raises:
        ValueError: for other codes.
    """
    return _pack_fields(codes, 2, 1, -1, 1)


def unpack_ternary(packed: Tensor, count: int) -> Tensor:
    """Inverse of :func:`pack_ternary`: (..., ceil(count/4)) uint8 to (..., count) int8."""
    _check_width(packed, field_bytes(count, 2))
    table = _ternary_table(packed.device)
    return _looked_up(packed.contiguous(), table)[..., :count]


def check_ternary(packed: Tensor, count: int) -> None:
    """Refuse bytes that :func:`pack_ternary` does not write.

    Raises:
        ValueError: for a field of 3, bits beyond the last code, or another width.
    """
    _check_width(packed, field_bytes(count, 2))
    x = packed.cpu().numpy()
    if (x & x // 2 & 0x55).any():
        _refuse(packed & (packed >> 1) & 0x55, "2-bit fields of 3, which is no ternary code")
    _check_padding(packed, count * 2)


def count_ternary(packed: Tensor, count: int) -> tuple[int, int, int]:
    """How many codes of :func:`pack_ternary` are -1, 0 and +1."""
    _check_width(packed, field_bytes(count, 2))
    rows = packed.numel() // max(packed.shape[-1], 1)
    histogram = torch.zeros(256, dtype=torch.int64, device=packed.device)
    flat = packed.flatten()
    for start in range(0, flat.numel(), _CHUNK):
        histogram += torch.bincount(flat[start : start + _CHUNK], minlength=256)
    fields = (
        torch.arange(256, device=packed.device)[:, None]
        >> torch.tensor([0, 2, 4, 6], device=packed.device)
    ) & 3
    found = [int((histogram * (fields == field).sum(1)).sum()) for field in range(3)]
    return found[0] - rows * (-count % 4), found[1], found[2]  # a row's end looks like -1


def pack_base3(codes: Tensor) -> Tensor:
    """Pack -1, 0, +1 five per byte: (..., n) of any dtype to (..., ceil(n/5)) uint8.

    Raises:
        ValueError: for other codes.
    """
    count, width = codes.shape[-1], base3_bytes(codes.shape[-1])

    def pack(rows: Tensor) -> Tensor:
        digits = _padded(_offset(rows, 1, -1, 1), 5 * width)
        packed = digits[:, 4 * width :] * 81
        for i in range(4):
            packed += digits[:, i : 4 * width : 4] * 3**i
        return packed

    return _by_rows(codes, width, torch.uint8, pack, count)


def unpack_base3(packed: Tensor, count: int) -> Tensor:
    """Inverse of :func:`pack_base3`: (..., ceil(count/5)) uint8 to (..., count) int8."""
    return unpack_ternary(base3_to_ternary(packed, count), count)


def check_base3(packed: Tensor, count: int) -> None:
    """Refuse bytes that :func:`pack_base3` does not write.

    Raises:
        ValueError: for a byte of 243 or more, digits beyond the last code, or another width.
    """
    width = base3_bytes(count)
    _check_width(packed, width)
    if not packed.numel():
        return
    if packed.cpu().numpy().max() >= 243:
        _refuse(packed >= 243, "bytes of 243 or more, which are no five ternary codes")
    last = max(count - 4 * width, 0)  # column of the first fifth digit beyond the last code
    if packed[..., last:].cpu().numpy().max(initial=0) >= 81:
        _refuse(packed[..., last:] >= 81, "ends that are not zero", last)
    for i in range(count, 4 * width):
        digits = packed[..., i // 4 : i // 4 + 1] // 3 ** (i % 4) % 3
        _refuse(digits, "ends that are not zero", i // 4)


def base3_to_ternary(packed: Tensor, count: int) -> Tensor:
    """Five per byte to four per byte: (..., ceil(count/5)) to (..., ceil(count/4)), both uint8.

    Bytes of 243 or more become bytes that mean nothing; :func:`check_base3` refuses them.
    """
    width, out_width = base3_bytes(count), field_bytes(count, 2)
    _check_width(packed, width)
    rows = packed.reshape(-1, width).cpu()
    out = torch.empty(rows.shape[0], out_width, dtype=torch.uint8)
    step = max(1, _AT_ONCE // max(width, 1))
    fifths = torch.empty(min(step, len(rows)), -(-width // 4) * 4, dtype=torch.uint8)
    fifths[:, width:] = 0
    for start in range(0, rows.shape[0], step):
        _convert_base3(rows[start : start + step], out[start : start + step], fifths)
    return out.reshape(*packed.shape[:-1], out_width).to(packed.device)


def _convert_base3(rows: Tensor, out: Tensor, room: Tensor) -> None:
    """A few rows of base 3 (rows, width) into ``out``; room has zeros behind column ``width``.

    With ``q[k] = byte // 3**k``, digit k is ``q[k] - 3 q[k + 1]``, so that the first four at 2 bits
    each are ``q[0] + q[1] + 4 q[2] + 16 q[3] - 192 q[4]``; modulo 256, -192 is 64.
    """
    (count, width), x, fields, fifths = rows.shape, rows.numpy(), out.numpy(), room.numpy()
    quotients = x // 3
    fours = x + quotients
    for weight in (4, 16, 64):
        quotients //= 3
        fours += quotients * weight
    fields[:, :width] = fours
    fifths[:count, :width] = quotients
    # Fifths in the four bytes of a word: the product has them side by side in its upper byte.
    words = fifths[:count].view("<u4") * (1 << 24 | 1 << 18 | 1 << 12 | 1 << 6)
    words >>= 24
    fields[:, width:] = words[:, : fields.shape[1] - width]


def pack_int(codes: Tensor, bits: int, signed: bool = True) -> Tensor:
    """Pack b-bit integers, two's complement or unsigned: (..., n) to (..., ceil(n b / 8)) uint8.

    Raises:
        ValueError: for codes or bits (1..8) out of range.
    """
    _check_bits(bits)
    low = -(1 << (bits - 1)) if signed else 0
    return _pack_fields(codes, bits, 0, low, low + (1 << bits) - 1)


def unpack_int(packed: Tensor, bits: int, count: int, signed: bool = True) -> Tensor:
    """Inverse of :func:`pack_int`: (..., count) int8, or uint8 if unsigned."""
    _check_bits(bits)
    fields = _unpack_fields(packed, bits, count)
    if not signed:
        return fields
    unused = 8 - bits
    return (fields << unused).view(torch.int8) >> unused  # the shift repeats the sign


def check_int(packed: Tensor, bits: int, count: int) -> None:
    """Refuse bits beyond the last code of a row, or another width; all else is some code.

    Raises:
        ValueError: see above.
    """
    _check_width(packed, field_bytes(count, bits))
    _check_padding(packed, count * bits)


def pack_signs(signs: Tensor) -> Tensor:
    """Pack -1 (bit 0) and +1 (bit 1), eight per byte: (..., n) to (..., ceil(n/8)) uint8.

    Raises:
        ValueError: for other codes.
    """
    if bool((signs == 0).any()):
        raise ValueError("signs hold zeros; a sign plane holds -1 and +1 only")
    return _pack_fields((signs + 1) / 2, 1, 0, 0, 1)


def unpack_signs(packed: Tensor, count: int) -> Tensor:
    """Inverse of :func:`pack_signs`: (..., count) int8."""
    return _unpack_fields(packed, 1, count).view(torch.int8).mul_(2).sub_(1)


def check_signs(packed: Tensor, count: int) -> None:
    """Refuse bits beyond the last sign of a row, or another width.

    Raises:
        ValueError: see above.
    """
    check_int(packed, 1, count)


def _pack_fields(codes: Tensor, bits: int, offset: int, low: int, high: int) -> Tensor:
    """Eight fields, a byte each, are one 64-bit word: move them together."""
    count, groups = codes.shape[-1], -(-codes.shape[-1] // 8)

    def pack(rows: Tensor) -> Tensor:
        spread = _padded(_offset(rows, offset, low, high), groups * 8).view(torch.int64)
        words = torch.zeros_like(spread)
        for k in range(8):
            words |= (spread >> ((8 - bits) * k)) & _mask(bits, bits * k)
        kept = words.view(torch.uint8).view(-1, groups, 8)[..., :bits]
        return kept.flatten(1)[:, : field_bytes(count, bits)]

    return _by_rows(codes, field_bytes(count, bits), torch.uint8, pack, count)


def _unpack_fields(packed: Tensor, bits: int, count: int) -> Tensor:
    """The inverse: move them apart."""
    _check_width(packed, field_bytes(count, bits))
    groups = -(-count // 8)

    def unpack(rows: Tensor) -> Tensor:
        words = _padded(_padded(rows, groups * bits).view(-1, groups, bits), 8).view(torch.int64)
        spread = torch.zeros_like(words)
        for k in range(8):
            spread |= (words << ((8 - bits) * k)) & _mask(bits, 8 * k)
        return spread.view(torch.uint8).flatten(1)[:, :count]

    return _by_rows(packed, count, torch.uint8, unpack, count)


def _mask(bits: int, at: int) -> int:
    """``bits`` ones at bit ``at`` of a signed 64-bit number."""
    mask = ((1 << bits) - 1) << at
    return mask - (1 << 64) if mask >> 63 else mask


def _by_rows(
    x: Tensor, width: int, dtype: torch.dtype, function: Callable[[Tensor], Tensor], cost: int
) -> Tensor:
    """Apply ``function`` to a few rows (rows, n) at a time; the result has rows of ``width``."""
    rows = x.reshape(-1, x.shape[-1])
    out = torch.empty(rows.shape[0], width, dtype=dtype, device=x.device)
    if out.numel():
        step = max(1, _CHUNK // max(cost, 1))
        for start in range(0, rows.shape[0], step):
            out[start : start + step] = function(rows[start : start + step])
    return out.reshape(*x.shape[:-1], width)


def _offset(codes: Tensor, offset: int, low: int, high: int) -> Tensor:
    """Codes plus ``offset`` as uint8, two's complement where negative."""
    whole = codes.to(torch.int16)
    if bool(((whole < low) | (whole > high) | (whole != codes)).any()):
        raise ValueError(
            f"codes span {codes.min().item()} .. {codes.max().item()}; only whole numbers from "
            f"{low} to {high} fit"
        )
    return (whole + offset).to(torch.uint8)


def _padded(x: Tensor, width: int) -> Tensor:
    """Zeros behind every row; the result is contiguous."""
    padded: Tensor = torch.nn.functional.pad(x, (0, width - x.shape[-1]))
    return padded.contiguous()


def _looked_up(packed: Tensor, table: Tensor) -> Tensor:
    """Ternary codes of all bytes, by pairs: (..., w) to (..., 4 w) int8."""
    flat = packed.flatten()
    even = flat if flat.numel() % 2 == 0 else _padded(flat, flat.numel() + 1)
    codes = table.index_select(0, _pairs(even)).view(torch.int8)
    return codes[: 4 * flat.numel()].view(*packed.shape[:-1], 4 * packed.shape[-1])


def _pairs(x: Tensor) -> Tensor:
    """Two bytes at a time as an index; from single bytes, the conversion alone takes longer."""
    return x.view(torch.int16).int() & 0xFFFF


@lru_cache(maxsize=16)
def _ternary_table(device: torch.device) -> Tensor:
    """Eight int8 codes, as one int64, for every pair of bytes."""
    with torch.inference_mode(False):
        pairs = torch.arange(1 << 16, device="cpu")
        fields = (pairs[:, None] >> (2 * torch.arange(8, device="cpu"))) & 3
        return (fields - 1).to(torch.int8).view(torch.int64).flatten().to(device)


def _check_bits(bits: int) -> None:
    if not 1 <= bits <= 8:
        raise ValueError(f"bits={bits} is outside 1..8; choose bits in it")


def _check_width(packed: Tensor, width: int) -> None:
    if packed.dtype != torch.uint8 or packed.shape[-1] != width:
        raise ValueError(
            f"packed codes are {packed.dtype} rows of {packed.shape[-1]} bytes; "
            f"this many codes take torch.uint8 rows of {width}"
        )


def _check_padding(packed: Tensor, bits: int) -> None:
    if bits % 8:
        _refuse(packed[..., -1:] >> (bits % 8), "ends that are not zero", bits // 8)


def _refuse(bad: Tensor, what: str, at: int = 0) -> None:
    """Refuse what is not zero; column 0 of ``bad`` is byte ``at`` of a row."""
    if bool(bad.any()):
        row, column = (int(i) for i in bad.reshape(-1, bad.shape[-1]).nonzero()[0])
        raise ValueError(
            f"packed codes hold {what} ({int(bad.count_nonzero())} of them, first in row {row}, "
            f"byte {at + column}); the data are damaged"
        )
