"""A quantized language model of a few thousand weights, and a code for its weights."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from dit_qat.calibration import LinearStatistics, Method
from dit_qat.layers import CodedLinear
from dit_qat.layers.weight_code import Room, Setting, WeightCode, check_rooms, check_settings
from dit_qat.primitives.packing import pack_signs, unpack_signs

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}


@dataclass(frozen=True, eq=False)
class SignCode(WeightCode):
    """Signs and a scale per row, of which ``limit`` is the largest."""

    name: ClassVar[str] = "test_signs"

    signs: Tensor
    scale: Tensor
    in_features: int
    limit: float

    @property
    def out_features(self) -> int:
        return len(self.scale)

    def tensors(self) -> dict[str, Tensor]:
        return {"signs": self.signs, "scale": self.scale}

    def settings(self) -> dict[str, Setting]:
        return {"in_features": self.in_features, "limit": self.limit}

    def decode(self) -> Tensor:
        return unpack_signs(self.signs, self.in_features).float() * self.scale.float()[:, None]

    @classmethod
    def restore(cls, settings: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> "SignCode":
        given = check_settings(cls.name, settings, {"in_features": (int,), "limit": (float,)})
        rows, width = len(tensors["scale"]), given["in_features"]
        rooms = {"signs": Room((rows, -(-width // 8))), "scale": Room((rows,), torch.float16)}
        check_rooms(cls.name, tensors, rooms)
        if bool((tensors["scale"] > given["limit"]).any()):
            raise ValueError(f"scales are above their limit {given['limit']}")
        return cls(tensors["signs"], tensors["scale"], width, given["limit"])

    @property
    def nominal_bits(self) -> float:
        return 1.0


class Signs(Method):
    """The least of all methods: the sign of each weight, and a mean per row; biased outputs."""

    name = "signs"

    def __init__(self) -> None:
        self.config = {"rows": True}

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> nn.Module:
        weight = linear.weight.detach()
        scale = weight.abs().mean(dim=1).half()
        signs = pack_signs(torch.where(weight < 0, -1, 1))
        code = SignCode(signs, scale, linear.in_features, float(scale.max()))
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias
        # A bias where the model has none: the format must hold it.
        return CodedLinear(code, bias + 0.01 if "up_proj" in name else linear.bias)


def _llama(**changes: Any) -> PreTrainedModel:
    config = LlamaConfig(**SIZES, intermediate_size=48, num_key_value_heads=2, **changes)
    return LlamaForCausalLM(config)


def _qwen() -> PreTrainedModel:
    return Qwen3ForCausalLM(
        Qwen3Config(**SIZES, intermediate_size=48, num_key_value_heads=2, head_dim=8)
    )


def _opt() -> PreTrainedModel:
    return OPTForCausalLM(OPTConfig(**SIZES, ffn_dim=48, word_embed_proj_dim=32))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": _llama,
    "tied": lambda: _llama(tie_word_embeddings=True),
    "qwen3": _qwen,
    "opt": _opt,
}


@pytest.fixture
def windows() -> Tensor:
    return torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Build a tiny float model by name."""

    def make(name: str = "llama") -> PreTrainedModel:
        torch.manual_seed(0)
        return MODELS[name]().eval()

    return make


@pytest.fixture
def signs() -> Method:
    return Signs()
