"""Diffusion transformers and their weights."""

from typing import TYPE_CHECKING, Any

from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.from_diffusers import dit_from_diffusers
from dit_qat.dit.models.native import save_dit
from dit_qat.dit.models.packed import register_dit
from dit_qat.dit.models.packed_diffusers import register_diffusers
from dit_qat.dit.models.published import save_published
from dit_qat.dit.models.to_diffusers import dit_to_diffusers
from dit_qat.dit.models.variants import dit_variant
from dit_qat.dit.models.weights import load_dit, load_weights_

if TYPE_CHECKING:
    from dit_qat.dit.convert import convert_checkpoint

__all__ = [
    "DiT",
    "convert_checkpoint",
    "dit_from_diffusers",
    "dit_to_diffusers",
    "dit_variant",
    "load_dit",
    "load_weights_",
    "save_dit",
    "save_published",
]


register_dit()
register_diffusers()


def __getattr__(name: str) -> Any:
    if name == "convert_checkpoint":  # late: it also converts training checkpoints
        from dit_qat.dit.convert import convert_checkpoint

        return convert_checkpoint
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
