"""One layer whose weight is a code, in plain values, as ``config.json`` has it, and back."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.export.finite import check_finite
from dit_qat.export.plain import check_same, object_of, settings, typed, width_of
from dit_qat.export.tensor_file import DTYPES, dtype_name
from dit_qat.layers import CodedLinear
from dit_qat.layers.weight_code import Room, Setting, code_named

__all__ = ["CODED_LINEAR", "CodedEntry"]

CODED_LINEAR = "coded_linear"

_PLAIN = (bool, int, float, str, type(None))
_MOST_DIMENSIONS, _MOST_NUMBERS = 8, 1 << 40


@dataclass(frozen=True)
class CodedEntry:
    """What a :class:`~dit_qat.layers.CodedLinear` is, without its tensors.

    Attributes:
        in_features: Input width.
        out_features: Output width.
        bias: Whether there is a bias.
        code: Name of the kind of code.
        settings: Of the code.
        rooms: Of the code's tensors.
        version: The first version of the format that has this kind.
    """

    in_features: int
    out_features: int
    bias: bool
    code: str
    settings: Mapping[str, Setting]
    rooms: Mapping[str, Room]
    version: int = 3

    @classmethod
    def of(cls, layer: CodedLinear) -> "CodedEntry":
        """Describe a layer."""
        tensors = {name: layer.get_buffer(name) for name in layer.code_names}
        return cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.kind.name,
            layer.settings,
            {name: Room(tuple(t.shape), t.dtype) for name, t in tensors.items()},
        )

    @property
    def by_timestep(self) -> bool:
        """Whether the layer asks for the model's timestep: never."""
        return False

    @property
    def adds_bias(self) -> bool:
        """Whether there may be a bias where the float layer has none: corrections of means."""
        return True

    @property
    def weights(self) -> str:
        """What the weights are, in a word."""
        return self.code

    @property
    def activation_bits(self) -> None:
        """Inputs stay float."""

    def make(self, device: torch.device | str) -> CodedLinear:
        """A layer with room for the tensors.

        Raises:
            ValueError: for a kind of code that nobody entered.
        """
        sizes, kind = (self.out_features, self.in_features), code_named(self.code)
        return CodedLinear.with_room(kind, self.settings, sizes, self.rooms, self.bias, device)

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "kind": CODED_LINEAR,
            "code": self.code,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "settings": dict(self.settings),
            "tensors": {
                name: {"dtype": dtype_name(room.dtype), "shape": list(room.shape)}
                for name, room in self.rooms.items()
            },
        }

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "CodedEntry":
        """Inverse of :meth:`as_json`.

        Raises:
            ValueError: for anything that it does not write.
        """
        content = object_of(content, "a layer")
        entry = cls(
            in_features=width_of(content, "in_features"),
            out_features=width_of(content, "out_features"),
            bias=typed(content, "bias", bool),
            code=typed(content, "code", str),
            settings={k: _setting(k, v) for k, v in typed(content, "settings", dict).items()},
            rooms={k: _room(k, v) for k, v in typed(content, "tensors", dict).items()},
        )
        check_same(entry.as_json(), content)
        return entry

    def stored_shape(self, leaf: str, resident: Tensor) -> tuple[int, ...]:
        """Shape in the file: that in memory."""
        return tuple(resident.shape)

    def is_passing(self, leaf: str) -> bool:
        """Whether memory gets another form: never."""
        return False

    def resident(self, leaf: str, stored: Tensor) -> Tensor:
        """Check a tensor alone; :meth:`check` has what they must be together.

        Raises:
            ValueError: for values that are not finite.
        """
        if stored.is_floating_point():
            check_finite(stored)
        return stored

    def check(self, layer: nn.Module) -> None:
        """Refuse tensors that are no code of this kind.

        Raises:
            ValueError: as the code's own checks.
        """
        assert isinstance(layer, CodedLinear)
        _ = layer.code


def _setting(name: str, value: object) -> Setting:
    """A plain value, or a list of such."""
    plain = [value] if not isinstance(value, list) else value
    if not all(isinstance(item, _PLAIN) for item in plain):
        raise ValueError(f"setting {name}={value!r} is no plain value")
    return value  # type: ignore[return-value]


def _room(name: str, content: object) -> Room:
    given = settings(content, f"tensor {name}", {"dtype": (str,), "shape": (list,)})
    dtype, shape = given["dtype"], given["shape"]
    if dtype not in DTYPES or len(shape) > _MOST_DIMENSIONS:
        raise ValueError(f"tensor {name} has dtype {dtype!r} and {len(shape)} dimensions")
    if not all(type(size) is int and 0 <= size < _MOST_NUMBERS for size in shape):
        raise ValueError(f"tensor {name} has the sizes {shape}")
    return Room(tuple(shape), DTYPES[dtype])
