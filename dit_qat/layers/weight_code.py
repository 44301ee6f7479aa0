"""What stands for a weight: codes that are stored exactly, and the weight that they decode to."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor

__all__ = [
    "WEIGHT_CODES",
    "Room",
    "Setting",
    "WeightCode",
    "check_rooms",
    "check_settings",
    "code_named",
]

Setting = int | float | str | bool | None | list[Any]

WEIGHT_CODES: dict[str, "type[WeightCode]"] = {}
"""Kinds of code by name; a subclass enters itself. Ask :func:`code_named` for all of ours."""

_FORBIDDEN = {"weight", "bias", "code", "training"}  # names that a layer needs for itself


class Room(NamedTuple):
    """What a stored tensor must look like.

    Attributes:
        shape: Its sizes.
        dtype: Its numbers.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.uint8


class WeightCode(ABC):
    """A weight (out, in) in the form in which it is stored.

    A subclass is a frozen dataclass without comparison (``@dataclass(frozen=True, eq=False)``, for
    tensors do not compare to one truth) of packed tensors and plain settings. It gives itself a
    ``name``, under which it is entered in :data:`WEIGHT_CODES`, and has the fields or properties
    ``out_features`` and ``in_features``.

    Attributes:
        name: Of the kind, in files; lower case letters, digits and underscores.
    """

    name: ClassVar[str]

    if TYPE_CHECKING:  # at run time a property here would be taken for a field's default

        @property
        def out_features(self) -> int:
            """Rows of the weight."""

        @property
        def in_features(self) -> int:
            """Columns of the weight."""

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        name = cls.__dict__.get("name")
        if name is None:  # a base of further kinds
            return
        known = WEIGHT_CODES.setdefault(name, cls)
        if known is not cls and known.__qualname__ != cls.__qualname__:
            raise ValueError(
                f"two weight codes are named {name!r}: {known.__qualname__} and {cls.__qualname__}"
            )
        WEIGHT_CODES[name] = cls

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """What is stored, by name: uint8, int32 or float16, nothing that follows from the rest."""

    @abstractmethod
    def settings(self) -> dict[str, Setting]:
        """Plain values that :meth:`restore` needs beside the tensors."""

    @abstractmethod
    def decode(self) -> Tensor:
        """The weight (out, in) float32, columns in their original order; always the same bits."""

    @classmethod
    @abstractmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Self:
        """Inverse of :meth:`settings` and :meth:`tensors`; neither is trusted.

        Raises:
            ValueError: for names, dtypes, shapes or values that no code of this kind has.
        """

    @property
    @abstractmethod
    def nominal_bits(self) -> float:
        """Bits per weight as the paper counts them."""

    @property
    def effective_bits(self) -> float:
        """Bits per weight that are stored: all of :meth:`tensors`."""
        stored = sum(tensor.nbytes for tensor in self.tensors().values())
        return 8 * stored / (self.out_features * self.in_features)


def code_named(name: str) -> type[WeightCode]:
    """Find a kind of code by its name: one that was entered, or one of this package.

    Raises:
        ValueError: if there is none.
    """
    if name not in WEIGHT_CODES:  # those of this package are in modules that end in _code
        package = __name__.rpartition(".")[0]
        for module in iter_modules([str(Path(__file__).parent)]):
            if module.name.endswith("_code"):
                import_module(f"{package}.{module.name}")
    if name not in WEIGHT_CODES:
        raise ValueError(
            f"a weight is a {name!r}, which is unknown here (there are "
            f"{', '.join(sorted(WEIGHT_CODES)) or 'none'}); read it with the version of dit_qat "
            "that wrote it"
        )
    return WEIGHT_CODES[name]


def check_settings(
    kind: str, settings: Mapping[str, Any], expected: Mapping[str, tuple[type, ...]]
) -> dict[str, Any]:
    """Give the settings back if they have the expected names and types.

    An int does for a float; a bool does for no number.

    Raises:
        ValueError: naming what is missing, unknown or of another type.
    """
    if settings.keys() != expected.keys():
        odd = sorted(settings.keys() ^ expected.keys())
        raise ValueError(
            f"a {kind} code has the settings {', '.join(expected) or 'none'}; missing or unknown: "
            f"{', '.join(map(str, odd))}"
        )
    for name, types in expected.items():
        value = settings[name]
        allowed = (*types, int) if float in types else types
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in types):
            wanted = " or ".join(kind.__name__ for kind in types)
            raise ValueError(f"setting {name} of a {kind} code is {value!r}, not {wanted}")
    return dict(settings)


def check_rooms(kind: str, tensors: Mapping[str, Tensor], rooms: Mapping[str, Room]) -> None:
    """Refuse tensors of other names, dtypes or shapes, and floats that are not finite.

    Raises:
        ValueError: naming the first that is wrong.
    """
    if tensors.keys() != rooms.keys():
        odd = sorted(tensors.keys() ^ rooms.keys())
        raise ValueError(
            f"a {kind} code has the tensors {', '.join(rooms)}; missing or unknown: "
            f"{', '.join(odd)}"
        )
    for name, room in rooms.items():
        tensor = tensors[name]
        if name in _FORBIDDEN:
            raise ValueError(f"a {kind} code may not have a tensor named {name!r}")
        if tuple(tensor.shape) != room.shape or tensor.dtype != room.dtype:
            raise ValueError(
                f"{name} of a {kind} code is {tensor.dtype} {tuple(tensor.shape)}, and not "
                f"{room.dtype} {room.shape}"
            )
        if tensor.is_floating_point() and not tensor.isfinite().all():
            raise ValueError(f"{name} of a {kind} code holds NaN or infinite values")
