"""Uniform quantization: codes from values and values from codes."""

from torch import Tensor

from dit_qat.primitives.formats import UniformGrid

__all__ = ["affine_step", "decode", "encode", "outer_edges"]


def encode(x: Tensor, step: Tensor, grid: UniformGrid, low: Tensor | None = None) -> Tensor:
    """Round values to codes of ``grid``.

    Args:
        x: Values, any shape.
        step: Grid spacing, broadcastable to ``x``, positive.
        grid: The format; mid-rise rounds down (its levels lie between integers), others to nearest.
        low: Value of level zero, broadcastable to ``x`` (affine grids); None means 0.

    Returns:
        Integer codes in the dtype of ``x`` (half precision holds codes up to 8 bits exactly).
    """
    scaled = (x if low is None else x - low) / step
    codes = scaled.floor_() if grid.kind == "mid_rise" else scaled.round_()
    return codes.clamp_(grid.code_min, grid.code_max)


def decode(codes: Tensor, step: Tensor, grid: UniformGrid, low: Tensor | None = None) -> Tensor:
    """Inverse of :func:`encode` on its codes: ``(codes + offset) * step + low``."""
    x = (codes + grid.offset) * step
    return x if low is None else x + low


def affine_step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Step of the min-max affine grid, ``(high - low) / (2^bits - 1)``."""
    return (high - low) / (2**bits - 1)


def outer_edges(grid: UniformGrid) -> tuple[float, float]:
    """Outer edges of the grid in steps: half a step beyond the lowest and the highest level."""
    return grid.code_min + grid.offset - 0.5, grid.code_max + grid.offset + 0.5
