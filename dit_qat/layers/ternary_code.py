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

_LONGEST_SHORT = 1 << 15  # columns whose positions int16 can name


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
        order: (in,) int16, or int32 beyond 32768 columns: which original column is stored where;
            None: the original order.
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
        if self.order is None:
            return weight
        return weight[:, self.order.long().argsort()]

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
            rooms["order"] = Room((width,), order_dtype(width))
        check_rooms(cls.name, tensors, rooms)
        check_base3(tensors["codes"], width)
        if plain["ordered"]:
            check_order(tensors["order"])
        return cls(width, group, **tensors)

    def take_rows(self, index: Tensor) -> "TernaryCode":
        """The code of ``weight[index]``: a permutation of the outputs costs nothing."""
        return replace(
            self, codes=self.codes[index], scale=self.scale[index], offset=self.offset[index]
        )

    def without_order(self) -> "TernaryCode":
        """The code of ``weight[:, order]``, for inputs that come in the stored order."""
        return replace(self, order=None)


def order_dtype(width: int) -> torch.dtype:
    """The least integers that name positions of so many columns."""
    return torch.int16 if width <= _LONGEST_SHORT else torch.int32


def stored_order(order: Tensor) -> Tensor:
    """An order (in,) as it is stored.

    Raises:
        ValueError: if it is no permutation.
    """
    check_order(order)
    return order.to(order_dtype(len(order)))


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
