"""PlaneCode: a sum of sign planes with row scales, and a scale per column."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from dit_qat.layers.weight_code import Room, Setting, WeightCode, check_rooms, check_settings
from dit_qat.primitives.packing import check_signs, field_bytes, pack_signs, unpack_signs

__all__ = ["PlaneCode"]

_MOST_PLANES = 4


@dataclass(frozen=True, eq=False)
class PlaneCode(WeightCode):
    """``W_ij = c_j sum_p r_ip B_p,ij`` with B in {-1, +1}; D2Quant, arXiv:2602.02546.

    Attributes:
        in_features: Columns.
        group_size: Columns that share row scales; the last group may be short.
        planes: (planes, out, ceil(in / 8)) uint8, signs.
        row_scale: (out, groups, planes) float16, r.
        column_scale: (in,) float16, c; None: 1, as where the layer before has taken it over.
    """

    name: ClassVar[str] = "planes"

    in_features: int
    group_size: int
    planes: Tensor
    row_scale: Tensor
    column_scale: Tensor | None = None

    @classmethod
    def build(
        cls, signs: Tensor, row_scale: Tensor, group_size: int, column_scale: Tensor | None = None
    ) -> "PlaneCode":
        """Pack what a method found.

        Args:
            signs: (planes, out, in) of -1 and +1.
            row_scale: (out, groups, planes), each a float16 already.
            group_size: Columns that share row scales.
            column_scale: (in,), each a float16 already; None: 1.

        Raises:
            ValueError: for other signs, or shapes and values that do not fit.
        """
        tensors = {"planes": pack_signs(signs), "row_scale": row_scale.half()}
        if column_scale is not None:
            tensors["column_scale"] = column_scale.half()
        settings = {
            "in_features": signs.shape[2],
            "group_size": group_size,
            "planes": signs.shape[0],
            "scaled": column_scale is not None,
        }
        return cls.restore(settings, tensors)

    @property
    def out_features(self) -> int:
        """Rows."""
        return self.planes.shape[1]

    @property
    def nominal_bits(self) -> float:
        """A bit per plane."""
        return float(len(self.planes))

    def tensors(self) -> dict[str, Tensor]:
        """Planes, row scales and column scales, if there are some."""
        stored = {"planes": self.planes, "row_scale": self.row_scale}
        return stored if self.column_scale is None else stored | {"column_scale": self.column_scale}

    def settings(self) -> dict[str, Setting]:
        """Width, group, number of planes, and whether columns have scales."""
        return {
            "in_features": self.in_features,
            "group_size": self.group_size,
            "planes": len(self.planes),
            "scaled": self.column_scale is not None,
        }

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The weight (out, in) float32."""
        groups = torch.arange(self.in_features, device=self.planes.device) // self.group_size
        weight = torch.zeros(self.out_features, self.in_features, device=self.planes.device)
        for number, plane in enumerate(self.planes):
            scale = self.row_scale[:, groups, number].float()
            weight.add_(scale.mul_(unpack_signs(plane, self.in_features)))
        return weight if self.column_scale is None else weight.mul_(self.column_scale.float())

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "PlaneCode":
        """Inverse of :meth:`settings` and :meth:`tensors`, with all values checked.

        Raises:
            ValueError: for what no such code has.
        """
        known = {"in_features": (int,), "group_size": (int,), "planes": (int,), "scaled": (bool,)}
        plain = check_settings(cls.name, settings, known)
        width, group, count = plain["in_features"], plain["group_size"], plain["planes"]
        if width < 1 or group < 1 or not 1 <= count <= _MOST_PLANES:
            raise ValueError(
                f"a planes code of {count} planes of {width} columns in groups of {group}; there "
                f"are 1 to {_MOST_PLANES} planes, and columns and groups from 1"
            )
        packed = tensors.get("planes")
        rows = packed.shape[1] if packed is not None and packed.ndim == 3 else 0
        rooms = {
            "planes": Room((count, rows, field_bytes(width, 1))),
            "row_scale": Room((rows, -(-width // group), count), torch.float16),
        }
        if plain["scaled"]:
            rooms["column_scale"] = Room((width,), torch.float16)
        check_rooms(cls.name, tensors, rooms)
        check_signs(tensors["planes"], width)
        return cls(width, group, **tensors)

    def without_column_scale(self) -> "PlaneCode":
        """The code for inputs that come multiplied by the column scales."""
        return replace(self, column_scale=None)
