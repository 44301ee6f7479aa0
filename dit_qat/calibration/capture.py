"""Recording what a sampler, or a whole pipeline, feeds a model."""

import inspect
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.calibration.calls import Call, CallStore, owned
from dit_qat.calibration.state import fingerprint
from dit_qat.calibration.trees import map_tensors, tensors_of

__all__ = ["check_argument", "evaluating", "record_calls"]


def record_calls(
    model: nn.Module,
    run: Callable[[], object],
    *,
    timestep_argument: str | None,
    keep: Collection[int] | None = None,
    limit_bytes: int | None = None,
    folder: Path | None = None,
) -> CallStore:
    """Record the calls that ``run()`` makes of a model.

    The step of a call is the position of its timestep among the different ones in the order in
    which they first come, so that two calls per step (guidance in two passes) and several runs of
    one schedule share their steps.

    Args:
        model: A float model; while it runs, its forward is listened to, however it is called.
        run: Samples images, or calls a pipeline.
        timestep_argument: Name of the forward argument that holds the timestep, (N,) or a number;
            None for a model without.
        keep: Steps to keep; None: all.
        limit_bytes: What the calls may take.
        folder: Where they go, one file each; None: memory.

    Raises:
        ValueError: if the model was never called or a step to keep never came, if the rows of a
            call are at different timesteps, or the limit is passed.
    """
    check_argument(model, timestep_argument)
    store = CallStore(fingerprint(model), limit_bytes, folder)
    recorder = _Recorder(model, store, timestep_argument, None if keep is None else set(keep))
    with _listened(model, recorder):
        run()
    recorder.check()
    store.finish()
    return store


def check_argument(model: nn.Module, name: str | None) -> None:
    """Refuse a timestep argument that a model's forward does not have.

    Raises:
        ValueError: naming those that it has.
    """
    known = inspect.signature(model.forward).parameters
    if name is not None and name not in known:
        raise ValueError(
            f"{type(model).__name__}.forward has no argument {name!r}; it has {', '.join(known)}"
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put every submodule into evaluation mode, and each back into its own mode after."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


@contextmanager
def _listened(
    model: nn.Module, listen: Callable[[tuple[Any, ...], dict[str, Any]], None]
) -> Iterator[None]:
    """Stand in for a model's forward: a hook would miss what calls ``forward`` itself."""
    inner, owned = model.forward, "forward" in model.__dict__

    @wraps(inner)
    def forward(*args: Any, **kwargs: Any) -> Any:
        listen(args, kwargs)
        return inner(*args, **kwargs)

    model.forward = forward
    try:
        yield
    finally:
        if owned:
            model.forward = inner
        else:
            del model.forward


class _Recorder:
    def __init__(
        self, model: nn.Module, store: CallStore, argument: str | None, keep: set[int] | None
    ) -> None:
        self.store, self.argument, self.keep = store, argument, keep
        self.name = type(model).__name__
        self.signature = inspect.signature(model.forward)
        self.seen: dict[float, int] = {}

    def __call__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        timestep, rows = self._timestep(args, kwargs)
        step = self.seen.setdefault(timestep, len(self.seen))
        if self.keep is None or step in self.keep:
            args, kwargs = map_tensors(owned, (args, kwargs))
            self.store.append(Call(args, kwargs, step, timestep, rows))

    def check(self) -> None:
        if not self.seen:
            raise ValueError(
                f"nothing was recorded: the run never called this {self.name}; give the model that "
                "the sampler or pipeline itself calls, and at least one image"
            )
        missing = sorted((self.keep or set()) - set(self.seen.values()))
        if missing:
            raise ValueError(
                f"steps {missing} were to be kept, but the sampler made steps 0 to "
                f"{len(self.seen) - 1}; keep some of those"
            )

    def _timestep(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[float, int]:
        if self.argument is None:
            return 0.0, _rows((args, kwargs))
        value = self.signature.bind(*args, **kwargs).arguments.get(self.argument)
        if value is None:
            raise ValueError(
                f"{self.name} was called without {self.argument!r}; name the argument that holds "
                "the timestep, or None for a model that has none"
            )
        if not isinstance(value, Tensor):
            return float(value), _rows((args, kwargs))
        different = torch.unique(value)
        if different.numel() != 1:
            low, high = float(value.min()), float(value.max())
            raise ValueError(
                f"a call of {self.name} mixes timesteps from {low:g} to {high:g}; calibration "
                "needs the same one for all rows of a call"
            )
        return float(different), (len(value) if value.ndim else _rows((args, kwargs)))


def _rows(tree: Any) -> int:
    sizes = [len(tensor) for tensor in tensors_of(tree) if tensor.ndim]
    return sizes[0] if sizes else 1
