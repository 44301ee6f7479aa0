"""A DiT as diffusers' ``DiTTransformer2DModel``: the inverse of ``from_diffusers``."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.from_diffusers import BLOCK_LAYERS, EMBEDDERS, OUTER_LAYERS, REQUIRED
from dit_qat.dit.models.native import float_state

if TYPE_CHECKING:
    from diffusers import DiTTransformer2DModel

__all__ = ["check_diffusers", "dit_to_diffusers"]

_MLP_RATIO = 4.0


def dit_to_diffusers(model: DiT) -> "DiTTransformer2DModel":
    """Build diffusers' model with the same outputs, in evaluation mode.

    diffusers' DiT computes timestep frequencies with a shift of 1, always has a table of labels
    with a null class (which its training mode draws by itself), MLPs four times as wide as the
    tokens, and positions that are computed, not stored. It holds a copy of the embedders in every
    block, so that 28 blocks of DiT-XL/2 are 12 % larger.

    Args:
        model: A float DiT; its tensors are copied.

    Raises:
        ValueError: If diffusers cannot hold the model, naming what and the way out.
    """
    from diffusers import DiTTransformer2DModel  # seconds, which only this costs

    state = float_state(model)
    check_diffusers(model)
    with torch.random.fork_rng(devices=[]):
        theirs = DiTTransformer2DModel(**_config(model))
    theirs.load_state_dict(_renamed(state, model.depth))
    return theirs.eval()


def check_diffusers(model: DiT) -> None:
    """Refuse a float DiT that diffusers' class cannot hold.

    Raises:
        ValueError: For what has no counterpart there.
    """
    if model.timestep_shift != 1:
        raise ValueError(
            f"timestep_shift={model.timestep_shift}: diffusers' DiT hard-codes the frequencies of "
            "timestep_shift=1, so its outputs would differ; convert_checkpoint with "
            "across_conventions=True measures by how much, and converts"
        )
    wrong = [
        (not model.num_classes, "num_classes=0", "has no unconditional DiT"),
        (not model.class_dropout_prob, "class_dropout_prob=0", "always has a null class"),
        (model.mlp_ratio != _MLP_RATIO, f"mlp_ratio={model.mlp_ratio}", "has only mlp_ratio=4"),
        (not model.depth, "depth=0", "keeps its embedders in the blocks"),
    ]
    for found, what, why in wrong:
        if found:
            raise ValueError(
                f"{what}: diffusers' DiT {why}, so this model cannot be one; use the format "
                "dit_qat (save_dit)"
            )
    with torch.random.fork_rng(devices=[]):
        bare = DiT(**(model.config | {"depth": 0, "num_classes": 0}))
    if not torch.allclose(model.pos_embed.detach().cpu(), bare.pos_embed, rtol=0, atol=1e-5):
        raise ValueError(
            "pos_embed: this model's table of positions is not the computed one, which is all that "
            "diffusers' DiT has; use the format dit_qat (save_dit)"
        )


def _config(model: DiT) -> dict[str, Any]:
    return REQUIRED | {
        "sample_size": model.input_size,
        "patch_size": model.patch_size,
        "in_channels": model.in_channels,
        "out_channels": model.out_channels,
        "num_attention_heads": model.num_heads,
        "attention_head_dim": model.hidden_size // model.num_heads,
        "num_layers": model.depth,
        "num_embeds_ada_norm": model.num_classes,
        "norm_eps": model.norm2_eps,
    }


def _renamed(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    weights = {}
    for kind in ("weight", "bias"):
        for ours, theirs in OUTER_LAYERS.items():
            weights[f"{theirs}.{kind}"] = state[f"{ours}.{kind}"]
        for i in range(depth):
            prefix = f"transformer_blocks.{i}"
            parts = state[f"blocks.{i}.attn.qkv.{kind}"].chunk(3)
            for name, part in zip("qkv", parts, strict=True):
                weights[f"{prefix}.attn1.to_{name}.{kind}"] = part
            for ours, theirs in BLOCK_LAYERS.items():
                weights[f"{prefix}.{theirs}.{kind}"] = state[f"blocks.{i}.{ours}.{kind}"]
    for i in range(depth):
        for ours, theirs in EMBEDDERS.items():
            weights[f"transformer_blocks.{i}.norm1.emb.{theirs}"] = state[ours]
    return weights
