"""Scores with all that belongs beside them: protocol, published numbers, warnings, notes."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from dit_qat.dit.evaluation.protocol import UNKNOWN, Protocol, protocol_of
from dit_qat.dit.evaluation.published import (
    PUBLISHED,
    Published,
    PublishedName,
    compare,
    fitting_published,
)
from dit_qat.dit.evaluation.scoring import Comparison, Scores

__all__ = ["CompareTo", "Report", "make_report"]

CompareTo = Literal[PublishedName, "auto", "none"]

_RULE = 78


@dataclass(frozen=True)
class Report:
    """What an evaluation has to say.

    Attributes:
        scores: By name.
        protocol: How they came about.
        published: What they are compared with.
        warnings: Why they must not be compared, or trusted.
        notes: What else there is to know.
    """

    scores: Mapping[str, float]
    protocol: Protocol
    published: Published | None
    warnings: Sequence[str]
    notes: Sequence[str]

    def content(self) -> dict[str, Any]:
        """Return plain values for a JSON file."""
        return {
            "metrics": dict(self.scores),
            "protocol": asdict(self.protocol),
            "published": None if self.published is None else asdict(self.published),
            "warnings": list(self.warnings),
            "notes": list(self.notes),
        }

    def table(self) -> str:
        """Return the scores, published ones beside them, and the protocol card."""
        theirs = {} if self.published is None else self.published.scores
        lines = [
            f"{name:<18}{value:>14.6g}"
            + (f"    published: {theirs[name]:g}" if name in theirs else "")
            for name, value in self.scores.items()
        ]
        if theirs and self.published is not None:
            lines.append(f"(published: {self.published.title})")
        lines += ["", "protocol"]
        for name, value in asdict(self.protocol).items():
            lines += [f"  {key:<18}{text}" for key, text in _card_lines(name, value)]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def warning_block(self) -> str:
        """Return the warnings, framed so that nobody misses them; empty without any."""
        if not self.warnings:
            return ""
        title = "other papers" if self.published is None else self.published.title
        head = f" WARNING: do not compare these numbers with those of {title} "
        points = [f" * {warning}" for warning in self.warnings]
        return "\n".join(["=" * _RULE, head, *points, "=" * _RULE])


def make_report(
    comparison: Comparison,
    scores: Scores,
    record: Mapping[str, Any],
    compare_to: CompareTo = "auto",
    cautions: Sequence[str] = (),
    notes: Sequence[str] = (),
) -> Report:
    """Return the report of a comparison.

    Args:
        comparison: What was computed.
        scores: Its result.
        record: What ``dit-qat sample`` wrote beside the samples; empty if nothing.
        compare_to: The published protocol to check against; "auto" is DiT's where it fits.
        cautions: Further warnings.
        notes: What else there is to know.
    """
    protocol = protocol_of(comparison, record)
    name = fitting_published(protocol) if compare_to == "auto" else compare_to
    published = None if name is None or name == "none" else PUBLISHED[name]
    deviations = compare(protocol, published)
    known = [str(deviation) for deviation in deviations if deviation.ours != UNKNOWN]
    unknown = [f"{d.field} ({d.theirs} there)" for d in deviations if d.ours == UNKNOWN]
    if unknown:
        known.append(
            f"unknown here: {', '.join(unknown)}. Nobody wrote it down (dit-qat sample does, in "
            "metrics.json), so nothing says that the protocols agree"
        )
    warnings = [*cautions, *comparison.unlike(), *known]
    return Report(scores.values, protocol, published, warnings, notes)


def _card_lines(name: str, value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, Mapping):
        return [(name, ", ".join(f"{key}: {text}" for key, text in value.items()))]
    return [] if value is None and name != "guided_channels" else [(name, value)]
