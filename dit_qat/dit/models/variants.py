"""The published sizes of the diffusion transformer (arXiv:2212.09748, table 1)."""

import re
from typing import Any

from dit_qat.dit.models.dit import DiT

__all__ = ["VARIANT_SIZES", "dit_variant"]

VARIANT_SIZES = {
    "S": {"hidden_size": 384, "depth": 12, "num_heads": 6},
    "B": {"hidden_size": 768, "depth": 12, "num_heads": 12},
    "L": {"hidden_size": 1024, "depth": 24, "num_heads": 16},
    "XL": {"hidden_size": 1152, "depth": 28, "num_heads": 16},
}


def dit_variant(name: str, **overrides: Any) -> DiT:
    """Build a published size such as "DiT-XL/2": size, then patch size 2, 4 or 8.

    Args:
        name: "DiT-{S,B,L,XL}/{2,4,8}".
        overrides: Any argument of :class:`DiT`, such as ``num_classes=10``.

    Raises:
        ValueError: If there is no such variant.
    """
    match = re.fullmatch(r"DiT-(S|B|L|XL)/([248])", name)
    if match is None:
        known = ", ".join(f"DiT-{size}/{{2,4,8}}" for size in VARIANT_SIZES)
        raise ValueError(f"no variant {name!r}; there are {known}")
    sizes = VARIANT_SIZES[match[1]] | {"patch_size": int(match[2])}
    return DiT(**(sizes | overrides))
