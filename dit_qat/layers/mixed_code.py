"""MixedCode: integer weights whose bits differ between groups of columns."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_qat.layers.weight_code import Room, Setting, WeightCode, check_rooms, check_settings
from dit_qat.primitives.packing import check_int, field_bytes, pack_int, unpack_int

__all__ = ["MixedCode"]

_TAG = 2  # bits of a group's tag: its bits less the lowest that a code has


@dataclass(frozen=True, eq=False)
class MixedCode(WeightCode):
    """``W = scale q + offset`` with q of b - 1, b or b + 1 bits by column group; SliM-LLM.

    Codes lie in three segments, of the columns of each number of bits, low to high.

    Attributes:
        in_features: Columns.
        group_size: Columns that share bits, scale and offset; the last group may be short.
        bits: b, 2 or 3.
        tags: (ceil(groups / 4),) uint8, two bits per group: its bits less ``bits - 1``.
        codes: (out, bytes) uint8.
        scale: (out, groups) float16.
        offset: (out, groups) float16.
    """

    name: ClassVar[str] = "mixed"

    in_features: int
    group_size: int
    bits: int
    tags: Tensor
    codes: Tensor
    scale: Tensor
    offset: Tensor

    @classmethod
    def build(
        cls,
        codes: Tensor,
        group_bits: Tensor,
        scale: Tensor,
        offset: Tensor,
        group_size: int,
        bits: int,
    ) -> "MixedCode":
        """Pack what a method found.

        Args:
            codes: (out, in) uint8.
            group_bits: (groups,), each ``bits - 1``, ``bits`` or ``bits + 1``.
            scale: (out, groups), each a float16 already.
            offset: (out, groups), each a float16 already.
            group_size: Columns that share them.
            bits: In the middle.

        Raises:
            ValueError: for codes that their group cannot hold, or shapes and values that do not
                fit.
        """
        tags = group_bits.long() - (bits - 1)
        if bool(((tags < 0) | (tags > 2)).any()):
            raise ValueError(f"group bits {group_bits.tolist()} are not within 1 of {bits}")
        parts = [
            pack_int(codes[:, columns], count, signed=False)
            for count, columns in _segments(tags, codes.shape[1], group_size, bits)
        ]
        tensors = {
            "tags": pack_int(tags, _TAG, signed=False),
            "codes": torch.cat(parts, 1),
            "scale": scale.half(),
            "offset": offset.half(),
        }
        settings = {"in_features": codes.shape[1], "group_size": group_size, "bits": bits}
        return cls.restore(settings, tensors)

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    @property
    def nominal_bits(self) -> float:
        """Mean over columns."""
        segments = _segments(self._tags(), self.in_features, self.group_size, self.bits)
        return sum(count * len(columns) for count, columns in segments) / self.in_features

    def tensors(self) -> dict[str, Tensor]:
        """Tags, codes, scales and offsets."""
        return {
            "tags": self.tags,
            "codes": self.codes,
            "scale": self.scale,
            "offset": self.offset,
        }

    def settings(self) -> dict[str, Setting]:
        """Width, group and bits."""
        return {
            "in_features": self.in_features,
            "group_size": self.group_size,
            "bits": self.bits,
        }

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The weight (out, in) float32."""
        device = self.codes.device
        weight = torch.empty(self.out_features, self.in_features, device=device)
        start = 0
        for count, columns in _segments(self._tags(), self.in_features, self.group_size, self.bits):
            stop = start + field_bytes(len(columns), count)
            part = unpack_int(self.codes[:, start:stop], count, len(columns), signed=False)
            weight[:, columns] = part.float()
            start = stop
        groups = torch.arange(self.in_features, device=device) // self.group_size
        return weight.mul_(self.scale.float()[:, groups]).add_(self.offset.float()[:, groups])

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "MixedCode":
        """Inverse of :meth:`settings` and :meth:`tensors`, with all values checked.

        Raises:
            ValueError: for what no such code has.
        """
        known = {"in_features": (int,), "group_size": (int,), "bits": (int,)}
        plain = check_settings(cls.name, settings, known)
        width, group, bits = plain["in_features"], plain["group_size"], plain["bits"]
        if width < 1 or group < 1 or bits not in (2, 3):
            raise ValueError(
                f"a mixed code of {bits} bits, {width} columns in groups of {group}; bits are 2 or "
                "3, columns and groups from 1"
            )
        count = -(-width // group)
        rows = len(tensors["codes"]) if "codes" in tensors else 0
        per_row = Room((rows, count), torch.float16)
        tag_room = Room((field_bytes(count, _TAG),))
        rooms = {"tags": tag_room, "codes": Room((rows, 0)), "scale": per_row, "offset": per_row}
        if "tags" in tensors:
            # Their number of bytes follows from the tags, which are looked at first.
            check_rooms(cls.name, {"tags": tensors["tags"]}, {"tags": tag_room})
            segments = _checked_segments(tensors["tags"], width, group, bits)
            rooms["codes"] = Room((rows, sum(field_bytes(len(c), b) for b, c in segments)))
        check_rooms(cls.name, tensors, rooms)
        start = 0
        for count, columns in segments:
            stop = start + field_bytes(len(columns), count)
            check_int(tensors["codes"][:, start:stop], count, len(columns))
            start = stop
        return cls(width, group, bits, **tensors)

    def _tags(self) -> Tensor:
        groups = -(-self.in_features // self.group_size)
        return unpack_int(self.tags, _TAG, groups, signed=False).long()


def _checked_segments(
    tags: Tensor, width: int, group_size: int, bits: int
) -> list[tuple[int, Tensor]]:
    groups = -(-width // group_size)
    check_int(tags, _TAG, groups)
    plain = unpack_int(tags, _TAG, groups, signed=False).long()
    if bool((plain > 2).any()):
        raise ValueError("tags of a mixed code hold a 3, which is no number of bits")
    return _segments(plain, width, group_size, bits)


def _segments(tags: Tensor, width: int, group_size: int, bits: int) -> list[tuple[int, Tensor]]:
    """Bits and columns of the three segments, empty ones left out."""
    of_columns = tags[torch.arange(width, device=tags.device) // group_size]
    found = [(bits - 1 + tag, (of_columns == tag).nonzero().flatten()) for tag in range(3)]
    return [(count, columns) for count, columns in found if len(columns)]
