"""Diffusion transformers and their weights."""

from dit_qat.dit.models.dit import DiT
from dit_qat.dit.models.from_diffusers import dit_from_diffusers
from dit_qat.dit.models.variants import dit_variant
from dit_qat.dit.models.weights import load_dit, load_weights_, save_dit

__all__ = ["DiT", "dit_from_diffusers", "dit_variant", "load_dit", "load_weights_", "save_dit"]
