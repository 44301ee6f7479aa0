"""How far a model's output moves when some of its layers are replaced."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration import Call, evaluating, swapped
from dit_qat.calibration.trees import map_tensors, tensors_of
from dit_qat.layers import timestep_scope

__all__ = ["OutputError"]


class OutputError:
    """Relative squared error of a whole model's output on a few recorded calls.

    Args:
        model: Float; its outputs are the reference.
        calls: On which; each is run once now and once per measurement.
    """

    def __init__(self, model: nn.Module, calls: Sequence[Call]) -> None:
        self.model, self.calls = model, list(calls)
        self._device = next(model.parameters()).device
        self._references = [self._output(call) for call in self.calls]
        self._power = sum(float(output.square().sum()) for output in self._references)

    def __call__(self, replacements: Mapping[str, nn.Module]) -> float:
        """``sum ||y' - y||^2 / sum ||y||^2`` with modules replaced by full name."""
        with swapped(self.model, replacements):
            pairs = zip(self.calls, self._references, strict=True)
            error = sum(float((self._output(call) - y).square().sum()) for call, y in pairs)
        return error / self._power if self._power > 0 else error

    @torch.no_grad()
    def _output(self, call: Call) -> Tensor:
        args, kwargs = map_tensors(lambda t: t.to(self._device), (call.args, call.kwargs))
        with evaluating(self.model), timestep_scope(call.timestep):
            output: Any = self.model(*args, **kwargs)
        parts = [t.float().flatten() for t in tensors_of(output) if t.is_floating_point()]
        return torch.cat(parts)
