"""The policy: activation bits by timestep and layer, as a file and at run time."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

from dit_qat.allocation import average_bits
from dit_qat.export.files import write_json
from dit_qat.layers.step_bits import StepBits

__all__ = ["FORMAT", "Policy"]

FORMAT = "dit_qat.step_policy.1"

Bits = tuple[tuple[int, ...], ...]
Scores = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Policy:
    """Who gets how many activation bits when.

    Attributes:
        layers: Full names (L).
        timesteps: The model's own, in the order of sampling (T).
        bits: (T, L).
        operations: Multiply-accumulates per token of each layer (L): its number of weights.
        scores: (T, L), what the candidates were ranked by.
        average_asked: The budget: largest plain mean over timesteps and layers.

    Raises:
        ValueError: for shapes that do not belong together, or a layer or timestep twice.
    """

    layers: tuple[str, ...]
    timesteps: tuple[float, ...]
    bits: Bits
    operations: tuple[int, ...]
    scores: Scores
    average_asked: float

    def __post_init__(self) -> None:
        for values, what in ((self.layers, "layer"), (self.timesteps, "timestep")):
            if not values or len(set(values)) < len(values):
                raise ValueError(f"a policy needs at least one {what}, each once")
        shape = [len(self.layers)] * len(self.timesteps)
        if [len(r) for r in self.bits] != shape or [len(r) for r in self.scores] != shape:
            raise ValueError(
                f"bits and scores must have {len(self.timesteps)} rows of {len(self.layers)}"
            )
        if len(self.operations) != len(self.layers) or min(self.operations) < 1:
            raise ValueError(f"operations must be {len(self.layers)} numbers from 1 up")
        for name in self.layers:
            self.step_bits(name)

    @classmethod
    def constant(cls, like: "Policy", bits: int) -> "Policy":
        """The same bits everywhere."""
        row = (bits,) * len(like.layers)
        return cls(
            like.layers,
            like.timesteps,
            (row,) * len(like.timesteps),
            like.operations,
            like.scores,
            like.average_asked,
        )

    @property
    def average_bits(self) -> float:
        """Plain mean over timesteps and layers: what the budget limits."""
        total = sum(sum(row) for row in self.bits)
        return float(Fraction(total, len(self.layers) * len(self.timesteps)))

    @property
    def average_bits_by_operations(self) -> float:
        """Mean weighted by multiply-accumulates."""
        return sum(average_bits(row, self.operations) for row in self.bits) / len(self.bits)

    def step_bits(self, layer: str) -> StepBits:
        """Bits of one layer by timestep, for run time: any number of steps, nearest timestep."""
        at = self.layers.index(layer)
        return StepBits(self.timesteps, tuple(row[at] for row in self.bits))

    def as_dict(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        return {
            "format": FORMAT,
            "average_bits": self.average_bits,
            "average_bits_by_operations": self.average_bits_by_operations,
            "average_asked": self.average_asked,
            "layers": [*self.layers],
            "operations": [*self.operations],
            "timesteps": [*self.timesteps],
            "bits": [[*row] for row in self.bits],
            "scores": [[*row] for row in self.scores],
        }

    @classmethod
    def from_dict(cls, content: Any, source: object) -> "Policy":
        """Read what :meth:`as_dict` wrote.

        Args:
            content: What the file holds.
            source: Where it comes from, for messages.

        Raises:
            ValueError: for anything else, or another version.
        """
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            found = content.get("format") if isinstance(content, Mapping) else None
            raise ValueError(
                f"{source} is no bit policy of this version (format {found!r}, not {FORMAT!r}); "
                "make one with dit-qat ptq and the method adatsq"
            )
        try:
            return cls(
                layers=tuple(map(str, content["layers"])),
                timesteps=tuple(map(float, content["timesteps"])),
                bits=tuple(tuple(map(_whole, row)) for row in content["bits"]),
                operations=tuple(map(_whole, content["operations"])),
                scores=tuple(tuple(map(float, row)) for row in content["scores"]),
                average_asked=float(content["average_asked"]),
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source} is a damaged bit policy ({type(error).__name__}: {error}); make it again"
            ) from error

    def save(self, path: Path) -> None:
        """Write a JSON file, whole or not at all."""
        write_json(path, self.as_dict())

    @classmethod
    def load(cls, path: Path) -> "Policy":
        """Read a JSON file.

        Raises:
            OSError: if it cannot be read.
            ValueError: if it is no policy.
        """
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is no JSON file ({error})") from error
        return cls.from_dict(content, path)

    def check_schedule(self, timesteps: Iterable[float]) -> None:
        """Refuse a schedule that the policy does not cover.

        Raises:
            ValueError: naming the timestep.
        """
        bits = self.step_bits(self.layers[0])
        for timestep in timesteps:
            bits.index(timestep)


def _whole(number: Any) -> int:
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ValueError(f"{number!r} is no whole number from 1 up")
    return number
