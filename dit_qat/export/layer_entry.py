"""One packed layer in plain values, as ``config.json`` has it, and back."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from dit_qat.export.finite import check_finite
from dit_qat.export.plain import (
    built,
    check_same,
    natural,
    object_of,
    rotation_facts,
    typed,
    width_of,
)
from dit_qat.layers import (
    AbsMaxQuantizer,
    AbsMeanQuantizer,
    ActivationQuantizer,
    HadamardRotation,
    LayerConfig,
    LowRank,
    MinMaxQuantizer,
    PackedLinear,
    QuantLinear,
    RobustQuantizer,
    TernaryWeight,
)
from dit_qat.primitives.packing import (
    base3_bytes,
    base3_to_ternary,
    check_base3,
    check_ternary,
    field_bytes,
)

__all__ = ["LINEAR", "LayerEntry", "Storage"]

LINEAR = "ternary_linear"

Storage = Literal["ternary_1.6", "ternary_2"]

_ACTIVATIONS: dict[str, type[ActivationQuantizer]] = {
    kind.__name__: kind
    for kind in (RobustQuantizer, MinMaxQuantizer, AbsMaxQuantizer, AbsMeanQuantizer)
}


@dataclass(frozen=True)
class LayerEntry:
    """What a packed layer is, without its tensors.

    Attributes:
        in_features: Input width.
        out_features: Output width.
        bias: Whether there is a bias.
        config: What is quantized and how; the activation bits are here.
        seed: Of the rotation's signs.
        storage: How the file holds the codes; in memory they take 2 bits.
        version: The first version of the format that has this kind.
    """

    in_features: int
    out_features: int
    bias: bool
    config: LayerConfig
    seed: int
    storage: Storage
    version: int = 1

    @classmethod
    def of(cls, layer: QuantLinear | PackedLinear, storage: Storage) -> "LayerEntry":
        """Describe a layer."""
        return cls(
            layer.in_features,
            layer.out_features,
            layer.bias is not None,
            layer.config,
            layer.seed,
            storage,
        )

    def make(self, device: torch.device | str) -> PackedLinear:
        """A layer with room for the tensors."""
        return PackedLinear(
            self.in_features, self.out_features, self.bias, self.config, self.seed, device
        )

    @property
    def adds_bias(self) -> bool:
        """Whether there may be a bias where the float layer has none: never."""
        return False

    @property
    def weights(self) -> str:
        """What the weights are, in a word."""
        return "ternary"

    @property
    def by_timestep(self) -> bool:
        """Whether the layer asks for the model's timestep: never."""
        return False

    @property
    def activation_bits(self) -> int | None:
        """Bits of the input; None where it stays float."""
        activation = self.config.activation
        return None if activation is None else activation.bits

    @property
    def stored_width(self) -> int:
        """Bytes of a row of codes in the file."""
        if self.storage == "ternary_2":
            return field_bytes(self.in_features, 2)
        return base3_bytes(self.in_features)

    def stored_shape(self, leaf: str, resident: Tensor) -> tuple[int, ...]:
        """Shape in the file; codes take the width of their storage."""
        if leaf == "codes":
            return self.out_features, self.stored_width
        return tuple(resident.shape)

    def is_passing(self, leaf: str) -> bool:
        """Whether memory gets another form of what is in the file."""
        return leaf == "codes" and self.storage == "ternary_1.6"

    def resident(self, leaf: str, stored: Tensor) -> Tensor:
        """Check a tensor; four codes per byte, whatever their storage.

        Raises:
            ValueError: for codes that no packing writes, scales that are not positive, and values
                that are not finite.
        """
        if leaf != "codes":
            check_finite(stored, positive=leaf == "scale")
            return stored
        if self.storage == "ternary_2":
            check_ternary(stored, self.in_features)
            return stored
        check_base3(stored, self.in_features)
        return base3_to_ternary(stored, self.in_features)

    def check(self, layer: nn.Module) -> None:
        """Every tensor was checked alone, and nothing more can be wrong."""

    def as_json(self) -> dict[str, Any]:
        """Plain values."""
        config, activation = self.config, self.config.activation
        return {
            "kind": LINEAR,
            "in_features": self.in_features,
            "out_features": self.out_features,
            "bias": self.bias,
            "codes": self.storage,
            "seed": self.seed,
            "weight": asdict(config.weight),
            "activation": None
            if activation is None
            else {"kind": type(activation).__name__, **asdict(activation)},
            "rotation": self._rotation_json(),
            "low_rank": None if config.low_rank is None else asdict(config.low_rank),
        }

    def _rotation_json(self) -> dict[str, Any] | None:
        config = self.config.rotation
        if config is None:
            return None
        rotation = config.for_width(self.in_features, self.seed)
        return asdict(config) | rotation_facts(rotation)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LayerEntry":
        """Inverse of :meth:`as_json`.

        Raises:
            ValueError: for anything that it does not write.
        """
        content = object_of(content, "a layer")
        entry = cls(
            in_features=width_of(content, "in_features"),
            out_features=width_of(content, "out_features"),
            bias=typed(content, "bias", bool),
            config=LayerConfig(
                weight=built(TernaryWeight, content.get("weight"), "weight"),
                activation=_activation(content.get("activation")),
                rotation=_rotation(content.get("rotation")),
                low_rank=None
                if content.get("low_rank") is None
                else built(LowRank, content["low_rank"], "low_rank"),
            ),
            seed=natural(content, "seed", 0, 1 << 63),
            storage=_storage(content.get("codes")),
        )
        check_same(entry.as_json(), content)
        return entry


def _rotation(content: object) -> HadamardRotation | None:
    if content is None:
        return None
    given = object_of(content, "rotation")
    settings = {k: v for k, v in given.items() if k not in ("factors", "signs_sha256")}
    return built(HadamardRotation, settings, "rotation")


def _activation(content: object) -> ActivationQuantizer | None:
    if content is None:
        return None
    given = dict(object_of(content, "activation"))
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in _ACTIVATIONS:
        raise ValueError(f"activation kind {kind!r} is unknown; there are {sorted(_ACTIVATIONS)}")
    return built(_ACTIVATIONS[kind], given, "activation")


def _storage(value: object) -> Storage:
    if value not in get_args(Storage):
        raise ValueError(f"codes={value!r} is unknown; there are {get_args(Storage)}")
    return value  # type: ignore[return-value]
