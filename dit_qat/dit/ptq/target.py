"""What of a model is quantized: its blocks, and which linear layers within them."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from dit_qat.calibration import Call, find_blocks
from dit_qat.calibration.capture import check_argument

__all__ = ["PTQTarget", "known_classes", "target_of", "transformer_of"]

_EMBEDDERS = ("*embed*", "*time_proj", "*caption_projection*", "*norm*.linear", "*adaLN*")
_ATTENTION = ("*.attn*.to_[qkv]", "*.attn*.to_out.0")
_TEXT_STREAM = ("*.attn.add_[qkv]_proj", "*.attn.to_add_out")
_MLP = ("*.ff*.net.0.proj", "*.ff*.net.2")


@dataclass(frozen=True)
class _Defaults:
    blocks: tuple[str, ...]
    quantize: tuple[str, ...]
    skip: tuple[str, ...]
    timestep_argument: str = "timestep"


# By class name, so that no class of diffusers is imported for its name.
_DEFAULTS = {
    "DiT": _Defaults(
        ("blocks.*",),
        ("blocks.*.attn.qkv", "blocks.*.attn.proj", "blocks.*.mlp.fc1", "blocks.*.mlp.fc2"),
        ("*adaLN_modulation*", "*_embedder*", "final_layer.*"),
        "t",
    ),
    "DiTTransformer2DModel": _Defaults(
        ("transformer_blocks.*",), (*_ATTENTION, *_MLP), (*_EMBEDDERS, "proj_out_*")
    ),
    "PixArtTransformer2DModel": _Defaults(
        ("transformer_blocks.*",), (*_ATTENTION, *_MLP), (*_EMBEDDERS, "adaln_single.*", "proj_out")
    ),
    "SD3Transformer2DModel": _Defaults(
        ("transformer_blocks.*",),
        (*_ATTENTION, *_TEXT_STREAM, *_MLP),
        (*_EMBEDDERS, "proj_out"),
    ),
    "FluxTransformer2DModel": _Defaults(
        ("transformer_blocks.*", "single_transformer_blocks.*"),
        (*_ATTENTION, *_TEXT_STREAM, *_MLP, "single_*.proj_mlp", "single_*.proj_out"),
        (*_EMBEDDERS, "proj_out"),
    ),
    "ZImageTransformer2DModel": _Defaults(
        ("noise_refiner.*", "context_refiner.*", "layers.*"),
        ("*.attention.to_[qkv]", "*.attention.to_out.0", "*.feed_forward.w[123]"),
        (*_EMBEDDERS, "all_final_layer.*"),
        "t",
    ),
    "WanTransformer3DModel": _Defaults(
        ("blocks.*",),
        (*_ATTENTION, "*.attn2.add_[kv]_proj", *_MLP),
        (*_EMBEDDERS, "proj_out"),
    ),
}


def known_classes() -> list[str]:
    """Names of the classes that have default patterns."""
    return sorted(_DEFAULTS)


@dataclass(frozen=True)
class PTQTarget:
    """Patterns over the names of a model's modules.

    Attributes:
        model: Float, or quantized in the course of a run.
        blocks: Globs of the blocks; ``*`` stays within its dots.
        quantize: Globs of linear layers; ``*`` also spans dots.
        skip: Globs of those that stay float whatever ``quantize`` says.
        timestep_argument: What the model's forward calls the timestep.

    Raises:
        ValueError: for a pattern that matches nothing, or an argument that forward does not have.
    """

    model: nn.Module
    blocks: Sequence[str]
    quantize: Sequence[str]
    skip: Sequence[str]
    timestep_argument: str

    def __post_init__(self) -> None:
        check_argument(self.model, self.timestep_argument)
        find_blocks(self.model, self.blocks)
        names = _linear_names(self.model)
        for pattern in (*self.quantize, *self.skip):
            if not any(fnmatchcase(name, pattern) for name in names):
                raise ValueError(_no_match(pattern, names, self.model))
        if not self.linears():
            raise ValueError(
                f"the patterns {list(self.skip)} skip every linear layer that "
                f"{list(self.quantize)} name; quantize more or skip less"
            )

    def linears(self) -> dict[str, nn.Linear]:
        """Linear layers to quantize, by full name, in the order of the model."""
        found = {}
        for name, module in self.model.named_modules():
            if isinstance(module, nn.Linear) and self._chosen(name):
                found[name] = module
        return found

    def find_blocks(self, call: Call | None = None) -> list[tuple[str, nn.Module]]:
        """Blocks by name; with a call, in the order in which it runs them."""
        return find_blocks(self.model, self.blocks, call)

    def _chosen(self, name: str) -> bool:
        wanted = any(fnmatchcase(name, pattern) for pattern in self.quantize)
        return wanted and not any(fnmatchcase(name, pattern) for pattern in self.skip)


def target_of(
    model: nn.Module,
    *,
    blocks: Sequence[str] | None = None,
    quantize: Sequence[str] | None = None,
    skip: Sequence[str] | None = None,
    timestep_argument: str | None = None,
) -> PTQTarget:
    """What is quantized of a model by default: q, k, v, out of every attention, and the MLP.

    Embedders, time, guidance and text projections, adaLN modulation and the final projection stay
    float (SVDQuant's and ViDiT-Q's lists together).

    Args:
        model: A DiT of ours or a transformer of diffusers.
        blocks: Patterns of :class:`PTQTarget`, in place of the default of the model's class.
        quantize: As ``blocks``.
        skip: As ``blocks``.
        timestep_argument: As ``blocks``.

    Raises:
        ValueError: for a class without defaults, unless all but ``skip`` are given, or as
            :class:`PTQTarget`.
    """
    defaults = _DEFAULTS.get(type(model).__name__)
    if defaults is None:
        if blocks is None or quantize is None or timestep_argument is None:
            raise ValueError(
                f"{type(model).__name__} has no default patterns (there are some for "
                f"{', '.join(known_classes())}); give blocks, quantize and timestep_argument"
            )
        defaults = _Defaults((), (), (), timestep_argument)
    names = _linear_names(model)
    return PTQTarget(
        model,
        _present(defaults.blocks, _module_names(model)) if blocks is None else blocks,
        _present(defaults.quantize, names) if quantize is None else quantize,
        _present(defaults.skip, names) if skip is None else skip,
        timestep_argument or defaults.timestep_argument,
    )


def transformer_of(pipeline: Any) -> nn.Module:
    """The transformer of a diffusers pipeline.

    Raises:
        ValueError: naming the parts that it has, if none is a transformer.
    """
    transformer = getattr(pipeline, "transformer", None)
    if isinstance(transformer, nn.Module):
        return transformer
    parts = ", ".join(getattr(pipeline, "components", {})) or "none"
    raise ValueError(
        f"{type(pipeline).__name__} has no transformer to quantize (its parts: {parts}); give a "
        "pipeline of a diffusion transformer"
    )


def _present(patterns: Iterable[str], names: Sequence[str]) -> tuple[str, ...]:
    """Defaults that this model has something for: a small one may have no text stream."""
    return tuple(p for p in patterns if any(fnmatchcase(name, p) for name in names))


def _linear_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]


def _no_match(pattern: str, names: Sequence[str], model: nn.Module) -> str:
    near = get_close_matches(pattern, names, n=3, cutoff=0.3) or list(names)[:3]
    return (
        f"pattern {pattern!r} matches no linear layer of {type(model).__name__}; near names: "
        f"{', '.join(near) or 'it has none'}"
    )
