"""Arithmetic whose result does not depend on what the rest of the process allows itself."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["exact_arithmetic"]


@contextmanager
def exact_arithmetic(device: torch.device | str) -> Iterator[None]:
    """Compute in float32, whatever autocast and TF32 settings say, and convolve repeatably.

    Training runs under autocast, many programs allow TF32 products, and some GPU images allow them
    by an environment variable: features and distances would follow, and scores with them.

    Args:
        device: Where the computation is.
    """
    kind = torch.device(device).type
    convolutions = torch.backends.cudnn.flags(
        enabled=True, benchmark=False, deterministic=True, allow_tf32=False
    )
    with _float32_products(), convolutions, torch.autocast(kind, enabled=False):
        yield


@contextmanager
def _float32_products() -> Iterator[None]:
    product = torch.backends.cuda.matmul
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # set for CUDA alone, and torch refuses to call that by one name
        alone = product.fp32_precision
        product.fp32_precision = "ieee"
        try:
            yield
        finally:
            product.fp32_precision = alone
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
