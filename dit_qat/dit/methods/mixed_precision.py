"""ViDiT-Q's metric-decoupled mixed precision: budgets by error, ranks by each group's own metric.

Section 4.3 of arXiv:2406.02540. Weight bits belong to a layer, activation bits to a layer and a
range of sampler steps.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import pairwise
from typing import Any, NamedTuple

from torch import nn

from dit_qat.calibration import Call, swapped
from dit_qat.dit.methods.output_error import OutputError
from dit_qat.dit.ptq.method import PTQRun
from dit_qat.layers import IntLinear, StepBits, TokenQuantizer
from dit_qat.primitives.integer import IntegerGrid

__all__ = [
    "Allocation",
    "MixedPrecision",
    "Score",
    "allocate",
    "group_budgets",
    "layer_groups",
    "raise_most_sensitive",
]

Score = Callable[[nn.Module], float]
"""From a model in which something is quantized to a score, lower being better."""

Trial = Callable[[str, nn.Linear, int, int | None], IntLinear]
"""A layer at weight bits and activation bits (None: float), from its name and itself."""

_GROUPS = {
    "temporal attention": ("*temp*",),
    "cross-attention": ("*attn2*", "*cross*"),
    "self-attention": ("*att*",),
    "feed-forward": ("*",),
}
_FINEST = 8  # weight bits beside which only the activation's error counts


@dataclass(frozen=True)
class MixedPrecision:
    """Budgets and choices.

    Attributes:
        weight_budget: Mean weight bits, weighted by the number of weights; None: not mixed.
        activation_budget: Mean activation bits in every range of steps, weighted alike; None: not
            mixed.
        weight_choices: Bits of weights.
        activation_choices: Bits of activations.
        ranges: How many ranges of steps have activation bits of their own.
        calls: Recorded calls per range on which errors are measured.

    Raises:
        ValueError: for bits that do not exist, a budget outside its choices, or nothing to mix.
    """

    weight_budget: float | None = None
    activation_budget: float | None = None
    weight_choices: tuple[int, ...] = (2, 4, 8)
    activation_choices: tuple[int, ...] = (4, 6, 8)
    ranges: int = 4
    calls: int = 1

    def __post_init__(self) -> None:
        for kind in ("weight", "activation"):
            choices = tuple(sorted({*getattr(self, f"{kind}_choices")}))
            object.__setattr__(self, f"{kind}_choices", choices)
            if not choices:
                raise ValueError(f"{kind}_choices are empty; name some bits")
            for bits in choices:
                IntegerGrid(bits) if kind == "weight" else TokenQuantizer(bits)
            budget = getattr(self, f"{kind}_budget")
            if budget is not None and not choices[0] <= budget <= choices[-1]:
                raise ValueError(
                    f"{kind}_budget={budget} is outside {choices[0]}..{choices[-1]}, which "
                    f"{kind}_choices={choices} reach; change one of them"
                )
        if self.weight_budget is None and self.activation_budget is None:
            raise ValueError("mixed precision without a budget; give a weight or activation budget")
        if min(self.ranges, self.calls) < 1:
            raise ValueError(f"ranges={self.ranges} and calls={self.calls} must be at least 1")


class Allocation(NamedTuple):
    """Bits by layer.

    Attributes:
        weights: By full name; empty: not mixed.
        activations: By full name; empty: not mixed.
        report: Plain values about how they came about.
    """

    weights: dict[str, int]
    activations: dict[str, StepBits]
    report: dict[str, Any]


def layer_groups(names: Iterable[str]) -> dict[str, list[str]]:
    """Layers by what they mostly move: content, text alignment, motion, detail."""
    groups: dict[str, list[str]] = {}
    for name in names:
        kind = next(k for k, globs in _GROUPS.items() if any(fnmatchcase(name, g) for g in globs))
        groups.setdefault(kind, []).append(name)
    return groups


def allocate(
    run: PTQRun,
    groups: Mapping[str, Sequence[str]],
    mixed: MixedPrecision,
    trial: Trial,
    metrics: Mapping[str, Score],
) -> Allocation:
    """Choose bits on the float model of a run.

    Args:
        run: Its model is float still.
        groups: Layers by group.
        mixed: Budgets and choices.
        trial: Makes a layer at given bits.
        metrics: Scores that rank the layers of a group.
    """
    ranges = _step_ranges(run, mixed.ranges)
    weights: dict[str, int] = {}
    activations: dict[str, StepBits] = {}
    report: dict[str, Any] = {}
    if mixed.weight_budget is not None:
        calls = [call for part in ranges for call in _calls(run, part, mixed.calls)]
        errors = _Errors(run, groups, calls, metrics)
        make = errors.maker(lambda name, linear, bits: trial(name, linear, bits, None))
        weights, report["weight_budgets"] = errors.divide(
            make, mixed.weight_choices, mixed.weight_budget
        )
        report["weight_bits"] = weights
    if mixed.activation_budget is not None:
        by_range = []
        for part in ranges:
            errors = _Errors(run, groups, _calls(run, part, mixed.calls), metrics)
            make = errors.maker(lambda name, linear, bits: trial(name, linear, _FINEST, bits))
            by_range.append(
                errors.divide(make, mixed.activation_choices, mixed.activation_budget)[0]
            )
        activations = _by_timestep(run, ranges, by_range)
        report["activation_bits"] = by_range
    return Allocation(weights, activations, report)


def group_budgets(
    errors: Mapping[str, Mapping[int, float]], sizes: Mapping[str, int], average: float
) -> dict[str, float]:
    """Mean bits of every group that make the summed error least.

    Between measured bits the error of a group is taken to fall in straight lines (those of the
    lower convex hull, along which layers can be raised one by one), so the steepest lines are
    bought first, and this is exact.

    Args:
        errors: Of the output, by group and bits of all its layers.
        sizes: Weights of each group.
        average: Mean bits over all weights.
    """
    budgets = {group: float(min(by_bits)) for group, by_bits in errors.items()}
    left = average * sum(sizes.values()) - sum(sizes[g] * bits for g, bits in budgets.items())
    lines = []
    for group, by_bits in errors.items():
        for low, high in pairwise(_hull(by_bits)):
            gain = (by_bits[low] - by_bits[high]) / ((high - low) * sizes[group])
            lines.append((gain, group, high - low))
    for gain, group, span in sorted(lines, reverse=True):
        bought = min(span * sizes[group], left) if gain > 0 else 0
        budgets[group] += bought / sizes[group]
        left -= bought
    return budgets


def raise_most_sensitive(
    ranking: Sequence[str], sizes: Mapping[str, int], choices: Sequence[int], budget: float
) -> dict[str, int]:
    """Bits of the layers of one group: all at the largest choice within budget, then upwards.

    Args:
        ranking: Layers, the most sensitive first.
        sizes: Weights of each layer.
        choices: Rising bits.
        budget: Mean bits over the group's weights.
    """
    floor = max(bits for bits in choices if bits <= budget + 1e-9)
    bits = dict.fromkeys(ranking, floor)
    left = (budget - floor) * sum(sizes[name] for name in ranking) + 1e-6
    for above in (choice for choice in choices if choice > floor):
        for name in ranking:
            price = (above - bits[name]) * sizes[name]
            if price <= left:
                bits[name], left = above, left - price
    return bits


class _Errors:
    """Output errors of a run's float model with layers or groups of it quantized."""

    def __init__(
        self,
        run: PTQRun,
        groups: Mapping[str, Sequence[str]],
        calls: Sequence[Call],
        metrics: Mapping[str, Score],
    ) -> None:
        self.model, self.groups, self.metrics = run.model, groups, metrics
        self.linears = run.target.linears()
        self.sizes = {name: linear.weight.numel() for name, linear in self.linears.items()}
        self.error = OutputError(run.model, calls)

    def maker(
        self, trial: Callable[[str, nn.Linear, int], IntLinear]
    ) -> Callable[[Sequence[str], int], dict[str, IntLinear]]:
        """Replacements of some layers at given bits."""
        return lambda names, bits: {name: trial(name, self.linears[name], bits) for name in names}

    def divide(
        self,
        make: Callable[[Sequence[str], int], dict[str, IntLinear]],
        choices: Sequence[int],
        average: float,
    ) -> tuple[dict[str, int], dict[str, float]]:
        """Bits by layer, and the budget of every group."""
        errors = {
            group: {bits: self.error(make(names, bits)) for bits in choices}
            for group, names in self.groups.items()
        }
        sizes = {g: sum(self.sizes[n] for n in names) for g, names in self.groups.items()}
        budgets = group_budgets(errors, sizes, average)
        found: dict[str, int] = {}
        for group, names in self.groups.items():
            ranking = self._ranking(group, names, make, choices[0])
            found |= raise_most_sensitive(ranking, self.sizes, choices, budgets[group])
        return {name: found[name] for name in self.linears}, budgets

    def _ranking(
        self,
        group: str,
        names: Sequence[str],
        make: Callable[[Sequence[str], int], dict[str, IntLinear]],
        bits: int,
    ) -> list[str]:
        """Layers of a group, the one first whose quantization alone hurts most."""
        metric = self.metrics.get(group)

        def score(name: str) -> float:
            layers = make([name], bits)
            if metric is None:
                return self.error(layers)
            with swapped(self.model, layers):
                return metric(self.model)

        return sorted(names, key=score, reverse=True)


