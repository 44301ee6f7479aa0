"""SVDQuant (arXiv:2411.05007): smooth, absorb outliers in a low-rank branch, round the residual."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from dit_qat.calibration import BlockView, Needs
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.methods.smoothing import (
    SharedInput,
    balance,
    shared_inputs,
    stacked_weight,
    weight_maxima,
)
from dit_qat.dit.ptq.method import PTQMethod
from dit_qat.layers import InputTransform, IntLinear, Scale, TokenQuantizer
from dit_qat.layers.linear import BranchDtype
from dit_qat.layers.rounding import (
    GPTQSettings,
    Rounded,
    Rounding,
    legal_group,
    round_gptq,
    round_nearest,
)
from dit_qat.primitives.integer import IntegerGrid, Scales

__all__ = [
    "Branched",
    "SVDQuant",
    "SVDQuantConfig",
    "SharedLayers",
    "branch_and_round",
    "iterate_branch",
    "leading_factors",
    "smoothing_grid",
    "stacked_layers",
]

_EXACT_WIDTH = 512  # from here on the many trials of the grid take an approximate subspace
_OVERSAMPLE, _POWER_ROUNDS = 8, 4


@dataclass(frozen=True)
class SVDQuantConfig:
    """Settings of :class:`SVDQuant`, as released for int4.

    Attributes:
        weight_bits: 2, 3, 4 or 8.
        activation_bits: 2..8; None: activations stay float.
        group_size: Inputs that share a scale, of weights and activations; where it does not divide
            a width, the largest smaller one that does.
        rank: Of the branch; narrower layers get their full rank min(in, out). 0: no branch.
        iterations: Most rounds of the branch; they end when the output error rises.
        grid_steps: Of the smoothing exponents: 20 makes 39 candidates; 1: no smoothing.
        rounding: Of the final residual: ``nearest``, or with error feedback (SVDQuant + GPTQ).
        gptq: Settings of ``rounding="gptq"``.
        branch_dtype: What the branch is rounded to, before the residual is formed.
        probe_calls: Calls on which candidates are compared.

    Raises:
        ValueError: for bits, a group, a rank or numbers outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    group_size: int = 64
    rank: int = 32
    iterations: int = 100
    grid_steps: int = 20
    rounding: Rounding = "nearest"
    gptq: GPTQSettings = field(default_factory=GPTQSettings)
    branch_dtype: BranchDtype = "float16"
    probe_calls: int = 4

    def __post_init__(self) -> None:
        IntegerGrid(self.weight_bits, group_size=self.group_size)
        if self.activation_bits is not None:
            TokenQuantizer(self.activation_bits)
        for name, least in (("rank", 0), ("iterations", 1), ("grid_steps", 1), ("probe_calls", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} is below {least}; choose it higher")


class SVDQuant(PTQMethod):
    """SVDQuant; linears of one input share their smoothing and their down-projection.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`SVDQuantConfig`.
    """

    name: ClassVar[str] = "svdquant"

    def __init__(self, config: SVDQuantConfig | None = None, **kwargs: Any) -> None:
        refuse_both("SVDQuant", config, kwargs)
        self.config = SVDQuantConfig(**kwargs) if config is None else config

    @property
    def needs(self) -> Needs:
        """Channel maxima for smoothing, second moments for GPTQ."""
        gptq = self.config.rounding == "gptq"
        return Needs(second_moment=gptq, probe_calls=self.config.probe_calls)

    def quantize_block(self, view: BlockView) -> dict[str, IntLinear]:
        """Smooth, branch and round every group of linears of one input."""
        layers: dict[str, IntLinear] = {}
        for names in stacked_layers(view):
            layers |= SharedLayers(view, names, self.config).quantize()
        return layers


def stacked_layers(view: BlockView) -> list[SharedInput]:
    """Linears of one input within one module of a block: q, k and v, but not the MLP beside them.

    In a parallel block such as FLUX's single one all four read the same tensor; the paper stacks
    q, k and v, and a rank of 32 is little for all.
    """
    groups: dict[tuple[SharedInput, str], list[str]] = {}
    for names in shared_inputs(view):
        for name in names:
            groups.setdefault((names, _child(view, name)), []).append(name)
    return [tuple(names) for names in groups.values()]


def smoothing_grid(steps: int = 20) -> list[tuple[float, float]]:
    """Exponents (a, b) of ``s = max|X|^a / max|W|^b``: b = 0, b = 1 - a, and no smoothing.

    Example:
        >>> len(smoothing_grid(20))
        39
    """
    powers = [step / steps for step in range(1, steps)]
    return [(0.0, 0.0), *((a, 0.0) for a in powers), *((a, 1 - a) for a in powers)]


def leading_factors(weight: Tensor, rank: int, exact: bool = True) -> tuple[Tensor, Tensor]:
    """Best factors A (out, rank), B (rank, in) of a weight: ``A B = W V V^T``, by its Gram matrix.

    The Gram matrix of the shorter side has the singular vectors as its eigenvectors; in float64
    that is as good as an SVD here, and several times faster.

    Args:
        weight: (out, in).
        rank: 1 .. min(out, in).
        exact: Otherwise a subspace iteration in float32, for trials.
    """
    W = weight.double() if exact else weight.float()
    tall = W.shape[0] >= W.shape[1]
    gram = W.T @ W if tall else W @ W.T
    V = torch.linalg.eigh(gram).eigenvectors[:, -rank:] if exact else _leading_space(gram, rank)
    A, B = (W @ V, V.T) if tall else (V, V.T @ W)
    return A.float(), B.float()


def _leading_space(gram: Tensor, rank: int) -> Tensor:
    """Approximate leading eigenvectors (n, rank) by subspace iteration and a Ritz step."""
    size = min(rank + _OVERSAMPLE, gram.shape[0])
    generator = torch.Generator().manual_seed(0)
    Q = torch.randn(gram.shape[0], size, generator=generator).to(gram)
    for _ in range(_POWER_ROUNDS):
        Q = torch.linalg.qr(gram @ Q).Q
    ritz: Tensor = torch.linalg.eigh(Q.T @ gram @ Q).eigenvectors
    leading: Tensor = Q @ ritz[:, -rank:]
    return leading


class Branched(NamedTuple):
    """``W = up down + residual``, the residual rounded.

    Attributes:
        up: (out, rank) in the branch's dtype; None: no branch.
        down: (rank, in).
        residual: (out, in) float32, before rounding.
        rounded: The residual in codes.
    """

    up: Tensor | None
    down: Tensor | None
    residual: Tensor
    rounded: Rounded


def branch_and_round(
    weight: Tensor,
    target: Tensor,
    rank: int,
    grid: IntegerGrid,
    branch_dtype: BranchDtype = "float16",
    exact: bool = True,
) -> Branched:
    """Give the leading part of ``target`` to the branch, and round what is left of the weight.

    Args:
        weight: (out, in).
        target: (out, in) the weight, or the weight less what the codes already hold.
        rank: Of the branch; 0: none.
        grid: Of the codes.
        branch_dtype: What the branch is stored in, rounded before the residual is formed.
        exact: See :func:`leading_factors`.
    """
    if rank == 0:
        return Branched(None, None, weight, round_nearest(weight, grid))
    dtype: torch.dtype = getattr(torch, branch_dtype)
    up, down = _stored(*leading_factors(target, rank, exact), dtype)
    residual = weight - up.float() @ down.float()
    return Branched(up, down, residual, round_nearest(residual, grid))


def _stored(up: Tensor, down: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Factors in their dtype; what is beyond its range moves to the other factor."""
    if up.abs().max() > torch.finfo(dtype).max or down.abs().max() > torch.finfo(dtype).max:
        tiny = torch.finfo(torch.float32).tiny
        ratio = up.norm(dim=0).clamp_min(tiny) / down.norm(dim=1).clamp_min(tiny)
        size = torch.exp2((ratio.log2() / 2).round())
        up, down = up / size, down * size[:, None]
    return up.to(dtype), down.to(dtype)


def iterate_branch(
    weight: Tensor,
    rank: int,
    grid: IntegerGrid,
    error: Callable[[Branched], float],
    iterations: int = 100,
    branch_dtype: BranchDtype = "float16",
) -> tuple[Branched, list[float]]:
    """Refit the branch to what the codes leave over, while the output error falls.

    Args:
        weight: (out, in), smoothed.
        rank: Of the branch.
        grid: Of the codes.
        error: Output error with the branch active.
        iterations: Most rounds, the first included.
        branch_dtype: What the branch is stored in.

    Returns:
        The best round, and the errors of those kept, which fall.
    """
    best = branch_and_round(weight, weight, rank, grid, branch_dtype)
    errors = [error(best)]
    for _ in range(iterations - 1 if rank else 0):
        left_over = weight - best.rounded.values
        trial = branch_and_round(weight, left_over, rank, grid, branch_dtype)
        found = error(trial)
        if found >= errors[-1]:
            break
        best = trial
        errors.append(found)
    return best, errors


class SharedLayers:
    """Linears of one input on their way: one smoothing vector, one branch, stacked along ``out``.

    Args:
        view: Of their block.
        names: Full names.
        config: Settings.
    """

    def __init__(self, view: BlockView, names: SharedInput, config: SVDQuantConfig) -> None:
        self.view, self.names, self.config = view, names, config
        self.linears = [view.linears[name] for name in names]
        self.statistics = view.statistics[names[0]]
        self.weight = stacked_weight(self.linears)
        width = self.weight.shape[1]
        self.rank = min(config.rank, width, *(linear.out_features for linear in self.linears))
        self.group = legal_group(width, config.group_size)
        self.grid = IntegerGrid(config.weight_bits, group_size=self.group)
        self.submodule = _evaluated_module(view, names)

    def quantize(self) -> dict[str, IntLinear]:
        """Smoothing by the grid, the branch by iteration, then the final rounding."""
        s = self.best_smoothing()
        branched, _ = iterate_branch(
            self.weight * s,
            self.rank,
            self.grid,
            lambda trial: self.error(s, trial),
            self.config.iterations,
            self.config.branch_dtype,
        )
        if self.config.rounding == "gptq":
            moment, transform = self.statistics.second_moment, self.transform(s)
            rounded = round_gptq(
                branched.residual, moment, self.grid, self.config.gptq, transform=transform
            )
            branched = branched._replace(rounded=rounded)
        return self.layers(s, branched)

    def best_smoothing(self) -> Tensor:
        """The candidate s (in,) of least output error with the branch active."""
        x_max, w_max = self.statistics.absmax, weight_maxima(self.weight)
        exact = min(self.weight.shape) <= _EXACT_WIDTH

        def error(s: Tensor) -> float:
            smoothed = self.weight * s
            rank, dtype = self.rank, self.config.branch_dtype
            return self.error(
                s, branch_and_round(smoothed, smoothed, rank, self.grid, dtype, exact)
            )

        grid = smoothing_grid(self.config.grid_steps)
        candidates = [balance(x_max, w_max, a, b) for a, b in grid]
        return candidates[0] if len(grid) == 1 else min(candidates, key=error)

    def error(self, s: Tensor, branched: Branched) -> float:
        """Relative squared output error of the attention or feed-forward around these linears."""
        return self.view.error(self.layers(s, branched), self.submodule)

    def layers(self, s: Tensor, branched: Branched) -> dict[str, IntLinear]:
        """The layers by name, each with its rows."""
        transform, first, made = self.transform(s), 0, {}
        codes, scales, _ = branched.rounded
        for name, linear in zip(self.names, self.linears, strict=True):
            rows = slice(first, first + linear.out_features)
            up, down = branched.up, branched.down
            made[name] = IntLinear.build(
                linear,
                grid=self.grid,
                scales=Scales(scales.scale[rows], None),
                codes=codes[rows],
                activation=self._activation(),
                transform=transform,
                branch=None if up is None or down is None else (up[rows], down),
                branch_dtype=self.config.branch_dtype,
            )
            first = rows.stop
        return made

    def transform(self, s: Tensor) -> InputTransform | None:
        """The online division, if there is any."""
        return None if bool((s == 1).all()) else InputTransform(s.numel(), [Scale(s)])

    def _activation(self) -> TokenQuantizer | None:
        bits = self.config.activation_bits
        if bits is None:
            return None
        # Unsigned codes where no input is negative, as behind a ReLU.
        signed = bool((self.statistics.low < 0).any())
        return TokenQuantizer(bits, symmetric=signed, group_size=self.group)


def _evaluated_module(view: BlockView, names: SharedInput) -> str | None:
    """The attention or feed-forward module that holds these linears; None: the whole block."""
    children: Mapping[str, nn.Module] = dict(view.block.named_children())
    found = {_child(view, name) for name in names}
    child = found.pop()
    if found or isinstance(children[child], nn.ModuleList):
        return None
    return f"{view.name}.{child}"


def _child(view: BlockView, name: str) -> str:
    """The module of a block that a linear is, or lies in."""
    return name.removeprefix(f"{view.name}.").split(".")[0]
