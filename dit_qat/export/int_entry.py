"""One layer of integer weights in plain values, as ``config.json`` has it, and back."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.export.finite import check_finite
from dit_qat.export.plain import (
    WIDEST,
    built,
    check_same,
    natural,
    numbers,
    object_of,
    rotation_facts,
    settings,
    typed,
    width_of,
)
from dit_qat.layers import IntLinear, IntLinearConfig, StepBits, TokenQuantizer, TransformStep
from dit_qat.layers.linear import BranchDtype
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid
from dit_qat.primitives.packing import check_int

__all__ = ["INT_LINEAR", "IntEntry"]

INT_LINEAR = "int_linear"

_MOST_STEPS = 64  # of a transform, beyond any method
_CHUNK = 1 << 17  # bytes of codes that stay in a core's cache with what is made of them


@dataclass(frozen=True)
class IntEntry:
    """What an :class:`~dit_qat.layers.IntLinear` is, without its tensors.

    Attributes:
        in_features: Input width.
        out_features: Output width.
        bias: Whether there is a bias.
        config: What is quantized and how; activation bits and their policy are here.
        version: The first version of the format that has this kind.
    """

    in_features: int
    out_features: int
    bias: bool
    config: IntLinearConfig
    version: int = 2

    @classmethod
    def of(cls, layer: IntLinear, branch_dtype: BranchDtype | None = None) -> "IntEntry":
        """Describe a layer, its branch in another dtype unless that is None."""
        config = replace(layer.config, branch_dtype=branch_dtype or layer.config.branch_dtype)
        if config.rank == 0:  # no branch, so that its dtype says nothing
            config = replace(config, branch_dtype=IntLinearConfig.branch_dtype)
        return cls(layer.in_features, layer.out_features, layer.bias is not None, config)

    @property
    def by_timestep(self) -> bool:
        """Whether the layer asks for the model's timestep."""
        return self.config.step_bits is not None

    @property
    def adds_bias(self) -> bool:
        """Whether there may be a bias where the float layer has none: corrections of means."""
        return True

    @property
    def weights(self) -> str:
        """What the weights are, in a word."""
        return f"{self.config.grid.bits}-bit"

    @property
    def activation_bits(self) -> float | None:
        """Mean over the timesteps of a policy; None where the input stays float."""
        return self.config.activation_bits

    def make(self, device: torch.device | str) -> nn.Module:
        """A layer with room for the tensors."""
        sizes = self.in_features, self.out_features
        return IntLinear(*sizes, self.bias, self.config, device)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        config = self.config
        return {
            "kind": INT_LINEAR,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "grid": asdict(config.grid),
            "activation": None if config.activation is None else _listed(asdict(config.activation)),
            "step_bits": None if config.step_bits is None else _listed(asdict(config.step_bits)),
            "transform": [self._step_json(step) for step in config.steps],
            "low_rank": None
            if config.rank == 0
            else {"rank": config.rank, "dtype": config.branch_dtype},
        }

    def _step_json(self, step: TransformStep) -> dict[str, Any]:
        if step.kind != "rotate":
            return {"kind": step.kind}
        rotation = Rotation(self.in_features, step.seed, step.block_size)
        return asdict(step) | rotation_facts(rotation)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "IntEntry":
        """Inverse of :meth:`as_json`.

        Raises:
            ValueError: for anything that it does not write.
        """
        content = object_of(content, "a layer")
        config = IntLinearConfig(
            grid=built(IntegerGrid, content.get("grid"), "grid"),
            activation=_activation(content.get("activation")),
            step_bits=_step_bits(content.get("step_bits")),
            steps=tuple(_step(step) for step in _list(content, "transform")),
            **_low_rank(content.get("low_rank")),
        )
        sizes = width_of(content, "in_features"), width_of(content, "out_features")
        entry = cls(*sizes, typed(content, "bias", bool), config)
        entry.make("meta")  # refuses what does not fit together
        check_same(entry.as_json(), content)
        return entry

    def stored_shape(self, leaf: str, resident: Tensor) -> tuple[int, ...]:
        """Shape in the file: that in memory."""
        return tuple(resident.shape)

    def is_passing(self, leaf: str) -> bool:
        """Whether memory gets another form: never."""
        return False

    def resident(self, leaf: str, stored: Tensor) -> Tensor:
        """Check a tensor.

        Raises:
            ValueError: for codes outside the grid, ends of rows that are not zero, zero points
                beyond the codes, scales that are not positive, an order that is no permutation, or
                values that are not finite.
        """
        bits = self.config.grid.bits
        if leaf == "codes":
            check_int(stored, bits, self.in_features)
            if self.config.grid.symmetric:
                check_lowest(stored, bits)
        elif leaf == "zero":
            if int(stored.max()) >= 1 << bits:
                raise ValueError(
                    f"holds zero points up to {int(stored.max())}, beyond {bits}-bit codes"
                )
        elif stored.is_floating_point():
            check_finite(stored, positive=leaf == "scale" or leaf.startswith("transform."))
        else:
            _check_order(stored)
        return stored

    def check(self, layer: nn.Module) -> None:
        """Every tensor was checked alone, and nothing more can be wrong."""


