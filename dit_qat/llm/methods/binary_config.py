"""What the configurations of BiLLM, ARB-LLM and PBS2P have in common."""

from dataclasses import dataclass
from typing import get_args

from dit_qat.llm.methods.binarizer import Metric, SearchOn
from dit_qat.llm.methods.settings import Preset, check_among, check_at_least
from dit_qat.llm.methods.zones import ZoneSearch
from dit_qat.primitives.compensation import Update

__all__ = ["FULL_RANGE", "BinaryChoices", "BinaryConfig"]

FULL_RANGE = ZoneSearch(most_salient=12, quantiles=49, lowest=0.02, highest=0.98)
"""Zones for searches on the weight, of which many entries are large.

Thresholds over nearly all quantiles: those of the releases end where most of their searches end.
Salient columns as many as the releases find in blocks of 128, about a tenth: on the weight a search
takes all that it may, and each costs a bit per weight that the nominal 1.1 would hide.
"""


@dataclass(frozen=True)
class BinaryChoices:
    """What presets differ in, with the values of the releases.

    Attributes:
        update: Of the columns behind a block.
        search_on: The matrix on which zones are sought.
        search: Which zones are tried.
    """

    update: Update = "diagonal"
    search_on: SearchOn = "saliency"
    search: ZoneSearch = ZoneSearch()  # noqa: RUF009


@dataclass(frozen=True)
class BinaryConfig:
    """Settings of a binary method with zones.

    Attributes:
        preset: ``paper`` as published or released, ``exact`` ours.
        block_size: Columns per block.
        damping: Of the second moment, as a fraction of its mean diagonal.
        metric: Which columns are salient: by ``w^2 / U_jj^2``, or by ``|w|`` (the default of the
            releases, though every published command asks for the other).
        update: As in :class:`BinaryChoices`; None: the preset's. So for those below, and for those
            that a method adds to them.
        search_on: As ``update``.
        search: As ``update``.

    Raises:
        ValueError: for an unknown name or a number outside its range.
    """

    preset: Preset = "exact"
    block_size: int = 128
    damping: float = 0.01
    metric: Metric = "hessian"
    update: Update | None = None
    search_on: SearchOn | None = None
    search: ZoneSearch | None = None

    def __post_init__(self) -> None:
        check_at_least(self, block_size=1, damping=0)
        if self.update is not None:
            check_among("update", self.update, get_args(Update))
