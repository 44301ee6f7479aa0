"""What the linear layers of a language model are for: attention and MLP, by name."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

__all__ = ["FAMILIES", "Family", "Roles", "check_unshared", "roles_of", "shared_weights"]


@dataclass(frozen=True)
class Family:
    """How the models of one architecture name their parts.

    Names of linears and norms are those within a block.

    Attributes:
        blocks: Name of the list of blocks.
        linears: Name of each linear by its role.
        groups: Roles that read the very same tensor, in the order in which a block runs them.
        norms: By role, the norm whose output goes to the linears of its group and nowhere else.
        feeders: By role, the linears whose output channels become its input channels one to one,
            with nothing between them but operations on single channels.
        final_norm: Name of the norm behind the last block.
    """

    blocks: str
    linears: Mapping[str, str]
    groups: tuple[tuple[str, ...], ...]
    norms: Mapping[str, str]
    feeders: Mapping[str, tuple[str, ...]]
    final_norm: str


GATED = Family(
    blocks="model.layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    groups=(("q", "k", "v"), ("o",), ("gate", "up"), ("down",)),
    norms={
        **dict.fromkeys(("q", "k", "v"), "input_layernorm"),
        **dict.fromkeys(("gate", "up"), "post_attention_layernorm"),
    },
    feeders={"down": ("gate", "up")},
    final_norm="model.norm",
)

OPT = Family(
    blocks="model.decoder.layers",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.out_proj",
        "fc1": "fc1",
        "fc2": "fc2",
    },
    groups=(("q", "k", "v"), ("o",), ("fc1",), ("fc2",)),
    norms={
        **dict.fromkeys(("q", "k", "v"), "self_attn_layer_norm"),
        "fc1": "final_layer_norm",
    },
    feeders={"fc2": ("fc1",)},
    final_norm="model.decoder.final_layer_norm",
)

FAMILIES: Mapping[str, Family] = {
    "llama": GATED,
    "mistral": GATED,
    "qwen2": GATED,
    "qwen3": GATED,
    "opt": OPT,
}
"""By ``model_type`` of the configuration."""


@dataclass(frozen=True)
class Roles:
    """The parts of one model, by full names; of :func:`roles_of`.

    Attributes:
        family: How its parts are named within a block.
        block_names: Full names of the blocks, in order.
        final_norm: Full name of the norm behind the last block; None if there is none.
        heads: Query heads of an attention.
        key_value_heads: Heads of keys and values, each of which serves ``heads //
            key_value_heads`` query heads.
    """

    family: Family
    block_names: tuple[str, ...]
    final_norm: str | None
    heads: int
    key_value_heads: int

    @property
    def blocks(self) -> str:
        """Pattern of the blocks."""
        return f"{self.family.blocks}.*"

    @property
    def quantize(self) -> tuple[str, ...]:
        """Patterns of the linears to quantize: all of them within blocks."""
        return tuple(f"{self.blocks}.{inner}" for inner in self.family.linears.values())

    @property
    def linears(self) -> tuple[str, ...]:
        """Full names of the linears to quantize, in the order in which they run."""
        return tuple(name for block in self.block_names for g in self.groups(block) for name in g)

    def role(self, name: str) -> str:
        """What a linear is for, such as "q" or "down".

        Raises:
            ValueError: if it is no linear of a block.
        """
        return self._split(name)[1]

    def name(self, block: str, role: str) -> str:
        """Full name of the linear of a role; ``block`` is a block or any linear in it.

        Raises:
            ValueError: if the model has no such role.
        """
        if role not in self.family.linears:
            raise ValueError(
                f"role {role!r} is unknown here; there are {', '.join(self.family.linears)}"
            )
        return f"{self._block(block)}.{self.family.linears[role]}"

    def groups(self, block: str) -> tuple[tuple[str, ...], ...]:
        """Full names of the linears of a block, those together that read the same tensor."""
        return tuple(
            tuple(self.name(block, role) for role in group) for group in self.family.groups
        )

    def siblings(self, name: str) -> tuple[str, ...]:
        """The linears that read the same tensor as this one, itself included."""
        block, role = self._split(name)
        group = next(group for group in self.family.groups if role in group)
        return tuple(self.name(block, member) for member in group)

    def norm_before(self, name: str) -> str | None:
        """The norm whose output is read by the siblings of a linear, and by nothing else."""
        block, role = self._split(name)
        norm = self.family.norms.get(role)
        return None if norm is None else f"{block}.{norm}"

    def feeders(self, name: str) -> tuple[str, ...]:
        """The linears whose output channels are this one's input channels, if there are such."""
        block, role = self._split(name)
        return tuple(self.name(block, feeder) for feeder in self.family.feeders.get(role, ()))

    def _block(self, name: str) -> str:
        """The block that a name lies in."""
        depth = self.family.blocks.count(".") + 2
        block = ".".join(name.split(".")[:depth])
        if block not in self.block_names:
            raise ValueError(
                f"{name} lies in no block; blocks are {self.block_names[0]} to "
                f"{self.block_names[-1]}"
            )
        return block

    def _split(self, name: str) -> tuple[str, str]:
        block = self._block(name)
        inner = name[len(block) + 1 :]
        for role, known in self.family.linears.items():
            if inner == known:
                return block, role
        known_names = ", ".join(self.family.linears.values())
        raise ValueError(f"{name} is no linear with a role; a block has {known_names}")


