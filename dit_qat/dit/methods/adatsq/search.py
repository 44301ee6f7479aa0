"""The search for a policy: bits by step and layer, judged by what the whole model makes of them."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn

from dit_qat.allocation.beam import BeamPath, Keep, beam_search, solve_additive
from dit_qat.calibration.calls import Call, CallStore
from dit_qat.calibration.capture import evaluating
from dit_qat.calibration.trees import map_tensors
from dit_qat.dit.methods.adatsq.fisher import first_rows, noise_channels
from dit_qat.dit.models.dit import DiT
from dit_qat.dit.ptq.trajectory import Trajectory
from dit_qat.layers.int_linear import IntLinear

__all__ = ["BitSwitch", "LayerBits", "additive_table", "search_additive", "search_path"]

LayerBits = tuple[int, ...]
"""Bits of all layers at one step."""


class BitSwitch:
    """Changes the activation bits of a model's layers, and nothing else of them.

    Args:
        layers: With an activation quantizer, by full name.

    Raises:
        ValueError: for a layer whose activations are not quantized.
    """

    def __init__(self, layers: Mapping[str, IntLinear]) -> None:
        self._layers = [*layers.values()]
        self._kept = [layer.config for layer in self._layers]
        for name, layer in layers.items():
            if layer.config.activation is None:
                raise ValueError(f"{name} keeps float activations; there are no bits to choose")

    def set(self, bits: LayerBits) -> None:
        """Give each layer its bits, whatever the timestep."""
        for layer, kept, b in zip(self._layers, self._kept, bits, strict=True):
            assert kept.activation is not None
            layer.config = replace(kept, activation=kept.activation.with_bits(b), step_bits=None)

    @contextmanager
    def restoring(self) -> Iterator["BitSwitch"]:
        """Give all layers their own configuration back after."""
        try:
            yield self
        finally:
            for layer, kept in zip(self._layers, self._kept, strict=True):
                layer.config = kept


def search_path(
    model: DiT,
    switch: BitSwitch,
    trajectory: Trajectory,
    reference: Sequence[Tensor],
    offered: Sequence[Sequence[LayerBits]],
    capacity: int,
    *,
    width: int | None = 4,
    prune: bool = True,
    keep: Keep = "origin",
    on_step: Callable[[], None] | None = None,
) -> list[list[LayerBits]]:
    """Beam search where each step starts from what the steps before it made.

    Args:
        model: With quantized weights.
        switch: Of its layers.
        trajectory: Few images.
        reference: What the float model makes of them.
        offered: Candidates of each step.
        capacity: Largest sum of bits.
        width: Paths kept after a step; None: all.
        prune: Whether dominated paths are dropped.
        keep: Which paths are; see :func:`~dit_qat.allocation.beam.beam_search`.
        on_step: Told of every step of the sampler that was taken.

    Returns:
        Bits by step of the paths that are left.

    Raises:
        ValueError: as :func:`~dit_qat.allocation.beam.beam_search`.
    """

    def extend(x: Tensor, step: int, choice: int) -> tuple[Tensor, float]:
        switch.set(offered[step][choice])
        x = trajectory.step(model, x, step)
        if on_step is not None:
            on_step()
        return x, _relative_error(x, reference[step + 1])

    sizes = [[sum(bits) for bits in row] for row in offered]
    with switch.restoring():
        paths: list[BeamPath[Tensor]] = beam_search(
            reference[0], sizes, extend, capacity, width=width, prune=prune, keep=keep
        )
    return [[offered[t][c] for t, c in enumerate(path.choices)] for path in paths]


def search_additive(
    table: Sequence[Sequence[float]], offered: Sequence[Sequence[LayerBits]], capacity: int
) -> list[LayerBits]:
    """The best policy where errors add up, exactly; a table as :func:`additive_table` makes."""
    sizes = [[sum(bits) for bits in row] for row in offered]
    return [offered[t][c] for t, c in enumerate(solve_additive(table, sizes, capacity))]


@torch.no_grad()
def additive_table(
    model: nn.Module,
    reference: nn.Module,
    switch: BitSwitch,
    store: CallStore,
    offered: Sequence[Sequence[LayerBits]],
    *,
    rows: int = 16,
    on_step: Callable[[], None] | None = None,
) -> list[list[float]]:
    """Relative squared error of the predicted noise, by step and candidate, on float latents.

    Args:
        model: With quantized weights.
        reference: The float one.
        switch: Of the model's layers.
        store: Recorded calls; their steps in rising order are those of ``offered``.
        offered: Candidates of each step.
        rows: Taken from each step.
        on_step: Told of every call of the quantized model.
    """
    steps = sorted(set(store.steps))
    errors = [[0.0] * len(row) for row in offered]
    powers = [0.0] * len(steps)
    with switch.restoring(), evaluating(model), evaluating(reference):
        for _, call in first_rows(store, rows):
            at, exact = steps.index(call.step), _noise(reference, call)
            powers[at] += float(exact.square().sum())
            for choice, bits in enumerate(offered[at]):
                switch.set(bits)
                errors[at][choice] += float((_noise(model, call) - exact).square().sum())
                if on_step is not None:
                    on_step()
    pairs = zip(errors, powers, strict=True)
    return [[error / (power or 1.0) for error in row] for row, power in pairs]


def _noise(model: nn.Module, call: Call) -> Tensor:
    device = next(model.parameters()).device
    args, kwargs = map_tensors(lambda tensor: tensor.to(device), (call.args, call.kwargs))
    return noise_channels(model(*args, **kwargs), (args, kwargs)).float()


def _relative_error(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).double().square().sum() / exact.double().square().sum())
