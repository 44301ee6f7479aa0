"""One packed layer in plain values, as ``config.json`` has it, and back."""

import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from typing import Any, Literal, TypeVar, get_args

import torch

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
from dit_qat.primitives.hadamard import Rotation, hadamard_factors
from dit_qat.primitives.packing import base3_bytes, field_bytes, pack_signs

__all__ = ["LINEAR", "LayerEntry", "Storage"]

LINEAR = "ternary_linear"

Storage = Literal["ternary_1.6", "ternary_2"]

_ACTIVATIONS: dict[str, type[ActivationQuantizer]] = {
    kind.__name__: kind
    for kind in (RobustQuantizer, MinMaxQuantizer, AbsMaxQuantizer, AbsMeanQuantizer)
}

ConfigT = TypeVar("ConfigT")

_WIDEST = 1 << 24  # wider layers than anyone has would only cost a reader its memory


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
    """

    in_features: int
    out_features: int
    bias: bool
    config: LayerConfig
    seed: int
    storage: Storage

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
    def stored_width(self) -> int:
        """Bytes of a row of codes in the file."""
        if self.storage == "ternary_2":
            return field_bytes(self.in_features, 2)
        return base3_bytes(self.in_features)

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
        return asdict(config) | _built(rotation)

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> "LayerEntry":
        """Inverse of :meth:`as_json`.

        Raises:
            ValueError: for anything that it does not write.
        """
        content = _object(content, "a layer")
        entry = cls(
            in_features=_natural(content, "in_features", 1, _WIDEST),
            out_features=_natural(content, "out_features", 1, _WIDEST),
            bias=_typed(content, "bias", bool),
            config=LayerConfig(
                weight=_build(TernaryWeight, content.get("weight"), "weight"),
                activation=_activation(content.get("activation")),
                rotation=_rotation(content.get("rotation")),
                low_rank=None
                if content.get("low_rank") is None
                else _build(LowRank, content["low_rank"], "low_rank"),
            ),
            seed=_natural(content, "seed", 0, 1 << 63),
            storage=_storage(content.get("codes")),
        )
        own = entry.as_json()
        differing = sorted(k for k in {**own, **content} if own.get(k, ()) != content.get(k, ()))
        if differing:
            key = differing[0]
            raise ValueError(
                f"{key} is {content.get(key)!r}, which this version makes {own.get(key)!r}; "
                "export it again with this version"
            )
        return entry


@lru_cache(maxsize=256)
def _built(rotation: Rotation) -> dict[str, Any]:
    """What a reader checks its own construction of a rotation against."""
    factors = hadamard_factors(rotation.block_size or rotation.width)
    signs = rotation.signs(torch.int8, "cpu")
    digest = None
    if signs is not None:
        digest = hashlib.sha256(pack_signs(signs).numpy().data).hexdigest()
    return {"factors": list(factors), "signs_sha256": digest}


def _rotation(content: object) -> HadamardRotation | None:
    if content is None:
        return None
    given = _object(content, "rotation")
    settings = {k: v for k, v in given.items() if k not in ("factors", "signs_sha256")}
    return _build(HadamardRotation, settings, "rotation")


def _activation(content: object) -> ActivationQuantizer | None:
    if content is None:
        return None
    given = dict(_object(content, "activation"))
    kind = given.pop("kind", None)
    if not isinstance(kind, str) or kind not in _ACTIVATIONS:
        raise ValueError(f"activation kind {kind!r} is unknown; there are {sorted(_ACTIVATIONS)}")
    return _build(_ACTIVATIONS[kind], given, "activation")


def _build(kind: type[ConfigT], content: object, what: str) -> ConfigT:
    """A frozen configuration of plain values, each of the type of the default."""
    given = _object(content, what)
    wanted = {field.name: field.default for field in fields(kind)}  # type: ignore[arg-type]
    if given.keys() != wanted.keys():
        raise ValueError(f"{what} has the settings {sorted(given)}, not {sorted(wanted)}")
    for key, default in wanted.items():
        allowed = (int, type(None)) if default is None else (type(default),)
        if type(given[key]) not in allowed:
            raise ValueError(f"{what} has {key}={given[key]!r}, which is no {allowed[0].__name__}")
    return kind(**given)


def _storage(value: object) -> Storage:
    if value not in get_args(Storage):
        raise ValueError(f"codes={value!r} is unknown; there are {get_args(Storage)}")
    return value  # type: ignore[return-value]


def _object(content: object, what: str) -> Mapping[str, Any]:
    if not isinstance(content, dict):
        raise ValueError(f"{what} is {content!r}, not a JSON object")
    return content


def _typed(content: Mapping[str, Any], key: str, kind: type[ConfigT]) -> ConfigT:
    value = content.get(key)
    if type(value) is not kind:
        raise ValueError(f"{key}={value!r} is no {kind.__name__}")
    return value


def _natural(content: Mapping[str, Any], key: str, least: int, limit: int) -> int:
    value = _typed(content, key, int)
    if not least <= value < limit:
        raise ValueError(f"{key}={value} is outside {least} .. {limit - 1}")
    return value
