"""Digests of tensors, by which damage is found."""

import hashlib
from collections.abc import Callable, Mapping

import torch
import xxhash
from torch import Tensor

__all__ = ["DIGESTS", "digest_for", "digest_of"]

DIGESTS: Mapping[str, Callable[[memoryview], str]] = {
    "sha256": lambda data: hashlib.sha256(data).hexdigest(),
    "xxh3_128": xxhash.xxh3_128_hexdigest,  # ten times as fast, which is for loading
}
_FIRST_XXH3 = 4


def digest_for(version: int) -> str:
    """Which of :data:`DIGESTS` a version of the format has."""
    return "xxh3_128" if version >= _FIRST_XXH3 else "sha256"


def digest_of(tensor: Tensor, name: str) -> str:
    """Digest of a tensor's bytes, row-major, as lowercase hex.

    Args:
        tensor: On any device.
        name: One of :data:`DIGESTS`.
    """
    flat = tensor.detach().cpu().contiguous().flatten()
    return DIGESTS[name](flat.view(torch.uint8).numpy().data)
