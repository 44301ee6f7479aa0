"""A bit map: who got how many bits, and the scores that decided it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from dit_qat.allocation.bounds import BoundRule, bit_bounds
from dit_qat.allocation.budget import average_bits
from dit_qat.allocation.knapsack import allocate_bits

__all__ = ["FORMAT", "BitMap", "make_bit_map"]

FORMAT = "dit_qat.bit_map.1"

Scores = tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class BitMap:
    """Activation bits by layer, with what they were chosen by.

    Attributes:
        layers: Module names (L).
        bits: Of each layer (L).
        costs: What a bit of each layer costs (L): its number of weights.
        choices: Bits that were to choose from (B).
        scores: (L, B), what each choice costs in quality.
        score: Name of the score.
        average_asked: The budget: largest mean of bits, weighted by cost.
        step: Optimizer steps behind the weights that were measured; None if unknown.
    """

    layers: tuple[str, ...]
    bits: tuple[int, ...]
    costs: tuple[int, ...]
    choices: tuple[int, ...]
    scores: Scores
    score: str
    average_asked: float
    step: int | None = None

    @property
    def average_bits(self) -> float:
        """Mean bits, weighted by cost: what was achieved."""
        return average_bits(self.bits, self.costs)

    @property
    def by_layer(self) -> dict[str, int]:
        """Bits by module name: what a method needs."""
        return dict(zip(self.layers, self.bits, strict=True))

    @property
    def mean_by_type(self) -> dict[str, float]:
        """Plain means over the blocks, by the last two parts of the name, such as ``mlp.fc2``."""
        found: dict[str, list[int]] = {}
        for name, bits in self.by_layer.items():
            found.setdefault(".".join(name.split(".")[-2:]), []).append(bits)
        return {kind: fmean(found[kind]) for kind in sorted(found)}

    def as_dict(self) -> dict[str, Any]:
        """Plain types for a JSON file."""
        rows = zip(self.layers, self.bits, self.costs, self.scores, strict=True)
        return {
            "format": FORMAT,
            "average_bits": self.average_bits,
            "average_asked": self.average_asked,
            "step": self.step,
            "score": self.score,
            "choices": [*self.choices],
            "mean_by_type": self.mean_by_type,
            "layers": [
                {"name": name, "bits": bits, "cost": cost, "scores": [*scores]}
                for name, bits, cost, scores in rows
            ],
        }

    @classmethod
    def from_dict(cls, content: Any, source: object) -> "BitMap":
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
                f"{source} is no bit map of this version (format {found!r}, not {FORMAT!r}); make "
                "one with dit-qat allocate"
            )
        try:
            rows = content["layers"]
            found = cls(
                layers=tuple(str(row["name"]) for row in rows),
                bits=tuple(_whole(row["bits"]) for row in rows),
                costs=tuple(_whole(row["cost"]) for row in rows),
                choices=tuple(_whole(b) for b in content["choices"]),
                scores=tuple(tuple(float(s) for s in row["scores"]) for row in rows),
                score=str(content["score"]),
                average_asked=float(content["average_asked"]),
                step=None if content["step"] is None else int(content["step"]),
            )
            found._check()
            return found
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source} is a damaged bit map ({type(error).__name__}: {error}); make it again "
                "with dit-qat allocate"
            ) from error

    def _check(self) -> None:
        """Raise ValueError if the parts do not belong together."""
        if not self.layers or len(set(self.layers)) < len(self.layers):
            raise ValueError("no layers, or one of them twice")
        for name, bits, row in zip(self.layers, self.bits, self.scores, strict=True):
            if bits not in self.choices or len(row) != len(self.choices):
                raise ValueError(
                    f"{name} has {bits} bits and {len(row)} scores, with "
                    f"{len(self.choices)} choices ({', '.join(map(str, self.choices))})"
                )


def _whole(number: Any) -> int:
    if not isinstance(number, int) or isinstance(number, bool) or number < 1:
        raise ValueError(f"{number!r} is no whole number from 1 up")
    return number


def make_bit_map(
    layers: Sequence[str],
    costs: Sequence[int],
    choices: Sequence[int],
    scores: Sequence[Sequence[float]],
    *,
    average: float,
    bounds: Mapping[str, BoundRule],
    score: str,
    step: int | None,
) -> BitMap:
    """Allocate bits by measured scores.

    Arguments as the attributes of :class:`BitMap`; ``bounds`` by glob as in :func:`bit_bounds`.

    Raises:
        ValueError: as :func:`bit_bounds` and :func:`allocate_bits`.
    """
    limits = bit_bounds(layers, bounds, choices)
    bits = allocate_bits(scores, costs, choices, average, bounds=limits)
    return BitMap(
        tuple(layers),
        tuple(bits.tolist()),
        tuple(costs),
        tuple(choices),
        tuple(tuple(row) for row in scores),
        score,
        average,
        step,
    )
