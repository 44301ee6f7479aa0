"""InputTransform: scale, permute and rotate a layer's input, and its weight to match."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from dit_qat.layers.stored import StoredBuffers
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.scales import widen

__all__ = ["InputTransform", "Permute", "Rotate", "Scale", "StepKind", "TransformStep"]

StepKind = Literal["scale", "permute", "rotate"]


@dataclass(frozen=True)
class TransformStep:
    """A step in plain values, without its vector: what a file says of it.

    Attributes:
        kind: Which step.
        seed: Of a rotation's signs; None: without signs.
        block_size: Of a rotation; None: the full width.

    Raises:
        ValueError: for an unknown kind.
    """

    kind: StepKind
    seed: int | None = None
    block_size: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(StepKind):
            raise ValueError(f"step {self.kind!r} is unknown; use one of {get_args(StepKind)}")


@dataclass(frozen=True)
class Scale:
    """Divide inputs by a positive vector (in,)."""

    vector: Tensor


@dataclass(frozen=True)
class Permute:
    """Take inputs in another order: ``x[..., index]``."""

    index: Tensor


@dataclass(frozen=True)
class Rotate:
    """Rotate inputs."""

    rotation: Rotation


class InputTransform(StoredBuffers):
    """A chain of steps ``x -> x T`` with the weight's ``W -> W T^-T``, so that ``x W^T`` stays.

    Args:
        width: Inputs.
        steps: In the order they apply to inputs; a :class:`TransformStep` makes room for a vector
            that a state dict will supply.
        device: Where room is made.

    Attributes:
        steps: Their plain description.

    Raises:
        ValueError: for a scale that is not positive and finite, an index that is no permutation,
            or another width.
    """

    def __init__(
        self,
        width: int,
        steps: Sequence[Scale | Permute | Rotate | TransformStep],
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.width = width
        self._rotations: dict[int, Rotation] = {}
        described = []
        for number, step in enumerate(steps):
            described.append(self._enter(number, step, device))
        self.steps: tuple[TransformStep, ...] = tuple(described)

    def forward(self, x: Tensor) -> Tensor:
        """Transform inputs (..., width), in their dtype."""
        for number, step in enumerate(self.steps):
            if step.kind == "scale":
                # The exact scale, as the weight has it: rounded to 16 bits it would be another one,
                # and beyond float16's range zero or infinite.
                x = (x / self._vector(number)).to(x.dtype)
            elif step.kind == "permute":
                x = x.index_select(-1, self._vector(number))
            else:
                x = self._rotations[number].apply(x)
        return x

    def weight(self, weight: Tensor) -> Tensor:
        """The weight (out, width), widened, that belongs to transformed inputs."""
        weight = widen(weight)
        for number, step in enumerate(self.steps):
            if step.kind == "scale":
                weight = weight * self._vector(number)
            elif step.kind == "permute":
                weight = weight.index_select(-1, self._vector(number))
            else:
                weight = self._rotations[number].apply(weight)
        return weight

    def inverse_weight(self, weight: Tensor) -> Tensor:
        """The inverse of :meth:`weight`."""
        weight = widen(weight)
        for number, step in reversed([*enumerate(self.steps)]):
            if step.kind == "scale":
                weight = weight / self._vector(number)
            elif step.kind == "permute":
                weight = weight.index_select(-1, self._vector(number).argsort())
            else:
                weight = self._rotations[number].inverse(weight)
        return weight

    def extra_repr(self) -> str:
        """One line: width and steps."""
        return f"width={self.width}, steps={self.steps}"

    def _enter(
        self,
        number: int,
        step: Scale | Permute | Rotate | TransformStep,
        device: torch.device | str | None,
    ) -> TransformStep:
        if isinstance(step, TransformStep):
            step = self._room(step, device)
        if isinstance(step, Rotate):
            rotation = step.rotation
            if rotation.width != self.width:
                raise ValueError(f"a rotation of {rotation.width} in a transform of {self.width}")
            self._rotations[number] = rotation
            return TransformStep("rotate", rotation.seed, rotation.block_size)
        if isinstance(step, Scale):
            vector = step.vector.detach().float().contiguous()
            _check_scale(vector, self.width)
            self.register_buffer(f"vector{number}", vector)
            return TransformStep("scale")
        index = step.index.detach()
        _check_permutation(index, self.width)
        self.register_buffer(f"vector{number}", index.to(torch.int32))
        return TransformStep("permute")

    def _room(
        self, step: TransformStep, device: torch.device | str | None
    ) -> Scale | Permute | Rotate:
        if step.kind == "rotate":
            return Rotate(Rotation(self.width, step.seed, step.block_size))
        if step.kind == "scale":
            return Scale(torch.ones(self.width, dtype=torch.float32, device=device))
        return Permute(torch.arange(self.width, device=device))

    def _vector(self, number: int) -> Tensor:
        return self.get_buffer(f"vector{number}")


def _check_scale(vector: Tensor, width: int) -> None:
    if vector.shape != (width,):
        raise ValueError(f"a scale of shape {tuple(vector.shape)} in a transform of {width} inputs")
    if vector.is_meta:
        return
    bad = ~(vector.isfinite() & (vector > 0))
    if bad.any():
        channel = int(bad.nonzero()[0])
        raise ValueError(
            f"the scale of input {channel} is {float(vector[channel]):g}; scales must be positive "
            "and finite"
        )


def _check_permutation(index: Tensor, width: int) -> None:
    if index.shape != (width,) or index.is_floating_point():
        raise ValueError(
            f"a permutation of shape {tuple(index.shape)} and {index.dtype} in a transform of "
            f"{width} inputs"
        )
    if index.is_meta:
        return
    if not torch.equal(index.long().sort().values, torch.arange(width, device=index.device)):
        raise ValueError(f"the index is no permutation of {width} inputs; it repeats or skips some")
