"""What a quantization-aware method tells the trainer: rules, and a distillation weight."""

from abc import ABC, abstractmethod
from typing import Any, ClassVar

from dit_qat.layers import AttentionConfig, LayerConfig, QuantConfig, Rule

__all__ = ["Method", "dit_rules"]


class Method(ABC):
    """A quantization-aware training method for DiTs; composes settings, walks no model."""

    name: ClassVar[str]

    @property
    @abstractmethod
    def config(self) -> Any:
        """The frozen configuration dataclass."""

    @abstractmethod
    def quant_config(self) -> QuantConfig:
        """Rules that turn a float DiT into the method's quantized one."""

    @property
    @abstractmethod
    def distillation(self) -> float:
        """Weight of the squared distance to the float teacher's noise prediction."""


def dit_rules(block: LayerConfig, unrotated: LayerConfig | None, adaln: LayerConfig) -> list[Rule]:
    """Rules shared by the methods: which linear of a DiT block gets what.

    Embedders and the final layer match no pattern and stay float.

    Args:
        block: For qkv, proj, fc1 and fc2.
        unrotated: For qkv and fc1 where a method treats them apart (BitNet v2); None: as block.
        adaln: For the adaLN linears, whose input is one token per image.
    """
    rules = [Rule("blocks.*.attn.*", block), Rule("blocks.*.mlp.*", block)]
    if unrotated is not None:
        rules += [Rule("blocks.*.attn.qkv", unrotated), Rule("blocks.*.mlp.fc1", unrotated)]
    return [
        *rules,
        Rule("blocks.*.adaLN_modulation.1", adaln),
        Rule("blocks.*.attn", AttentionConfig(bits=8)),
    ]
