"""SliM-LLM: bits by column group after salience, ranges by a search that minds salient weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.layers.coded_linear import CodedLinear
from dit_qat.layers.mixed_code import MixedCode
from dit_qat.layers.ternary_code import stored_half
from dit_qat.llm.methods.settings import check_at_least, settled
from dit_qat.llm.methods.staged import Linears, StagedMethod
from dit_qat.primitives.compensation import Block, column_by_column, compensate
from dit_qat.primitives.damped_cholesky import damped_upper
from dit_qat.primitives.second_moment import SecondMoment

__all__ = ["SliM", "SliMConfig", "allocate_bits", "fit_group", "quantize_weight", "salience"]

_SIGMAS = 3.0  # above the mean of its group a weight's salience is an outlier


@dataclass(frozen=True)
class SliMConfig:
    """Settings of :class:`SliM`, with the release's values.

    Attributes:
        bits: 2 or 3 on average.
        group_size: Columns that share bits, scale and offset.
        range_steps: Range factors tried on either side of 1.
        range_width: How far from 1 they reach.
        tokens: On which output distributions are compared.
        damping: Added to the diagonal of H, as a fraction of its mean.
        staged: Whether each group of layers sees what the quantized ones before it leave.

    Raises:
        ValueError: for values outside their range.
    """

    bits: int = 2
    group_size: int = 128
    range_steps: int = 50
    range_width: float = 0.1
    tokens: int = 256
    damping: float = 0.01
    staged: bool = True

    def __post_init__(self) -> None:
        if self.bits not in (2, 3):
            raise ValueError(f"bits={self.bits}: SliM-LLM is for 2 and 3 bits")
        check_at_least(self, group_size=1, range_steps=0, range_width=0, tokens=1, damping=0)
        if self.range_width >= 1:
            raise ValueError(f"range_width={self.range_width} must be below 1; 0.1 is usual")

    @property
    def factors(self) -> list[float]:
        """Of the range, 1 first."""
        steps = [self.range_width * k / self.range_steps for k in range(1, self.range_steps + 1)]
        return [1.0, *(1 + step for step in steps), *(1 - step for step in steps)]


class Affine(NamedTuple):
    """``scale q + offset``, each (out, 1) and a float16, with q from 0 to ``2^bits - 1``."""

    scale: Tensor
    offset: Tensor
    bits: int

    def codes(self, weight: Tensor) -> Tensor:
        """The nearest codes of weights (out, k), as floats."""
        flat = self.scale == 0
        levels = (weight - self.offset) / torch.where(flat, 1, self.scale)
        return torch.where(flat, 0, levels.round_().clamp_(0, (1 << self.bits) - 1))

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for, in the steps of ``MixedCode.decode``."""
        return (codes * self.scale).add_(self.offset)


def quantize_weight(
    weight: Tensor, second_moment: SecondMoment, config: SliMConfig, rows: Tensor
) -> MixedCode:
    """Quantize a weight to mixed bits.

    Args:
        weight: (out, in).
        second_moment: H (in, in) of the inputs.
        config: How.
        rows: Some inputs (tokens, in), on which the number of groups with other bits is chosen.

    Raises:
        ValueError: for shapes that do not fit, values that are not finite, or scales beyond
            float16.
    """
    weight = weight.detach().float()
    worth = salience(weight, second_moment.matrix, config.damping)
    bits = allocate_bits(weight, worth, rows, config)
    rounder = _MixedRounder(weight, worth, bits, config)
    compensate(weight, second_moment, rounder, config.group_size, damping=config.damping)
    return MixedCode.build(
        rounder.codes, bits, rounder.scale, rounder.offset, config.group_size, config.bits
    )


def salience(weight: Tensor, H: Tensor, damping: float) -> Tensor:
    """``w_ij^2 / U_jj^2`` (out, in), U the upper factor of ``H^-1 = U^T U``; 0 in dead columns."""
    R, _ = damped_upper(H, damping, torch.arange(len(H), device=H.device))
    inverse = R.diagonal().square().to(weight.dtype)  # 1 / U_jj^2
    return weight.square() * inverse.masked_fill(H.diagonal() == 0, 0)


