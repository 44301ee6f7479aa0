"""AWQ: scale up the columns that see large activations before rounding to nearest."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Needs, Run
from dit_qat.layers.input_transform import InputTransform, Scale
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.rounding import Rounded
from dit_qat.llm.methods.folding import fold_input_scale, foldable_scale
from dit_qat.llm.methods.rtn import grid_of
from dit_qat.llm.methods.settings import check_at_least, settled
from dit_qat.llm.methods.staged import Linears, StagedMethod
from dit_qat.primitives.integer import IntegerGrid, Scales, decode, encode, fit_scales

__all__ = ["AWQ", "AWQConfig", "Scaled", "clip_ranges", "quantize_siblings", "search_scale"]

_LEAST_ACTIVATION = 1e-4


@dataclass(frozen=True)
class AWQConfig:
    """Settings of :class:`AWQ`, with the release's values.

    Attributes:
        bits: 2, 3, 4 or 8.
        group_size: Inputs that share a scale; it divides every width, or is no less, which is a
            scale per output, as None is.
        symmetric: Signed codes; otherwise with a zero point.
        ratios: Exponents k / ratios of mean activations that are tried, from 0 on.
        clip: Search the range of groups, too; never of q and k.
        clip_steps: Steps that would take the range to nothing.
        clip_least: The smallest fraction of the range that is tried.
        tokens: On which losses are measured.
        staged: Whether each group of layers sees what the quantized ones before it leave.

    Raises:
        ValueError: for values outside their range.
    """

    bits: int = 2
    group_size: int | None = 128
    symmetric: bool = False
    ratios: int = 20
    clip: bool = True
    clip_steps: int = 20
    clip_least: float = 0.5
    tokens: int = 512
    staged: bool = False

    def __post_init__(self) -> None:
        IntegerGrid(self.bits, self.symmetric, self.group_size)
        check_at_least(self, ratios=1, clip_steps=1, tokens=1, clip_least=0)
        if self.clip_least > 1:
            raise ValueError(f"clip_least={self.clip_least} is above 1; 0.5 is usual")

    @property
    def clip_factors(self) -> list[float]:
        """Fractions of the range, from 1 down."""
        count = int((1 - self.clip_least) * self.clip_steps)
        return [1 - step / self.clip_steps for step in range(max(count, 1))]


class Scaled(NamedTuple):
    """Layers of one input, rounded.

    Attributes:
        scale: (in,), by which inputs are divided and columns were multiplied; None: 1.
        rounded: The scaled weights in codes.
    """

    scale: Tensor | None
    rounded: list[Rounded]


def quantize_siblings(
    weights: Sequence[Tensor],
    rows: Tensor,
    config: AWQConfig,
    scale: Tensor | None,
    clipped: Sequence[bool],
) -> Scaled:
    """Round weights (out, in) that read the same input.

    Args:
        weights: Of the siblings.
        rows: Inputs (tokens, in).
        config: How.
        scale: Of :func:`search_scale`; None: 1.
        clipped: Of which weights the range is searched.
    """
    grid = _grid(config, weights[0].shape[1])
    factor = 1.0 if scale is None else scale
    x, found = rows / factor, []
    for weight, search in zip(weights, clipped, strict=True):
        W = weight.detach().float() * factor
        scales = clip_ranges(W, x, grid, config.clip_factors if search else [1.0])
        codes = encode(W, grid, scales)
        found.append(Rounded(codes, scales, decode(codes, grid, scales)))
    return Scaled(scale, found)


def search_scale(weights: Sequence[Tensor], rows: Tensor, config: AWQConfig) -> Tensor:
    """The shared scale (in,) of least output error among powers of mean activations.

    Power 0 is tried first and means no scale, so that rounding alone is never better.

    Args:
        weights: (out, in) of layers that read the same input.
        rows: Inputs (tokens, in).
        config: How.
    """
    grid = _grid(config, rows.shape[1])
    size = rows.abs().mean(0).clamp_min(_LEAST_ACTIVATION)
    best, least = torch.ones_like(size), torch.inf
    for step in range(config.ratios):
        scale = size ** (step / config.ratios)
        scale = scale / (scale.max() * scale.min()).sqrt()
        loss = sum(_loss(weight.detach().float(), rows, grid, scale) for weight in weights)
        if loss < least:
            best, least = scale, loss
    return best


def clip_ranges(
    weight: Tensor, rows: Tensor, grid: IntegerGrid, factors: Sequence[float]
) -> Scales:
    """Scales of least output error of every row and group, its inputs taken alone.

    Args:
        weight: (out, in).
        rows: Inputs (tokens, in).
        grid: Bits and group.
        factors: Of each group's largest magnitude, beyond which weights are clipped.
    """
    count = grid.groups(weight.shape[1])
    groups, x = weight.view(len(weight), count, -1), rows.view(len(rows), count, -1)
    S = torch.einsum("tgi,tgj->gij", x, x)
    widest = groups.abs().amax(-1, keepdim=True)
    best: Scales | None = None
    least = torch.full((len(weight), count), torch.inf, device=weight.device)
    for factor in factors:
        limit = widest * factor
        trial = fit_scales(groups.clamp(-limit, limit).view_as(weight), grid)
        error = decode(encode(weight, grid, trial), grid, trial).sub_(weight).view_as(groups)
        loss = torch.einsum("ogi,gij,ogj->og", error, S, error)
        if best is None:
            best, least = trial, loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best.scale.copy_(torch.where(better, trial.scale, best.scale))
        if best.zero is not None and trial.zero is not None:
            best.zero.copy_(torch.where(better, trial.zero, best.zero))
    assert best is not None
    return best


def _loss(weight: Tensor, rows: Tensor, grid: IntegerGrid, scale: Tensor) -> float:
    scales = fit_scales(weight * scale, grid)
    rounded = decode(encode(weight * scale, grid, scales), grid, scales)
    return float((rows @ (rounded / scale - weight).T).square().sum())


def _grid(config: AWQConfig, width: int) -> IntegerGrid:
    return grid_of(config.bits, config.symmetric, config.group_size, width)


class AWQ(StagedMethod):
    """Activation-aware weight quantization (https://github.com/mit-han-lab/llm-awq).

    Scales are searched where a norm, or a layer that feeds another channel by channel, can take
    them over: of q, k, v, of gate, up, and of down. Losses are output errors of the layers
    themselves, not of the attention or MLP that they are in.

    Args:
        config: The whole configuration, or else
        fields: fields of :class:`AWQConfig`.
    """

    name: ClassVar[str] = "awq"

    def __init__(self, config: AWQConfig | None = None, **fields: Any) -> None:
        self.config = settled(AWQConfig, config, fields)
        self._model: nn.Module | None = None

    @property
    def needs(self) -> Needs:
        """Some tokens."""
        return Needs(tokens=self.config.tokens, ranges=False)

    def start(self, run: Run) -> None:
        """Learn what stands before which layers."""
        super().start(run)
        self._model = run.model

    def quantize_group(
        self, linears: Linears, statistics: LinearStatistics
    ) -> Mapping[str, nn.Module]:
        """Search one scale for layers of one input, and the range of each."""
        roles, c = self.known_roles(), self.config
        weights = [linear.weight.detach().float() for linear in linears.values()]
        clipped = [c.clip and roles.role(name) not in ("q", "k") for name in linears]
        rows = statistics.rows
        scale = self._scale(next(iter(linears)), weights, rows)
        result = quantize_siblings(weights, rows, c, scale, clipped)
        grid, found = _grid(c, rows.shape[1]), {}
        for (name, linear), (codes, scales, _) in zip(linears.items(), result.rounded, strict=True):
            transform = None if scale is None else InputTransform(rows.shape[1], [Scale(scale)])
            found[name] = IntLinear.build(
                linear, grid=grid, scales=scales, codes=codes, activation=None, transform=transform
            )
        return found

    def finish(self, run: Run) -> None:
        """Let what stands before layers take over the division of their inputs."""
        roles, done = self.known_roles(), set()
        for name in run.names:
            before = self._before(name)
            siblings = roles.siblings(name)
            if before is None or siblings in done or not set(siblings) <= set(run.names):
                continue
            done.add(siblings)
            if fold_input_scale(run.model, siblings, before):
                run.note(name, scale="folded")

    def _scale(self, name: str, weights: Sequence[Tensor], rows: Tensor) -> Tensor | None:
        before = self._before(name)
        if before is None or self._model is None:
            return None
        scale = search_scale(weights, rows, self.config)
        source = self._model.get_submodule(before)
        return scale if isinstance(source, nn.Linear) else foldable_scale(scale, source)

    def _before(self, name: str) -> str | None:
        """What can take over a scale of a layer's inputs: their norm, or up_proj."""
        roles = self.known_roles()
        up = [feeder for feeder in roles.feeders(name) if roles.role(feeder) == "up"]
        return up[0] if up else roles.norm_before(name)
