"""PackedLinear: a QuantLinear whose weight is codes, for inference."""

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dit_qat.kernels.packed_matmul import float_matmul, packed_matmul
from dit_qat.layers.linear import (
    BranchDtype,
    LayerConfig,
    QuantLinear,
    marker,
    refuse_other_marker,
)
from dit_qat.layers.stored import StoredBuffers, refuse_float_weight
from dit_qat.primitives.formats import UniformGrid
from dit_qat.primitives.packing import field_bytes, pack_ternary
from dit_qat.primitives.scales import widen
from dit_qat.primitives.uniform import round_codes_, standardize

__all__ = ["PackedLinear"]

FORMAT = "dit_qat.packed_linear.1"


class PackedLinear(StoredBuffers):
    """The inference twin of :class:`QuantLinear`: the same outputs from 2 bits per weight.

    ``codes`` (out, ceil(in/4)) uint8 holds the ternary residual in the rotated basis, four per byte
    (:func:`~dit_qat.primitives.packing.pack_ternary`); ``scale`` (out, 1) or (1, 1) multiplies it;
    ``low_rank_up``, ``low_rank_down`` and ``bias`` are those of the quantized layer. All are
    buffers: nothing here trains, and no gradient passes.

    Activation codes and weight codes are multiplied as integers and scaled once, so that in float32
    the output is that of the quantized layer up to the rounding of the branch.

    Args:
        in_features: Input width; needs a Hadamard order if ``config.rotation`` is set.
        out_features: Output width.
        bias: Whether there is a bias.
        config: As of the quantized layer.
        seed: Seed of the rotation's signs.
        device: Where the buffers are.

    Raises:
        ValueError: for a width without a Hadamard order or a rank beyond min(out, in).
    """

    cast = frozenset({"bias", "low_rank_up", "low_rank_down"})

    codes: Tensor
    scale: Tensor
    bias: Tensor | None
    low_rank_up: Tensor | None
    low_rank_down: Tensor | None
    row_sums: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        config: LayerConfig | None = None,
        seed: int = 0,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        twin = QuantLinear(in_features, out_features, bias, config, seed, device="meta")
        self.in_features, self.out_features = in_features, out_features
        self.config, self.seed, self.rotation = twin.config, seed, twin.rotation
        rows = out_features if self.config.weight.per_channel else 1
        width = field_bytes(in_features, 2)
        codes = torch.zeros(out_features, width, dtype=torch.uint8, device=device)
        self.register_buffer("codes", codes)
        self.register_buffer("scale", torch.ones(rows, 1, device=device))
        low_rank = self.config.low_rank
        branch = torch.float32 if low_rank is None else low_rank.torch_dtype
        for name, dtype in {"bias": None, "low_rank_up": branch, "low_rank_down": branch}.items():
            like = getattr(twin, name)
            room = None if like is None else torch.zeros(like.shape, dtype=dtype, device=device)
            self.register_buffer(name, room)
        self.register_buffer("row_sums", None, persistent=False)  # made when first needed

    @torch.no_grad()
    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        if self.rotation is not None:
            x = self.rotation.apply(x)
        y = self._product(x)
        if self.low_rank_up is not None and self.low_rank_down is not None:
            bias = None if self.bias is None else self.bias.to(x.dtype)
            inner = F.linear(x, self.low_rank_down.to(x.dtype))
            y.add_(F.linear(inner, self.low_rank_up.to(x.dtype), bias))
        elif self.bias is not None:
            y.add_(self.bias)
        return y.to(x.dtype)

    def _product(self, x: Tensor) -> Tensor:
        """``Q_a(x) Q_w(W)^T``, (..., out) in float32 or finer."""
        activation, scale = self.config.activation, self.scale.squeeze(-1)
        if activation is None:
            sums = float_matmul(x.reshape(-1, self.in_features), self.codes)
            return widen(sums.view(*x.shape[:-1], self.out_features)).mul_(scale)
        exact = widen(x)
        step, low = activation.step_and_low(exact)
        grid = activation.grid
        center = _center(grid)  # moves unsigned 8-bit codes into int8
        codes = round_codes_(standardize(exact, step, low), grid).sub_(center).to(torch.int8)
        sums = packed_matmul(codes.reshape(-1, self.in_features), self.codes)
        y = sums.to(exact.dtype).view(*x.shape[:-1], self.out_features)
        if grid.offset + center:
            y.add_(self._row_sums(), alpha=grid.offset + center)  # still exact: halves at most
        y.mul_(scale).mul_(step)
        return y if low is None else y.addcmul_(low, self._row_sums() * scale)

    def _row_sums(self) -> Tensor:
        """Sums over the rows of codes, (out,) int32."""
        if self.row_sums is None:
            with torch.inference_mode(False):
                ones = torch.ones(1, self.in_features, dtype=torch.int8, device=self.codes.device)
                self.row_sums = packed_matmul(ones, self.codes).squeeze(0)
        return self.row_sums

    @classmethod
    def like(cls, layer: QuantLinear, branch_dtype: BranchDtype | None = None) -> "PackedLinear":
        """The twin of a layer without memory; arguments as in :meth:`from_quantized`."""
        config, low_rank = layer.config, layer.config.low_rank
        if branch_dtype is not None and low_rank is not None:
            config = replace(config, low_rank=replace(low_rank, dtype=branch_dtype))
        has_bias = layer.bias is not None
        sizes = layer.in_features, layer.out_features
        return cls(*sizes, has_bias, config, layer.seed, device="meta").train(layer.training)

    @classmethod
    @torch.no_grad()
    def from_quantized(
        cls, layer: QuantLinear, branch_dtype: BranchDtype | None = None
    ) -> "PackedLinear":
        """Pack a quantized layer, without choosing anything anew.

        Args:
            layer: Its values may be of any float dtype.
            branch_dtype: What the branch is rounded to; None: what the layer computes with. Another
                one changes the outputs.

        Raises:
            ValueError: for a weight, branch or bias that is not finite.
        """
        _check_finite(layer.named_parameters(recurse=False))
        packed = cls.like(layer, branch_dtype)
        codes, scale = layer.config.weight.quantize(widen(layer.weight))
        packed.codes, packed.scale = pack_ternary(codes), scale.float()
        for name in ("bias", "low_rank_up", "low_rank_down"):
            value, room = getattr(layer, name), getattr(packed, name)
            setattr(packed, name, None if value is None else value.detach().to(room.dtype))
        _check_finite(packed.named_buffers())
        return packed

    def get_extra_state(self) -> dict[str, Any]:
        """Format marker: plain types that say how the tensors are to be read."""
        return marker(FORMAT, self.config, self.seed)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse tensors that were written under another configuration."""
        refuse_other_marker(self.get_extra_state(), state)

    def extra_repr(self) -> str:
        """One line: shape, bits, rank, rotation."""
        rank = 0 if self.config.low_rank is None else self.config.low_rank.rank
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, activation={self.config.activation}, rank={rank}, "
            f"rotation={self.rotation}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        refuse_float_weight(self, state_dict, prefix)
        self.row_sums = None
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _center(grid: UniformGrid) -> int:
    """What is taken off a code so that it fits int8."""
    return 0 if grid.code_max < 128 else 128


def _check_finite(tensors: Iterable[tuple[str, Tensor]]) -> None:
    for name, tensor in tensors:
        if not tensor.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values, or larger ones than {tensor.dtype} has; "
                "take an earlier checkpoint, or another dtype for the branch"
            )
