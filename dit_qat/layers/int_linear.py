"""IntLinear: integer weights and activations beside an optional low-rank branch, for inference."""

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from statistics import fmean
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.layers.input_transform import InputTransform, TransformStep
from dit_qat.layers.linear import BranchDtype, refuse_other_marker
from dit_qat.layers.step_bits import StepBits, timesteps_in_scope
from dit_qat.layers.stored import StoredBuffers, refuse_float_weight
from dit_qat.layers.token_quantizer import TokenQuantizer
from dit_qat.primitives.integer import IntegerGrid, Scales, decode, pack_codes, unpack_codes
from dit_qat.primitives.packing import field_bytes

__all__ = ["IntLinear", "IntLinearConfig"]

FORMAT = "dit_qat.int_linear.1"


@dataclass(frozen=True)
class IntLinearConfig:
    """What an :class:`IntLinear` is, apart from its values.

    Attributes:
        grid: Of the weight.
        activation: Of the transformed input; None: it stays float.
        step_bits: Bits of the activation by timestep, instead of its own.
        steps: The transform of the input.
        rank: Of the branch; 0: none.
        branch_dtype: What the branch is stored in.

    Raises:
        ValueError: for a negative rank, an unknown dtype, or step bits without an activation.
    """

    grid: IntegerGrid
    activation: TokenQuantizer | None = None
    step_bits: StepBits | None = None
    steps: tuple[TransformStep, ...] = ()
    rank: int = 0
    branch_dtype: BranchDtype = "float16"

    def __post_init__(self) -> None:
        if self.rank < 0:
            raise ValueError(f"rank={self.rank} is below 0; 0 is for no branch")
        if self.branch_dtype not in get_args(BranchDtype):
            raise ValueError(
                f"branch_dtype={self.branch_dtype!r} is unknown; use one of {get_args(BranchDtype)}"
            )
        if self.step_bits is not None and self.activation is None:
            raise ValueError("step_bits without an activation quantizer; give it one")

    @property
    def activation_bits(self) -> float | None:
        """Of the input: the mean over the timesteps of a policy; None: float."""
        if self.step_bits is not None:
            return fmean(self.step_bits.bits)
        return None if self.activation is None else self.activation.bits

    def plain(self) -> dict[str, Any]:
        """Plain values, as for a JSON file."""
        return asdict(self)

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> "IntLinearConfig":
        """The inverse of :meth:`plain`, lists for tuples allowed.

        Raises:
            ValueError: for values out of range.
            TypeError: for unknown or missing names.
        """
        values = dict(plain)
        values["grid"] = IntegerGrid(**values["grid"])
        for name, kind in (("activation", TokenQuantizer), ("step_bits", StepBits)):
            if values.get(name) is not None:
                values[name] = kind(**values[name])
        values["steps"] = tuple(TransformStep(**step) for step in values.get("steps", ()))
        return cls(**values)


