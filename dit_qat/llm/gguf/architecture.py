"""What GGUF calls the parts and sizes of a model, for the architectures that can be written."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from dit_qat.export.extras import import_extra
from dit_qat.llm.models.roles import Roles, roles_of

__all__ = [
    "EXTRA",
    "GGUFArchitecture",
    "TensorNames",
    "add_sizes",
    "architecture_of",
    "rope_factors",
    "row_order",
]

EXTRA = "gguf"
"""The extra of this package that installs the writer."""


@dataclass(frozen=True)
class GGUFArchitecture:
    """How llama.cpp reads the models of one architecture.

    Attributes:
        name: As GGUF has it.
        paired: Rotary positions turn neighbouring channels of a head (those of transformers turn
            channels half a head apart), so that rows of q and k are stored in another order.
        biases: Roles whose linears may have a bias; others are not read.
        factors: Whether it reads factors of the rotary frequencies.
    """

    name: str
    paired: bool
    biases: tuple[str, ...]
    factors: bool


_LLAMA = GGUFArchitecture("llama", True, ("q", "k", "v", "o", "gate", "up", "down"), True)
_KNOWN: Mapping[str, GGUFArchitecture] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "qwen2": GGUFArchitecture("qwen2", False, ("q", "k", "v"), False),
    "qwen3": GGUFArchitecture("qwen3", False, (), False),
}


def architecture_of(model: Any) -> GGUFArchitecture:
    """How llama.cpp reads a model.

    Raises:
        ValueError: for a model, an activation or positions that it does not have.
    """
    config = model.config
    found = _KNOWN.get(config.model_type)
    if found is None:
        raise ValueError(
            f"GGUF of {config.model_type!r} models is not written; llama.cpp reads, of those known "
            f"here, {', '.join(_KNOWN)}. Export a folder (--format folder) instead"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"hidden_act={config.hidden_act!r}, and llama.cpp has silu there")
    rope = config.rope_parameters
    allowed = ("default", "linear", "llama3") if found.factors else ("default", "linear")
    if rope["rope_type"] not in allowed or rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"rotary positions {rope} cannot be said in GGUF of {found.name}; there are "
            f"{', '.join(allowed)} over whole heads"
        )
    return found


def row_order(name: str, roles: Roles, model: Any, found: GGUFArchitecture) -> Tensor | None:
    """The rows of a linear (out,) in the order in which they are stored; None: as they are."""
    role = roles.role(name)
    if not found.paired or role not in ("q", "k"):
        return None
    heads = roles.heads if role == "q" else roles.key_value_heads
    width = _head_width(model)
    # Channel i of a head and its partner i + width / 2 come side by side.
    return torch.arange(heads * width).view(heads, 2, width // 2).mT.flatten()


def _head_width(model: Any) -> int:
    """Channels of an attention head."""
    config = model.config
    own = getattr(config, "head_dim", None)
    return int(own or config.hidden_size // config.num_attention_heads)


def rope_factors(model: Any) -> Tensor | None:
    """What rotary frequencies are divided by (head width / 2,); None where nothing but 1."""
    rope = model.config.rope_parameters
    if rope["rope_type"] != "llama3":
        return None
    width = _head_width(model)
    plain = float(rope["rope_theta"]) ** -(torch.arange(0, width, 2).double() / width)
    scaled: Tensor = model.model.rotary_emb.inv_freq
    return (plain / scaled.double().cpu()).float()


def add_sizes(writer: Any, model: Any) -> None:
    """Write what a reader needs to know beside tensors and tokens."""
    config, rope = model.config, model.config.rope_parameters
    roles, width = roles_of(model), _head_width(model)
    writer.add_block_count(len(roles.block_names))
    writer.add_context_length(_context_length(config))
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(roles.heads)
    writer.add_head_count_kv(roles.key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_vocab_size(config.vocab_size)
    if rope["rope_type"] == "linear":
        kinds = import_extra("gguf", EXTRA).RopeScalingType
        writer.add_rope_scaling_type(kinds.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def _context_length(config: Any) -> int:
    """The longest sequence on which llama.cpp computes what transformers does.

    These architectures have no sliding window there, which makes no difference up to its length.
    """
    limits = (config.max_position_embeddings, getattr(config, "sliding_window", None))
    return min(int(limit) for limit in limits if limit)


class TensorNames:
    """What GGUF calls the tensors of a model."""

    def __init__(self, model: nn.Module, found: GGUFArchitecture) -> None:
        gguf = import_extra("gguf", EXTRA)
        kinds = {known: kind for kind, known in gguf.MODEL_ARCH_NAMES.items()}
        self.architecture = found.name
        self._map = gguf.get_tensor_name_map(kinds[found.name], len(roles_of(model).block_names))

    def __call__(self, module: str, leaf: str) -> str:
        """The name of a parameter of a module.

        Raises:
            ValueError: if there is no place for it.
        """
        stored: str | None = self._map.get_name(module)
        if stored is None:
            raise ValueError(f"GGUF of {self.architecture} models has no place for {module}.{leaf}")
        return f"{stored}.{leaf}"
