"""Conversion of diffusers' ``DiTTransformer2DModel``, which has names and groupings of its own."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.dit.models.build import build_dit
from dit_qat.dit.models.dit import DiT

__all__ = [
    "BLOCK_LAYERS",
    "EMBEDDERS",
    "OUTER_LAYERS",
    "REQUIRED",
    "dit_from_diffusers",
    "weights_from_diffusers",
]

# Names in a block of ours -> names in a block of diffusers.
BLOCK_LAYERS = {
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
    "adaLN_modulation.1": "norm1.linear",
}
OUTER_LAYERS = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
EMBEDDERS = {
    "t_embedder.mlp.0.weight": "timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "timestep_embedder.linear_2.bias",
    "y_embedder.embedding_table.weight": "class_embedder.embedding_table.weight",
}
_NEEDED = (
    "sample_size",
    "patch_size",
    "in_channels",
    "num_attention_heads",
    "attention_head_dim",
    "num_layers",
    "num_embeds_ada_norm",
)
# What the conversion takes for granted; diffusers' classes can be configured otherwise.
REQUIRED = {
    "activation_fn": "gelu-approximate",
    "norm_type": "ada_norm_zero",
    "norm_elementwise_affine": False,
    "attention_bias": True,
}


def dit_from_diffusers(
    model_or_state_dict: nn.Module | Mapping[str, Tensor],
    config: Mapping[str, Any] | None = None,
) -> DiT:
    """Build a DiT with the same outputs as a ``DiTTransformer2DModel``.

    Args:
        model_or_state_dict: The diffusers model or its state dict.
        config: Its configuration; by default the model's own.

    Returns:
        A float32 DiT on the CPU with diffusers' timestep frequencies and norm epsilon.

    Raises:
        ValueError: If the configuration is missing, incomplete or of another kind of model, weights
            are missing, or the embedders, of which diffusers keeps a copy per block, differ.
    """
    if isinstance(model_or_state_dict, nn.Module):
        state: Mapping[str, Tensor] = model_or_state_dict.state_dict()
        config = getattr(model_or_state_dict, "config", None) if config is None else config
    else:
        state = model_or_state_dict
    if config is None:
        raise ValueError("a state dict does not tell the number of heads: pass diffusers' config")
    arguments, weights = weights_from_diffusers(state, config, "diffusers' model")
    copies = {name: tensor.to("cpu", torch.float32, copy=True) for name, tensor in weights.items()}
    return build_dit(arguments, copies, "diffusers' model")


def weights_from_diffusers(
    state: Mapping[str, Tensor], config: Mapping[str, Any], source: object
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Name and group the tensors of a ``DiTTransformer2DModel`` as :class:`DiT` does.

    Args:
        state: Its state dict; what is not regrouped is not copied.
        config: Its configuration.
        source: Where both come from, for messages.

    Returns:
        Arguments of :class:`DiT`, and its tensors.

    Raises:
        ValueError: As for :func:`dit_from_diffusers`.
    """
    try:
        arguments = _arguments(config)
        # The table of positions is computed: a DiT without blocks has the same.
        with torch.random.fork_rng(devices=[]):
            bare = DiT(**(arguments | {"depth": 0, "num_classes": 0}))
        weights = {"pos_embed": bare.pos_embed.detach()} | _renamed(state, arguments["depth"])
    except KeyError as error:
        raise ValueError(
            f"{source}: the weights lack {error}; they are not those of a DiTTransformer2DModel "
            f"with num_layers={config['num_layers']}"
        ) from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{source}: {error}") from error
    return arguments, weights


def _arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    missing = [name for name in _NEEDED if name not in config]
    if missing:
        raise ValueError(
            f"the configuration lacks {', '.join(missing)}; pass the whole config.json of a "
            "DiTTransformer2DModel"
        )
    for name, required in REQUIRED.items():
        if config.get(name, required) != required:
            raise ValueError(
                f"diffusers' {name}={config[name]!r} has no counterpart here; only models with "
                f"{name}={required!r} can be converted"
            )
    channels, heads = config["in_channels"], config["num_attention_heads"]
    out_channels = config.get("out_channels") or channels
    if out_channels not in (channels, 2 * channels):
        raise ValueError(
            f"out_channels={out_channels} is neither in_channels={channels} (noise) nor twice "
            "that (noise and variance)"
        )
    return {
        "input_size": config["sample_size"],
        "patch_size": config["patch_size"],
        "in_channels": channels,
        "hidden_size": heads * config["attention_head_dim"],
        "depth": config["num_layers"],
        "num_heads": heads,
        "num_classes": config["num_embeds_ada_norm"],
        "learn_sigma": out_channels == 2 * channels,
        "timestep_shift": 1,
        "norm2_eps": config.get("norm_eps", 1e-5),
    }


def _renamed(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    weights = _shared_embedders(state, depth)
    for kind in ("weight", "bias"):
        for ours, theirs in OUTER_LAYERS.items():
            weights[f"{ours}.{kind}"] = state[f"{theirs}.{kind}"]
        for i in range(depth):
            prefix = f"transformer_blocks.{i}"
            qkv = [state[f"{prefix}.attn1.to_{part}.{kind}"] for part in "qkv"]
            weights[f"blocks.{i}.attn.qkv.{kind}"] = torch.cat(qkv)
            for ours, theirs in BLOCK_LAYERS.items():
                weights[f"blocks.{i}.{ours}.{kind}"] = state[f"{prefix}.{theirs}.{kind}"]
    return weights


def _shared_embedders(state: Mapping[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Return the first block's embedders, after a check that every block has the same."""
    weights = {}
    for ours, theirs in EMBEDDERS.items():
        copies = [state[f"transformer_blocks.{i}.norm1.emb.{theirs}"] for i in range(depth)]
        for i, copy in enumerate(copies):
            if not torch.equal(copy, copies[0]):
                raise ValueError(
                    f"transformer_blocks.{i}.norm1.emb.{theirs} differs from block 0's; a DiT has "
                    "one embedder for all blocks, so this model cannot be converted"
                )
        weights[ours] = copies[0]
    return weights