class IntLinear(StoredBuffers):
    """``y = Q_a(z) (scale (codes - zero))^T + (z B^T) A^T + bias`` with ``z = transform(x)``.

    ``codes`` (out, ceil(in bits / 8)) uint8 is packed by
    :func:`~dit_qat.primitives.packing.pack_int`; ``scale`` (out, groups) float16; ``zero`` (out,
    groups) uint8 or None; ``low_rank_up`` is A (out, rank), ``low_rank_down`` is B (rank, in). All
    are buffers. Values enter through :meth:`build`; the constructor makes room for a state dict.

    Args:
        in_features: Input width.
        out_features: Output width.
        bias: Whether there is a bias.
        config: See there.
        device: Where the buffers are.

    Raises:
        ValueError: for groups that do not divide the width, or a rank beyond min(out, in).
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor | None
    bias: Tensor | None
    low_rank_up: Tensor | None
    low_rank_down: Tensor | None
    transform: InputTransform | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        config: IntLinearConfig,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        _check(in_features, out_features, config)
        self.in_features, self.out_features, self.config = in_features, out_features, config
        grid, rank = config.grid, config.rank
        per_row = (out_features, grid.groups(in_features))
        branch: torch.dtype = getattr(torch, config.branch_dtype)
        room: dict[str, tuple[tuple[int, ...], torch.dtype] | None] = {
            "codes": ((out_features, field_bytes(in_features, grid.bits)), torch.uint8),
            "scale": (per_row, torch.float16),
            "zero": None if grid.symmetric else (per_row, torch.uint8),
            "low_rank_up": ((out_features, rank), branch) if rank else None,
            "low_rank_down": ((rank, in_features), branch) if rank else None,
            "bias": ((out_features,), torch.float32) if bias else None,
        }
        for name, made in room.items():
            buffer = None if made is None else torch.zeros(made[0], dtype=made[1], device=device)
            self.register_buffer(name, buffer)
        self.transform = InputTransform(in_features, config.steps, device) if config.steps else None

    @classmethod
    @torch.no_grad()
    def build(
        cls,
        linear: nn.Linear,
        *,
        grid: IntegerGrid,
        scales: Scales,
        codes: Tensor,
        activation: TokenQuantizer | None,
        transform: InputTransform | None = None,
        branch: tuple[Tensor, Tensor] | None = None,
        step_bits: StepBits | None = None,
        branch_dtype: BranchDtype = "float16",
    ) -> "IntLinear":
        """Put what a method found in the place of a float layer.

        Args:
            linear: Gives shapes and bias.
            grid: Of the codes.
            scales: Of the codes; rounded to float16 already.
            codes: (out, in) integers, of the transformed weight less the branch.
            activation: Quantizer of the transformed input.
            transform: Of the input; kept, not copied.
            branch: A (out, rank) and B (rank, in), which reads the transformed input.
            step_bits: Bits of the activation by timestep.
            branch_dtype: What the branch is rounded to.

        Raises:
            ValueError: for shapes that do not fit, codes outside the grid, or values that are not
                finite in the dtype that stores them.
        """
        rank = 0 if branch is None else branch[1].shape[0]
        steps = () if transform is None else transform.steps
        config = IntLinearConfig(grid, activation, step_bits, steps, rank, branch_dtype)
        sizes = linear.in_features, linear.out_features
        layer = cls(*sizes, linear.bias is not None, config, device="meta").train(linear.training)
        if transform is not None and transform.width != linear.in_features:
            raise ValueError(
                f"a transform of {transform.width} inputs for a layer of {linear.in_features}"
            )
        layer.transform = transform if steps else None
        up, down = branch if branch is not None else (None, None)
        if codes.shape != (sizes[1], sizes[0]):
            raise ValueError(
                f"codes {tuple(codes.shape)} do not fit a layer (out, in) {sizes[::-1]}"
            )
        packed = pack_codes(codes, grid)
        values = {"codes": packed, "scale": scales.scale, "zero": scales.zero}
        values |= {"low_rank_up": up, "low_rank_down": down, "bias": linear.bias}
        for name, value in values.items():
            layer._fill(name, value)
        return layer

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        z = x if self.transform is None else self.transform(x)
        bias = None if self.bias is None else self.bias.to(z.dtype)
        y = F.linear(self._quantized(z), self.dequantized().to(z.dtype), bias)
        if self.low_rank_up is None or self.low_rank_down is None:
            return y
        inner = F.linear(z, self.low_rank_down.to(z.dtype))
        return y + F.linear(inner, self.low_rank_up.to(z.dtype))

    def _quantized(self, z: Tensor) -> Tensor:
        activation, step_bits = self.config.activation, self.config.step_bits
        if activation is None:
            return z
        if step_bits is None:
            return activation.fake_quantize(z)
        bits = [step_bits.at(timestep) for timestep in timesteps_in_scope()]
        if len(set(bits)) == 1:
            return activation.with_bits(bits[0]).fake_quantize(z)
        if z.shape[0] % len(bits):
            raise ValueError(
                f"{len(bits)} timesteps of different bits for an input of {z.shape[0]} rows; each "
                "timestep must have as many rows"
            )
        chunks = z.chunk(len(bits))
        parts = [
            activation.with_bits(b).fake_quantize(part)
            for b, part in zip(bits, chunks, strict=True)
        ]
        return torch.cat(parts)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The quantized weight (out, in) in the transformed basis, without the branch; float32."""
        grid = self.config.grid
        codes = unpack_codes(self.codes, grid, self.in_features)
        return decode(codes, grid, Scales(self.scale.float(), self.zero))

    @torch.no_grad()
    def to_float(self) -> nn.Linear:
        """The layer as ``nn.Linear`` in the original basis; activations are not quantized there."""
        weight = self.dequantized()
        if self.low_rank_up is not None and self.low_rank_down is not None:
            weight = weight + self.low_rank_up.float() @ self.low_rank_down.float()
        if self.transform is not None:
            weight = self.transform.inverse_weight(weight)
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        linear.weight = nn.Parameter(weight)
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.float().clone())
        return linear.train(self.training)

    def with_activation(self, activation: TokenQuantizer | None) -> "IntLinear":
        """The same layer, its buffers shared, with another quantizer and no bits by timestep."""
        return self._twin(replace(self.config, activation=activation, step_bits=None))

    def with_step_bits(self, step_bits: StepBits | None) -> "IntLinear":
        """The same layer, its buffers shared, with other bits by timestep."""
        return self._twin(replace(self.config, step_bits=step_bits))

    def _twin(self, config: IntLinearConfig) -> "IntLinear":
        _check(self.in_features, self.out_features, config)
        twin = copy.copy(self)
        twin._buffers, twin._modules = dict(self._buffers), dict(self._modules)
        twin.config = config
        return twin

    @property
    def bytes_stored(self) -> int:
        """Bytes of all buffers, the bias included."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def effective_weight_bits(self) -> float:
        """Bits per weight with scales, zero points, transform and branch; without the bias."""
        bias = 0 if self.bias is None else self.bias.nbytes
        return 8 * (self.bytes_stored - bias) / (self.in_features * self.out_features)

    @property
    def nominal_weight_bits(self) -> int:
        """Bits of a code."""
        return self.config.grid.bits

    @property
    def activation_bits(self) -> float | None:
        """Of the input: the mean over the timesteps of a policy; None: float."""
        return self.config.activation_bits

    def get_extra_state(self) -> dict[str, Any]:
        """Format marker: plain types that say how the tensors are to be read."""
        return {"format": FORMAT, **self.config.plain()}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse tensors that were written under another configuration."""
        refuse_other_marker(self.get_extra_state(), state)

    def extra_repr(self) -> str:
        """One line: shape, bits, rank."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, grid={self.config.grid}, "
            f"activation={self.config.activation}, rank={self.config.rank}"
        )

    def _fill(self, name: str, value: Tensor | None) -> None:
        """Set a buffer to a value that fits its room."""
        room = getattr(self, name)
        shapes = tuple(None if t is None else tuple(t.shape) for t in (room, value))
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} has shape {shapes[1]}, this layer needs {shapes[0]}")
        if value is None:
            return
        # Laid out as a file will hold it: other strides would round a product otherwise.
        stored = value.detach().to(room.dtype).clone(memory_format=torch.contiguous_format)
        if not stored.isfinite().all():
            raise ValueError(
                f"{name} holds NaN or infinite values, or larger ones than {room.dtype} has"
            )
        setattr(self, name, stored)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        refuse_float_weight(self, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _check(in_features: int, out_features: int, config: IntLinearConfig) -> None:
    config.grid.groups(in_features)
    if config.activation is not None:
        config.activation.check_width(in_features)
    if config.rank > min(in_features, out_features):
        raise ValueError(
            f"rank={config.rank} is beyond {min(in_features, out_features)} for a layer of "
            f"{in_features} inputs and {out_features} outputs; choose it lower"
        )
