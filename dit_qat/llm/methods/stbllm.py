"""STBLLM (arXiv:2408.01803): N:M pruning, then binarisation in three magnitude groups."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor

from dit_qat.calibration import Run
from dit_qat.layers.binary_code import BinaryCode, BinaryLayout
from dit_qat.llm.methods.binarizer import (
    Binarizer,
    Recipe,
    binary_code,
    moment_of,
)
from dit_qat.llm.methods.binary_block import Plain
from dit_qat.llm.methods.pruning import (
    PruningMethod,
    keep_highest,
    outlier_share,
    ria,
    shifted_kept,
)
from dit_qat.llm.methods.settings import (
    Preset,
    check_among,
    check_at_least,
    overridden,
    settled,
)
from dit_qat.llm.methods.zones import Groups, ZoneSearch
from dit_qat.primitives.compensation import Update
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["PRESETS", "STBLLM", "STBLLMChoices", "STBLLMConfig", "quantize_weight"]

KeepMask = Literal["enforced", "as_released"]
ZonesOn = Literal["weight", "saliency", "ria"]


@dataclass(frozen=True)
class STBLLMChoices:
    """What the presets differ in.

    Attributes:
        update: Of the columns behind a block.
        iterations: Of ARB in every zone; 0: plain means.
        joint: Then values of all zones of a row together, for what will be left of the error.
    """

    update: Update
    iterations: int
    joint: bool


PRESETS: dict[Preset, STBLLMChoices] = {
    "paper": STBLLMChoices("diagonal", 0, False),
    "exact": STBLLMChoices("exact", 15, True),
}


@dataclass(frozen=True)
class STBLLMConfig:
    """Settings of :class:`STBLLM`.

    Attributes:
        preset: ``paper``: update and plain means of the release; ``exact``: the least-squares
            update, and values refined as in ARB and solved together.
        kept: N, entries kept (the release counts those pruned).
        of: M consecutive columns of a row; it divides ``block_size``.
        keep_mask: ``enforced``: pruned entries are zero. ``as_released``: they are set to zero
            once, and then binarised with the rest, so that the weight is not N:M sparse, nor is it
            stored or counted as such.
        search_on: What zones are sought on.
        norm_power: Of the norms of inputs in the importance of an entry.
        strength: Of the allocation over layers; below 1/2 all keep the same.
        outliers: Times the mean score, above which an entry counts in that allocation.
        block_size: Columns per block.
        damping: Of the second moment, as a fraction of its mean diagonal.
        search: Salient columns and thresholds tried.
        update: As in :class:`STBLLMChoices`; None: the preset's. So for those below.
        iterations: As ``update``.
        joint: As ``update``.

    Raises:
        ValueError: for an unknown name or a number outside its range.
    """

    preset: Preset = "exact"
    kept: int = 4
    of: int = 8
    keep_mask: KeepMask = "enforced"
    search_on: ZonesOn = "weight"
    norm_power: float = 0.5
    strength: float = 0.08
    outliers: float = 3.0
    block_size: int = 128
    damping: float = 0.01
    search: ZoneSearch = ZoneSearch(quantiles=160)  # noqa: RUF009
    update: Update | None = None
    iterations: int | None = None
    joint: bool | None = None

    def __post_init__(self) -> None:
        check_among("keep_mask", self.keep_mask, get_args(KeepMask))
        check_among("search_on", self.search_on, get_args(ZonesOn))
        check_at_least(self, norm_power=0, strength=0, outliers=0, damping=0)
        BinaryLayout(3, 1, kept=self.kept, of=self.of, block_size=self.block_size)
        _ = self.choices

    @property
    def choices(self) -> STBLLMChoices:
        """The preset's, with this configuration's own in their place."""
        return overridden(PRESETS, self)

    def recipe(self, kept: int) -> Recipe:
        """What the binarizer is told."""
        own = self.choices
        pattern = (kept, self.of) if self.keep_mask == "enforced" else (1, 1)
        return Recipe(
            BinaryLayout(3, 1, False, *pattern, block_size=self.block_size),
            Groups(3, 1, doubled=True),
            self.search,
            "saliency" if self.search_on == "saliency" else "weight",
            "hessian" if self.search_on == "saliency" else "magnitude",
            Plain(own.iterations, closed=True),
            joint=own.joint,
        )


def quantize_weight(
    weight: Tensor,
    second_moment: Tensor | SecondMoment,
    config: STBLLMConfig,
    kept: int,
) -> BinaryCode:
    """Prune and binarise a weight (out, in), given the second moment (in, in) of its inputs.

    Args:
        weight: (out, in).
        second_moment: (in, in), of any scale.
        config: How.
        kept: Entries of every ``config.of`` columns.

    Raises:
        ValueError: for a width that patterns do not fill.
    """
    recipe, H = config.recipe(kept), moment_of(second_moment)
    BinaryLayout(3, 1, kept=kept, of=config.of, block_size=config.block_size).blocks(
        weight.shape[1]
    )
    score = ria(weight.float(), H.diagonal().clamp_min(0).sqrt(), config.norm_power)
    keep = keep_highest(score, kept, config.of)
    matrix = None
    if config.search_on == "ria":
        matrix = (score - score.mean()) / score.std(1, keepdim=True).clamp_min(1e-30)
    del score
    mask = keep if config.keep_mask == "enforced" else None
    binarizer = Binarizer(recipe, H, mask, matrix)
    pruned = weight.detach() * keep
    update, damping = config.choices.update, config.damping
    return binary_code(pruned, second_moment, binarizer, update, damping)


class STBLLM(PruningMethod):
    """STBLLM.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`STBLLMConfig`.
    """

    name: ClassVar[str] = "stbllm"

    def __init__(self, config: STBLLMConfig | None = None, **fields: Any) -> None:
        self.config = settled(STBLLMConfig, config, fields)

    def allocate(self, run: Run) -> Mapping[str, int]:
        """More for layers with more outliers among their weights.

        Raises:
            ValueError: if that takes weights that are not in memory.
        """
        own, linears = self.config, run.target.linears()
        if own.strength < 0.5:  # every shift rounds to zero
            return {}
        shares = []
        for name, linear in linears.items():
            if linear.weight.is_meta:
                raise ValueError(
                    f"strength={own.strength} compares all layers, but {name} is not in memory; "
                    "load the whole model, or leave the strength below 0.5"
                )
            ones = torch.ones(linear.in_features, device=linear.weight.device)
            score = ria(linear.weight.detach().float(), ones)
            shares.append(outlier_share(score, own.outliers))
        kept = shifted_kept(shares, own.kept, own.of, own.strength)
        return dict(zip(linears, kept, strict=True))

    def code(self, name: str, weight: Tensor, second_moment: SecondMoment) -> BinaryCode:
        """Prune and binarise one layer."""
        return quantize_weight(weight, second_moment, self.config, self.kept_of(name))
