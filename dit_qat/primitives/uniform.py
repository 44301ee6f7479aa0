"""Uniform quantization: codes from values and values from codes."""

from torch import Tensor

from dit_qat.primitives.formats import UniformGrid

__all__ = ["affine_step", "decode", "encode", "outer_edges", "round_codes_", "standardize"]


def standardize(x: Tensor, step: Tensor, low: Tensor | None = None) -> Tensor:
    """Values in steps, ``(x - low) / step``: a new tensor, in the finer dtype of x and step."""
    return x / step if low is None else (x - low).div_(step)


def round_codes_(scaled: Tensor, grid: UniformGrid) -> Tensor:
    """Round values in steps to codes, in place; see :func:`encode`."""
    codes = scaled.floor_() if grid.kind == "mid_rise" else scaled.round_()
    return codes.clamp_(grid.code_min, grid.code_max)


def encode(x: Tensor, step: Tensor, grid: UniformGrid, low: Tensor | None = None) -> Tensor:
    """Round values to codes of ``grid``.

    Args:
        x: Values, any shape.
        step: Grid spacing, broadcastable to ``x``, positive.
        grid: The format; mid-rise rounds down (its levels lie between integers), others to nearest.
        low: Value of level zero, broadcastable to ``x`` (affine grids); None means 0.

    Returns:
        Whole numbers in the finer dtype of ``x`` and ``step`` (half precision holds codes up to 8
        bits exactly).
    """
    return round_codes_(standardize(x, step, low), grid)


def decode(codes: Tensor, step: Tensor, grid: UniformGrid, low: Tensor | None = None) -> Tensor:
    """Inverse of :func:`encode` on its codes: ``(codes + offset) * step + low``."""
    x = (codes + grid.offset) * step
    return x if low is None else x + low


def affine_step(low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Step of the min-max affine grid, ``(high - low) / (2^bits - 1)``."""
    return (high - low) / float(2**bits - 1)


def outer_edges(grid: UniformGrid) -> tuple[float, float]:
    """Outer edges of the grid in steps: half a step beyond the lowest and the highest level."""
    return grid.code_min + grid.offset - 0.5, grid.code_max + grid.offset + 0.5