def roles_of(model: nn.Module, family: Family | None = None) -> Roles:
    """Tell what the linears of a causal language model are for.

    Args:
        model: Of Hugging Face; float or with quantized layers in the place of linears.
        family: How its parts are named; by default that of its ``config.model_type``.

    Raises:
        ValueError: for an architecture without default, or a model that lacks a part.
    """
    config = getattr(model, "config", None)
    kind = getattr(config, "model_type", None)
    if family is None and kind not in FAMILIES:
        raise ValueError(
            f"{type(model).__name__} (model_type {kind!r}) has no known roles; there are some for "
            f"{', '.join(FAMILIES)}. Give family=Family(...) for a model with parts like theirs"
        )
    family = FAMILIES[str(kind)] if family is None else family
    if getattr(config, "do_layer_norm_before", True) is False:
        # Norms behind attention and MLP also feed the residual stream.
        family = Family(**{**vars(family), "norms": {}})
    # Twice, what stands in two places.
    modules = dict(model.named_modules(remove_duplicate=False))
    listed = modules.get(family.blocks)
    if not isinstance(listed, nn.ModuleList) or not len(listed):
        raise ValueError(f"{type(model).__name__} has no list of blocks {family.blocks!r}")
    blocks = tuple(f"{family.blocks}.{index}" for index in range(len(listed)))
    _check_parts(family, blocks, modules, type(model).__name__)
    heads = _head_count(config, "num_attention_heads")
    return Roles(
        family,
        blocks,
        family.final_norm if family.final_norm in modules else None,
        heads,
        _head_count(config, "num_key_value_heads") or heads,
    )


def _check_parts(
    family: Family, blocks: Iterable[str], modules: Mapping[str, nn.Module], name: str
) -> None:
    for block in blocks:
        for inner in (*family.linears.values(), *family.norms.values()):
            if f"{block}.{inner}" not in modules:
                raise ValueError(
                    f"{name} has no {block}.{inner}; its blocks are not as those of a "
                    f"{'gated' if 'gate' in family.linears else 'plain'} MLP and attention are "
                    "known here (mixtures of experts and fused projections are not)"
                )


def _head_count(config: Any, key: str) -> int:
    return int(getattr(config, key, None) or 0)


def shared_weights(model: nn.Module) -> list[tuple[str, ...]]:
    """Groups of parameter names that stand for the same numbers, such as tied embeddings.

    One parameter in two places, and two parameters whose memory overlaps, are shared; pieces of
    one buffer side by side are not.
    """
    names, parameters = zip(*model.named_parameters(remove_duplicate=False), strict=True)
    spans = sorted((*_span(parameter), place) for place, parameter in enumerate(parameters))
    found: list[list[int]] = []
    previous, end = "", 0
    for kind, start, stop, place in spans:
        if kind == previous and start < end:
            found[-1].append(place)
            end = max(end, stop)
        else:
            found.append([place])
            previous, end = kind, stop
    return [tuple(names[i] for i in sorted(group)) for group in sorted(found) if len(group) > 1]


def _span(parameter: Tensor) -> tuple[str, int, int]:
    """Where a parameter's memory is, and the bytes that it takes; of none, what is its own."""
    if parameter.is_meta or not parameter.numel():
        return "none", id(parameter), id(parameter) + 1
    steps = zip(parameter.shape, parameter.stride(), strict=True)
    reach = sum((size - 1) * step for size, step in steps) + 1
    start = parameter.data_ptr()
    return str(parameter.device), start, start + reach * parameter.element_size()


def check_unshared(model: nn.Module, linears: Iterable[str]) -> None:
    """Refuse to quantize weights that stand in more than one place.

    Args:
        model: The model.
        linears: Full names of the layers to quantize.

    Raises:
        ValueError: naming a layer whose weight or bias something else uses, and what.
    """
    wanted = {f"{name}.{leaf}": name for name in linears for leaf in ("weight", "bias")}
    for names in shared_weights(model):
        hit = next((name for name in names if name in wanted), None)
        if hit is not None:
            others = ", ".join(name for name in names if name != hit)
            raise ValueError(
                f"{hit} is shared with {others}, so that quantizing {wanted[hit]} would part "
                "them: skip it, or untie the model first (give each its own copy and set "
                "config.tie_word_embeddings=False)"
            )