def allocate_bits(weight: Tensor, worth: Tensor, rows: Tensor, config: SliMConfig) -> Tensor:
    """Bits of each column group (groups,): as many of one bit more as of one bit less.

    The most salient groups gain and the least salient lose. Their number, from 1 to below half the
    groups, is that of least divergence between the layer's output distributions. A short last
    group keeps its bits, so that the mean over columns is exact.

    Args:
        weight: (out, in).
        worth: Its salience.
        rows: Inputs (tokens, in).
        config: How.
    """
    parts = torch.split(weight, config.group_size, dim=1)
    bits = torch.full((len(parts),), config.bits)
    whole = [k for k, part in enumerate(parts) if part.shape[1] == config.group_size]
    if len(whole) < 3:
        return bits
    totals = torch.stack([part.sum() for part in torch.split(worth, config.group_size, dim=1)])[
        whole
    ]
    ranked = [whole[k] for k in totals.argsort(stable=True).tolist()]
    inputs = torch.split(rows, config.group_size, dim=1)
    exact = (rows @ weight.T).log_softmax(-1)
    output = sum(x @ _plain(w, config.bits).T for x, w in zip(inputs, parts, strict=True))
    best, least = 0, float("inf")
    for count in range(1, (len(whole) + 1) // 2):
        for group, to in ((ranked[count - 1], -1), (ranked[-count], 1)):
            w = parts[group]
            change = _plain(w, config.bits + to) - _plain(w, config.bits)
            output = output + inputs[group] @ change.T
        found = F.log_softmax(torch.as_tensor(output), -1)
        divergence = float(F.kl_div(found, exact, reduction="batchmean", log_target=True))
        if divergence < least:
            best, least = count, divergence
    bits[ranked[:best]] -= 1
    bits[ranked[len(ranked) - best :]] += 1
    return bits


def fit_group(weight: Tensor, salient: Tensor, bits: int, config: SliMConfig) -> Affine:
    """Scale and offset of each row of a group.

    One bit stands for ``mean +- mean|w - mean|``; more for the range with a zero point, times the
    factor of least error, salient weights and the others counting alike as a whole.

    Args:
        weight: (out, k).
        salient: (out, k) bool.
        bits: Of the codes.
        config: Which factors.
    """
    if bits == 1:
        mean = weight.mean(1, keepdim=True)
        spread = (weight - mean).abs().mean(1, keepdim=True)
        return _affine(2 * spread, mean - spread, 1)
    low = weight.amin(1, keepdim=True).clamp_max(0)
    high = weight.amax(1, keepdim=True).clamp_min(0)
    best: Affine | None = None
    least = torch.full_like(low, torch.inf)
    weights = _shares(salient) + _shares(~salient)
    for factor in config.factors:
        trial = _ranged(low * factor, high * factor, bits)
        squares = (trial.values(trial.codes(weight)) - weight).square_()
        error = (squares * weights).sum(1, keepdim=True)
        if best is None:
            best, least = trial, error
            continue
        better = error < least
        least = torch.where(better, error, least)
        scale = torch.where(better, trial.scale, best.scale)
        best = Affine(scale, torch.where(better, trial.offset, best.offset), bits)
    assert best is not None
    return best


def _shares(mask: Tensor) -> Tensor:
    """Weights that make a sum over rows the mean over what is masked."""
    return mask / mask.sum(1, keepdim=True).clamp_min(1)


def _ranged(low: Tensor, high: Tensor, bits: int) -> Affine:
    top = (1 << bits) - 1
    scale = stored_half((high - low) / top, "a scale")
    zero = (-low / torch.where(scale == 0, 1, scale)).round_().clamp_(0, top)
    return _affine(scale, -zero * scale, bits)


def _affine(scale: Tensor, offset: Tensor, bits: int) -> Affine:
    return Affine(stored_half(scale, "a scale"), stored_half(offset, "an offset"), bits)


def _plain(weight: Tensor, bits: int) -> Tensor:
    """Rounded to nearest in the full range, for the choice of bits."""
    fit = fit_group(weight, torch.zeros_like(weight, dtype=torch.bool), bits, _FULL_RANGE)
    return fit.values(fit.codes(weight))


_FULL_RANGE = SliMConfig(range_steps=0)


class _MixedRounder:
    """A block quantizer of one group; it keeps codes and scales."""

    def __init__(self, weight: Tensor, worth: Tensor, bits: Tensor, config: SliMConfig) -> None:
        self.config, self.bits, self._worth = config, bits.tolist(), worth
        shape = (len(weight), len(bits))
        self.codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
        self.scale = torch.empty(shape, device=weight.device)
        self.offset = torch.empty(shape, device=weight.device)

    def __call__(self, W: Tensor, block: Block) -> Tensor:
        group = int(block.columns[0]) // self.config.group_size
        worth = self._worth[:, block.columns]
        salient = worth > worth.mean() + _SIGMAS * worth.std(correction=0)
        fit = fit_group(W, salient, self.bits[group], self.config)
        self.scale[:, group : group + 1] = fit.scale
        self.offset[:, group : group + 1] = fit.offset

        def column(w: Tensor, position: Tensor) -> Tensor:
            codes = fit.codes(w)
            self.codes[:, position] = codes.to(torch.uint8)
            return fit.values(codes)

        return column_by_column(column)(W, block)


class SliM(StagedMethod):
    """SliM-LLM (https://github.com/Aaronhuang-778/SliM-LLM).

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`SliMConfig`.
    """

    name: ClassVar[str] = "slim"

    def __init__(self, config: SliMConfig | None = None, **fields: Any) -> None:
        self.config = settled(SliMConfig, config, fields)

    @property
    def needs(self) -> Needs:
        """Second moments and some tokens."""
        return Needs(second_moment=True, tokens=self.config.tokens, ranges=False)

    def quantize_group(
        self, linears: Linears, statistics: LinearStatistics
    ) -> Mapping[str, nn.Module]:
        """Solve each layer."""
        if statistics.second_moment is None:
            raise ValueError("SliM-LLM needs second moments: ask for Needs(second_moment=True)")
        found: dict[str, nn.Module] = {}
        for name, linear in linears.items():
            code = quantize_weight(
                linear.weight, statistics.second_moment, self.config, statistics.rows
            )
            found[name] = CodedLinear.build(linear, code)
        return found