def check_lowest(packed: Tensor, bits: int) -> None:
    """Refuse the code -2^(b-1) of two's complement, which a symmetric grid does not have.

    Args:
        packed: (out, bytes of a row) uint8, ends of rows being zero.
        bits: Of a code.

    Raises:
        ValueError: if it occurs.
    """
    for words in _words(packed, bits):
        if _lowest(words, bits).any():
            raise ValueError(
                f"holds the code {-(1 << (bits - 1))}, which symmetric {bits}-bit weights do not "
                "have; the data are damaged"
            )


def _lowest(words: Any, bits: int) -> Any:
    """Not zero where a field has its upper bit and no other."""
    if bits == 8:
        return words == 1 << 7
    tops = sum(1 << at for at in range(bits - 1, 24 if bits == 3 else 8, bits))
    others = words << 1  # lower bits of a field, moved to its upper one
    for k in range(2, bits):
        others |= words << k
    return words & ~others & tops


def _words(packed: Tensor, bits: int) -> Iterator[Any]:
    """Arrays of whole fields: bytes, or at 3 bits what three bytes make."""
    step = max(1, _CHUNK // max(1, packed.shape[1]))
    for rows in torch.split(packed.cpu(), step):
        if bits != 3:
            yield rows.numpy()
            continue
        padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % 3)).numpy()
        first, second, third = (padded[:, k::3].astype("i4") for k in range(3))
        yield first | second << 8 | third << 16


def _check_order(index: Tensor) -> None:
    count = index.numel()
    inside = index[(index >= 0) & (index < count)]
    if len(torch.unique(inside)) < count:
        raise ValueError(f"holds no permutation of {count} inputs; it repeats or skips some")


_NULL = type(None)
_ACTIVATION = {
    "bits": (int,),
    "symmetric": (bool,),
    "group_size": (int, _NULL),
    "clip": (list,),
    "fixed_range": (list, _NULL),
}


def _activation(content: object) -> TokenQuantizer | None:
    if content is None:
        return None
    given = settings(content, "activation", _ACTIVATION)
    for key in ("clip", "fixed_range"):
        if given[key] is not None:
            given[key] = numbers(given[key], f"activation {key}", float)
            if len(given[key]) != 2:
                raise ValueError(f"activation {key} has {len(given[key])} numbers, not 2")
    return TokenQuantizer(**given)


def _step_bits(content: object) -> StepBits | None:
    if content is None:
        return None
    given = settings(content, "step_bits", {"timesteps": (list,), "bits": (list,)})
    timesteps = numbers(given["timesteps"], "step_bits timesteps", float)
    return StepBits(timesteps, numbers(given["bits"], "step_bits bits", int))


def _step(content: object) -> TransformStep:
    given = dict(object_of(content, "a step of the transform"))
    if given.keys() == {"kind"}:
        kind = typed(given, "kind", str)
        if kind == "rotate":
            raise ValueError("a rotation without seed, block_size, factors and signs_sha256")
        return TransformStep(kind)  # type: ignore[arg-type]  # checked there
    kinds = {"kind": (str,), "seed": (int, _NULL), "block_size": (int, _NULL)}
    facts = {"factors": (list,), "signs_sha256": (str, _NULL)}
    given = settings(given, "a rotation", kinds | facts)
    if given["seed"] is not None:
        natural(given, "seed", 0, 1 << 63)
    return TransformStep(given["kind"], given["seed"], given["block_size"])


def _low_rank(content: object) -> dict[str, Any]:
    if content is None:
        return {}
    given = settings(content, "low_rank", {"rank": (int,), "dtype": (str,)})
    return {"rank": natural(given, "rank", 1, WIDEST), "branch_dtype": given["dtype"]}


def _list(content: Mapping[str, Any], key: str) -> list[Any]:
    value = typed(content, key, list)
    if len(value) > _MOST_STEPS:
        raise ValueError(f"{key} has {len(value)} steps, beyond {_MOST_STEPS}")
    return value


def _listed(values: Mapping[str, Any]) -> dict[str, Any]:
    """Lists for tuples, as a file gives them back."""
    return {key: list(v) if isinstance(v, tuple) else v for key, v in values.items()}
