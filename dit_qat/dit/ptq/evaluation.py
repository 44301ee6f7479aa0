"""How far a quantized model is from the float one: by layer, by timestep, along a trajectory."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from tqdm.auto import tqdm

from dit_qat.calibration import Call, CallStore, evaluating
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.ptq.trajectory import Trajectory, step_errors
from dit_qat.layers.int_linear import IntLinear

__all__ = ["OutputErrors", "PathErrors", "output_errors", "path_errors", "spread_calls"]


@dataclass(frozen=True)
class OutputErrors:
    """Relative squared errors on recorded calls, ``sum ||y' - y||^2 / sum ||y||^2``.

    Attributes:
        output: Of the model's output, both models on the same recorded inputs.
        by_timestep: The same by the model's timestep, in the order of sampling.
        layers: Of each quantized layer's own output, a float layer on the same input being true.
    """

    output: float
    by_timestep: Mapping[float, float]
    layers: Mapping[str, float]

    def plain(self) -> dict[str, Any]:
        """Plain values, as for ``metrics.json``."""
        return {
            "output_error": self.output,
            "timesteps": [*self.by_timestep],
            "output_error_by_timestep": [*self.by_timestep.values()],
            "layer_errors": dict(self.layers),
        }


@dataclass(frozen=True)
class PathErrors:
    """Errors along the path of a sampler or pipeline, each model following its own images.

    Attributes:
        timesteps: The model's, step by step.
        by_step: ``||x_q - x_f||^2 / ||x_f||^2`` after each.
        reference: The float model's last x (N, C, H, W), or a pipeline's latents in its own
            layout (N, ...), on the CPU.
        found: The quantized model's.
    """

    timesteps: Sequence[float]
    by_step: Sequence[float]
    reference: Tensor = field(repr=False)
    found: Tensor = field(repr=False)

    @property
    def trajectory_error(self) -> float:
        """Mean over steps."""
        return sum(self.by_step) / len(self.by_step)

    def plain(self) -> dict[str, Any]:
        """Plain values, as for ``metrics.json``."""
        return {
            "trajectory_error": self.trajectory_error,
            "trajectory_timesteps": [*self.timesteps],
            "trajectory_error_by_step": [*self.by_step],
            "images": len(self.found),
        }


@torch.no_grad()
def output_errors(
    model: nn.Module,
    reference: nn.Module,
    calls: Iterable[Call],
    progress: bool = False,
) -> OutputErrors:
    """Run both models on recorded calls.

    Args:
        model: Quantized; it follows timesteps, if its layers do.
        reference: The float model.
        calls: With their timesteps.
        progress: Whether to show a bar over calls.

    Raises:
        ValueError: without calls, or if a model's output is not finite.
    """
    layers = {name: m for name, m in model.named_modules() if isinstance(m, IntLinear)}
    own: defaultdict[str, _Sums] = defaultdict(_Sums)
    steps: defaultdict[float, _Sums] = defaultdict(_Sums)

    def compare(name: str, args: Any, kwargs: Any, output: Tensor) -> None:
        own[name].add(output, reference.get_submodule(name)(*args, **kwargs))

    with evaluating(model), evaluating(reference):
        for call in tqdm(calls, disable=not progress, unit="call", desc="output error"):
            with ExitStack() as stack:
                for name, layer in layers.items():
                    stack.callback(_listen(layer, partial(compare, name)).remove)
                found = _run(model, call)
            steps[call.timestep].add(found, _run(reference, call))
    if not steps:
        raise ValueError("there are no recorded calls to compare on; record at least one")
    _check_finite(steps)
    total = _Sums(sum(s.error for s in steps.values()), sum(s.power for s in steps.values()))
    return OutputErrors(
        total.ratio,
        {timestep: sums.ratio for timestep, sums in steps.items()},
        {name: own[name].ratio for name in layers if name in own},
    )


def path_errors(model: DiT, reference: DiT, trajectory: Trajectory) -> PathErrors:
    """Take all steps of a trajectory with both models, each on its own."""
    expected, found = trajectory.run(reference), trajectory.run(model)
    by_step = step_errors(expected, found)
    return PathErrors(trajectory.timesteps, by_step, expected[-1].cpu(), found[-1].cpu())


def spread_calls(store: CallStore, count: int) -> list[Call]:
    """At most ``count`` calls, spread evenly over the steps and, within each, over its calls.

    Raises:
        ValueError: for a count below 1.
    """
    if count < 1:
        raise ValueError(f"calls={count}: comparing models takes at least 1")
    count = min(count, len(store))
    # By step first, so that every timestep has its turn before one has a second.
    by_step: defaultdict[int, list[int]] = defaultdict(list)
    for index, step in enumerate(store.steps):
        by_step[step].append(index)
    turns: list[int] = []
    for turn in range(max(map(len, by_step.values()))):
        turns += [calls[turn] for calls in by_step.values() if turn < len(calls)]
    first = len(by_step)
    some = turns[:count]
    if count < first:  # both ends included
        some = [turns[round(i * (first - 1) / max(count - 1, 1))] for i in range(count)]
    return [store[index] for index in sorted(some)]


@dataclass
class _Sums:
    """Squared norms: of a difference, and of what is true."""

    error: float = 0.0
    power: float = 0.0

    def add(self, found: Tensor, expected: Tensor) -> None:
        self.error += float((found.double() - expected.double()).square().sum())
        self.power += float(expected.double().square().sum())

    @property
    def ratio(self) -> float:
        return self.error / self.power if self.power > 0 else self.error


def _listen(layer: nn.Module, compare: Callable[[Any, Any, Tensor], None]) -> RemovableHandle:
    def hook(_: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        compare(args, kwargs, output)

    return layer.register_forward_hook(hook, with_kwargs=True)


def _run(model: nn.Module, call: Call) -> Tensor:
    """All floating-point values of an output, in one row."""
    device = next(iter((*model.parameters(), *model.buffers()))).device
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (call.args, call.kwargs))
    output = model(*args, **kwargs)
    return torch.cat([t.flatten() for t in tensors_of(output) if t.is_floating_point()])


def _check_finite(steps: Mapping[float, _Sums]) -> None:
    for timestep, sums in steps.items():
        if not sums.error < float("inf"):
            raise ValueError(
                f"the quantized model's output at timestep {timestep:g} is not finite; use more "
                "bits, or float32"
            )
