"""Diffusers transformers of a few thousand random weights, and what to call them with."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor, nn

from dit_qat.calibration import LinearStatistics, Needs, Prefix
from dit_qat.dit.ptq import PTQMethod
from dit_qat.layers.int_linear import IntLinear
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.integer import IntegerGrid, round_to_nearest

_DIT = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 8,
    "num_embeds_ada_norm": 10,
}
_PIXART = {
    "num_attention_heads": 2,
    "attention_head_dim": 8,
    "in_channels": 4,
    "out_channels": 8,
    "num_layers": 2,
    "cross_attention_dim": 16,
    "sample_size": 8,
    "caption_channels": 12,
    "use_additional_conditions": False,
}
_SD3 = {
    "sample_size": 8,
    "in_channels": 4,
    "num_layers": 3,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "caption_projection_dim": 16,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "out_channels": 4,
    "pos_embed_max_size": 8,
    "dual_attention_layers": (0,),
    "qk_norm": "rms_norm",
}
_FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 2,
    "attention_head_dim": 16,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "axes_dims_rope": (4, 4, 8),
    "guidance_embeds": True,
}
_Z_IMAGE = {
    "in_channels": 4,
    "dim": 32,
    "n_layers": 2,
    "n_refiner_layers": 2,
    "n_heads": 2,
    "n_kv_heads": 2,
    "cap_feat_dim": 12,
    "axes_dims": [4, 4, 8],
    "axes_lens": [64, 16, 16],
}
_WAN = {
    "num_attention_heads": 2,
    "attention_head_dim": 12,
    "in_channels": 4,
    "out_channels": 4,
    "text_dim": 10,
    "freq_dim": 16,
    "ffn_dim": 40,
    "num_layers": 2,
    "rope_max_seq_len": 32,
}
CONFIGS = {
    "DiTTransformer2DModel": _DIT,
    "PixArtTransformer2DModel": _PIXART,
    "SD3Transformer2DModel": _SD3,
    "FluxTransformer2DModel": _FLUX,
    "ZImageTransformer2DModel": _Z_IMAGE,
    "WanTransformer3DModel": _WAN,
}


def _randn(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)))


def _inputs(name: str, timestep: float) -> dict[str, Any]:
    t = torch.full((2,), timestep)
    latents = {"hidden_states": _randn(2, 4, 8, 8), "timestep": t, "return_dict": False}
    text = {"encoder_hidden_states": _randn(2, 5, 12)}
    return {
        "DiTTransformer2DModel": latents | {"class_labels": torch.tensor([1, 3])},
        "PixArtTransformer2DModel": latents
        | text
        | {"encoder_attention_mask": torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])}
        | {"added_cond_kwargs": {"resolution": None, "aspect_ratio": None}},
        "SD3Transformer2DModel": latents | text | {"pooled_projections": _randn(2, 10)},
        "FluxTransformer2DModel": text
        | {"hidden_states": _randn(2, 16, 4), "timestep": t / 1000, "return_dict": False}
        | {"pooled_projections": _randn(2, 10), "guidance": torch.full((2,), 3.5)}
        | {"img_ids": torch.stack([torch.arange(16.0)] * 3, 1), "txt_ids": torch.zeros(5, 3)},
        "ZImageTransformer2DModel": {
            "x": [_randn(4, 1, 8, 8), _randn(4, 1, 8, 8) + 1],
            "t": t / 1000,
            "cap_feats": [_randn(5, 12), _randn(9, 12)],
            "return_dict": False,
        },
        "WanTransformer3DModel": {
            "hidden_states": _randn(2, 4, 2, 8, 8),
            "timestep": t,
            "encoder_hidden_states": _randn(2, 6, 10),
            "return_dict": False,
        },
    }[name]


@pytest.fixture(scope="session")
def make_transformer() -> Callable[..., nn.Module]:
    """Build a tiny transformer of a class of diffusers, no weight of it zero."""

    def make(name: str, **overrides: Any) -> nn.Module:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model: nn.Module = getattr(diffusers, name)(**(CONFIGS[name] | overrides)).eval()
            for parameter in model.parameters():
                nn.init.normal_(parameter, std=0.2)
        return model

    return make


@pytest.fixture(scope="session")
def transformer_inputs() -> Callable[[str, float], dict[str, Any]]:
    """Keyword arguments of a call of two images at a timestep from 0 to 1000."""
    return _inputs


@dataclass(frozen=True)
class RoundConfig:
    bits: int = 8


class Round(PTQMethod):
    """The least of all methods: weights to the nearest code of their channel."""

    name = "round"

    def __init__(self, bits: int = 8, needs: Needs | None = None, prefix: Prefix = "all") -> None:
        self.config = RoundConfig(bits)
        self._needs, self._prefix = needs or Needs(), prefix

    @property
    def needs(self) -> Needs:
        return self._needs

    @property
    def prefix(self) -> Prefix:
        return self._prefix

    def quantize_linear(
        self, name: str, linear: nn.Linear, statistics: LinearStatistics
    ) -> IntLinear:
        grid = IntegerGrid(self.config.bits)
        codes, scales = round_to_nearest(linear.weight.detach(), grid, "minmax")
        activation = TokenQuantizer(self.config.bits)
        return IntLinear.build(linear, grid=grid, scales=scales, codes=codes, activation=activation)


@pytest.fixture(scope="session")
def make_round() -> Callable[..., PTQMethod]:
    return Round
