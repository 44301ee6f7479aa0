"""CodedLinear: a linear layer whose weight is a :class:`~dit_qat.layers.weight_code.WeightCode`."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dit_qat.layers.linear import refuse_other_marker
from dit_qat.layers.stored import StoredBuffers, refuse_float_weight
from dit_qat.layers.weight_code import Room, Setting, WeightCode

__all__ = ["CodedLinear"]

FORMAT = "dit_qat.coded_linear.1"


class CodedLinear(StoredBuffers):
    """``y = x decode(code)^T + bias``, with the code's tensors as buffers of their own names.

    Buffers keep their dtype when the model is cast. The weight is decoded at every call: whoever
    makes many calls of few tokens puts :meth:`to_float` in the layer's place.

    Args:
        code: Of the weight.
        bias: (out,), kept as float32; None: none.

    Raises:
        ValueError: for a bias that does not fit or is not finite.
    """

    bias: Tensor | None

    def __init__(self, code: WeightCode, bias: Tensor | None = None) -> None:
        super().__init__()
        if bias is not None and tuple(bias.shape) != (code.out_features,):
            raise ValueError(f"a bias {tuple(bias.shape)} for a weight of {code.out_features} rows")
        if bias is not None and not bias.isfinite().all():
            raise ValueError("bias holds NaN or infinite values")
        tensors = {name: tensor.contiguous() for name, tensor in code.tensors().items()}
        self._set_up(type(code), code.settings(), (code.out_features, code.in_features))
        self._register(tensors, None if bias is None else bias.detach().float().clone())

    @classmethod
    def build(cls, linear: nn.Linear, code: WeightCode) -> "CodedLinear":
        """Put a code in the place of a float layer's weight.

        Raises:
            ValueError: for a code of another shape.
        """
        sizes = code.out_features, code.in_features
        if sizes != (linear.out_features, linear.in_features):
            raise ValueError(
                f"a code of a weight (out, in) {sizes} for a layer of "
                f"{(linear.out_features, linear.in_features)}"
            )
        return cls(code, linear.bias).train(linear.training)

    @classmethod
    def with_room(
        cls,
        kind: type[WeightCode],
        settings: Mapping[str, Setting],
        sizes: tuple[int, int],
        rooms: Mapping[str, Room],
        bias: bool,
        device: torch.device | str = "meta",
    ) -> "CodedLinear":
        """A layer whose buffers wait to be loaded; its code is checked when it is first needed.

        Args:
            kind: Of the code.
            settings: Of the code.
            sizes: Of the weight, (out, in).
            rooms: Of the code's tensors.
            bias: Whether there is one.
            device: Of the buffers.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._set_up(kind, settings, sizes)
        tensors = {
            name: torch.zeros(room.shape, dtype=room.dtype, device=device)
            for name, room in rooms.items()
        }
        # Named: loaders of transformers make another dtype the default.
        zeros = torch.zeros(sizes[0], dtype=torch.float32, device=device)
        layer._register(tensors, zeros if bias else None)
        return layer

    def _set_up(
        self, kind: type[WeightCode], settings: Mapping[str, Setting], sizes: tuple[int, int]
    ) -> None:
        self.kind, self.settings = kind, dict(settings)
        self.out_features, self.in_features = sizes
        self._restored: tuple[WeightCode, tuple[Tensor, ...], tuple[int, ...]] | None = None

    def _register(self, tensors: Mapping[str, Tensor], bias: Tensor | None) -> None:
        self.code_names = tuple(tensors)
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_buffer("bias", bias)

    @property
    def code(self) -> WeightCode:
        """The code, restored from the buffers whenever they have become others or changed.

        Raises:
            ValueError: for buffers that hold no such code.
        """
        tensors = {name: self.get_buffer(name) for name in self.code_names}
        kept, versions = self._restored, tuple(map(_version, tensors.values()))
        if (
            kept is None
            or kept[2] != versions
            or any(a is not b for a, b in zip(kept[1], tensors.values(), strict=True))
        ):
            code = self.kind.restore(self.settings, tensors)
            if (code.out_features, code.in_features) != (self.out_features, self.in_features):
                raise ValueError(
                    f"a code of {(code.out_features, code.in_features)} in a layer (out, in) of "
                    f"{(self.out_features, self.in_features)}"
                )
            kept = self._restored = code, tuple(tensors.values()), versions
        return kept[0]

    def forward(self, x: Tensor) -> Tensor:
        """Map (..., in_features) to (..., out_features)."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.dequantized().to(x.dtype), bias)

    @torch.no_grad()
    def dequantized(self) -> Tensor:
        """The weight (out, in), float32."""
        return self.code.decode()

    @torch.no_grad()
    def to_float(self) -> nn.Linear:
        """The layer as ``nn.Linear``, float32."""
        has_bias = self.bias is not None
        linear = nn.Linear(self.in_features, self.out_features, has_bias, device="meta")
        linear.weight = nn.Parameter(self.dequantized())
        if self.bias is not None:
            linear.bias = nn.Parameter(self.bias.clone())
        return linear.train(self.training)

    @property
    def bytes_stored(self) -> int:
        """Bytes of all buffers, the bias included."""
        return sum(buffer.nbytes for buffer in self.buffers())

    @property
    def effective_weight_bits(self) -> float:
        """Bits per weight with all that the code stores; without the bias."""
        stored = sum(self.get_buffer(name).nbytes for name in self.code_names)
        return 8 * stored / (self.in_features * self.out_features)

    @property
    def nominal_weight_bits(self) -> float:
        """Bits per weight as the paper counts them."""
        return self.code.nominal_bits

    @property
    def activation_bits(self) -> None:
        """Inputs stay float."""

    def get_extra_state(self) -> dict[str, Any]:
        """Format marker: plain types that say how the tensors are to be read."""
        return {"format": FORMAT, "code": self.kind.name, **self.settings}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Refuse tensors that were written under other settings."""
        refuse_other_marker(self.get_extra_state(), state)

    def extra_repr(self) -> str:
        """One line: shape and kind."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"bias={self.bias is not None}, code={self.kind.name}, settings={self.settings}"
        )

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        refuse_float_weight(self, state_dict, prefix)
        self._restored = None  # values may change in place
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)


def _version(tensor: Tensor) -> int:
    """How often a tensor changed in place; those of inference mode do not tell."""
    return 0 if tensor.is_inference() else tensor._version
