"""Activation bits that depend on the sampler's timestep, which layers find in a scope."""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import update_wrapper
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

__all__ = [
    "StepBits",
    "TimestepHandle",
    "follow_timesteps_",
    "timestep_scope",
    "timesteps_in_scope",
]

_TIMESTEPS: ContextVar[tuple[float, ...] | None] = ContextVar("timesteps", default=None)


@dataclass(frozen=True)
class StepBits:
    """Bits of one layer by the model's own timestep; between two, the nearest.

    Attributes:
        timesteps: As the model's forward gets them, in any order.
        bits: One of 2..8 for each.

    Raises:
        ValueError: for lengths that differ, no timestep, equal ones, or other bits.
    """

    timesteps: tuple[float, ...]
    bits: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "timesteps", tuple(float(t) for t in self.timesteps))
        object.__setattr__(self, "bits", tuple(self.bits))
        if not self.timesteps or len(self.timesteps) != len(self.bits):
            raise ValueError(
                f"{len(self.timesteps)} timesteps with {len(self.bits)} bits; each of at least one "
                "timestep needs its bits"
            )
        if len(set(self.timesteps)) < len(self.timesteps):
            raise ValueError(f"timesteps {self.timesteps} hold one twice")
        for bits in self.bits:
            if bits not in range(2, 9):
                raise ValueError(f"activation bits={bits!r} are outside 2..8; choose whole bits")

    def index(self, timestep: float) -> int:
        """Position of the nearest timestep.

        Raises:
            ValueError: for one that lies further outside than neighbours lie apart.
        """
        low, high = min(self.timesteps), max(self.timesteps)
        gap = max((b - a for a, b in pairwise(sorted(self.timesteps))), default=0.0)
        slack = gap + 1e-5 * max(abs(low), abs(high))
        if not low - slack <= timestep <= high + slack:
            raise ValueError(
                f"timestep {timestep:g} is not covered by bits for {low:g} .. {high:g}, at most "
                f"{gap:g} apart; use a schedule within them, or search bits for this one"
            )
        return min(range(len(self.timesteps)), key=lambda i: abs(self.timesteps[i] - timestep))

    def at(self, timestep: float) -> int:
        """Bits at a timestep; see :meth:`index`."""
        return self.bits[self.index(timestep)]


def timesteps_in_scope() -> tuple[float, ...]:
    """Timesteps of the forward that runs: one, or one per row of the batch.

    Raises:
        RuntimeError: if none runs that is followed.
    """
    timesteps = _TIMESTEPS.get()
    if timesteps is None:
        raise RuntimeError(
            "a layer with bits by timestep ran, but no timestep is known: call "
            "follow_timesteps_(model, argument) on the whole model, argument being what its "
            "forward calls the timestep, or run the layer inside timestep_scope(t)"
        )
    return timesteps


@contextmanager
def timestep_scope(timestep: Tensor | float) -> Iterator[None]:
    """Tell layers the timestep: a number, () or (rows,)."""
    token = _TIMESTEPS.set(_numbers(timestep))
    try:
        yield
    finally:
        _TIMESTEPS.reset(token)


class TimestepHandle:
    """Ends what :func:`follow_timesteps_` began."""

    def __init__(self, model: nn.Module, following: "_Following") -> None:
        self._model, self._following = model, following

    def remove(self) -> None:
        """Stop following; a second call does nothing."""
        self._following.stop(self._model)


def follow_timesteps_(model: nn.Module, argument: str) -> TimestepHandle:
    """Let layers find the timestep of every forward of ``model`` while it runs.

    Calls of ``model.forward`` count as calls of the model do. Copies of the model follow their own
    calls.

    Args:
        model: The whole model, not a block.
        argument: What its forward calls the timestep, a number, () or (rows,); by keyword or
            position.

    Raises:
        ValueError: if its forward has no such argument.
    """
    names = list(inspect.signature(model.forward).parameters)
    if argument not in names:
        raise ValueError(
            f"forward of {type(model).__name__} has no argument {argument!r}; it has "
            f"{', '.join(names)}"
        )
    following = _Following(model, argument)
    model.forward = following
    return TimestepHandle(model, following)


class _Following:
    """Stands for a model's forward: hooks would miss what calls ``forward`` itself.

    Only bound methods and plain values are kept, so that a deep copy belongs to the copied model.
    """

    def __init__(self, model: nn.Module, argument: str) -> None:
        self.inner: Callable[..., Any] = model.forward
        self.owned = "forward" in model.__dict__  # someone else replaced it before
        self.argument, self.active = argument, True
        update_wrapper(self, self.inner, updated=())  # its signature is asked for

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active:
            return self.inner(*args, **kwargs)
        given = inspect.signature(self.inner).bind(*args, **kwargs).arguments
        if given.get(self.argument) is None:
            return self.inner(*args, **kwargs)
        with timestep_scope(given[self.argument]):
            return self.inner(*args, **kwargs)

    def stop(self, model: nn.Module) -> None:
        self.active = False
        if model.__dict__.get("forward") is not self:
            return  # replaced again since, by something that still calls this
        if self.owned:
            model.forward = self.inner
        else:
            del model.forward


def _numbers(timestep: Tensor | float) -> tuple[float, ...]:
    values = torch.as_tensor(timestep).detach()
    if values.ndim > 1 or not values.numel():
        raise ValueError(
            f"a timestep of shape {tuple(values.shape)} is neither one number nor one per row"
        )
    return tuple(float(t) for t in values.reshape(-1).tolist())
