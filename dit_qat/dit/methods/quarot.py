"""QuaRot (arXiv:2404.00456): rotate inputs so that no channel stands out, then quantize."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import nn

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.dit.methods.rotation import check_rotations, rotation_of
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.layers import InputTransform, IntLinear, Rotate, TokenQuantizer
from dit_qat.layers.rounding import (
    ClipSearch,
    GPTQSettings,
    Rounding,
    nearest_layer,
    round_gptq,
)
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["QuaRot", "QuaRotConfig"]


@dataclass(frozen=True)
class QuaRotConfig:
    """Settings of :class:`QuaRot`.

    Attributes:
        weight_bits: 2, 3, 4 or 8; symmetric, a scale per output channel.
        activation_bits: 2..8; symmetric, a scale per token; None: activations stay float.
        activation_clip: Factor on every token's range, in (0, 1]; 0.9 for language models.
        rounding: ``gptq``, or ``nearest``.
        gptq: Settings of ``rounding="gptq"``.
        clip: Search of the weight's range; None: the full one.
        block_size: Rotate blocks of at most this; None: the full width, or, where that has no
            Hadamard order, half of it, or the largest power of two in it.
        seed: Of the random signs.

    Raises:
        ValueError: for values outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    activation_clip: float = 1.0
    rounding: Rounding = "gptq"
    gptq: GPTQSettings = field(default_factory=GPTQSettings)
    clip: ClipSearch | None = field(default_factory=ClipSearch)
    block_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.grid, self.activation  # refuse bad values now

    @property
    def grid(self) -> IntegerGrid:
        """Of the rotated weights."""
        return IntegerGrid(self.weight_bits)

    @property
    def activation(self) -> TokenQuantizer | None:
        """Of the rotated inputs."""
        clip = (self.activation_clip, self.activation_clip)
        bits = self.activation_bits
        return None if bits is None else TokenQuantizer(bits, clip=clip)


class QuaRot(PTQMethod):
    """QuaRot with an online rotation of every input.

    A DiT's adaptive norms modulate each channel by the condition, so that a rotation cannot be
    folded into what comes before, as it is in language models.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`QuaRotConfig`.
    """

    name: ClassVar[str] = "quarot"

    def __init__(self, config: QuaRotConfig | None = None, **kwargs: Any) -> None:
        refuse_both("QuaRot", config, kwargs)
        self.config = QuaRotConfig(**kwargs) if config is None else config

    @property
    def needs(self) -> Needs:
        """Second moments for GPTQ."""
        return Needs(second_moment=self.config.rounding == "gptq", ranges=False)

    def start(self, run: PTQRun) -> None:
        """Refuse widths that cannot be rotated."""
        check_rotations(run.target.linears(), self.config.block_size)

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        """Rotate the weight over its inputs, then round it."""
        c = self.config
        width = linear.in_features
        rotation = rotation_of(width, c.seed, name, c.block_size)
        transform = InputTransform(width, [Rotate(rotation)])
        if c.rounding == "nearest":
            return nearest_layer(linear, c.grid, c.activation, transform, c.clip)
        weight, moment = transform.weight(linear.weight), statistics.second_moment
        codes, scales, _ = round_gptq(weight, moment, c.grid, c.gptq, c.clip, transform)
        return IntLinear.build(
            linear,
            grid=c.grid,
            scales=scales,
            codes=codes,
            activation=c.activation,
            transform=transform,
        )
