"""AMPN (RobuQ, arXiv:2509.23582): activation bits by layer, ternary weights everywhere."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar, get_args

from dit_qat.allocation import BoundRule
from dit_qat.dit.evaluation.sensitivity import BLOCK_LINEARS, Score
from dit_qat.dit.methods.robuq import RobuQ, RobuQConfig
from dit_qat.layers import QuantConfig, Rule

__all__ = ["AMPN", "AMPNConfig"]

_MOST_BITS = 8
_MOST_TIMESTEPS = 1000


@dataclass(frozen=True)
class AMPNConfig(RobuQConfig):
    """Settings of :class:`AMPN`, those of RobuQ included.

    Attributes:
        activation_bits: Of all block linears during the warm-up; 0: the highest choice. (After a
            warm-up at two bits the weights make up for just these, and hide which layer needs
            more.)
        average_bits: Budget: largest mean of the block linears' bits, weighted by their weights.
        choices: Bits that a layer can get.
        warmup_steps: Optimizer steps before the layers are scored and the bits allocated.
        score: How layers are scored (see ``layer_sensitivity``).
        score_images: Images to score with.
        score_timesteps: Timesteps at which each of them is noised.
        bounds: Fixed bits, or least and most bits, by glob over layer names; the last match wins.
        bit_map: Bits by layer, or the path of a bit map, which is read on a fresh start only; None:
            to be allocated after the warm-up. With a bit map there is no warm-up.

    Raises:
        ValueError: for choices, an average or counts out of range, or an unknown score.
    """

    activation_bits: int = 0
    average_bits: float = 2.0
    choices: tuple[int, ...] = (1, 2, 3, 4)
    warmup_steps: int = 1000
    score: Score = "output"
    score_images: int = 32
    score_timesteps: int = 8
    bounds: dict[str, BoundRule] = field(default_factory=dict)
    bit_map: dict[str, int] | str | Path | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        choices = tuple(self.choices)  # files hand tuples over as lists
        object.__setattr__(self, "choices", choices)
        whole = all(isinstance(b, int) and 1 <= b <= _MOST_BITS for b in choices)
        if not choices or not whole or len(set(choices)) < len(choices):
            raise ValueError(
                f"choices={choices} must be whole activation bits from 1 to {_MOST_BITS}, each once"
            )
        if not min(choices) <= self.average_bits <= max(choices):
            raise ValueError(
                f"average_bits={self.average_bits} is outside {min(choices)}..{max(choices)}, what "
                "the choices allow"
            )
        for name in ("warmup_steps", "score_images", "score_timesteps"):
            count = getattr(self, name)
            if not isinstance(count, int) or count < 1:
                raise ValueError(f"{name}={count} must be a whole number, at least 1")
        if self.score_timesteps > _MOST_TIMESTEPS:
            raise ValueError(
                f"score_timesteps={self.score_timesteps} is beyond the {_MOST_TIMESTEPS} of the "
                "schedule; 8 are usually enough"
            )
        if self.score not in get_args(Score):
            raise ValueError(f"score={self.score!r} is unknown; use one of {get_args(Score)}")
        if not self.activation_bits:
            object.__setattr__(self, "activation_bits", max(choices))
        if isinstance(self.bit_map, Path):  # checkpoints hold plain types
            object.__setattr__(self, "bit_map", str(self.bit_map))


class AMPN(RobuQ):
    """RobuQ with activation bits allocated per layer, after a warm-up at uniform bits.

    Which layers are to get bits, how they are scored and under which budget is decided here; the
    measuring, in the midst of a training run, is ``BitAllocation``'s (a callback).

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`AMPNConfig`.
    """

    name: ClassVar[str] = "ampn"
    layers: ClassVar[tuple[str, ...]] = BLOCK_LINEARS

    def __init__(self, config: AMPNConfig | None = None, **kwargs: Any) -> None:
        if config is not None and kwargs:
            raise ValueError(f"give AMPN either a config or fields of it, not both: {kwargs}")
        self._config: AMPNConfig = AMPNConfig(**kwargs) if config is None else config
        self.without_file().quant_config()  # refuses bad settings now

    @property
    def config(self) -> AMPNConfig:
        """The frozen settings."""
        return self._config

    @property
    def bits(self) -> dict[str, int] | None:
        """The bit map, once there is one."""
        found = self.config.bit_map
        return found if isinstance(found, dict) else None

    def with_bits(self, bits: Mapping[str, int]) -> "AMPN":
        """The same method with its bit map frozen."""
        return AMPN(replace(self.config, bit_map=dict(bits)))

    def without_file(self) -> "AMPN":
        """Itself, or, where its bit map is a file that nobody has read, the method without one."""
        if not isinstance(self.config.bit_map, str):
            return self
        return AMPN(replace(self.config, bit_map=None))

    def quant_config(self) -> QuantConfig:
        """RobuQ's rules, and one more for each layer of the bit map.

        Raises:
            ValueError: if the bit map is a file: a method opens none.
        """
        if isinstance(self.config.bit_map, str):
            raise ValueError(
                f"bit_map={self.config.bit_map!r} names a file, which a training run reads; here "
                "give the bits: with_bits(read_bit_map(path).by_layer), of "
                "dit_qat.dit.training.bit_maps"
            )
        base = super().quant_config()
        block = self._block()
        own = [
            Rule(name, replace(block, activation=self._activation(bits)))
            for name, bits in (self.bits or {}).items()
        ]
        return QuantConfig((*base.rules, *own), base.seed)
