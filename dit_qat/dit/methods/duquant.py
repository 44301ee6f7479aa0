"""DuQuant (arXiv:2406.01721): rotate blocks, deal channels to them in zigzag, rotate again."""

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Needs
from dit_qat.dit.methods.rotation import check_rotations, rotation_of, zigzag
from dit_qat.dit.methods.settings import refuse_both
from dit_qat.dit.ptq.method import PTQMethod, PTQRun
from dit_qat.layers import InputTransform, IntLinear, Permute, Rotate, TokenQuantizer
from dit_qat.layers.rounding import nearest_layer
from dit_qat.primitives.hadamard import Rotation
from dit_qat.primitives.integer import IntegerGrid

__all__ = ["DuQuant", "DuQuantConfig", "zigzag_transform"]


@dataclass(frozen=True)
class DuQuantConfig:
    """Settings of :class:`DuQuant`.

    Attributes:
        weight_bits: 2, 3, 4 or 8; asymmetric, a scale per output channel.
        activation_bits: 2..8; asymmetric, a scale per token; None: activations stay float.
        block_size: Of both rotations; where it does not divide a width, the largest power of two
            up to it that does.
        tokens: Rows from which channel maxima behind the first rotation are taken.
        seed: Of the random signs.

    Raises:
        ValueError: for values outside their range.
    """

    weight_bits: int = 4
    activation_bits: int | None = 4
    block_size: int = 128
    tokens: int = 512
    seed: int = 0

    def __post_init__(self) -> None:
        _ = self.grid, self.activation  # refuse bad bits now
        if self.tokens < 1:
            raise ValueError(f"tokens={self.tokens} is below 1; 512 is usual")

    @property
    def grid(self) -> IntegerGrid:
        """Of the transformed weights."""
        return IntegerGrid(self.weight_bits, symmetric=False)

    @property
    def activation(self) -> TokenQuantizer | None:
        """Of the transformed inputs."""
        bits = self.activation_bits
        return None if bits is None else TokenQuantizer(bits, symmetric=False)


class DuQuant(PTQMethod):
    """DuQuant's transform with Hadamard blocks, and rounding to nearest.

    The paper's blocks are found greedily, from rotations that spread the largest channel; these are
    Hadamard matrices with random signs, so that it differs from CLQ's smoothing by its permutation
    alone.

    Args:
        config: The whole configuration, or else
        kwargs: fields of :class:`DuQuantConfig`.
    """

    name: ClassVar[str] = "duquant"

    def __init__(self, config: DuQuantConfig | None = None, **kwargs: Any) -> None:
        refuse_both("DuQuant", config, kwargs)
        self.config = DuQuantConfig(**kwargs) if config is None else config

    @property
    def needs(self) -> Needs:
        """Some rows of every input."""
        return Needs(tokens=self.config.tokens, ranges=False)

    def start(self, run: PTQRun) -> None:
        """Refuse widths that cannot be rotated."""
        check_rotations(run.target.linears(), self.config.block_size)

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        """Transform, then round to nearest."""
        c = self.config
        rotation = rotation_of(linear.in_features, c.seed, name, c.block_size)
        transform = zigzag_transform(statistics.rows, rotation)
        return nearest_layer(linear, c.grid, c.activation, transform)


def zigzag_transform(rows: Tensor, rotation: Rotation) -> InputTransform:
    """Rotate blocks, give each a similar share of what still stands out, and rotate again.

    Args:
        rows: (n, in) inputs.
        rotation: Of blocks.
    """
    width = rotation.width
    scores = rotation.apply(rows).abs().amax(0)
    order = zigzag(scores, width // (rotation.block_size or width))
    seed = None if rotation.seed is None else rotation.seed + 1
    again = replace(rotation, seed=seed)
    return InputTransform(width, [Rotate(rotation), Permute(order), Rotate(again)])
