"""What of a model is quantized: its blocks, and which linear layers within them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from torch import nn

from dit_qat.calibration.blocks import find_blocks
from dit_qat.calibration.calls import Call
from dit_qat.calibration.capture import check_argument

__all__ = ["Target", "linear_names", "present"]


@dataclass(frozen=True)
class Target:
    """Patterns over the names of a model's modules.

    Attributes:
        model: Float, or quantized in the course of a run.
        blocks: Globs of the blocks; ``*`` stays within its dots.
        quantize: Globs of linear layers; ``*`` also spans dots.
        skip: Globs of those that stay float whatever ``quantize`` says.
        timestep_argument: What the model's forward calls the timestep; None for a model without.

    Raises:
        ValueError: for a pattern that matches nothing, or an argument that forward does not have.
    """

    model: nn.Module
    blocks: Sequence[str]
    quantize: Sequence[str]
    skip: Sequence[str] = ()
    timestep_argument: str | None = None

    def __post_init__(self) -> None:
        check_argument(self.model, self.timestep_argument)
        find_blocks(self.model, self.blocks)
        names = linear_names(self.model)
        for pattern in (*self.quantize, *self.skip):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(_no_match(pattern, names, self.model))
        if not self.linears():
            raise ValueError(
                f"the patterns {list(self.skip)} skip every linear layer that "
                f"{list(self.quantize)} name; quantize more or skip less"
            )

    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers to quantize, by full name, in the order of the model."""
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and self._chosen(name):
                found[name] = module
        return found

    def find_blocks(self, call: Call | None = None) -> list[tuple[str, nn.Module]]:
        """Blocks by name; with a call, in the order in which it runs them."""
        return find_blocks(self.model, self.blocks, call)

    def _chosen(self, name: str) -> bool:
        wanted = any(fnmatchcase(name, pattern) for pattern in self.quantize)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.skip)


def present(patterns: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """Those patterns that match one of the names: defaults may name what a small model lacks."""
    return tuple(p for p in patterns if any(fnmatchcase(name, p) for name in names))


def linear_names(model: nn.Module) -> list[str]:
    """Full names of a model's linear layers."""
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _no_match(pattern: str, names: Sequence[str], model: nn.Module) -> str:
    near = get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
    return (
        f"pattern {pattern!r} matches no linear layer of {type(model).__name__}; near names: "
        f"{', '.join(near) or 'it has none'}"
    )
