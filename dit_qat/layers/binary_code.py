"""BinaryCode: signs, bitmaps and float16 scales of the binary methods, as they are stored.

Columns are taken in blocks. In a block some columns are *salient* and carry two sign planes, the
others one; every entry belongs to a magnitude *group*, and a zone (salient or not, and group) has
its own scales. What is stored, bits along columns, 1 for +1:

* ``signs`` (out, kept bits), ``groups`` (out, kept fields): of the kept entries of a row;
* ``second``: the second plane, of kept entries in salient columns, row after row without gaps;
* ``salient``: a bit per column; ``keep``: for every ``of`` columns the rank of the pattern of kept
  ones among all patterns, read as little-endian numbers;
* ``rows`` (out, blocks, q): first the values of the groups of plain columns, then those of salient
  ones: mean and scales, or only scales where columns have scales too;
* ``plain_columns`` (columns, groups) and ``salient_columns`` (columns, 2 groups): those.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

from dit_qat.layers.weight_code import Room, Setting, WeightCode, check_rooms, check_settings
from dit_qat.primitives.packing import check_int, field_bytes, pack_int, unpack_int
from dit_qat.primitives.patterns import (
    WIDEST_PATTERN,
    pack_bits,
    pack_patterns,
    pattern_bits,
    unpack_bits,
    unpack_patterns,
)

__all__ = ["BinaryBlock", "BinaryCode", "BinaryLayout", "decode_block"]

_MOST_GROUPS = 16


@dataclass(frozen=True)
class BinaryLayout:
    """What is stored of a block.

    Attributes:
        plain_groups: Magnitude groups of columns with one plane.
        salient_groups: Magnitude groups of columns with two.
        column_scales: A scale for every row and one for every column in place of mean and scale.
        kept: Entries kept, in every row, of every ``of`` columns.
        of: 1 to 8 columns; it divides ``block_size``.
        block_size: Columns per block.

    Raises:
        ValueError: for counts outside their range.
    """

    plain_groups: int = 2
    salient_groups: int = 1
    column_scales: bool = False
    kept: int = 1
    of: int = 1
    block_size: int = 128

    def __post_init__(self) -> None:
        for name in ("plain_groups", "salient_groups"):
            if not 1 <= getattr(self, name) <= _MOST_GROUPS:
                raise ValueError(f"{name}={getattr(self, name)} is outside 1..{_MOST_GROUPS}")
        if not 1 <= self.kept <= self.of <= WIDEST_PATTERN:
            raise ValueError(
                f"pattern {self.kept}:{self.of} is none; keep 1 to {self.of} of at most "
                f"{WIDEST_PATTERN} columns, such as 4:8"
            )
        if self.block_size < 1 or self.block_size % self.of:
            raise ValueError(
                f"block_size={self.block_size} is no positive multiple of the {self.of} columns of "
                "a pattern; 128 is usual"
            )

    @property
    def widths(self) -> tuple[int, int]:
        """Row values of a plain and of a salient zone."""
        return (1, 2) if self.column_scales else (2, 3)

    @property
    def row_values(self) -> int:
        """Row values of a block."""
        return self.plain_groups * self.widths[0] + self.salient_groups * self.widths[1]

    @property
    def group_bits(self) -> int:
        """Bits of a group's number."""
        return (max(self.plain_groups, self.salient_groups) - 1).bit_length()

    @property
    def pattern_bits(self) -> int:
        """Bits of the pattern of ``of`` columns."""
        return pattern_bits(self.kept, self.of)

    def blocks(self, width: int) -> int:
        """Blocks of ``width`` columns.

        Raises:
            ValueError: for a width that patterns do not fill.
        """
        if width % self.of:
            raise ValueError(
                f"{width} columns are not a multiple of the {self.of} of a pattern {self.kept}:"
                f"{self.of}; choose another pattern or leave this layer out"
            )
        return -(-width // self.block_size)

    def bits(self, rows: int, width: int, salient: float) -> float:
        """Stored bits per weight of a layer with a share ``salient`` of salient columns."""
        share = self.kept / self.of
        stored = share * (1 + salient + self.group_bits) + self.pattern_bits / self.of + 1 / rows
        stored += 16 * self.row_values * self.blocks(width) / width
        if self.column_scales:
            plain, twice = (1 - salient) * self.plain_groups, 2 * salient * self.salient_groups
            stored += 16 * (plain + twice) / rows
        return stored


class BinaryBlock(NamedTuple):
    """A block of columns (n, k), unpacked.

    Attributes:
        salient: (k,) bool.
        group: (n, k) uint8.
        first: (n, k) bool, where the first plane is +1.
        second: (n, salient columns) bool.
        rows: (n, row values) float16.
        columns: Scales of plain and of salient columns, as stored; None: there are none.
        keep: (n, k) bool; None: everything.
    """

    salient: Tensor
    group: Tensor
    first: Tensor
    second: Tensor
    rows: Tensor
    columns: tuple[Tensor, Tensor] | None = None
    keep: Tensor | None = None


def decode_block(layout: BinaryLayout, block: BinaryBlock) -> Tensor:
    """Values (n, k) float32: the same operations, and bits, wherever a block comes from."""
    weight = torch.zeros(block.group.shape, device=block.rows.device)
    start = layout.plain_groups * layout.widths[0]
    for part, salient in enumerate((~block.salient, block.salient)):
        at = salient.nonzero().flatten()
        if not at.numel():
            continue
        values = block.rows[:, start:] if part else block.rows[:, :start]
        values = values.float().view(len(weight), -1, layout.widths[part])
        planes = [block.first[:, at], block.second][: 1 + part]
        group = block.group[:, at].long()
        if block.columns is None:
            weight[:, at] = _from_levels(values, planes, group)
        else:
            weight[:, at] = _from_scales(values, planes, group, block.columns[part].float())
    return weight if block.keep is None else weight.masked_fill_(~block.keep, 0)


def _from_levels(values: Tensor, planes: Sequence[Tensor], group: Tensor) -> Tensor:
    """Look up ``mean +- scale (+- scale)``; values (n, groups, 1 + planes)."""
    levels = values[..., :1]
    for t, plane in enumerate(planes):
        scale = values[..., t + 1, None]
        levels = torch.stack([levels - scale, levels + scale], -1).flatten(2)
        group = 2 * group + plane
    return levels.flatten(1).gather(1, group)


def _from_scales(
    values: Tensor, planes: Sequence[Tensor], group: Tensor, columns: Tensor
) -> Tensor:
    """Row scale times column scale, exact in float32 for factors of float16, times signs."""
    by_group = columns.view(len(columns), -1, len(planes))  # (columns, groups, planes)
    weight = torch.zeros(group.shape, device=values.device)
    for t, plane in enumerate(planes):
        size = values[..., t].gather(1, group) * by_group[..., t].T.gather(0, group)
        weight += torch.where(plane, size, -size)
    return weight


@dataclass(frozen=True, eq=False)
class BinaryCode(WeightCode):
    """A weight of BiLLM, ARB-LLM, STBLLM or PBS2P; see the module for the tensors.

    Attributes:
        layout: Of its blocks.
        out_features: Rows.
        in_features: Columns.
        stored: The packed tensors by name.
    """

    name: ClassVar[str] = "binary"

    layout: BinaryLayout
    out_features: int
    in_features: int
    stored: Mapping[str, Tensor]

    @classmethod
    def assemble(cls, layout: BinaryLayout, blocks: Sequence[BinaryBlock]) -> Self:
        """Pack blocks, from left to right, all but the last of ``block_size`` columns.

        Raises:
            ValueError: for masks that do not keep as many entries as the layout says.
        """
        salient = torch.cat([block.salient for block in blocks])
        n, width = blocks[0].group.shape[0], len(salient)
        layout.blocks(width)
        first = torch.cat([block.first for block in blocks], 1)
        second = torch.cat([block.second for block in blocks], 1)
        group = torch.cat([block.group for block in blocks], 1)
        stored = {"salient": pack_int(salient, 1, signed=False)}
        if layout.kept < layout.of:
            keep = torch.cat([block.keep for block in blocks if block.keep is not None], 1)
            stored["keep"] = pack_patterns(keep, layout.kept, layout.of)
            first, group = (x[keep].view(n, -1) for x in (first, group))
            second = second[keep[:, salient]]
        stored["signs"] = pack_int(first, 1, signed=False)
        stored["second"] = pack_bits(second.flatten())
        if layout.group_bits:
            stored["groups"] = pack_int(group, layout.group_bits, signed=False)
        stored["rows"] = torch.stack([block.rows for block in blocks], 1)
        for part, kind in enumerate(("plain_columns", "salient_columns")):
            if layout.column_scales:
                found = [block.columns[part] for block in blocks if block.columns is not None]
                stored[kind] = torch.cat(found)
        return cls(layout, n, width, stored)

    def tensors(self) -> dict[str, Tensor]:
        """The packed tensors."""
        return dict(self.stored)

    def settings(self) -> dict[str, Setting]:
        """The layout and the sizes."""
        return asdict(self.layout) | {"rows": self.out_features, "width": self.in_features}

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of :meth:`settings` and :meth:`tensors`.

        Raises:
            ValueError: for settings or tensors that :meth:`assemble` does not make.
        """
        names = BinaryLayout.__dataclass_fields__
        kinds = dict.fromkeys((*names, "rows", "width"), (int,)) | {"column_scales": (bool,)}
        plain = check_settings(cls.name, settings, kinds)
        layout = BinaryLayout(**{name: plain[name] for name in names})
        if plain["rows"] < 1 or plain["width"] < 1:
            raise ValueError(f"a binary code of {plain['rows']} rows, {plain['width']} columns")
        code = cls(layout, plain["rows"], plain["width"], dict(tensors))
        code._check()
        return code

    @property
    def nominal_bits(self) -> float:
        """Sign bits alone, as the papers count: ``(1 + salient share) kept / of``."""
        share = 1 + int(self._salient().count_nonzero()) / self.in_features
        return share * self.layout.kept / self.layout.of

    @torch.no_grad()
    def decode(self) -> Tensor:
        """The weight (out, in) float32."""
        parts = [decode_block(self.layout, block) for block in self.blocks()]
        return torch.cat(parts, 1)

    def blocks(self) -> Iterator[BinaryBlock]:
        """Unpack, block by block."""
        layout, width = self.layout, self.in_features
        salient, keep = self._salient(), self._keep()
        first, group = (
            self._spread("signs", 1, keep),
            self._spread("groups", layout.group_bits, keep),
        )
        second = self._second(salient, keep)
        twice = plain = 0
        starts = [*range(0, width, layout.block_size), width]
        for index, (start, stop) in enumerate(pairwise(starts)):
            own = salient[start:stop]
            more = int(own.count_nonzero())
            less = stop - start - more
            columns = None
            if layout.column_scales:
                columns = (
                    self.stored["plain_columns"][plain : plain + less],
                    self.stored["salient_columns"][twice : twice + more],
                )
            yield BinaryBlock(
                own,
                group[:, start:stop],
                first[:, start:stop].bool(),
                second[:, twice : twice + more].bool(),
                self.stored["rows"][:, index],
                columns,
                None if keep is None else keep[:, start:stop],
            )
            twice, plain = twice + more, plain + less

    def _salient(self) -> Tensor:
        return unpack_int(self.stored["salient"], 1, self.in_features, signed=False).bool()

    def _keep(self) -> Tensor | None:
        if "keep" not in self.stored:
            return None
        layout = self.layout
        return unpack_patterns(self.stored["keep"], layout.kept, layout.of, self.in_features)

    def _spread(self, name: str, bits: int, keep: Tensor | None) -> Tensor:
        """Fields (out, in) uint8, 0 where nothing is kept or stored."""
        layout, shape = self.layout, (self.out_features, self.in_features)
        full = torch.zeros(shape, dtype=torch.uint8, device=self.stored["rows"].device)
        if not bits:
            return full
        count = self.in_features // layout.of * layout.kept
        fields = unpack_int(self.stored[name], bits, count, signed=False)
        return fields if keep is None else full.masked_scatter_(keep, fields)

    def _second(self, salient: Tensor, keep: Tensor | None) -> Tensor:
        """The second plane (out, salient columns) uint8."""
        shape = (self.out_features, int(salient.count_nonzero()))
        kept = torch.ones(shape, dtype=torch.bool, device=salient.device)
        kept = kept if keep is None else keep[:, salient]
        bits = unpack_bits(self.stored["second"], int(kept.count_nonzero()))
        return torch.zeros_like(kept, dtype=torch.uint8).masked_scatter_(kept, bits)

    def _check(self) -> None:
        n, width, layout = self.out_features, self.in_features, self.layout
        blocks, kept = layout.blocks(width), width // layout.of * layout.kept
        rooms = {
            "salient": Room((field_bytes(width, 1),)),
            "signs": Room((n, field_bytes(kept, 1))),
            "rows": Room((n, blocks, layout.row_values), torch.float16),
        }
        if layout.group_bits:
            rooms["groups"] = Room((n, field_bytes(kept, layout.group_bits)))
        if layout.kept < layout.of:
            patterns = width // layout.of
            rooms["keep"] = Room((n, field_bytes(patterns, layout.pattern_bits)))
        known = {name: tensor for name, tensor in self.stored.items() if name in rooms}
        check_rooms(self.name, known, rooms)
        check_int(self.stored["salient"], 1, width)
        check_int(self.stored["signs"], 1, kept)
        salient, keep = self._salient(), self._keep()
        many = int(salient.count_nonzero())
        seconds = n * many if keep is None else int(keep[:, salient].count_nonzero())
        rooms["second"] = Room((field_bytes(seconds, 1),))
        if layout.column_scales:
            rooms["plain_columns"] = Room((width - many, layout.plain_groups), torch.float16)
            rooms["salient_columns"] = Room((many, 2 * layout.salient_groups), torch.float16)
        check_rooms(self.name, self.stored, rooms)
        check_int(self.stored["second"], 1, seconds)
        if layout.group_bits:
            check_int(self.stored["groups"], layout.group_bits, kept)
            group = self._spread("groups", layout.group_bits, keep)
            limits = torch.where(salient, layout.salient_groups, layout.plain_groups)
            if bool((group >= limits).any()):
                raise ValueError("a binary code names groups that it does not have; it is damaged")
