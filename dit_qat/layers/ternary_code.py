"""TernaryCode: asymmetric ternary weights, a scale and an offset per row and column group."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import log2
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_qat.layers.weight_code import Room, Setting, WeightCode, check_rooms, check_settings
from dit_qat.primitives.packing import base3_bytes, check_base3, pack_base3, unpack_base3

__all__ = ["TernaryCode", "check_order", "stored_half", "stored_order"]


@dataclass(frozen=True, eq=False)
class TernaryCode(WeightCode):
    """``W[:, order] = scale T + offset``, T in {-1, 0, +1}; PT2-LLM, arXiv:2510.03267.

    Attributes:
        in_features: Columns.
        group_size: Stored columns that share a scale and an offset; the last group may be short.
        codes: (out, ceil(in / 5)) uint8, as :func:`~dit_qat.primitives.packing.pack_base3` has it,
            in stored order.
        scale: (out, groups) float16, alpha.
        offset: (out, groups) float16, mu.
        order: (in, bytes) uint8, little-endian: which original column is stored where; None: the
            original order.
    """

    name: ClassVar[str] = "ternary"

    in_features: int
    group_size: int
    codes: Tensor
    scale: Tensor
    offset: Tensor
    order: Tensor | None = None

    @classmethod
    def build(
        cls,
        codes: Tensor,
        scale: Tensor,
        offset: Tensor,
        group_size: int,
        order: Tensor | None = None,
    ) -> "TernaryCode":
        """Pack what a method found.

        Args:
            codes: (out, in) of -1, 0, +1 in stored order, any dtype.
            scale: (out, groups), each a float16 already.
            offset: (out, groups), each a float16 already.
            group_size: Columns that share a scale.
            order: (in,) original position of every stored column; None: as they are.

        Raises:
            ValueError: for other codes, or shapes and values that do not fit.
        """
        width = codes.shape[1]
        tensors = {"codes": pack_base3(codes), "scale": scale.half(), "offset": offset.half()}
        if order is not None:
            tensors["order"] = stored_order(order)
        settings = {"in_features": width, "group_size": group_size, "ordered": order is not None}
        return cls.restore(settings, tensors)

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.codes.shape[0]

    @property
    def nominal_bits(self) -> float:
        """log2 of 3."""
        return log2(3)

    def tensors(self) -> dict[str, Tensor]:
        """Codes, scales, offsets and the order, if there is one."""
        stored = {"codes": self.codes, "scale": self.scale, "offset": self.offset}
        return stored if self.order is None else stored | {"order": self.order}

    def settings(self) -> dict[str, Setting]:
        """Width, group, and whether there is an order."""
        return {
            "in_features": self.in_features,
            "group_size": self.group_size,
            "ordered": self.order is not None,
        }

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The weight (out, in) float32 in the original column order."""
        groups = torch.arange(self.in_features, device=self.codes.device) // self.group_size
        weight = unpack_base3(self.codes, self.in_features).float()
        weight.mul_(self.scale.float()[:, groups]).add_(self.offset.float()[:, groups])
        return weight if self.order is None else weight[:, _unpacked(self.order).argsort()]

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "TernaryCode":
        """Inverse of :meth:`settings` and :meth:`tensors`, with all values checked.

        Raises:
            ValueError: for what no such code has.
        """
        known = {"in_features": (int,), "group_size": (int,), "ordered": (bool,)}
        plain = check_settings(cls.name, settings, known)
        width, group = plain["in_features"], plain["group_size"]
        if width < 1 or group < 1:
            raise ValueError(f"a ternary code of {width} columns in groups of {group}; both from 1")
        rows = len(tensors["codes"]) if "codes" in tensors else 0
        per_row = Room((rows, -(-width // group)), torch.float16)
        rooms = {"codes": Room((rows, base3_bytes(width))), "scale": per_row, "offset": per_row}
        if plain["ordered"]:
            rooms["order"] = Room((width, _position_bytes(width)))
        check_rooms(cls.name, tensors, rooms)
        check_base3(tensors["codes"], width)
        if plain["ordered"]:
            check_order(_unpacked(tensors["order"]))
        return cls(width, group, **tensors)

    @property
    def columns(self) -> Tensor | None:
        """Original position of every stored column (in,), long; None: as they are."""
        return None if self.order is None else _unpacked(self.order)

    def take_rows(self, index: Tensor) -> "TernaryCode":
        """The code of ``weight[index]``: a permutation of the outputs costs nothing.

        It shares no memory with this one, as writers of files demand.
        """
        return replace(
            self,
            codes=self.codes[index],
            scale=self.scale[index],
            offset=self.offset[index],
            order=None if self.order is None else self.order.clone(),
        )

    def without_order(self) -> "TernaryCode":
        """The code of ``weight[:, order]``, for inputs that come in the stored order."""
        return replace(self, order=None)


def stored_order(order: Tensor) -> Tensor:
    """An order (in,) as it is stored: (in, bytes) uint8, as few bytes as name all columns.

    Raises:
        ValueError: if it is no permutation.
    """
    check_order(order)
    count = _position_bytes(len(order))
    return torch.stack([order.long() >> 8 * k & 255 for k in range(count)], 1).to(torch.uint8)


def _unpacked(stored: Tensor) -> Tensor:
    """The inverse of :func:`stored_order`: (in,) long."""
    parts = [column.long() << 8 * k for k, column in enumerate(stored.unbind(1))]
    return torch.stack(parts).sum(0)


def _position_bytes(width: int) -> int:
    return max(1, -(-(width - 1).bit_length() // 8))


def check_order(order: Tensor) -> None:
    """Refuse what is no permutation of columns.

    Raises:
        ValueError: see above.
    """
    straight = torch.arange(len(order), device=order.device)
    if not torch.equal(order.long().sort().values, straight):
        raise ValueError(f"the order is no permutation of {len(order)} columns: some are missing")


def stored_half(values: Tensor, what: str) -> Tensor:
    """Values rounded to float16, still in their own dtype.

    Raises:
        ValueError: naming the first row that float16 does not reach.
    """
    rounded = values.half()
    if bool(rounded.isinf().any()):
        row = int(rounded.isinf().nonzero()[0, 0])
        raise ValueError(
            f"row {row} of the weight needs {what} of {float(values[row].abs().max()):g}, beyond "
            f"the {torch.finfo(torch.float16).max:g} of float16; scale the layer down"
        )
    return rounded.to(values.dtype)
