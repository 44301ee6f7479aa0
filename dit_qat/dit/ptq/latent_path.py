"""The path of a pipeline's latents, step by step, for a float and a quantized transformer."""

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.dit.ptq.evaluation import PathErrors

__all__ = ["LatentPath", "PathSums"]

_AT_STEP_END, _OLDER = "callback_on_step_end", "callback"  # what pipelines call their callback


class LatentPath:
    """What one drawing of a pipeline passes through; empty where the pipeline shows nothing.

    Args:
        pipeline: Of diffusers.
        argument: What its transformer's forward calls the timestep.

    Attributes:
        latents: After each step, on the CPU, in the pipeline's own layout.
        timesteps: What the transformer was last given before the end of each.
    """

    def __init__(self, pipeline: Any, argument: str) -> None:
        self.latents: list[Tensor] = []
        self.timesteps: list[float] = []
        self._known = inspect.signature(pipeline.__call__).parameters
        self._argument, self._timestep = argument, 0.0

    @property
    def options(self) -> dict[str, Any]:
        """What the pipeline is to be called with."""
        if _AT_STEP_END in self._known:
            return {_AT_STEP_END: self._step_ended}
        if _OLDER in self._known:
            return {_OLDER: lambda step, timestep, latents: self._keep(latents)}
        return {}

    @contextmanager
    def listening(self, transformer: nn.Module) -> Iterator[None]:
        """Follow the timesteps that a transformer is given."""
        signature = inspect.signature(transformer.forward)

        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            value = signature.bind(*args, **kwargs).arguments.get(self._argument)
            if value is not None:
                self._timestep = float(torch.as_tensor(value).max())

        handle = transformer.register_forward_pre_hook(hook, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    def _step_ended(
        self, pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]
    ) -> dict[str, Any]:
        if "latents" in tensors:
            self._keep(tensors["latents"])
        return {}  # nothing is replaced

    def _keep(self, latents: Tensor) -> None:
        self.latents.append(latents.detach().cpu().clone())
        self.timesteps.append(self._timestep)


class PathSums:
    """Squared norms by step over several drawings."""

    def __init__(self) -> None:
        self._timesteps: list[float] = []
        self._errors: list[float] = []
        self._powers: list[float] = []
        self._ends: tuple[list[Tensor], list[Tensor]] = ([], [])

    def add(self, reference: LatentPath, found: LatentPath) -> None:
        """Count one drawing by both transformers from the same noise."""
        if not reference.latents:
            return
        if not self._timesteps:
            self._timesteps = reference.timesteps
            self._errors = [0.0] * len(reference.latents)
            self._powers = [0.0] * len(reference.latents)
        for step, (x, y) in enumerate(zip(reference.latents, found.latents, strict=True)):
            self._errors[step] += float((y.double() - x.double()).square().sum())
            self._powers[step] += float(x.double().square().sum())
        for ends, path in zip(self._ends, (reference, found), strict=True):
            ends.append(path.latents[-1])

    def errors(self) -> PathErrors | None:
        """Relative errors by step; None where the pipeline showed no latents."""
        if not self._timesteps:
            return None
        pairs = zip(self._errors, self._powers, strict=True)
        by_step = [error / power if power > 0 else error for error, power in pairs]
        reference, found = (torch.cat(ends) for ends in self._ends)
        return PathErrors(self._timesteps, by_step, reference, found)
