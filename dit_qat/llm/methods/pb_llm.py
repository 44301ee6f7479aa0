"""PB-LLM (arXiv:2310.00034): the most salient entries at eight bits, the others at one."""

from dataclasses import dataclass
from typing import Any, ClassVar, get_args

import torch
from torch import Tensor

from dit_qat.layers.partial_binary_code import (
    HIGH_GRID,
    PartialBinaryCode,
    PartialBlock,
    decode_partial_block,
)
from dit_qat.llm.methods.binarizer import CodingMethod, Metric, error_left
from dit_qat.llm.methods.settings import (
    Preset,
    check_among,
    check_at_least,
    overridden,
    settled,
)
from dit_qat.llm.methods.zones import saliency
from dit_qat.primitives.binary import basis_of, moment_error, normal_equations, signs, solve
from dit_qat.primitives.compensation import Block, column_by_column, compensate
from dit_qat.primitives.integer import Scales, encode, fit_scales
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["PBLLM", "PRESETS", "PBLLMChoices", "PBLLMConfig", "quantize_weight"]

_HALF_MAX = torch.finfo(torch.float16).max


@dataclass(frozen=True)
class PBLLMChoices:
    """What the presets differ in.

    Attributes:
        masked_mean: Mean and mean magnitude over the binary entries; the release also counts, as
            zeros, those that are not.
        refits: Times that both levels are fitted to the signs found, by what will be left of the
            block's error, and the block is rounded again; a row keeps its best.
    """

    masked_mean: bool
    refits: int


PRESETS: dict[Preset, PBLLMChoices] = {
    "paper": PBLLMChoices(False, 0),
    "exact": PBLLMChoices(True, 2),
}


@dataclass(frozen=True)
class PBLLMConfig:
    """Settings of :class:`PBLLM`.

    Attributes:
        preset: ``paper``: levels as released; ``exact``: refitted by the error of the block.
        low_share: Share of binary entries, in every block.
        block_size: Columns per block, which share mean and scale in a row.
        damping: Of the second moment, as a fraction of its mean diagonal.
        metric: Entries of large ``w^2 / U_jj^2``, or of large ``|w|``, keep eight bits.
        masked_mean: As in :class:`PBLLMChoices`; None: the preset's.
        refits: As ``masked_mean``.

    Raises:
        ValueError: for an unknown name or a number outside its range.
    """

    preset: Preset = "exact"
    low_share: float = 0.9
    block_size: int = 128
    damping: float = 0.01
    metric: Metric = "hessian"
    masked_mean: bool | None = None
    refits: int | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.low_share <= 1:
            raise ValueError(f"low_share={self.low_share} is no share; choose one within 0..1")
        check_among("metric", self.metric, get_args(Metric))
        check_at_least(self, block_size=1, damping=0)
        _ = self.choices

    @property
    def choices(self) -> PBLLMChoices:
        """The preset's, with this configuration's own in their place."""
        return overridden(PRESETS, self)


def quantize_weight(
    weight: Tensor, second_moment: Tensor | SecondMoment, config: PBLLMConfig
) -> PartialBinaryCode:
    """Code a weight (out, in), given the second moment (in, in) of its inputs."""
    quantizer = _PartialQuantizer(fit_scales(weight.detach().float(), HIGH_GRID), config)
    compensate(weight, second_moment, quantizer, config.block_size, damping=config.damping)
    return PartialBinaryCode.assemble(config.block_size, quantizer.blocks, quantizer.scales)


class PBLLM(CodingMethod):
    """PB-LLM.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`PBLLMConfig`.
    """

    name: ClassVar[str] = "pb_llm"

    def __init__(self, config: PBLLMConfig | None = None, **fields: Any) -> None:
        self.config = settled(PBLLMConfig, config, fields)

    def code(self, name: str, weight: Tensor, second_moment: SecondMoment) -> PartialBinaryCode:
        """Code one layer."""
        return quantize_weight(weight, second_moment, self.config)


class _PartialQuantizer:
    """Chooses entries and levels of a block, then rounds it column by column."""

    def __init__(self, scales: Scales, config: PBLLMConfig) -> None:
        self.scales, self.config = scales, config
        self.blocks: list[PartialBlock] = []

    def __call__(self, W: Tensor, block: Block) -> Tensor:
        score = saliency(W, block.factor) if self.config.metric == "hessian" else W.abs()
        low = _lowest(score, self.config.low_share)
        best, Q = self._round(W, block, low, self._levels(W, low))
        left = error_left(block.factor)
        least = moment_error(W - Q, left)
        for _ in range(self.config.choices.refits):
            basis = basis_of(low.to(W.dtype), signs(best.plus.to(W.dtype) - 0.5)[None])
            levels = solve(*normal_equations(basis, W - Q * ~low, left))
            trial, trial_Q = self._round(W, block, low, levels.clamp(-_HALF_MAX, _HALF_MAX))
            error = moment_error(W - trial_Q, left)
            better = (error < least)[:, None]
            best = PartialBlock(
                low, *(torch.where(better, *p) for p in zip(trial[1:], best[1:], strict=True))
            )
            Q, least = torch.where(better, trial_Q, Q), torch.minimum(error, least)
        self.blocks.append(best)
        return Q

    def _round(
        self, W: Tensor, block: Block, low: Tensor, levels: Tensor
    ) -> tuple[PartialBlock, Tensor]:
        """Round column by column; the codes, and their values (n, k)."""
        rows = levels.to(torch.float16)
        if not bool(rows.isfinite().all()):
            row = int((~rows.isfinite()).any(1).nonzero()[0])
            raise ValueError(f"row {row} of the weight exceeds float16; scale the layer down")
        plus = torch.empty_like(low)
        high = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
        start = int(block.columns[0])

        def round_column(w: Tensor, column: Tensor) -> Tensor:
            at = column - start
            plus[:, at] = w >= rows[:, :1]
            high[:, at] = encode(w, HIGH_GRID, self.scales)
            own = PartialBlock(low[:, at], plus[:, at], high[:, at], rows)
            return decode_partial_block(own, self.scales).to(W.dtype)

        Q = column_by_column(round_column)(W.clone(), block)
        return PartialBlock(low, plus & low, high * ~low, rows), Q

    def _levels(self, W: Tensor, low: Tensor) -> Tensor:
        """Mean and mean magnitude about it (n, 2) of the binary entries."""
        masked = self.config.choices.masked_mean
        own = low.to(W.dtype)
        count = own.sum(1).clamp_min(1) if masked else W.new_full((len(W),), W.shape[1])
        mean = (W * own).sum(1) / count
        scale = ((W - mean[:, None]).abs() * own).sum(1) / count
        return torch.stack([mean, scale], 1)


def _lowest(score: Tensor, share: float) -> Tensor:
    """Mask (n, k) of the ``share`` lowest scores of a block."""
    count = round(share * score.numel())
    mask = torch.zeros(score.numel(), dtype=torch.bool, device=score.device)
    mask[score.flatten().argsort(stable=True)[:count]] = True
    return mask.view(score.shape)
