"""What of a diffusion transformer is quantized by default."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from dit_qat.calibration.target import Target, linear_names, present

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


@dataclass(frozen=True)
class PTQTarget(Target):
    """Patterns over the names of a diffusion transformer, which always has a timestep."""

    timestep_argument: str = "timestep"


def known_classes() -> list[str]:
    """Names of the classes that have default patterns."""
    return sorted(_DEFAULTS)


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
    names = linear_names(model)
    return PTQTarget(
        model,
        present(defaults.blocks, _module_names(model)) if blocks is None else blocks,
        present(defaults.quantize, names) if quantize is None else quantize,
        present(defaults.skip, names) if skip is None else skip,
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


def _module_names(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_modules()]