def _hull(errors: Mapping[int, float]) -> list[int]:
    """Bits on the lower convex hull of an error, rising."""
    hull: list[int] = []
    for bits in sorted(errors):
        while len(hull) > 1 and _slope(errors, hull[-2], hull[-1]) >= _slope(
            errors, hull[-2], bits
        ):
            hull.pop()
        hull.append(bits)
    return hull


def _slope(errors: Mapping[int, float], low: int, high: int) -> float:
    return (errors[high] - errors[low]) / (high - low)


def _step_ranges(run: PTQRun, count: int) -> list[list[int]]:
    """Recorded steps in as many contiguous ranges as there are, at most one per step."""
    steps = sorted(run.store.timesteps)
    count = min(count, len(steps))
    edges = [len(steps) * i // count for i in range(count + 1)]
    return [steps[low:high] for low, high in pairwise(edges)]


def _calls(run: PTQRun, steps: Sequence[int], count: int) -> list[Call]:
    """A few calls from the middle of a range of steps."""
    places = [i for i, step in enumerate(run.store.steps) if step in steps]
    first = max(len(places) - count, 0) // 2
    return [run.store[i] for i in places[first : first + count]]


def _by_timestep(
    run: PTQRun, ranges: Sequence[Sequence[int]], bits: Sequence[Mapping[str, int]]
) -> dict[str, StepBits]:
    timesteps = run.store.timesteps
    times = tuple(timesteps[step] for part in ranges for step in part)
    return {
        name: StepBits(
            times,
            tuple(here[name] for part, here in zip(ranges, bits, strict=True) for _ in part),
        )
        for name in bits[0]
    }
